"""The products of attached LoRAs in the model's own forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmdit.models.lora import LoraProducts
from mmdit.runtime.rows import Added, Down, Rounding, Rows
from quant import low_rank
from quant.current import on_its_device


def gelu(output: Tensor, low: Tensor, up: Tensor, next_down: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """GELU in its tanh approximation of output [rows, out] + low [rows, r] times the transposed up [out, r].

    Large ones are computed by one kernel, in which the sum stays in float32, so that what the LoRA adds is not read and
    written once more. It also multiplies by the next down projection, [r, out].
    """
    if output.nbytes < low_rank.LARGE or not low_rank.by_kernels(low, up, up.shape[1]):
        low_rank.add_up(output, low, up)
        return F.gelu(output, approximate="tanh"), None
    can_go_on = next_down is not None and low_rank.by_kernels(low, next_down, len(next_down))
    return _by_kernel(output, low, up, next_down if can_go_on else None)


@on_its_device
def _by_kernel(output: Tensor, low: Tensor, up: Tensor, next_down: Tensor | None) -> tuple[Tensor, Tensor | None]:
    from mmdit.runtime import lora_kernels

    down = None if next_down is None else Down(next_down.unsqueeze(0))
    found = lora_kernels.gelu(output, Rows(1, 0, len(output)), Rounding(), Added(low, up.unsqueeze(0)), down)
    assert found.image is not None, "the rows are those of an image"
    return found.image.data, found.low


PRODUCTS = LoraProducts(low_rank.low, low_rank.add_up, low_rank.up_and_bias, gelu)
