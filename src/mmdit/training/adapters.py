"""Adapters that train beside frozen Linears: LoRA, DoRA and LoKr, on float32, 16-bit and float8 weights.

    adapters = attach(pipe.transformer, config)     # by name of the Linear; the model computes with them from here on
    optimizer = torch.optim.AdamW(part for one in adapters.values() for part in one.parameters())

Sources: LoRA arXiv 2106.09685; DoRA 2402.09353 with the norm taken as a constant (section 4.3), as in PEFT; LoKr
2309.14859. An adapter starts without a change of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.checkpoints.lora_kinds import Change, Kronecker, LowRank, Magnitude
from mmdit.models.lora import LoraLinear, all_beside, stand_in, without
from mmdit.runtime.compiled import refuse_own_forward
from mmdit.training.config import TrainingConfig
from quant.quantize import linears_of
from quant.tensor import Float8Tensor


class Adapter(nn.Module, ABC):
    """The trained part of a Linear with an adapter. Its parameters are float32, or float64 beside float64 weights."""

    scale: float

    @abstractmethod
    def added(self, x: Tensor) -> Tensor:
        """The term [..., out] that is added to the Linear's output for x [..., in]."""

    def changed(self, output: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
        """The output [..., out] of the Linear with the adapter, from its plain output."""
        return output + self.added(x)

    @abstractmethod
    def change(self) -> Change:
        """The change of the whole weight, as LoRA files describe it."""

    def magnitude(self) -> Magnitude | None:
        """The norms of the changed weight, of an adapter that trains them."""
        return None


class LowRankAdapter(Adapter):
    """LoRA: scale up (down x); with several parts, an own LoRA for each of as many equal parts of the rows.

    Args:
        linear: the Linear.
        rank: the rank of each part.
        scale: alpha / rank.
        parts: 3 for q, k and v of a fused projection.
        generator: draws the start.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, parts: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = linear.out_features // parts, linear.in_features
        self.scale, self.parts = scale, parts
        self.down = nn.Parameter(_kaiming(parts * rank, columns, linear, generator))
        self.up = nn.Parameter(torch.zeros(parts, rows, rank, dtype=_wide(linear), device=linear.weight.device))

    def added(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), (self.scale * self.whole_up()).to(x.dtype))

    def changed(self, output: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
        low = F.linear(x, self.down.to(x.dtype)).flatten(0, -2)
        up = (self.scale * self.whole_up()).to(x.dtype)
        if output.dtype != x.dtype:  # under autocast
            return output + F.linear(low, up).view(output.shape)
        return torch.addmm(output.flatten(0, -2), low, up.t()).view(output.shape)  # not in place: blocks run twice

    def whole_up(self) -> Tensor:
        """The up factor of all rows, [out, parts * rank]: blocks along the diagonal."""
        return self.up[0] if self.parts == 1 else torch.block_diag(*self.up)

    def change(self) -> Change:
        return LowRank(up=self.whole_up().detach(), down=self.down.detach(), scale=self.scale)


class DoraAdapter(LowRankAdapter):
    """DoRA: the rows of W + scale up down are scaled to trained norms; gradients take their own norms as constants."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, parts: int, generator: torch.Generator) -> None:
        super().__init__(linear, rank, scale, parts, generator)
        self.norms = nn.Parameter(_values(linear).to(_wide(linear)).norm(dim=1))

    def changed(self, output: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
        bias = linear.bias
        plain = output if bias is None else output - bias
        scaled = (plain + self.added(x)) * (self.norms / self._row_norms(linear)).to(x.dtype)
        return scaled if bias is None else scaled + bias

    @torch.no_grad()
    def _row_norms(self, linear: nn.Linear) -> Tensor:
        """|W + scale up down| of each row, without making the sum: |W|^2 + 2 (W down^T) . up + up (down down^T) up."""
        weight, down, up = _values(linear).to(_wide(linear)), self.down, self.scale * self.whole_up()
        crossed = 2 * ((weight @ down.T) * up).sum(1)
        return (weight.square().sum(1) + crossed + ((up @ (down @ down.T)) * up).sum(1)).sqrt()

    def magnitude(self) -> Magnitude:
        return Magnitude(self.norms.detach()[:, None], "trained")


class LokrAdapter(Adapter):
    """LoKr: scale kron(w1, w2) x, w2 = w2_a w2_b where the rank makes it smaller.

    Args:
        linear: the Linear.
        rank: the rank of w2.
        scale: alpha / rank; it is 1 where w2 is whole, as every reader of such files has it.
        factor: the largest number of rows, and of columns, of w1.
        generator: draws the start.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, factor: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = linear.out_features, linear.in_features
        self.sides = _divisor(rows, factor), _divisor(columns, factor)
        big = rows // self.sides[0], columns // self.sides[1]
        self.is_whole = rank >= min(big) / 2
        self.scale = 1.0 if self.is_whole else scale
        self.w1 = nn.Parameter(_kaiming(*self.sides, linear, generator))
        if self.is_whole:
            self.w2 = nn.Parameter(self.w1.detach().new_zeros(big))
        else:
            self.w2_a = nn.Parameter(_kaiming(big[0], rank, linear, generator))
            self.w2_b = nn.Parameter(self.w1.detach().new_zeros(rank, big[1]))

    def added(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.sides[1], -1))  # ... i1 i2
        if self.is_whole:
            inner = F.linear(parts, self.w2.to(x.dtype))
        else:
            inner = F.linear(F.linear(parts, self.w2_b.to(x.dtype)), self.w2_a.to(x.dtype))
        return torch.matmul((self.scale * self.w1).to(x.dtype), inner).flatten(-2)  # ... o1 o2

    def change(self) -> Change:
        if self.is_whole:
            return Kronecker(w1=self.w1.detach(), w2=self.w2.detach())
        return Kronecker(w1=self.w1.detach(), w2_a=self.w2_a.detach(), w2_b=self.w2_b.detach(), scale=self.scale)


class AdaptedLinear(LoraLinear):
    """A Linear with an adapter in training; see `mmdit.models.lora.LoraLinear`, as which it is found and removed."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.changed(nn.Linear.forward(self, x), x, self)

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """Change an output of the Linear in place, without a gradient."""
        return output.copy_(self.adapter.changed(output, x, self))


def attach(model: nn.Module, config: TrainingConfig) -> dict[str, Adapter]:
    """Freeze a model, and put an adapter beside each Linear that `config.targets` names.

    Returns:
        The adapters by the name of their Linear. Their parameters are parameters of the model too.

    Raises:
        ValueError: a glob matches no Linear, the rank exceeds a side of a Linear, a Linear has a forward of its own
            (as a fake-quantized one has), or LoRAs or other adapters are attached to the model, which these would take
            the place of.
    """
    if there := list(all_beside(model)):
        raise ValueError(
            f"something is attached beside {len(there)} Linears, such as {there[0]}, and a new adapter would take its "
            "place: merge LoRAs by pipe.fuse_lora(), remove them by pipe.unload_lora_weights(), or remove adapters of "
            "another training by mmdit.training.adapters.detach(model, adapters)"
        )
    linears = dict(linears_of(model))
    names = targets_of(linears, config.targets)
    for name in names:
        refuse_own_forward(model, name)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    adapters = {name: _adapter(name, linears[name], config, generator) for name in names}
    for name, adapter in adapters.items():
        into = stand_in(model, name, AdaptedLinear)
        into.down = into.up = into.delta = None
        into.adapter = adapter
    return adapters


def detach(model: nn.Module, names: Iterable[str]) -> None:
    """Remove the adapters beside these Linears."""
    for name in names:
        without(model, name)


def targets_of(linears: Sequence[str] | dict[str, nn.Linear], globs: Sequence[str]) -> list[str]:
    """The names of Linears that globs match, in the order of the model.

    Raises:
        ValueError: there is no glob, or a glob matches no Linear; the nearest names are given.
    """
    if not globs:
        raise ValueError("targets names no Linear; give globs such as 'joint_blocks.*.attn.qkv'")
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in linears):
            near = get_close_matches(glob, linears, n=3, cutoff=0)
            raise ValueError(f"targets: {glob!r} matches none of {len(linears)} Linears, such as {', '.join(near)}")
    return [name for name in linears if any(fnmatchcase(name, glob) for glob in globs)]


def _adapter(name: str, linear: nn.Linear, config: TrainingConfig, generator: torch.Generator) -> Adapter:
    parts = 3 if config.split_qkv and name.endswith(".qkv") else 1
    least = min(linear.in_features, linear.out_features // parts)
    if config.rank > least:
        raise ValueError(f"rank {config.rank} exceeds {least}, the smaller side of {name}; take a smaller rank")
    if config.adapter == "lokr":
        return LokrAdapter(linear, config.rank, config.scale, config.lokr_factor, generator)
    kind = DoraAdapter if config.adapter == "dora" else LowRankAdapter
    return kind(linear, config.rank, config.scale, parts, generator)


def _wide(linear: nn.Linear) -> torch.dtype:
    return torch.promote_types(linear.weight.dtype, torch.float32)


def _values(linear: nn.Linear) -> Tensor:
    weight = linear.weight.detach()
    return weight.dequantize() if isinstance(weight, Float8Tensor) else weight


def _kaiming(rows: int, columns: int, linear: nn.Linear, generator: torch.Generator) -> Tensor:
    """Uniform in +-1 / sqrt(columns), as PEFT starts lora_A; drawn on the CPU, so that devices do not differ."""
    bound = 1 / math.sqrt(columns)
    values = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return values.to(linear.weight.device, _wide(linear))


def _divisor(size: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return next(one for one in range(min(size, most), 0, -1) if size % one == 0)
