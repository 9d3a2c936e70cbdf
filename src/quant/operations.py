"""The operations of a `Float8Tensor`: products, and operations that move, copy, cut and join values.

`F.linear` and matrix products arrive through `__torch_function__`, the others as operations of aten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.dispatch import FUNCTIONS, implements
from quant.formats import DTYPES
from quant.matmul import linear
from quant.prepared import product
from quant.scaling import has_float8
from quant.tensor import LOGICAL, NOT_TRAINED, Float8Tensor

aten = torch.ops.aten

# Products: `F.linear`, and matrix products through it. Arguments are named as torch names them.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if type(weight) is Float8Tensor and (found := product(input, weight, bias)) is not None:
        return found
    if isinstance(bias, Float8Tensor):
        raise NotImplementedError("linear with a Float8Tensor as bias; use bias.dequantize()")
    if isinstance(input, Float8Tensor):
        input = input.dequantize()
    if not isinstance(weight, Float8Tensor):
        return torch.nn.functional.linear(input, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():  # else each attribute of a tensor comes here as a call of Python
        dims, dtype = weight.ndim, weight.dtype
    if dims != 2:
        raise ValueError(f"a float8 weight to multiply with is a matrix, got shape {list(weight.shape)}")
    return linear(input, weight.qdata, weight.scale, weight.input_scale, bias, weight.recipe, dtype)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    """input @ other as a Linear whose weight is other.T; where input is the Float8Tensor, (other.T @ input.T).T."""
    if any(isinstance(factor, Float8Tensor) and factor.ndim > 2 for factor in (input, other)):
        return _matmul_of_stacks(input, other)
    if isinstance(other, Float8Tensor):
        if other.ndim != 2:
            raise NotImplementedError(f"matmul with a Float8Tensor of shape {list(other.shape)}; give a matrix")
        return _linear(input, other.t())
    if input.ndim != 2 or not other.ndim:
        raise NotImplementedError(
            f"matmul of a Float8Tensor of shape {list(input.shape)} with shape {list(other.shape)}; give a matrix"
        )
    return _linear(other, input) if other.ndim == 1 else _linear(other.mT, input).mT


def _matmul_of_stacks(input: Tensor, other: Tensor) -> Tensor:
    """Products of the matrices of stacks, one by one; stacks broadcast as in torch.matmul."""
    dims = max(input.ndim, other.ndim)
    lengths = {len(factor) for factor in (input, other) if factor.ndim == dims}
    length = max(lengths) if 0 not in lengths else 0
    if lengths - {1, length}:
        raise ValueError(f"matmul of shapes {list(input.shape)} and {list(other.shape)}: the stacks do not broadcast")
    if not length:
        return torch.matmul(_dequantized(input), _dequantized(other))
    products = []
    for i in range(length):
        one, two = (_of_stack(factor, i) if factor.ndim == dims else factor for factor in (input, other))
        products.append(_matmul(one, two) if any(isinstance(x, Float8Tensor) for x in (one, two)) else one @ two)
    return torch.stack(products)


def _of_stack(stack: Tensor, i: int) -> Tensor:
    return stack[0 if len(stack) == 1 else i]


def _dequantized(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, Float8Tensor) else tensor


def _mm(input: Tensor, mat2: Tensor) -> Tensor:
    if input.ndim != 2 or mat2.ndim != 2:
        raise ValueError(f"mm of shapes {list(input.shape)} and {list(mat2.shape)}; give two matrices")
    return _matmul(input, mat2)


def _mv(input: Tensor, vec: Tensor) -> Tensor:
    if input.ndim != 2 or vec.ndim != 1:
        raise ValueError(f"mv of shapes {list(input.shape)} and {list(vec.shape)}; give a matrix and a vector")
    return _matmul(input, vec)


def _bmm(input: Tensor, mat2: Tensor) -> Tensor:
    if input.ndim != 3 or mat2.ndim != 3 or len(input) != len(mat2):
        raise ValueError(f"bmm of shapes {list(input.shape)} and {list(mat2.shape)}; give two stacks of equal length")
    return _matmul(input, mat2)


def _rmatmul(self: Tensor, other: Tensor) -> Tensor:
    return _matmul(other, self)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: int | float = 1, alpha: int | float = 1) -> Tensor:
    if beta == alpha == 1 and input.ndim == 1 and isinstance(mat2, Float8Tensor):
        return _linear(mat1, mat2.t(), input)
    product = alpha * _matmul(mat1, mat2)
    return product + beta * input if beta else product


def _set_data(self: Tensor, data: Tensor) -> None:
    """`tensor.data = other`, also for qdata and scales, of which torch knows nothing."""
    if not (isinstance(self, Float8Tensor) and isinstance(data, Float8Tensor)):
        raise NotImplementedError("data of a Float8Tensor can only be set to another Float8Tensor")
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(self, data)  # type: ignore[attr-defined]
    self.qdata, self.scale, self.input_scale, self.recipe = data.qdata, data.scale, data.input_scale, data.recipe
    self.snr, self._shares_scale, self._is_part = data.snr, data._shares_scale, data._is_part
    self.prepared = None  # it has views of the former parts, and the former dtype


def _set_requires_grad(self: Tensor, value: bool) -> None:
    """`tensor.requires_grad = value`; see `Float8Tensor.requires_grad_`."""
    if value:
        raise RuntimeError(NOT_TRAINED)


FUNCTIONS |= {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _mm,
    Tensor.matmul: _matmul,
    Tensor.mm: _mm,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    torch.mv: _mv,
    Tensor.mv: _mv,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
}

# Operations that move, copy, cut and join.


@implements(aten.clone.default)
def _clone(func: Any, x: Float8Tensor, **kwargs: Any) -> Float8Tensor:
    return x._map(lambda part: func(part, **kwargs))


@implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, x: Float8Tensor) -> Float8Tensor:
    same = x._view(func(x.qdata), func(x.scale))
    same.snr = x.snr
    return same


@implements(aten._to_copy.default)
def _to_copy(
    func: Any, x: Float8Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
) -> Float8Tensor:
    """A dtype changes the logical dtype and no qdata; a device moves qdata and scales."""
    kwargs.pop("memory_format", None)

    def moved(part: Tensor) -> Tensor:
        if part.dtype == torch.float32:
            return func(part, device=device, **kwargs)
        codes = func(part.view(torch.uint8), device=device, **kwargs)
        return codes.view(DTYPES[x.recipe.format]) if has_float8(codes.device) else codes

    return x._map(moved, dtype)


@implements(aten.t.default, aten.transpose.int, aten.permute.default)
def _transposed(func: Any, x: Float8Tensor, *dims: Any) -> Float8Tensor:
    return x._view(func(x.qdata, *dims), func(x.scale, *dims) if x.scale.ndim else x.scale)


@implements(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, x: Float8Tensor, size: Sequence[int]) -> Float8Tensor:
    """Any shape under one scale; under one scale per row, shapes that do not join values of different scales."""
    qdata = func(x.qdata, size)
    if not _per_row(x):
        return x._view(qdata, x.scale)
    try:
        each = x.scale.expand(x.shape).view(size)  # has stride 0 where the scale is the same, and view joins no others
    except RuntimeError as error:
        raise NotImplementedError(
            f"{func} from {list(x.shape)} to {list(size)}: a scale per row needs rows to stay whole; dequantize() first"
        ) from error
    kept = [slice(None) if step else slice(1) for step in each.stride()]
    return x._view(qdata, each[tuple(kept)])


def _per_row(x: Float8Tensor) -> bool:
    """Whether the scale has the dimensions of the values; a single value has none of either."""
    return x.recipe.granularity == "row"


@implements(aten.unsqueeze.default)
def _unsqueeze(func: Any, x: Float8Tensor, dim: int) -> Float8Tensor:
    return x._view(func(x.qdata, dim), func(x.scale, dim) if _per_row(x) else x.scale)


@implements(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(func: object, x: Float8Tensor, dims: int | Sequence[int] | None = None) -> Float8Tensor:
    wanted = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = [dim for dim in wanted if x.ndim and x.shape[dim] == 1]  # torch lets squeeze(0) of a scalar pass
    scale = aten.squeeze.dims(x.scale, ones) if x.scale.ndim else x.scale
    return x._view(aten.squeeze.dims(x.qdata, ones), scale)


@implements(aten.expand.default)
def _expand(func: Any, x: Float8Tensor, size: Sequence[int], **kwargs: Any) -> Float8Tensor:
    qdata = func(x.qdata, size, **kwargs)
    if not _per_row(x):
        return x._view(qdata, x.scale)
    new = qdata.ndim - x.ndim
    own, values = [1] * new + list(x.scale.shape), [1] * new + list(x.shape)
    # New rows get scales of their own; where all values along a dimension have one scale, it stays one.
    rows = [
        length if one == many else one
        for length, one, many in zip(qdata.shape[:-1], own[:-1], values[:-1], strict=True)
    ]
    return x._view(qdata, x.scale.reshape(own).expand(*rows, *own[-1:]))


@implements(aten.as_strided.default)
def _as_strided(
    func: object, x: Float8Tensor, size: Sequence[int], stride: Sequence[int], offset: object = None
) -> Tensor:
    """The tensor itself, as FSDP and compiled code ask for it; other strides would mix rows."""
    if (tuple(size), tuple(stride), offset or 0) != (tuple(x.shape), x.stride(), 0):
        raise NotImplementedError(f"{func} of a Float8Tensor to another shape; use view, transpose or slices")
    return _alias(aten.alias.default, x)


@implements(aten.slice.Tensor, aten.select.int)
def _cut(func: Any, x: Float8Tensor, dim: int = 0, *where: Any, **kwargs: Any) -> Float8Tensor:
    scale = x.scale
    if scale.ndim and scale.shape[dim] == x.shape[dim]:
        scale = func(scale, dim, *where, **kwargs)
    elif scale.ndim and func is aten.select.int:
        scale = scale.select(dim, 0)
    return x._view(func(x.qdata, dim, *where, **kwargs), scale)


@implements(aten.unbind.int)
def _unbind(func: object, x: Float8Tensor, dim: int = 0) -> list[Float8Tensor]:
    return [_cut(aten.select.int, x, dim, i) for i in range(x.shape[dim])]


@implements(aten.index_select.default)
def _index_select(func: Any, x: Float8Tensor, dim: int, index: Tensor) -> Float8Tensor:
    along = x.scale.ndim and x.scale.shape[dim] == x.shape[dim]
    return _taken(x, lambda part: func(part, dim, index), lambda scale: func(scale, dim, index) if along else scale)


@implements(aten.index.Tensor)
def _index(func: Any, x: Float8Tensor, indices: Sequence[Tensor | None]) -> Float8Tensor:
    """x[indices], a copy. Where all values along an indexed dimension have one scale, that scale is taken."""
    places: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        places += index.nonzero(as_tuple=True) if masks else [index]  # type: ignore[union-attr]
    dims = [dim for dim, index in enumerate(places) if index is not None]
    own = {dim for dim in dims if x.scale.ndim and x.scale.shape[dim] == x.shape[dim]}
    rank = max((index.ndim for index in places if index is not None), default=0)
    one = torch.zeros([1] * rank, dtype=torch.long, device=x.device)
    ways = [index if dim in own or index is None else torch.zeros_like(index) for dim, index in enumerate(places)]
    ways = ways if own else [None if index is None else one for index in places]
    return _taken(x, lambda part: func(part, places), lambda scale: func(scale, ways))


def _taken(x: Float8Tensor, take: Callable[[Tensor], Tensor], scale: Callable[[Tensor], Tensor]) -> Float8Tensor:
    """A copy of some values: `take` of the qdata, `scale` of the scales where there are several."""
    codes = take(x.qdata.view(torch.uint8)).view(x.qdata.dtype)
    input_scale = None if x.input_scale is None else x.input_scale.clone()
    return x._replace(qdata=codes, scale=(scale(x.scale) if x.scale.ndim else x.scale).clone(), input_scale=input_scale)


@implements(aten.embedding.default)
def _embedding(func: object, weight: Tensor, indices: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The dequantized rows, as a Linear gives plain values."""
    if not isinstance(weight, Float8Tensor) or weight.ndim != 2:
        raise NotImplementedError("embedding with a Float8Tensor takes a float8 matrix and plain indices")
    return _index(aten.index.Tensor, weight, [indices.long()]).dequantize()


