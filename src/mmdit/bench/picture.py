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
from mmdit.bench.first_picture import FIRSTS, first_picture
from mmdit.bench.random_models import MODELS, check_names, check_peers, check_size, fill, quantized, recipe_of
from mmdit.bench.rows import FAILURES, said_of
from mmdit.checkpoints.components import to_diffusers
from mmdit.checkpoints.load_pipeline import Components
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import markdown_table, weight_bytes

_FEW_STEPS = 4  # of a picture without guidance, as Turbo draws
PROMPT = "a large red circle above a blue star, on a white background"


@dataclass
class Drawn:
    """A row of the table: seconds by stage, and gigabytes (1e9 bytes) of the device's memory."""

    name: str
    # By stage, where it was measured: "text", "steps", "decode", "picture" (all of these), "encode" (a picture by the
    # VAE), "turbo" (a picture of 4 steps without guidance) and "first" (from the start of a process).
    seconds: dict[str, float] = field(default_factory=dict)
    weights_gb: float = 0.0
    peak_gb: dict[str, float] = field(default_factory=dict)  # by stage
    more_gb: dict[str, float] = field(default_factory=dict)  # the peak of a stage beyond what was there before
    failed: str = ""  # why nothing was measured


def pictures(
    model: str = "large",
    recipes: Sequence[str] = ("fp8",),
    *,
    steps: int = 20,
    size: int | None = None,
    compiled: bool = True,
    fast: bool = False,
    first: bool = False,
    seconds: float = float("inf"),
    against: Sequence[str] = (),
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Drawn]:
    """Draw with all models on the device: in 16 bits and with each recipe, accelerated, eager and compiled.

    A row draws twice; the second time counts. The prompt is encoded with T5 at 256 tokens, by T5-XXL, CLIP-L and CLIP-G
    of official size (for the embedded model's size, by itself).

    Args:
        model: one of `mmdit.bench.random_models.MODELS`.
        recipes: names as in `mmdit.bench.step.bench`; they quantize transformer and T5.
        steps: Sampler steps.
        size: Side of the picture in pixels; None is the model's default.
        compiled: whether to draw with compiled blocks too.
        fast: whether to draw with `mmdit.Pipeline.accelerate` too.
        first: whether to measure the first pictures of new processes too, see `mmdit.bench.first_picture`.
        seconds: no row is started after so many seconds.
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
    start = time.monotonic()
    modes = [*(["fast"] if fast else []), "eager", *(["compiled"] if compiled else [])]
    rows: dict[str, Callable[[str], Drawn]] = {}
    for mode in modes:
        for recipe in (*recipes, None) if mode == "fast" else (None, *recipes):
            build = partial(_ours, model, recipe, mode, device, dtype)
            rows[f"mmdit {recipe or word} {mode}"] = partial(_drawn, build=build, steps=steps, size=size, device=device)
    if first:
        recipe = next(iter(recipes), None)
        for name, options in FIRSTS.items():
            asked = partial(first_picture, model, recipe, steps=steps, size=size, device=device, dtype=dtype)
            rows[f"mmdit {recipe or word}, {name}"] = partial(_first, measure=partial(asked, **options), device=device)
    if "diffusers" in against:
        rows[f"diffusers {word} eager, no text encoders"] = lambda name: _theirs(
            name, model, steps, size, device, dtype
        )
    for name, measure in rows.items():
        if time.monotonic() - start > seconds:
            yield Drawn(name, failed="no time was left")
            continue
        try:
            yield measure(name)
        except FAILURES as error:
            yield Drawn(name, failed=f"failed: {said_of(error, 140)}"[:160])


def _first(name: str, measure: Callable[[], float], device: torch.device) -> Drawn:
    _emptied(device)
    return Drawn(name, {"first": measure()})


def table(found: Sequence[Drawn]) -> str:
    """Times and memory beside those of the first row that draws whole pictures."""
    base = next((one for one in found if "picture" in one.seconds), None)
    rows = []
    for one in found:
        if one.failed:
            rows.append((one.name, one.failed, *[""] * (len(_TITLES) - 2)))
            continue
        times = (f"{one.seconds[stage]:.3f}" if stage in one.seconds else "-" for stage in _STAGES)
        ratio = "-" if base is None else _ratio(one.seconds.get("picture", 0.0), base.seconds["picture"])
        peak = max(one.peak_gb.values(), default=0.0)
        more = (f"{one.more_gb[stage]:.2f}" if one.more_gb.get(stage) else "-" for stage in ("decode", "encode"))
        weights = f"{one.weights_gb:.2f}" if one.weights_gb else "-"
        rows.append((one.name, *times, ratio, weights, f"{peak:.2f}" if peak else "-", *more))
    return "\n".join(markdown_table(_TITLES, rows))


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.3f}" if value and base else "-"


_STAGES = ("text", "steps", "decode", "picture", "encode", "turbo", "first")
_TITLES = (
    *("", "text s", "steps s", "decoding s", "picture s", "encoding s", "4 steps s", "first picture s"),
    *("to the first", "weights GB", "peak GB", "decoding + GB", "encoding + GB"),
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


def _ours(model: str, recipe: str | None, mode: str, device: torch.device, dtype: torch.dtype) -> Pipeline:
    pipe = random_pipeline(model, device, dtype)
    if recipe is not None:
        assert pipe.t5 is not None
        for part in (pipe.transformer, pipe.t5):
            quantized(part, recipe)
    if mode == "compiled":
        for block in pipe.transformer.joint_blocks:
            block.compile(fullgraph=True)
    if mode == "fast":
        pipe.accelerate()
    return pipe


@torch.no_grad()
def _drawn(name: str, build: Callable[[], Pipeline], steps: int, size: int, device: torch.device) -> Drawn:
    _emptied(device)
    pipe = build()
    weights = sum(weight_bytes(part) for part in pipe.models.values())
    found = Drawn(name, weights_gb=weights / 1e9)
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(pipe.device, pipe.dtype)
    for _ in range(2):  # the second time counts
        found.seconds, found.peak_gb, found.more_gb = {}, {}, {}
        _Picture(pipe, found, size, device)(steps, 4.5)
        found.seconds["picture"] = sum(found.seconds[stage] for stage in ("text", "steps", "decode"))
        turbo = Drawn("")
        _Picture(pipe, turbo, size, device)(_FEW_STEPS, 1.0)
        found.seconds["turbo"] = sum(turbo.seconds.values())
        _Watch(device, found)("encode", lambda: pipe._fast_vae.encode(pixels).mean)
    torch.compiler.reset()
    return found


class _Picture:
    """Draws a picture and notes the time of each stage; negative prompts are encoded where there is guidance."""

    def __init__(self, pipe: Pipeline, into: Drawn, size: int, device: torch.device) -> None:
        self.pipe, self.size, self.watch = pipe, size, _Watch(device, into)

    def __call__(self, steps: int, guidance: float) -> None:
        texts = (PROMPT, "") if guidance > 1 else (PROMPT,)
        cond, *rest = [self.watch("text", partial(self.pipe.encode, text)) for text in texts]
        noise = self.pipe.noise(0, height=self.size, width=self.size)
        settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}

        def every_step() -> Any:
            *_, last = self.pipe.sample(cond, rest[0] if rest else None, noise, **settings)
            return last.x

        self.watch("decode", partial(self.pipe.decode, self.watch("steps", every_step)))


class _Watch:
    """Runs a stage and notes its time and its peak; a stage that runs twice counts twice."""

    def __init__(self, device: torch.device, into: Drawn) -> None:
        self.device, self.into = device, into

    def __call__(self, stage: str, run: Callable[[], Any]) -> Any:
        cuda = self.device.type == "cuda"
        before = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        result = run()
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.into.seconds[stage] = self.into.seconds.get(stage, 0.0) + seconds
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else 0
        for kept, size in ((self.into.peak_gb, peak), (self.into.more_gb, peak - before)):
            kept[stage] = max(kept.get(stage, 0.0), size / 1e9)
        return result


@torch.no_grad()
def _theirs(name: str, model: str, steps: int, size: int, device: torch.device, dtype: torch.dtype) -> Drawn:
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
    found = Drawn(name)
    found.weights_gb = (weight_bytes(transformer) + weight_bytes(vae)) / 1e9
    image = torch.rand(1, 3, size, size, device=device, dtype=dtype)
    for _ in range(2):
        found.seconds, found.peak_gb, found.more_gb = {}, {}, {}
        watch = _Watch(device, found)
        latent = watch("steps", lambda: pipe(**embeddings, **settings, output_type="latent").images)
        watch("decode", partial(vae.decode, latent / 1.5305 + 0.0609))
        watch("encode", lambda: vae.encode(image).latent_dist.mean)
    found.seconds["picture"] = found.seconds["steps"] + found.seconds["decode"]
    return found


def _emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
