"""What a ControlNet of full size costs in a step, beside the floor of its operations: `mmdit bench controlnet`.

The net is Stability's 8B kind: single-stream blocks of the transformer's width, half as many as the transformer has.
Weights, inputs and the hint are random. A step predicts both branches of the guidance in one batch, as a pipeline does.
In a fast step the net runs by the fast kernels, and the net alone is a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from encoders import Conditioning
from mmdit.bench.floor import attention_floor, product_floor
from mmdit.bench.layers import Shape, counted
from mmdit.bench.random_models import MODELS, Inputs, check_names, check_size, fill, quantized
from mmdit.bench.rows import Cells, attempted, peak_of, step_time
from mmdit.models.config import MMDiTConfig
from mmdit.models.controlnet import ControlNet, ControlNetConfig
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import Control, acting_nets, residuals
from mmdit.pipeline.passes import Branch
from mmdit.pipeline.predict import control_timestep_of, predict_branches, timestep_of
from mmdit.pipeline.profiles import PROFILES
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.attention import BestAttention
from mmdit.runtime.fast_nets import FastNets, residuals_of
from mmdit.runtime.graphs import Graphs
from mmdit.utils import weight_bytes
from quant.recipe import RECIPES

STEPS = [
    *("step", "ms without", "ms with the net", "more", "the net alone", "its floor", "net GB"),
    *("peak GB without", "peak GB with", "CUDA graph", "from eager"),
]
SIGMA = 0.5
_PROFILE = PROFILES["diffusers"]


def net_config(config: MMDiTConfig) -> ControlNetConfig:
    """The ControlNet of Stability's kind for a transformer."""
    return ControlNetConfig(
        depth=max(config.depth // 2, 1),
        hidden_size=config.hidden_size,
        pooled_dim=config.pooled_dim,
        head_dim=config.head_dim,
        in_channels=config.in_channels,
        hint_channels=config.in_channels,
        kind="canny",
    )


def shapes_of_net(config: ControlNetConfig, size: int, batch: int) -> list[Shape]:
    """The Linears of the net's blocks and those after them, each shape once."""
    with torch.device("meta"):
        net = ControlNet(config)
    rows = batch * (size // 8 // config.patch_size) ** 2
    return counted(net, lambda name: rows if "blocks." in name and "adaLN" not in name else None)


def flops_of_net(config: ControlNetConfig, size: int, batch: int) -> float:
    """Operations of the net in a step: 2 per weight and token, 4 per pair of tokens and channel in attention."""
    image = (size // 8 // config.patch_size) ** 2
    linear = sum(2.0 * one.count * one.rows * one.out * one.width for one in shapes_of_net(config, size, batch))
    return linear + 4.0 * batch * config.depth * config.hidden_size * image**2


def floor_of_net(
    config: ControlNetConfig, recipe: str | None, size: int, batch: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Milliseconds of the net's products and attention at the rates of the device's own kernels; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    products = sum(product_floor(one, recipe, device, dtype) for one in shapes_of_net(config, size, batch))
    image = (size // 8 // config.patch_size) ** 2
    return products + config.depth * attention_floor((batch, image, config.heads, config.head_dim), device, dtype)


def steps(
    model: str = "large",
    *,
    recipes: Sequence[str] = ("fp8",),
    size: int | None = None,
    text: int = 333,
    batch: int = 2,
    repeats: int = 8,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = float("inf"),
) -> Iterator[Cells]:
    """Rows of `STEPS`: the accelerated and the model's own forward, with both models in 16 bits and by each recipe.

    Args:
        model: one of `MODELS`.
        recipes: names of `quant.RECIPES`; transformer and net are quantized.
        size, text, batch: see `mmdit.bench.step.bench`.
        repeats: steps of which the median is taken.
        device, dtype: the device and dtype of the models.
        seconds: time limit, after which no further row is started.

    Raises:
        ValueError: a name or a size is unknown.
    """
    check_names((model,), MODELS)
    check_names(recipes, RECIPES)
    device, size = torch.device(device), check_size(model, size)
    inputs = Inputs.random(MODELS[model], size, text, batch, device, dtype)
    tasks: dict[str, Callable[[], Cells]] = {}
    for recipe in (None, *recipes):
        floor = partial(floor_of_net, net_config(MODELS[model]), recipe, size, batch, device, dtype)
        for fast in (True, False):
            name = f"{recipe or str(dtype).removeprefix('torch.')} {'fast' if fast else 'eager'}"
            tasks[name] = partial(_row, model, recipe, inputs, floor, repeats, fast=fast)
    return attempted(tasks, len(STEPS), seconds)


class _Models(NamedTuple):
    """A transformer, a net that acts on it, and the inputs of a step."""

    transformer: MMDiT
    net: ControlNet
    control: Control
    inputs: Inputs

    def branches(self, *, controlled: bool) -> list[Branch]:
        """The branches of the guidance, one for each sample of the batch."""
        control, names = (self.control,) if controlled else (), cycle(("uncond", "cond"))
        texts = zip(self.inputs.context.split(1), self.inputs.pooled.split(1), names, strict=False)
        return [Branch(Conditioning(context, pooled), name, control=control) for context, pooled, name in texts]

    def step(self, branches: Sequence[Branch], fast: Accelerated | None) -> list[Tensor]:
        """The predictions of a step."""
        x = self.inputs.latent[:1].float()
        return predict_branches(self.transformer, _PROFILE, x, SIGMA, branches, lambda _: None, fast)

    def alone(self, branches: Sequence[Branch], *, fast: bool) -> Callable[[], object]:
        """What computes the net's residuals: its own forward, or its fast one as a graph where there is a GPU."""
        texts = [(branch.name, branch.conditioning) for branch in branches]
        level = control_timestep_of(_PROFILE, SIGMA)
        latent, model = self.inputs.latent, self.transformer
        if not fast:
            return partial(residuals, (self.control,), model, _PROFILE, latent, SIGMA, level, texts)
        graphs, names, depth = Graphs(), [branch.name for branch in branches], model.config.depth
        (acting,) = acting_nets((self.control,), _PROFILE, SIGMA, level, names, depth)
        contexts, pooled = ([getattr(text, part) for _, text in texts] for part in ("context", "pooled"))
        prepared = FastNets(model, BestAttention(), graphs).prepare(acting, latent, contexts, pooled)

        def run(latent: Tensor, *inputs: Tensor) -> Tensor:
            return residuals_of(prepared, model, latent, inputs)[-1]  # a graph's results are copied

        inputs = (latent, *prepared.inputs)
        return partial(graphs, "the net", run, inputs) if latent.is_cuda else partial(run, *inputs)


def _built(model: str, recipe: str | None, inputs: Inputs) -> _Models:
    config, like = MODELS[model], inputs.latent
    with torch.device("meta"):
        models = MMDiT(config), ControlNet(net_config(config))
    for one in models:
        fill(one.to_empty(device=like.device).to(like.dtype).requires_grad_(False).eval())
        if recipe is not None:
            quantized(one, recipe)
    hint = torch.randn_like(like[:1])
    return _Models(*models, Control(models[1], hint, hint), inputs)


@torch.no_grad()
def _row(
    model: str, recipe: str | None, inputs: Inputs, floor: Callable[[], float], repeats: int, *, fast: bool
) -> Cells:
    models, device = _built(model, recipe, inputs), inputs.latent.device
    without, controlled = (models.branches(controlled=each) for each in (False, True))
    accelerated = Accelerated(models.transformer) if fast else None
    if accelerated is not None:
        accelerated.begin([timestep_of(_PROFILE, SIGMA)])
    times, peaks = [], []
    for branches in (without, controlled):
        run = partial(models.step, branches, accelerated)
        times.append(step_time(run, device, repeats))
        peaks.append(peak_of(run, device))
    alone = step_time(models.alone(controlled, fast=fast), device, repeats)
    return [
        *(f"{one:.2f}" for one in times),
        f"{times[1] - times[0]:.2f}",
        f"{alone:.2f}",
        f"{floor():.2f}" if device.type == "cuda" else "-",
        f"{weight_bytes(models.net) / 1e9:.2f}",
        *(f"{one:.2f}" if one else "-" for one in peaks),
        _said(models, controlled, accelerated),
        _difference(models, controlled) if fast else "-",
    ]


def _said(models: _Models, branches: Sequence[Branch], accelerated: Accelerated | None) -> str:
    """Whether a graph draws what the kernels without graph do."""
    if accelerated is None or not accelerated.graph:
        return "no graph"
    found = models.step(branches, accelerated)
    wanted = models.step(branches, accelerated.without_graphs())
    return "bit-equal" if all(map(torch.equal, found, wanted)) else "DIFFERS"


def _difference(models: _Models, branches: Sequence[Branch]) -> str:
    """The relative distance of the last residual of the fast forward from that of the net's own forward."""
    found, every = (models.alone(branches, fast=fast)() for fast in (True, False))
    assert isinstance(found, Tensor), "the fast forward gives one residual"
    assert isinstance(every, list), "the net's own forward gives all"
    wanted = [one for one in every if one is not None][-1].double()
    return f"{float((found.double() - wanted).norm() / wanted.norm()):.1e}"
