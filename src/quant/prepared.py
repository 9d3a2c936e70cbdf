"""Products by a GPU's own float8 matmul in eager mode, with little work for the host.

On a fast GPU the host may be the slower of the two, and `quant.matmul.linear` checks the weight, its recipe and its
device in every call. Here they are checked once for each weight, and a call checks its input alone. All other cases and
all errors are left to `linear`. Where both give a result, the same operations compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.emulation import HALF, HAS_TRITON
from quant.formats import DTYPES
from quant.matmul import SMALL, backend_of, quantize_activation
from quant.recipe import Recipe
from quant.tensor import Float8Tensor

_PLAIN = (Tensor, nn.Parameter)  # no tensor subclass


@dataclass(slots=True, eq=False)
class Native:
    """A weight as `torch._scaled_mm` takes it: views of its parts, and what no input changes."""

    weight: Tensor  # [in, out]
    factor: Tensor  # the scale, [1, out] or ()
    dtype: torch.dtype  # of inputs
    gpu: int
    width: int  # in
    outs: int
    bias_shape: torch.Size
    quantize_rows: Callable[..., tuple[Tensor, Tensor]]  # `kernels.rows_of`


@dataclass(slots=True, eq=False)
class Prepared:
    """What is known of the parts of a weight; the weight keeps it until a part is replaced or moved."""

    qdata: Tensor
    scale: Tensor
    recipe: Recipe
    places: tuple[int, int]  # addresses of qdata and scale
    native: Native | None  # None leaves products to `linear`

    def is_of(self, qdata: Tensor, scale: Tensor, recipe: Recipe) -> bool:
        """Whether these are the parts, at the addresses that they had."""
        same = self.qdata is qdata and self.scale is scale and self.recipe is recipe
        return same and self.places == (qdata.data_ptr(), scale.data_ptr())

    def __deepcopy__(self, memo: object) -> None:
        """Nothing: a copy of the weight has parts of its own."""


def product(x: Tensor, weight: Float8Tensor, bias: Tensor | None) -> Tensor | None:
    """The result of `quant.matmul.linear`, [..., out]; None where the call is left to it.

    Args:
        x: The input, [..., in].
        weight: The weight, [out, in].
        bias: The bias, [out].
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or not x.is_cuda:
        return None
    kept: Prepared | None = weight.prepared
    qdata, scale, recipe = weight.qdata, weight.scale, weight.recipe
    if type(qdata) not in _PLAIN:
        return None
    if kept is None or not kept.is_of(qdata, scale, recipe):
        kept = weight.prepared = _prepared(weight, qdata, scale, recipe)
    if (own := kept.native) is None or not _takes(own, x, bias):
        return None
    x = x.contiguous()
    shape, rows = x.shape, x.numel() // own.width
    if recipe.activation == "token":
        codes, x_scale = own.quantize_rows(x, rows, own.width, own.width, recipe.activation_format)
    else:
        if recipe.activation == "static" and weight.input_scale is None:
            return None
        codes, x_scale = quantize_activation(x.view(-1, own.width), recipe, weight.input_scale, as_bytes=False)
    fast = recipe.fast_accum and rows * own.outs >= SMALL
    y = torch._scaled_mm(codes, own.weight, x_scale, own.factor, bias, out_dtype=own.dtype, use_fast_accum=fast)
    return y if len(shape) == 2 else y.view(shape[0], shape[1], own.outs)


def _takes(own: Native, x: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` would multiply this input by the GPU's own matmul, as it is."""
    shape, dtype = x.shape, own.dtype
    if x.dtype != dtype or len(shape) not in (2, 3) or shape[-1] != own.width:
        return False
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype != dtype or bias.shape != own.bias_shape):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if not x.numel() or torch.is_autocast_enabled("cuda"):
        return False
    return x.get_device() == own.gpu == torch.cuda.current_device()


def _prepared(weight: Float8Tensor, qdata: Tensor, scale: Tensor, recipe: Recipe) -> Prepared:
    with torch._C.DisableTorchFunctionSubclass():  # else each attribute of a tensor is a call of Python
        dtype = weight.dtype
    native = _native(qdata, scale, recipe, dtype) if _is_native(qdata, scale, recipe, dtype) else None
    if native is not None and type(native.weight) is not Tensor:  # made by a mode of torch, such as FakeTensorMode
        native = None
    return Prepared(qdata, scale, recipe, (qdata.data_ptr(), scale.data_ptr()), native)


def _is_native(qdata: Tensor, scale: Tensor, recipe: Recipe, dtype: torch.dtype) -> bool:
    """Whether products are by the GPU's own matmul, which takes views of these parts."""
    if qdata.ndim != 2 or not qdata.is_cuda or not HAS_TRITON or dtype not in HALF:
        return False
    out, width = qdata.shape
    if backend_of(recipe, qdata.device, dtype, (out, width))[0] != "native":
        return False
    per_row = recipe.granularity == "row"
    if per_row != (recipe.activation == "token") or scale.shape != ((out, 1) if per_row else ()):
        return False
    whole = qdata.is_contiguous() and scale.is_contiguous()
    return whole and qdata.dtype == DTYPES[recipe.format] and scale.device == qdata.device


def _native(qdata: Tensor, scale: Tensor, recipe: Recipe, dtype: torch.dtype) -> Native:
    from quant import kernels  # only where there is Triton

    out, width = qdata.shape
    return Native(
        weight=qdata.t(),
        factor=scale.t() if scale.ndim else scale,
        dtype=dtype,
        gpu=qdata.get_device(),
        width=width,
        outs=out,
        bias_shape=qdata.shape[:1],
        quantize_rows=kernels.rows_of,
    )
