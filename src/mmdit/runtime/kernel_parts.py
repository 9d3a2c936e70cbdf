"""What several Triton kernels of the fast path share."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from mmdit.runtime.rows import Blank, Rounding

KINDS = {"none": 0, "token": 1, "static": 2}


def targets(blank: Blank, rounding: Rounding, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where values and scales go, and the static scales of text and image."""
    scales = unused if blank.scales is None else blank.scales
    if rounding.kind != "static":
        return blank.data, scales, unused, unused
    either = rounding.image if rounding.image is not None else rounding.text
    assert either is not None, "static rounding has the scale of its stream"
    return blank.data, scales, rounding.text if rounding.text is not None else either, either


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def gelu_of(x):
    """x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the same as x (1 + tanh(u)) / 2."""
    # The constants are -2 sqrt(2 / pi) / ln 2, and that times 0.044715.
    power = x * (-2.302208198144325 - 0.1029432395800235 * x * x)
    factor = tl.rsqrt(1.0 + tl.exp2(power))  # to multiply twice by it takes half of a division's instructions
    return x * factor * factor
