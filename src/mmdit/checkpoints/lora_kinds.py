"""The kinds of patches in LoRA files and their formulas, in float32 (float64 for float64 weights).

`Change.of(weight, strength)` returns the term that a patch adds to a weight W. Sources: LoRA arXiv 2106.09685, LoHa
2108.06098, LoKr and the Tucker forms LyCORIS 2309.14859, GLoRA 2306.07967, OFT 2306.07280, BOFT 2311.06243, (IA)^3
2205.05638, DoRA 2402.09353. The tensors are stored as in LyCORIS 4.1 and ComfyUI 0.3.64 `comfy/weight_adapter`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

EPSILON: Final = torch.finfo(torch.float32).eps  # added to norms, as LyCORIS and ComfyUI do
Sizes = tuple[int | None, int | None]
"""Rows and inputs of the weight that a patch is for; None where it does not say."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """A change of one kind, with its tensors; `scale` is sigma = alpha / rank."""

    name: ClassVar[str]
    scale: float = 1.0

    @property
    def sizes(self) -> Sizes:
        """Rows and inputs of the weight that the change fits."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """The rank; None for kinds without a rank."""
        return None

    def of(self, weight: Tensor, strength: float) -> Tensor:
        """Compute the term that is added to `weight`, with its shape and dtype."""
        raise NotImplementedError

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the change."""
        return (value for one in fields(self) if isinstance(value := getattr(self, one.name), Tensor))


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Change):
    """LoRA: up @ down, or the Tucker form of a convolution if there is a core `mid`."""

    name = "lora"
    up: Tensor  # [out, r], or [out, r, 1, 1]
    down: Tensor  # [r, in], or [r, in, k, k]
    mid: Tensor | None = None  # [r, r, k, k]
    padded: tuple[int, ...] | None = None  # the shape to which the weight is padded first

    @property
    def sizes(self) -> Sizes:
        kernel = 1 if self.mid is None else prod(self.mid.shape[2:])
        return self.up.shape[0], prod(self.down.shape[1:]) * kernel

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def of(self, weight: Tensor, strength: float) -> Tensor:
        up, down = _like(self.up, weight).flatten(1), _like(self.down, weight)
        if self.mid is not None:
            mid = _like(self.mid, weight)
            delta = torch.einsum("oa,ab...,bi->oi...", up, mid, down.flatten(1))
        else:
            delta = up @ down.flatten(1)
        return (strength * self.scale) * delta.reshape(weight.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """up [out, r] and down [r, in] of the plain form, in float32; up is multiplied by sigma."""
        assert self.mid is None, "a Tucker form has no two factors"
        return self.scale * self.up.float().flatten(1), self.down.float().flatten(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Hadamard(Change):
    """LoHa: the elementwise product of two low-rank products, each with an optional Tucker core."""

    name = "loha"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None  # [r, r, k, k]
    t2: Tensor | None = None

    @property
    def sizes(self) -> Sizes:
        if self.t1 is None:
            return self.w1_a.shape[0], prod(self.w1_b.shape[1:])
        return self.w1_a.shape[1], self.w1_b.shape[1] * prod(self.t1.shape[2:])

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def of(self, weight: Tensor, strength: float) -> Tensor:
        halves = (
            self._half(weight, *each) for each in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))
        )
        one, two = halves
        return (strength * self.scale) * (one * two).reshape(weight.shape)

    def _half(self, weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
        a, b = _like(a, weight).flatten(1), _like(b, weight).flatten(1)
        if core is None:
            return a @ b
        return torch.einsum("ij...,jq,ip->pq...", _like(core, weight), b, a)


@dataclass(frozen=True, eq=False, kw_only=True)
class Kronecker(Change):
    """LoKr: kron(w1, w2). Each matrix is stored in full or factored; w2 may also have the Tucker form."""

    name = "lokr"
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None  # [r, r, k, k]

    @property
    def sizes(self) -> Sizes:
        one = self._shape_of(self.w1, self.w1_a, self.w1_b)
        two = self._shape_of(self.w2, self.w2_a, self.w2_b, self.t2)
        return one[0] * two[0], one[1] * two[1]

    @property
    def rank(self) -> int | None:
        """The rank of w2 if it is factored, else that of w1; None if both are full, and alpha is then ignored."""
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else factor.shape[0]

    def of(self, weight: Tensor, strength: float) -> Tensor:
        one, two = self._whole(weight, self.w1, self.w1_a, self.w1_b), self._second(weight)
        one = one.reshape(*one.shape, *[1] * (two.ndim - one.ndim))
        return (strength * self.scale) * torch.kron(one, two).reshape(weight.shape)

    def _second(self, weight: Tensor) -> Tensor:
        if self.t2 is None:
            return self._whole(weight, self.w2, self.w2_a, self.w2_b)
        assert self.w2_a is not None, "the reader checks that a core has both factors"
        assert self.w2_b is not None, "the reader checks that a core has both factors"
        factors = (_like(part, weight) for part in (self.t2, self.w2_b, self.w2_a))
        return torch.einsum("ij...,jq,ip->pq...", *factors)

    @staticmethod
    def _whole(weight: Tensor, whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
        if whole is not None:
            return _like(whole, weight)
        assert a is not None, "the reader checks that there are both factors"
        assert b is not None, "the reader checks that there are both factors"
        return _like(a, weight) @ _like(b, weight).flatten(1)

    @staticmethod
    def _shape_of(
        whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None = None
    ) -> tuple[int, int]:
        if whole is not None:
            return whole.shape[0], prod(whole.shape[1:])
        assert a is not None, "the reader checks that there are both factors"
        assert b is not None, "the reader checks that there are both factors"
        if core is not None:
            return a.shape[1], b.shape[1] * prod(core.shape[2:])
        return a.shape[0], prod(b.shape[1:])


@dataclass(frozen=True, eq=False, kw_only=True)
class Generalized(Change):
    """GLoRA: W a1 a2 + b1 b2. Older versions of LyCORIS store the factors of each product in the opposite order."""

    name = "glora"
    a1: Tensor  # [in, r]; older [r, in]
    a2: Tensor  # [r, in]; older [in, r]
    b1: Tensor  # [out, r]; older [r, in]
    b2: Tensor  # [r, in]; older [out, r]

    @property
    def is_older(self) -> bool:
        """Whether the factors are in the order of older files."""
        return not self.a1.shape[1] == self.a2.shape[0] == self.b1.shape[1] == self.b2.shape[0]

    @property
    def sizes(self) -> Sizes:
        rows, columns = (self.b2, self.b1) if self.is_older else (self.b1, self.b2)
        return rows.shape[0], prod(columns.shape[1:])

    @property
    def rank(self) -> int:
        return self.b1.shape[0] if self.is_older else self.b2.shape[0]

    def of(self, weight: Tensor, strength: float) -> Tensor:
        a1, a2, b1, b2 = (_like(part, weight).flatten(1) for part in (self.a1, self.a2, self.b1, self.b2))
        if self.is_older:
            a1, a2, b1, b2 = a2, a1, b2, b1
        if weight.ndim > 2 and a1.shape[0] == weight.shape[1]:  # in a convolution, a1 mixes the channels
            product = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)
        else:
            product = (weight.flatten(1) @ a1 @ a2).reshape(weight.shape)
        return (strength * self.scale) * (product + (b1 @ b2).reshape(weight.shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class Orthogonal(Change):
    """OFT and BOFT: blocks of rows are rotated by R = (I + Q)(I - Q)^-1, Q = B - B^T.

    `limit` is the maximum norm of Q; 0 is no limit. At strength s, the rotation is I + s (R - I). ComfyUI then
    multiplies the change by s once more (`twice`), so that a strength of -0.5 has the effect of 0.25.
    """

    name = "oft"
    blocks: Tensor  # [n, b, b]; BOFT [m, n, b, b]
    limit: float = 0.0
    rescale: Tensor | None = None
    twice: bool = False

    @property
    def sizes(self) -> Sizes:
        return self.blocks.shape[-3] * self.blocks.shape[-1], None

    @property
    def rank(self) -> int:
        return self.blocks.shape[-1]

    def of(self, weight: Tensor, strength: float) -> Tensor:
        rotation = self._rotation(weight)
        identity = torch.eye(rotation.shape[-1], dtype=weight.dtype, device=weight.device)
        rotation = identity + strength * (rotation - identity)
        turned = self._butterfly(rotation, weight) if rotation.ndim == 4 else self._turned(rotation, weight)
        if self.rescale is not None and not (self.twice and rotation.ndim == 3):  # ComfyUI's OFT ignores `rescale`
            rescale = _like(self.rescale, weight).reshape(-1, *[1] * (weight.ndim - 1))
            turned = turned * (1 + strength * (rescale - 1) if not self.twice else rescale)
        return (turned - weight) * (strength if self.twice else 1.0)

    def _rotation(self, weight: Tensor) -> Tensor:
        blocks = _like(self.blocks, weight)
        q = blocks - blocks.mT
        norm = q.norm() + 1e-8
        if 0 < self.limit < norm:
            q = q * self.limit / norm
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        return (identity + q) @ torch.linalg.inv(identity - q)

    @staticmethod
    def _turned(rotation: Tensor, weight: Tensor) -> Tensor:
        parts = weight.reshape(*rotation.shape[:2], -1)
        return torch.einsum("knm,knc->kmc", rotation, parts).reshape(weight.shape)

    @staticmethod
    def _butterfly(rotation: Tensor, weight: Tensor) -> Tensor:
        """Apply the butterfly factors; factor i combines rows that are 2^i half blocks apart."""
        turned, half = weight.flatten(1), rotation.shape[-1] // 2
        for i, factor in enumerate(rotation):
            k = 2**i * half
            mixed = turned.unflatten(0, (-1, 2, k)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, rotation.shape[-1]))
            mixed = torch.einsum("bij,bjc->bic", factor, mixed).flatten(0, 1)
            turned = mixed.unflatten(0, (-1, k, 2)).transpose(1, 2).flatten(0, 2)
        return turned.reshape(weight.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaled(Change):
    """(IA)^3: the rows of W, or with `on_input` its columns, are multiplied by 1 + s * factor."""

    name = "ia3"
    factor: Tensor
    on_input: bool = False

    @property
    def sizes(self) -> Sizes:
        count = self.factor.numel()
        return (None, count) if self.on_input else (count, None)

    def of(self, weight: Tensor, strength: float) -> Tensor:
        shape = [1] * weight.ndim
        shape[1 if self.on_input else 0] = -1
        return strength * weight * _like(self.factor, weight).reshape(shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Full(Change):
    """A full difference of the weight (`.diff`, `.w_norm`, biases)."""

    name = "full"
    diff: Tensor

    @property
    def sizes(self) -> Sizes:
        return self.diff.shape[0], prod(self.diff.shape[1:])

    def of(self, weight: Tensor, strength: float) -> Tensor:
        return (strength * self.scale) * _like(self.diff, weight).reshape(weight.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Replacement(Change):
    """A tensor that replaces the weight, whatever the strength (`.set_weight`)."""

    name = "set"
    value: Tensor

    @property
    def sizes(self) -> Sizes:
        return self.value.shape[0], prod(self.value.shape[1:])

    def of(self, weight: Tensor, strength: float) -> Tensor:
        return _like(self.value, weight).reshape(weight.shape) - weight


DoraRule = Literal["trained", "comfyui", "peft"]


@dataclass(frozen=True, eq=False)
class Magnitude:
    """DoRA: the rows, or the columns, of the changed weight M are scaled to the norms m.

    The shape of m distinguishes them: [out, 1] or [out] for rows, [1, in] for columns. Rules, with s the strength:
        trained: W + s (m M / norm(M) - W), M = W + sigma delta (LyCORIS, OneTrainer at s = 1)
        comfyui: the same, but rows are divided by the norms of W (`comfy/weight_adapter/base.py`)
        peft: m M / rownorm(V + s sigma delta), M = W + s sigma delta, where V is the weight without any other patch
            (peft 0.21 `tuners/lora/dora.py`)
    """

    values: Tensor
    rule: DoraRule

    def on_rows(self, rows: int) -> bool:
        """Whether m has the norms of rows, for a weight with this number of rows."""
        return self.values.shape[0] == rows

    def changed(self, weight: Tensor, change: Tensor, strength: float, base: Tensor) -> Tensor:
        """The weight after the change.

        Args:
            weight: the weight, after the patches before this one.
            change: includes the strength for the rule "peft", else it is at strength 1.
            strength: the strength of the patch.
            base: the weight before all patches.
        """
        moved, rows = weight + change, self.on_rows(weight.shape[0])
        values = _like(self.values, weight)
        ones = [1] * (weight.ndim - 2)
        values = values.reshape(-1, 1, *ones) if rows else values.reshape(1, -1, *ones)
        if self.rule == "peft":
            return moved * (values / _norm(base + change, rows=True))
        measured = weight if rows and self.rule == "comfyui" else moved
        return weight + strength * (moved * (values / (_norm(measured, rows=rows) + EPSILON)) - weight)


def _norm(weight: Tensor, *, rows: bool) -> Tensor:
    """The norm of each row over its inputs, or of each input over the rows (and the kernel)."""
    dims = [dim for dim in range(weight.ndim) if dim != (0 if rows else 1)]
    return weight.square().sum(dim=dims, keepdim=True).sqrt()


def _like(part: Tensor, weight: Tensor) -> Tensor:
    return part.to(weight.device).to(weight.dtype)  # in this order a GPU gets the file's bytes, and converts them