@implements(aten.empty_like.default)
def _empty_like(
    func: Any, x: Float8Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
) -> Tensor:
    """Memory for codes and scales, not filled; a plain tensor for a dtype that is no logical one."""
    if dtype is not None and dtype not in LOGICAL:
        return torch.empty(x.shape, dtype=dtype, device=x.device if device is None else device)

    def empty(part: Tensor) -> Tensor:
        if part.dtype == torch.float32:
            return func(part, device=device, **kwargs)
        codes = func(part.view(torch.uint8), device=device, **kwargs)
        return codes.view(DTYPES[x.recipe.format]) if has_float8(codes.device) else codes

    new = x._map(empty, dtype)
    new.snr = None
    return new


@implements(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, x: Float8Tensor, sizes: Any, dim: int = 0) -> list[Float8Tensor]:
    pieces = func(x.qdata, sizes, dim)
    whole = not x.scale.ndim or x.scale.shape[dim] != x.shape[dim]
    scales = [x.scale] * len(pieces) if whole else func(x.scale, sizes, dim)
    return [x._view(qdata, scale) for qdata, scale in zip(pieces, scales, strict=True)]


@implements(aten.stack.default)
def _stack(func: object, tensors: Sequence[Tensor], dim: int = 0) -> Float8Tensor:
    return _cat(aten.cat.default, [tensor.unsqueeze(dim) for tensor in tensors], dim)


