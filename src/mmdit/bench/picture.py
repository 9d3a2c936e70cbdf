"""A whole picture at full size on random weights: time of each stage, and the most memory it takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from encoders import VAE, CLIPText, T5Encoder, Tokenizers
from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.bench.random_models import MODELS, check_names, check_peers, check_size, fill, quantized, recipe_of
from mmdit.checkpoints.components import to_diffusers
from mmdit.checkpoints.load_pipeline import Components
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import markdown_table, weight_bytes

PROMPT = "a large red circle above a blue star, on a white background"


@dataclass
class Drawn:
    """A row of the table: seconds by stage, and gigabytes (1e9 bytes) of the device's memory."""

    name: str
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # "text" unless it was not measured, "steps", "decode", "picture"
    weights_gb: float = 0.0
    peak_gb: dict[str, float] = field(default_factory=dict)  # by stage


def pictures(
    model: str = "large",
    recipes: Sequence[str] = ("fp8",),
    *,
    steps: int = 20,
    size: int | None = None,
    compiled: bool = True,
    against: Sequence[str] = (),
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Drawn]:
    """Draw with all models on the device: in 16 bits and with each recipe, eager and compiled.

    A row draws twice; the second time counts. The prompt is encoded with T5 at 256 tokens, by T5-XXL, CLIP-L and CLIP-G
    of official size (for the embedded model's size, by itself).

    Args:
        model: one of `mmdit.bench.random_models.MODELS`.
        recipes: names as in `mmdit.bench.step.bench`; they quantize transformer and T5.
        steps: Sampler steps.
        size: Side of the picture in pixels; None is the model's default.
        compiled: whether to draw with compiled blocks too.
        against: ("diffusers",) adds its pipeline, eager, with the same embeddings and without text encoders.
        device, dtype: The device and dtype of all models.

    Raises:
        ValueError: an unknown name.
    """
    check_names((model,), MODELS)
    for name in recipes:
        recipe_of(name)
    check_peers(against, ("diffusers",))
    size = check_size(model, size)
    device = torch.device(device)
    word = str(dtype).removeprefix("torch.")
    for mode in (False, True) if compiled else (False,):
        for recipe in (None, *recipes):
            name = f"mmdit {recipe or word} {'compiled' if mode else 'eager'}"
            yield _drawn(name, partial(_ours, model, recipe, mode, device, dtype), steps, size, device)
    if "diffusers" in against:
        yield _theirs(model, steps, size, device, dtype)


def table(found: Sequence[Drawn]) -> str:
    """Times and memory beside those of the first row."""
    first, base = found[0], max(found[0].peak_gb.values())
    rows = []
    for one in found:
        stages = ("text", "steps", "decode", "picture")
        times = (f"{one.seconds[stage]:.3f}" if stage in one.seconds else "-" for stage in stages)
        peak = max(one.peak_gb.values())
        memory = (f"{peak:.2f}", f"{peak / base:.3f}") if base else ("-", "-")  # a CPU does not count
        faster = f"{one.seconds['picture'] / first.seconds['picture']:.3f}"
        rows.append((one.name, *times, faster, f"{one.weights_gb:.2f}", *memory))
    return "\n".join(markdown_table(_TITLES, rows))


_TITLES = (
    *("", "text s", "steps s", "decoding s", "picture s", "to the first", "weights GB", "peak GB"),
    "peak to the first",
)


