"""What our pipeline and diffusers' compute on the way from a prompt to a picture, recorded stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from encoders import Conditioning
from encoders.clip import CLIPOutput
from mmdit.checkpoints.components import Component
from mmdit.pipeline.pipeline import Pipeline

GUIDANCE = 7.0  # diffusers' default
TIMESTEP = 712.5  # of the forward whose blocks are recorded: no integer, and not an end of the range
SEED = 0
Trace = dict[tuple[str, str], Tensor]  # (group, name) -> a copy on the CPU
Note = Callable[[tuple[Any, ...], dict[str, Any], Any], None]  # what is done with a call: args, kwargs, output
_TEXT: tuple[Component, ...] = ("clip_l", "clip_g", "t5")


class Job(NamedTuple):
    """What both sides draw."""

    prompts: tuple[str, str]  # the prompt and the negative prompt
    steps: int
    height: int
    width: int
    device: torch.device
    dtype: torch.dtype

    @property
    def timestep(self) -> Tensor:
        """For the forward whose blocks are recorded, once per prompt."""
        return torch.full((2,), TIMESTEP, dtype=torch.float32, device=self.device)


def trace_ours(pipe: Pipeline, job: Job) -> Trace:
    """The stages of our pipeline; the pipeline is as it was afterwards."""
    trace: Trace = {}
    conditioning = _our_text(pipe, job, trace)
    noise = pipe.noise(SEED, height=job.height, width=job.width)
    _put(trace, "noise", "latents", noise)
    _put(trace, "schedule", "sigmas", pipe.sigmas(job.steps))
    _our_forward(pipe, job, trace, noise, conditioning)
    _our_sampling(pipe, job, trace, noise, conditioning)
    return trace


def trace_theirs(pipe: Any, job: Job, noise: Tensor) -> Trace:
    """The same of diffusers' pipeline; it samples from `noise`, after its own has been recorded."""
    trace: Trace = {}
    context, pooled = _their_text(pipe, job, trace)
    shape = (1, pipe.transformer.config.in_channels, job.height, job.width)
    own = pipe.prepare_latents(*shape, job.dtype, job.device, torch.Generator().manual_seed(SEED))
    _put(trace, "noise", "latents", own)
    pipe.scheduler.set_timesteps(job.steps)
    _put(trace, "schedule", "sigmas", pipe.scheduler.sigmas)
    _their_forward(pipe.transformer, job, trace, noise, context, pooled)
    _their_sampling(pipe, job, trace, noise, context, pooled)
    return trace


def _our_text(pipe: Pipeline, job: Job, trace: Trace) -> Conditioning:
    encoders = {name: model for name, model in pipe.models.items() if name in _TEXT}

    def note(name: str, ids: Tensor, output: CLIPOutput | Tensor) -> None:
        if isinstance(output, Tensor):
            _put_text(trace, name, ids, output)
        else:
            pooled = output.pooled if output.projected is None else output.projected
            _put_text(trace, name, ids, output.penultimate, pooled)

    with _watching({model: _with_name(note, name) for name, model in encoders.items()}):
        both = pipe.encode(job.prompts)
    _put(trace, "conditioning", "context", both.context)
    _put(trace, "conditioning", "pooled", both.pooled)
    return both


def _their_text(pipe: Any, job: Job, trace: Trace) -> tuple[Tensor, Tensor]:
    encoders = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2, "t5": pipe.text_encoder_3}

    def note(name: str, ids: Tensor, output: Any) -> None:
        if name == "t5":
            _put_text(trace, name, ids, output[0])
        else:
            _put_text(trace, name, ids, output.hidden_states[-2], output.text_embeds)

    with _watching({model: _with_name(note, name) for name, model in encoders.items() if model is not None}):
        context, _, pooled, _ = pipe.encode_prompt(list(job.prompts), None, None, do_classifier_free_guidance=False)
    _put(trace, "conditioning", "context", context)
    _put(trace, "conditioning", "pooled", pooled)
    return context, pooled


def _our_forward(pipe: Pipeline, job: Job, trace: Trace, noise: Tensor, conditioning: Conditioning) -> None:
    def first(args: tuple[Any, ...], _: dict[str, Any]) -> None:
        _put_inputs(trace, *args)

    with _watching_blocks(trace, pipe.transformer.joint_blocks, first):
        inputs = torch.cat([noise] * 2), job.timestep, conditioning.context, conditioning.pooled
        _put(trace, "velocity", "velocity", pipe.transformer(*inputs))


