"""Tokens of both streams as rows of one matrix, and what the kernels of the fast path make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EPS = 1e-6  # of LayerNorm and of the RMS norms of queries and keys


class Rows(NamedTuple):
    """Layout of the rows of a matrix: the text tokens of all samples, then the image tokens of all samples."""

    samples: int
    text: int  # tokens of a sample; 0 where only the image's rows are meant
    image: int

    @property
    def split(self) -> int:
        """Number of text rows."""
        return self.samples * self.text

    @property
    def total(self) -> int:
        """Number of rows of both streams."""
        return self.samples * (self.text + self.image)

    @property
    def divisors(self) -> tuple[int, int, int]:
        """`split`, and text and image tokens of a sample, at least 1: kernels divide by them to find a row's sample."""
        return self.split, max(self.text, 1), max(self.image, 1)

    def as_one_sample(self) -> Rows:
        """The same rows, where it does not matter of which sample they are."""
        return Rows(1, self.samples * self.text, self.samples * self.image)

    def only_image(self) -> Rows:
        """The rows of the image alone, as a matrix of their own."""
        return self._replace(text=0)

    def only_text(self) -> Rows:
        """The rows of the text alone, as a matrix of their own."""
        return self._replace(image=0)


class Columns(NamedTuple):
    """Where a vector of each stream stands in the modulation table, counted in vectors."""

    text: int
    image: int


class Rounding(NamedTuple):
    """The rounding of an activation before the products that read it.

    `none` keeps 16 bits. `token` gives E4M3 codes and a scale per row. `static` gives E4M3 codes under the scale of
    each stream, float32 (). Codes are float8, or their values in float16 where products are emulated in 16 bits.
    """

    kind: Literal["none", "token", "static"] = "none"
    text: Tensor | None = None
    image: Tensor | None = None
    codes: torch.dtype = torch.float8_e4m3fn  # or float16


class Part(NamedTuple):
    """The rows of one stream, [rows, k]: values, or codes (see `Rounding`) and their scale, float32 [rows, 1] or ()."""

    data: Tensor
    scale: Tensor | None = None


class Activation(NamedTuple):
    """What the products of both streams read; a stream that has no rows is None."""

    text: Part | None
    image: Part | None
    low: Tensor | None = None  # [rows, r]: `plain_kernels.low` of it, where the kernel that made it has computed that

    @property
    def parts(self) -> tuple[Part | None, Part | None]:
        """The rows of text and image."""
        return self.text, self.image


class Added(NamedTuple):
    """What LoRAs add to the rows of a product: low times the transposed `up` of the row's stream."""

    low: Tensor  # [rows, r]: the products of activations and down projections
    up: Tensor  # [streams, out, r]: of text and image, or of the only stream that has rows


class Result(NamedTuple):
    """The products of both streams, and what the kernel that reads them is left to add to them."""

    value: Tensor  # [rows, out]
    added: Added | None = None


class Update(NamedTuple):
    """What a sublayer adds to the residual stream: gate x value."""

    value: Tensor  # [rows, d]
    gate: Columns

    def text(self, split: int) -> Update:
        """The update of the text's rows, the first `split`."""
        return Update(self.value[:split], self.gate)

    def image(self, split: int) -> Update:
        """The update of the image's rows, those after the first `split`."""
        return Update(self.value[split:], self.gate)


class Output(NamedTuple):
    """One modulation of the normed residual stream, and what it is rounded to."""

    shift: Columns
    scale: Columns
    rounding: Rounding
    wide: Tensor | None = None  # [rows, d] float32: gets the values before they are rounded, to check the rounding


class Down(NamedTuple):
    """The down projections of the LoRAs of text and image, or of the only stream that has rows."""

    exact: Tensor  # [streams, r, in], in the model's dtype
    halves: Tensor | None = None  # for codes: each row times a power of two that brings it below 1, in float16
    factor: Tensor | None = None  # float32 [streams, r], by which products with `halves` are multiplied

    @classmethod
    def of(cls, exact: Tensor, codes: bool) -> Down:
        """For activations that are values, or codes."""
        if not codes:
            return cls(exact)
        largest = exact.float().abs().amax(-1, keepdim=True)
        factor = torch.exp2(torch.frexp(largest).exponent.float())
        return cls(exact, (exact.float() / factor).half(), factor.squeeze(-1))


class Blank(NamedTuple):
    """Memory for an activation; the scales of the image start at a multiple of 16 bytes, as cuBLAS wants it."""

    data: Tensor  # [rows, k]
    scales: Tensor | None  # float32
    gap: int  # between the scales of text and image

    @classmethod
    def of(cls, rows: Rows, width: int, rounding: Rounding, like: Tensor, dtype: torch.dtype) -> Blank:
        """For these rows, each of `width` values of `dtype` where they are not rounded, on the device of `like`."""
        if rounding.kind == "none":
            return cls(torch.empty((rows.total, width), dtype=dtype, device=like.device), None, 0)
        data = torch.empty((rows.total, width), dtype=rounding.codes, device=like.device)
        if rounding.kind == "static":
            return cls(data, None, 0)
        gap = -rows.split % 4
        return cls(data, torch.empty(rows.total + gap, dtype=torch.float32, device=like.device), gap)

    def activation(self, rows: Rows, rounding: Rounding) -> Activation:
        """The parts of each stream."""
        split = rows.split
        text_scale, image_scale = rounding.text, rounding.image
        if self.scales is not None:
            text_scale = self.scales[:split].unsqueeze(1)
            image_scale = self.scales[split + self.gap :].unsqueeze(1)
        return Activation(
            Part(self.data[:split], text_scale) if split else None,
            Part(self.data[split:], image_scale) if split < rows.total else None,
        )


AttentionInputs = tuple[Tensor, Tensor, Tensor]  # queries, keys and values, each [samples, tokens, heads, head_dim]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same layout out