@implements(aten.cat.default)
def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Float8Tensor:
    """Join qdata as they are; rows keep their scales, and tensors with different single scales get one per row."""
    parts = [tensor for tensor in tensors if isinstance(tensor, Float8Tensor)]
    first, *others = parts
    if len(parts) < len(tensors) or not all(_joins(first, other) for other in others):
        raise NotImplementedError("cat of a Float8Tensor with other tensors, recipes, dtypes or input scales")
    if any(part.scale.ndim and part.scale.shape[-1] != 1 for part in parts):
        raise NotImplementedError("cat of transposed Float8Tensors; transpose afterwards")
    qdata, within_rows = func([part.qdata for part in parts], dim), dim % first.ndim == first.ndim - 1
    input_scale = None if first.input_scale is None else first.input_scale.clone()
    if (within_rows or not first.scale.ndim) and all(_same(first.scale, other.scale) for other in others):
        return first._replace(qdata=qdata, scale=first.scale.clone(), input_scale=input_scale)
    if within_rows:
        raise NotImplementedError("cat of Float8Tensors in rows that have different scales; dequantize() first")
    scale = torch.cat([part.scale.expand(*part.shape[:-1], 1) for part in parts], dim)
    recipe = replace(first.recipe, granularity="row")
    return first._replace(qdata=qdata, scale=scale, input_scale=input_scale, recipe=recipe)