def _their_forward(model: Any, job: Job, trace: Trace, noise: Tensor, context: Tensor, pooled: Tensor) -> None:
    def first(_: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _put_inputs(trace, kwargs["encoder_hidden_states"], kwargs["hidden_states"], kwargs["temb"])

    with _watching_blocks(trace, model.transformer_blocks, first):
        velocity = model(torch.cat([noise] * 2), context, pooled, job.timestep, return_dict=False)[0]
    _put(trace, "velocity", "velocity", velocity)


def _our_sampling(pipe: Pipeline, job: Job, trace: Trace, noise: Tensor, conditioning: Conditioning) -> None:
    timesteps: list[Tensor] = []
    cond, uncond = (Conditioning(conditioning.context[i, None], conditioning.pooled[i, None]) for i in (0, 1))
    latent = noise
    with _watching({pipe.transformer: lambda args, *_: timesteps.append(args[1][:1])}):
        for step in pipe.sample(cond, uncond, noise, num_inference_steps=job.steps, guidance_scale=GUIDANCE):
            _put(trace, "latents", f"step {step.i + 1}", step.x)
            latent = step.x
    _put(trace, "schedule", "timesteps", torch.cat(timesteps))
    _put(trace, "pixels", "picture", pipe.decode(latent))


def _their_sampling(pipe: Any, job: Job, trace: Trace, noise: Tensor, context: Tensor, pooled: Tensor) -> None:
    timesteps: list[Tensor] = []

    def after_step(_: Any, i: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        _put(trace, "latents", f"step {i + 1}", tensors["latents"])
        return tensors

    with _watching({pipe.transformer: lambda _, kwargs, __: timesteps.append(kwargs["timestep"][:1])}):
        pictures = pipe(
            prompt_embeds=context[:1],
            negative_prompt_embeds=context[1:],
            pooled_prompt_embeds=pooled[:1],
            negative_pooled_prompt_embeds=pooled[1:],
            height=job.height,
            width=job.width,
            num_inference_steps=job.steps,
            guidance_scale=GUIDANCE,
            latents=noise,
            output_type="pt",
            callback_on_step_end=after_step,
        ).images
    _put(trace, "schedule", "timesteps", torch.cat(timesteps))
    _put(trace, "pixels", "picture", pictures)


def _put(trace: Trace, group: str, name: str, value: Tensor) -> None:
    trace[group, name] = value.detach().to("cpu", copy=True)


def _put_text(trace: Trace, encoder: str, ids: Tensor, hidden: Tensor, pooled: Tensor | None = None) -> None:
    _put(trace, "tokens", encoder, ids)
    _put(trace, "encoders", f"{encoder} hidden", hidden)
    if pooled is not None:
        _put(trace, "encoders", f"{encoder} pooled", pooled)


def _put_inputs(trace: Trace, context: Tensor, x: Tensor, c: Tensor) -> None:
    for name, value in (("text", context), ("image", x), ("timestep + pooled", c)):
        _put(trace, "embedders", name, value)


def _put_block(trace: Trace, i: int, context: Tensor | None, x: Tensor) -> None:
    if context is not None:
        _put(trace, "blocks", f"{i} text", context)
    _put(trace, "blocks", f"{i} image", x)


def _with_name(note: Callable[[str, Tensor, Any], None], name: str) -> Note:
    """A note of a text encoder's call: its name, the ids it was given, its output."""
    return lambda args, _, output: note(name, args[0], output)


@contextmanager
def _watching(notes: Mapping[nn.Module, Note]) -> Iterator[None]:
    """Pass every call of these modules to its note; undone at the end."""
    handles = [module.register_forward_hook(_hook(note), with_kwargs=True) for module, note in notes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching_blocks(
    trace: Trace, blocks: nn.ModuleList, first: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Record what goes into the first block, by `first`, and both streams after every block."""

    def note(i: int) -> Note:
        return lambda _, __, streams: _put_block(trace, i, *streams)

    handle = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: first(args, kwargs), with_kwargs=True)
    try:
        with _watching({block: note(i) for i, block in enumerate(blocks)}):
            yield
    finally:
        handle.remove()


def _hook(note: Note) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    return lambda _, args, kwargs, output: note(args, kwargs, output)