def random_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """All models of that size with random weights; tokenizers of the embedded model, whose ids every vocabulary has."""
    config = MODELS[model]
    if model == "demo":
        return Pipeline.demo(device=device, dtype=dtype)
    with torch.device("meta"):
        transformer, vae = MMDiT(config), VAE(VAEConfig())
        clip_l = CLIPText(CLIPConfig(768, 12, 3072, "quick_gelu", 12))
        clip_g = CLIPText(CLIPConfig(1280, 32, 5120, "gelu", 20, projection_dim=1280))
        t5 = T5Encoder(T5Config(4096, 24, 64, 64, 10240))
    for part in (transformer, vae, clip_l, clip_g, t5):
        fill(part.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    tokenizers = Tokenizers.from_folder(EMBEDDED)
    return Pipeline(Components(transformer, vae, clip_l, clip_g, t5, tokenizers, 3.0), name="random weights")


def _ours(model: str, recipe: str | None, compiled: bool, device: torch.device, dtype: torch.dtype) -> Pipeline:
    pipe = random_pipeline(model, device, dtype)
    if recipe is not None:
        assert pipe.t5 is not None
        for part in (pipe.transformer, pipe.t5):
            quantized(part, recipe)
    if compiled:
        for block in pipe.transformer.joint_blocks:
            block.compile(fullgraph=True)
    return pipe


@torch.no_grad()
def _drawn(name: str, build: Callable[[], Pipeline], steps: int, size: int, device: torch.device) -> Drawn:
    _emptied(device)
    pipe = build()
    weights = sum(weight_bytes(part) for part in pipe.models.values())
    found = Drawn(name, weights_gb=weights / 1e9)
    for _ in range(2):
        watch = _Watch(device, found)
        cond, uncond = (watch("text", partial(pipe.encode, text)) for text in (PROMPT, ""))
        noise = pipe.noise(0, height=size, width=size)

        def every_step(cond: Any = cond, uncond: Any = uncond, noise: Any = noise) -> Any:
            *_, last = pipe.sample(cond, uncond, noise, num_inference_steps=steps, guidance_scale=4.5)
            return last.x

        latent = watch("steps", every_step)
        watch("decode", partial(pipe.decode, latent))
        found.seconds["picture"] = sum(found.seconds[stage] for stage in ("text", "steps", "decode"))
    del pipe, cond, uncond, noise, latent, every_step
    torch.compiler.reset()
    return found


class _Watch:
    """Runs a stage and notes its time and its peak; a stage that runs twice counts twice."""

    def __init__(self, device: torch.device, into: Drawn) -> None:
        self.device, self.into = device, into
        into.seconds, into.peak_gb = {}, {}

    def __call__(self, stage: str, run: Callable[[], Any]) -> Any:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        result = run()
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.into.seconds[stage] = self.into.seconds.get(stage, 0.0) + seconds
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9 if cuda else 0.0
        self.into.peak_gb[stage] = max(self.into.peak_gb.get(stage, 0.0), peak)
        return result


@torch.no_grad()
def _theirs(model: str, steps: int, size: int, device: torch.device, dtype: torch.dtype) -> Drawn:
    """diffusers' pipeline, eager, from embeddings of the right shape; its text encoders are not loaded."""
    try:
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            SD3Transformer2DModel,
            StableDiffusion3Pipeline,
        )
    except ImportError as error:
        raise ImportError('--against diffusers needs diffusers: pip install "mmdit-lab[test]"') from error
    _emptied(device)
    config = MODELS[model]
    settings_of = {"transformer": to_diffusers("transformer", config), "vae": to_diffusers("vae", VAEConfig())}
    settings_of = {name: {k: v for k, v in said.items() if k[0] != "_"} for name, said in settings_of.items()}
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**settings_of["transformer"])
        vae = AutoencoderKL(**settings_of["vae"])
    for part in (transformer, vae):
        fill(part.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer, scheduler, vae, *[None] * 6)  # no text encoders, no tokenizers
    pipe.set_progress_bar_config(disable=True)
    context = torch.randn(1, 333, config.context_dim, device=device, dtype=dtype)
    pooled = torch.randn(1, config.pooled_dim, device=device, dtype=dtype)
    embeddings = {"prompt_embeds": context, "pooled_prompt_embeds": pooled}
    embeddings |= {f"negative_{key}": torch.zeros_like(value) for key, value in embeddings.items()}
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.5, "height": size, "width": size}
    found = Drawn(f"diffusers {str(dtype).removeprefix('torch.')} eager, no text encoders")
    found.weights_gb = (weight_bytes(transformer) + weight_bytes(vae)) / 1e9
    for _ in range(2):
        watch = _Watch(device, found)
        latent = watch("steps", lambda: pipe(**embeddings, **settings, output_type="latent").images)
        watch("decode", partial(vae.decode, latent / 1.5305 + 0.0609))
    found.seconds["picture"] = found.seconds["steps"] + found.seconds["decode"]
    return found


def _emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
