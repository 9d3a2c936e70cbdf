"""The kernels that add attached LoRAs, each by itself at the sizes of a step: `python -m mmdit.bench.lora_kernels`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.bench.floor import copy_rate
from mmdit.bench.layers import timed
from mmdit.bench.lora import attach, host_time, kernel_time, model_of
from mmdit.bench.random_models import MODELS, TIMESTEP, Inputs, check_size
from mmdit.bench.rows import Cells, attempted, step_time
from mmdit.models.lora import all_beside, without
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import products
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.products import Kind
from mmdit.runtime.rows import Activation, Added, Columns, Down, Output, Part, Rounding, Rows, Update
from mmdit.utils import markdown_table
from quant import low_rank
from quant.matmul import multiply_into, quantize_activation
from quant.recipe import RECIPES
from quant.tensor import Float8Tensor

STEPS = ["step", "LoRA", "ms", "host", "kernels", "norm of the result"]
ROWS = Rows(2, 333, 4096)  # of both branches at 1024 x 1024
HEADERS = ["kernel", "us", "us at copy speed", "GB/s"]


class Kernels:
    """Random operands of one model at one size, and the rows that they give.

    Args:
        model: one of `MODELS`.
        rows: tokens of both streams.
        rank: of the LoRA, 16, 32 or 64.
        device, dtype: of the operands.
    """

    def __init__(self, model: str, rows: Rows, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rows, self.rank, self.device, self.dtype = rows, rank, device, dtype
        self.d, self.head_dim = MODELS[model].hidden_size, MODELS[model].head_dim
        self.rate = copy_rate(device) if device.type == "cuda" else float("inf")

    def tasks(self) -> dict[str, Callable[[], Cells]]:
        """What measures each row, the most important ones first."""
        d = self.d
        tasks: dict[str, Callable[[], Cells]] = {}
        for out in (3 * d, 4 * d, d):
            for rank in (self.rank, 64, 128):
                tasks[f"addmm_ {out}, rank {rank}"] = partial(self.addmm_, out, rank)
                tasks[f"addmm of a bias {out}, rank {rank}"] = partial(self.addmm, out, rank)
            tasks[f"up_and_bias {out}"] = partial(self.up_and_bias, out)
            tasks[f"add_up {out}"] = partial(self.add_up, out)
        for kind in get_args(Kind):
            tasks[f"gelu {kind}"] = partial(self.gelu, kind)
            tasks[f"gelu {kind} with a LoRA"] = partial(self.gelu_with_lora, kind)
            tasks[f"gelu {kind} with a LoRA, and low"] = partial(self.gelu_with_lora, kind, with_low=True)
        tasks["torch's gelu"] = self.torch_gelu
        tasks["largest gelu"] = self.largest_gelu
        tasks[f"fp8 {d} to {4 * d}, gelu token"] = partial(self.inner, False)
        tasks[f"fp8 {d} to {4 * d}, gelu token with a LoRA"] = partial(self.inner, True)
        tasks["pack"] = partial(self.pack, False)
        tasks["pack with a LoRA"] = partial(self.pack, True)
        for width in (d, 4 * d):
            tasks[f"low {width} codes"] = partial(self.low, width, True)
            tasks[f"low {width} 16 bits"] = partial(self.low, width, False)
            tasks[f"F.linear {width} to the rank"] = partial(self.linear, width)
        for kind in ("token", "none"):
            tasks[f"norm {kind}"] = partial(self.norm, kind)
        return tasks

    def cells(self, run: Callable[[], object], moved: float) -> Cells:
        """Time, time of so many bytes at the speed of a copy, and the rate."""
        found = timed(run, self.device)
        return [f"{1000 * found:.1f}", f"{1e6 * moved / self.rate:.1f}", f"{moved / found / 1e6:.0f}"]

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def activation(self, width: int, codes: bool) -> Activation:
        """Both streams."""
        x, split = self.random(self.rows.total, width), self.rows.split
        scale: Tensor | None = None
        if codes:
            x, scale = quantize_activation(x, RECIPES["fp8"], None, as_bytes=False)
        text, image = (None, None) if scale is None else (scale[:split], scale[split:])
        return Activation(Part(x[:split], text), Part(x[split:], image))

    def added(self, width: int) -> Added:
        """What a LoRA adds to the products."""
        return Added(self.random(self.rows.total, self.rank), self.random(2, width, self.rank))

    def low(self, width: int, codes: bool) -> Cells:
        """Activations times the down projections."""
        from quant.low_rank_kernels import low

        x, down = self.activation(width, codes), Down.of(self.random(2, self.rank, width), codes)
        weight = down.exact if down.halves is None else down.halves
        size = self.rows.total * (width * (1 if codes else 2) + 2 * self.rank)
        return self.cells(lambda: low(x.text, x.image, weight, down.factor, self.dtype), size)

    def gelu(self, kind: Kind) -> Cells:
        """GELU of the MLP's inner product."""
        from mmdit.runtime import kernels

        x, rounding = self.random(self.rows.total, 4 * self.d), self.rounding(kind)
        size = x.numel() * (4 if kind == "none" else 3)
        return self.cells(lambda: kernels.gelu(x, self.rows, rounding), size)

    def torch_gelu(self) -> Cells:
        """GELU of the eager model."""
        x = self.random(self.rows.total, 4 * self.d)
        return self.cells(lambda: F.gelu(x, approximate="tanh"), 4 * x.numel())

    def gelu_with_lora(self, kind: Kind, *, with_low: bool = False) -> Cells:
        """GELU with a LoRA, and the products of what it gives with the next down projections."""
        from mmdit.runtime.lora_kernels import gelu

        width = 4 * self.d
        x, added, rounding = self.random(self.rows.total, width), self.added(width), self.rounding(kind)
        down = Down.of(self.random(2, self.rank, width), codes=kind != "none") if with_low else None
        size = x.numel() * {"none": 4, "token": 5, "static": 3}[kind]
        return self.cells(lambda: gelu(x, self.rows, rounding, added, down), size)

    def largest_gelu(self) -> Cells:
        """The pass before it, under a scale per row."""
        from mmdit.runtime.lora_kernels import largest_gelu

        x, added = self.random(self.rows.total, 4 * self.d), self.added(4 * self.d)
        return self.cells(lambda: largest_gelu(x, self.rows, added), x.nbytes)

    def rounding(self, kind: Kind) -> Rounding:
        """The rounding of a kind, under some scale where that is static."""
        scale = torch.tensor(0.02, device=self.device)
        return Rounding(kind, scale, scale) if kind == "static" else Rounding(kind)

    def inner(self, lora: bool) -> Cells:
        """The first product of the image's MLP in float8, and GELU after it."""
        from mmdit.runtime import kernels

        rows, rounding = self.rows.only_image(), Rounding("token")
        count, wide = rows.total, 4 * self.d
        weight = Float8Tensor.quantize(self.random(wide, self.d), recipe=RECIPES["fp8"])
        codes, scale = quantize_activation(self.random(count, self.d), RECIPES["fp8"], None, as_bytes=False)
        added, out = Added(self.random(count, self.rank), self.random(1, wide, self.rank)), self.random(count, wide)

        def run() -> None:
            multiply_into(codes, scale, weight.qdata, weight.scale, None, weight.recipe, out=out)
            kernels.gelu(out, rows, rounding, added if lora else None)

        return self.cells(run, count * wide * (5 if lora else 3))

    def pack(self, lora: bool) -> Cells:
        """Norms of queries and keys, and the joint layout."""
        from mmdit.runtime import kernels

        width = 3 * self.d
        qkv, norms, added = self.random(self.rows.total, width), self.random(2, 2, self.head_dim), self.added(width)
        size = 4 * self.rows.total * width
        return self.cells(lambda: kernels.pack(qkv, norms, self.rows, self.head_dim, added if lora else None), size)

    def norm(self, kind: str) -> Cells:
        """A gated update, and the norm after it."""
        from mmdit.runtime import kernels

        x, table = self.random(self.rows.total, self.d), self.random(self.rows.samples, 4, self.d)
        output = Output(Columns(0, 0), Columns(1, 1), Rounding("token" if kind == "token" else "none"))
        update = Update(self.random(self.rows.total, self.d), Columns(2, 2))
        size = self.rows.total * self.d * (7 if kind == "token" else 8)
        return self.cells(lambda: kernels.norm_modulate(x, table, self.rows, [output], [update]), size)

    def add_up(self, out: int) -> Cells:
        """Our kernel that adds to products in place."""
        from mmdit.runtime import kernels

        y, added = self.random(self.rows.total, out), self.added(out)
        return self.cells(lambda: kernels.add_up(y, added, self.rows), 4 * self.rows.total * out)

    def addmm_(self, out: int, rank: int) -> Cells:
        """The same by torch, for the image's rows; factors may have zeros up to a rank."""
        rows = self.rows.samples * self.rows.image
        y, low, up = self.random(rows, out), self.random(rows, rank), 1e-3 * self.random(out, rank)
        return self.cells(lambda: y.addmm_(low, up.t()), 4 * rows * out)

    def addmm(self, out: int, rank: int) -> Cells:
        """What the eager model adds its product to in 16 bits: the bias and what the LoRA adds."""
        rows = self.rows.samples * self.rows.image
        bias, low, up = self.random(out), self.random(rows, rank), 1e-3 * self.random(out, rank)
        return self.cells(lambda: torch.addmm(bias, low, up.t()), 2 * rows * out)

    def up_and_bias(self, out: int) -> Cells:
        """The same by our kernel."""
        from quant.low_rank_kernels import up_and_bias

        rows = self.rows.samples * self.rows.image
        bias, low, up = self.random(out), self.random(rows, self.rank), self.random(out, self.rank)
        return self.cells(lambda: up_and_bias(low, up, bias), 2 * rows * out)

    def linear(self, width: int) -> Cells:
        """The down projection of the image by torch."""
        rows = self.rows.samples * self.rows.image
        x, down = self.random(rows, width), self.random(self.rank, width)
        return self.cells(lambda: F.linear(x, down), 2 * rows * width)