def _joins(a: Float8Tensor, b: Float8Tensor) -> bool:
    """Whether both can be in one tensor, but for their scales."""
    kinds = {(replace(part.recipe, granularity="row"), part.dtype, part.input_scale is None) for part in (a, b)}
    return len(kinds) == 1 and _same(a.input_scale, b.input_scale)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


@implements(aten.copy_.default)
def _copy(func: Any, into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """From a Float8Tensor of the same kind, copy its qdata; from any other tensor, quantize its values."""
    if not isinstance(into, Float8Tensor):
        assert isinstance(source, Float8Tensor)
        wide = torch.promote_types(into.dtype, torch.float32) if into.is_floating_point() else torch.float32
        return func(into, source.dequantize(wide), non_blocking)
    if into._shares_scale:
        raise NotImplementedError(
            "copy_ into a part of a Float8Tensor whose scale is that of other parts too; quantize the whole again"
        )
    source = _like(into, source)
    if into._is_part and source.input_scale is not None and not _same(into.input_scale, source.input_scale):
        raise NotImplementedError(
            "copy_ of another input scale into a part of a Float8Tensor: the input scale is that of the whole layer"
        )
    func(into.qdata.view(torch.uint8), source.qdata.view(torch.uint8), non_blocking)
    func(into.scale, source.scale, non_blocking)
    if source.input_scale is not None:
        if into.input_scale is None:
            into.input_scale = torch.empty_like(source.input_scale, device=into.device)
        func(into.input_scale, source.input_scale, non_blocking)
    into.snr = source.snr
    return into


def _like(into: Float8Tensor, source: Tensor) -> Float8Tensor:
    """The source as a Float8Tensor whose qdata and scales have the shapes of those of `into`."""
    if isinstance(source, Float8Tensor):
        alike = (source.shape, source.scale.shape, source.recipe.format)
        if alike == (into.shape, into.scale.shape, into.recipe.format):
            return source
        source = source.dequantize(into.dtype)
    values = source.to(into.device, into.dtype).expand(into.shape)
    quantized = Float8Tensor.quantize(values, recipe=into.recipe)
    if quantized.scale.shape != into.scale.shape:
        raise NotImplementedError("copy_ into a transposed Float8Tensor; copy into it before it is transposed")
    return quantized


@implements(aten.equal.default)
def _equal(func: object, a: Tensor, b: Tensor) -> bool:
    """Whether qdata, scales, recipe and logical dtype are the same."""
    if not (isinstance(a, Float8Tensor) and isinstance(b, Float8Tensor)):
        return False
    if (a.recipe, a.dtype, a.shape, len(a._parts)) != (b.recipe, b.dtype, b.shape, len(b._parts)):
        return False
    same_codes = torch.equal(a.qdata.view(torch.uint8), b.qdata.view(torch.uint8))
    return same_codes and all(torch.equal(*pair) for pair in zip(a._parts[1:], b._parts[1:], strict=True))
