"""The kernels that add attached LoRAs, each by itself at the sizes of a step: `python -m mmdit.bench.lora_kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.bench.floor import copy_rate
from mmdit.bench.layers import timed
from mmdit.bench.lora import attach, model_of
from mmdit.bench.random_models import MODELS, TIMESTEP, Inputs, check_size
from mmdit.bench.rows import Cells, attempted, step_time
from mmdit.models.lora import all_beside, without
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import products
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.products import Kind
from mmdit.runtime.rows import Activation, Added, Columns, Down, Output, Part, Rounding, Rows, Update
from mmdit.utils import markdown_table
from quant.matmul import quantize_activation
from quant.recipe import RECIPES

STEPS = ["step", "LoRA", "ms", "norm of the result"]
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
        for codes in (True, False):
            for width in (d, 4 * d):
                tasks[f"low {width} {'codes' if codes else '16 bits'}"] = partial(self.low, width, codes)
        for kind in ("token", "static", "none"):
            tasks[f"gelu {kind}"] = partial(self.gelu, kind, False)
            tasks[f"gelu {kind} with a LoRA"] = partial(self.gelu, kind, True)
        tasks["pack"] = partial(self.pack, False)
        tasks["pack with a LoRA"] = partial(self.pack, True)
        for kind in ("token", "none"):
            tasks[f"norm {kind}"] = partial(self.norm, kind)
        for out in (3 * d, d, 4 * d):
            tasks[f"add_up {out}"] = partial(self.add_up, out)
            tasks[f"addmm_ {out}"] = partial(self.addmm_, out)
        for width in (d, 4 * d):
            tasks[f"F.linear {width} to the rank"] = partial(self.linear, width)
        for blocks in ((32, 128, 4), (32, 256, 6), (16, 512, 4), (16, 256, 8)):
            tasks[f"low {d} codes {blocks}"] = partial(self.low, d, True, blocks)
            tasks[f"low {4 * d} codes {blocks}"] = partial(self.low, 4 * d, True, blocks)
        for blocks in ((64, 256, 4), (128, 128, 4), (64, 128, 6)):
            tasks[f"low {4 * d} 16 bits {blocks}"] = partial(self.low, 4 * d, False, blocks)
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

    def low(self, width: int, codes: bool, blocks: tuple[int, int, int] | None = None) -> Cells:
        """Activations times the down projections."""
        from quant.low_rank_kernels import low

        x, down = self.activation(width, codes), Down.of(self.random(2, self.rank, width), codes)
        weight = down.exact if down.halves is None else down.halves
        rest = {} if blocks is None else {"blocks": blocks}
        size = self.rows.total * (width * (1 if codes else 2) + 2 * self.rank)
        return self.cells(lambda: low(x.text, x.image, weight, down.factor, self.dtype, **rest), size)

    def gelu(self, kind: Kind, lora: bool) -> Cells:
        """GELU of the MLP's inner product."""
        from mmdit.runtime import kernels

        width, scale = 4 * self.d, torch.tensor(0.02, device=self.device)
        rounding = Rounding(kind, scale, scale) if kind == "static" else Rounding(kind)
        x, added = self.random(self.rows.total, width), self.added(width) if lora else None
        size = self.rows.total * width * (4 if kind == "none" else 3)
        return self.cells(lambda: kernels.gelu(x, self.rows, rounding, added), size)

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

    def addmm_(self, out: int) -> Cells:
        """The same by torch."""
        rows = self.rows.samples * self.rows.image
        y, low, up = self.random(rows, out), self.random(rows, self.rank), 1e-3 * self.random(out, self.rank)
        return self.cells(lambda: y.addmm_(low, up.t()), 4 * rows * out)

    def linear(self, width: int) -> Cells:
        """The down projection of the image by torch."""
        rows = self.rows.samples * self.rows.image
        x, down = self.random(rows, width), self.random(self.rank, width)
        return self.cells(lambda: F.linear(x, down), 2 * rows * width)


def steps(
    model: str = "large",
    *,
    recipes: Sequence[str] = ("fp8",),
    rank: int = 16,
    size: int | None = None,
    text: int = 333,
    batch: int = 2,
    repeats: int = 8,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 60.0,
) -> Iterator[Cells]:
    """Rows of `STEPS`: an accelerated step with a LoRA beside every Linear, added in each of the ways there are.

    Args:
        model, recipes, rank, size, text, batch, repeats, device, dtype, seconds: see `mmdit.bench.lora.steps`.
    """
    device = torch.device(device)
    inputs = Inputs.random(MODELS[model], check_size(model, size), text, batch, device, dtype)
    for recipe in (*recipes, None):
        made = model_of(model, recipe, device, dtype)
        ways: dict[str, Callable[[], Cells]] = {
            way: partial(_step, made, way, rank, inputs, repeats)
            for way in ("without", "in the kernels", "by products", "without again")
        }
        for way, *cells in attempted(ways, len(STEPS) - 1, seconds):
            yield [recipe or str(dtype).removeprefix("torch."), way, *cells]


def _step(model: MMDiT, way: str, rank: int, inputs: Inputs, repeats: int) -> Cells:
    """A step of a model whose LoRAs are added in a way, and the part that its largest kernels have."""
    for name in all_beside(model):
        without(model, name)
    if not way.startswith("without"):
        torch.manual_seed(0)
        attach(model, rank)
    most = products.MOST_RANK
    if way == "by products":
        products.MOST_RANK = 0
    fast = Accelerated(model)
    try:
        fast.begin([TIMESTEP])

        def velocity() -> Tensor:
            return fast.velocity(inputs.latent, TIMESTEP, [inputs.context], [inputs.pooled])

        found = step_time(velocity, inputs.latent.device, repeats)
        return [f"{found:.2f}", f"{float(velocity().double().norm()):.6g}"]
    finally:
        fast.close()
        products.MOST_RANK = most


def rows_of(
    model: str = "large",
    *,
    rows: Rows = ROWS,
    rank: int = 16,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 60.0,
    only: str = "",
) -> Iterator[Cells]:
    """Rows of `HEADERS`.

    Args:
        model: one of `MODELS`.
        rows: tokens of both streams.
        rank: of the LoRA, 16, 32 or 64.
        device, dtype: of the operands.
        seconds: time limit, after which no further row is started.
        only: rows are left out whose names do not have this.
    """
    tasks = Kernels(model, rows, rank, torch.device(device), dtype).tasks()
    return attempted({name: task for name, task in tasks.items() if only in name}, len(HEADERS), seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="large", choices=list(MODELS))
    parser.add_argument("--rows", type=int, nargs=3, default=list(ROWS), help="samples, text and image tokens")
    parser.add_argument("--rank", type=int, default=16, choices=[16, 32, 64])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="", help="rows whose names have this")
    parser.add_argument("--steps", action="store_true", help="whole steps, with the LoRA added in each way")
    options = parser.parse_args()
    common = {"rank": options.rank, "device": options.device, "seconds": options.seconds}
    if options.steps:
        found, header = steps(options.model, **common), STEPS
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