class Way(NamedTuple):
    """How a LoRA is added in a step.

    Args:
        rank: of the LoRA; None attaches none.
        eager: whether the model's own forward is measured, instead of the accelerated one.
        settings: attributes that differ meanwhile: the module or class, the name and the value.
    """

    rank: int | None
    eager: bool = False
    settings: tuple[tuple[object, str, object], ...] = ()


def ways(rank: int) -> dict[str, Way]:
    """What is compared, by name."""
    return {
        "without": Way(None),
        "as it is": Way(rank),
        "without again": Way(None),
        "eager without": Way(None, True),
        "eager as it is": Way(rank, True),
        "eager, rank 64": Way(64, True),
        "eager, by torch": Way(rank, True, ((low_rank, "LARGE", sys.maxsize),)),
        "eager without again": Way(None, True),
        "by products": Way(rank, settings=((products, "MOST_RANK", 0),)),
    }


def steps(
    model: str = "large",
    *,
    recipes: Sequence[str | None] = ("fp8", None),
    rank: int = 16,
    size: int | None = None,
    text: int = 333,
    batch: int = 2,
    repeats: int = 8,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 60.0,
    only: Sequence[str] = ("",),
) -> Iterator[Cells]:
    """Rows of `STEPS`: a step with a LoRA beside every Linear, added in each of the ways there are.

    Args:
        recipes: of the weights; None keeps `dtype`.
        model, rank, size, text, batch, repeats, device, dtype: see `mmdit.bench.lora.steps`.
        seconds: time limit, after which no further row is started.
        only: what the names of the ways start with that are measured.
    """
    device, start = torch.device(device), time.monotonic()
    inputs = Inputs.random(MODELS[model], check_size(model, size), text, batch, device, dtype)
    for recipe in recipes:
        made = model_of(model, recipe, device, dtype)
        tasks: dict[str, Callable[[], Cells]] = {
            name: partial(_step, made, way, inputs, repeats)
            for name, way in ways(rank).items()
            if name.startswith(tuple(only))
        }
        for name, *cells in attempted(tasks, len(STEPS) - 1, seconds - time.monotonic() + start):
            yield [recipe or str(dtype).removeprefix("torch."), name, *cells]


def _step(model: MMDiT, way: Way, inputs: Inputs, repeats: int) -> Cells:
    """The time of a step, of the host and of the kernels in the model's own, and the norm of what it gives."""
    for name in all_beside(model):
        without(model, name)
    if way.rank is not None:
        torch.manual_seed(0)
        attach(model, way.rank)
    with ExitStack() as stack:
        for setting in way.settings:
            stack.enter_context(replaced(*setting))
        if way.eager:
            run = partial(model, inputs.latent, inputs.timestep, inputs.context, inputs.pooled)
        else:
            fast = Accelerated(model)
            stack.callback(fast.close)
            fast.begin([TIMESTEP])
            run = partial(fast.velocity, inputs.latent, TIMESTEP, [inputs.context], [inputs.pooled])
        found, device = step_time(run, inputs.latent.device, repeats), inputs.latent.device
        parts = (host_time(model, run, repeats), kernel_time(run, device)) if way.eager else (0.0, 0.0)
        shown = (f"{part:.1f}" if part else "-" for part in parts)
        return [f"{found:.2f}", *shown, f"{float(run().double().norm()):.6g}"]


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute of a module or class that has another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def rows_of(
    model: str = "large",
    *,
    rows: Rows = ROWS,
    rank: int = 16,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 60.0,
    only: Sequence[str] = ("",),
) -> Iterator[Cells]:
    """Rows of `HEADERS`.

    Args:
        model: one of `MODELS`.
        rows: tokens of both streams.
        rank: of the LoRA, 16, 32 or 64.
        device, dtype: of the operands.
        seconds: time limit, after which no further row is started.
        only: what the names of the rows start with that are measured.
    """
    tasks = Kernels(model, rows, rank, torch.device(device), dtype).tasks()
    return attempted(
        {name: task for name, task in tasks.items() if name.startswith(tuple(only))}, len(HEADERS), seconds
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="large", choices=list(MODELS))
    parser.add_argument("--rows", type=int, nargs=3, default=list(ROWS), help="samples, text and image tokens")
    parser.add_argument("--rank", type=int, default=16, choices=[16, 32, 64])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="+", default=[""], metavar="START", help="rows whose names start so")
    parser.add_argument("--recipes", nargs="+", default=["fp8", "none"], help="of steps; none is 16 bits")
    parser.add_argument("--steps", action="store_true", help="whole steps, with the LoRA added in each way")
    options = parser.parse_args()
    common = {"rank": options.rank, "device": options.device, "seconds": options.seconds}
    if options.steps:
        recipes = [None if one == "none" else one for one in options.recipes]
        found, header = steps(options.model, recipes=recipes, only=options.only, **common), STEPS
    else:
        found, header = rows_of(options.model, rows=Rows(*options.rows), only=options.only, **common), HEADERS
    rows = []
    for row in found:
        sys.stderr.write(f"note: {', '.join(map(str, row))}\n")
        rows.append(row)
    sys.stdout.write("\n".join(markdown_table(header, rows)) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
