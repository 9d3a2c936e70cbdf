"""`Float8Tensor`: float8 codes and their scale that stand in for a Linear's weight.

The tensor shows shape and dtype of the weight that it replaces (its logical dtype), and model code does not know of it.
`F.linear` and matrix products find it through `__torch_function__`, everything that moves or cuts tensors through the
table of aten operations below. An operation that is in neither raises and names itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from quant.matmul import linear
from quant.recipe import Format, Granularity, Recipe
from quant.scaling import DTYPES, from_codes, has_float8, scale_of, to_codes

aten = torch.ops.aten


class Float8Tensor(Tensor):
    """A matrix (or stack of matrices) as float8 codes and scale: value = qdata * scale.

    Args:
        qdata: codes, float8 of the recipe's format, or uint8 on devices that have no float8; [..., out, in].
        scale: float32, () for one scale, or [..., out, 1] for one per row.
        input_scale: float32 (), the scale of activations; None where they get one in every call, or none.
        recipe: how it is stored and multiplied.
        dtype: what it stands for: the dtype of `dequantize()`.
    """

    qdata: Tensor
    scale: Tensor
    input_scale: Tensor | None
    recipe: Recipe

    @staticmethod
    def __new__(
        cls, qdata: Tensor, scale: Tensor, input_scale: Tensor | None, recipe: Recipe, dtype: torch.dtype
    ) -> Float8Tensor:
        return Tensor._make_wrapper_subclass(
            cls, qdata.shape, strides=qdata.stride(), dtype=dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self, qdata: Tensor, scale: Tensor, input_scale: Tensor | None, recipe: Recipe, dtype: torch.dtype
    ) -> None:
        self.qdata, self.scale, self.input_scale, self.recipe = qdata, scale, input_scale, recipe

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        format: Format = "e4m3",
        granularity: Granularity = "row",
        *,
        recipe: Recipe | None = None,
        input_scale: Tensor | None = None,
    ) -> Self:
        """The nearest codes under the smallest scale that reaches the largest value.

        Args:
            tensor: [..., out, in], finite.
            format, granularity: of the codes and of the scale.
            recipe: instead of these two.
            input_scale: for recipes with static activations, float32 ().

        Raises:
            ValueError: values that are not finite, how many; or a scalar.
        """
        recipe = recipe or Recipe(format, granularity, activation="none")
        if not tensor.ndim:
            raise ValueError("a tensor to quantize needs at least one dimension, got a scalar")
        tensor = tensor.detach()
        if bad := int((~tensor.isfinite()).sum()):
            raise ValueError(f"{bad} of {tensor.numel()} values are not finite; float8 keeps finite weights only")
        scale = scale_of(_amax(tensor, recipe.granularity), recipe.format)
        qdata = to_codes(tensor, scale, recipe.format, as_bytes=not has_float8(tensor.device))
        return cls(qdata, scale, input_scale, recipe, tensor.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """qdata * scale, multiplied in float32 (float64 for float64) and rounded once; None is the logical dtype."""
        dtype = dtype or self.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return (from_codes(self.qdata, self.recipe.format, wide) * self.scale.to(wide)).to(dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        recipe = self.recipe
        static = "" if self.input_scale is None else ", static input scale"
        return (
            f"Float8Tensor({list(self.shape)}, {recipe.format}, scale per {recipe.granularity}{static}, "
            f"activation={recipe.activation!r}, dtype={self.dtype}, device='{self.device}')"
        )

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Of codes and scales."""
        return sum(part.nbytes for part in self._parts)

    @property
    def _parts(self) -> list[Tensor]:
        return [part for part in (self.qdata, self.scale, self.input_scale) if part is not None]

    def share_memory_(self) -> Self:
        """Move codes and scales to memory that processes share."""
        for part in self._parts:
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether all of it is in shared memory."""
        return all(part.is_shared() for part in self._parts)

    def pin_memory(self, device: Any = None) -> Float8Tensor:
        """A copy in page-locked memory, from where copies to a GPU are fast."""
        return self._replace(lambda part: part.pin_memory())

    def is_pinned(self, device: Any = None) -> bool:
        """Whether all of it is in page-locked memory."""
        return all(part.is_pinned() for part in self._parts)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Recipe, torch.dtype]]:
        names = ["qdata", "scale"] + ([] if self.input_scale is None else ["input_scale"])
        return names, (self.recipe, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: Mapping[str, Tensor], context: tuple[Recipe, torch.dtype], size: object, stride: object
    ) -> Float8Tensor:
        recipe, dtype = context
        return cls(parts["qdata"], parts["scale"], parts.get("input_scale"), recipe, dtype)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on beside shapes and dtypes of the parts."""
        return f"{self.recipe!r} {self.dtype} {self.input_scale is None}"

    def _replace(
        self,
        change: Callable[[Tensor], Tensor] | None = None,
        *,
        qdata: Tensor | None = None,
        scale: Tensor | None = None,
        recipe: Recipe | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float8Tensor:
        """A new tensor with `change` applied to every part, or with these in place of its own."""
        new_qdata = self.qdata if qdata is None else qdata
        new_scale = self.scale if scale is None else scale
        input_scale = self.input_scale
        if change is not None:
            new_qdata, new_scale = change(new_qdata), change(new_scale)
            input_scale = None if input_scale is None else change(input_scale)
        return Float8Tensor(new_qdata, new_scale, input_scale, recipe or self.recipe, dtype or self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _PRODUCTS:
            return _PRODUCTS[func](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _OPERATIONS:
            raise NotImplementedError(
                f"{func} is not defined for Float8Tensor; compute it on tensor.dequantize(), or quantize its result"
            )
        return _OPERATIONS[func](func, *args, **(kwargs or {}))


def _amax(tensor: Tensor, granularity: Granularity) -> Tensor:
    if not tensor.numel():
        shape = () if granularity == "tensor" else (*tensor.shape[:-1], 1)
        return tensor.new_zeros(shape)
    return tensor.abs().amax() if granularity == "tensor" else tensor.abs().amax(dim=-1, keepdim=True)


# Products: `F.linear` and what is written with its transpose.


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(x, Float8Tensor):
        x = x.dequantize()
    if not isinstance(weight, Float8Tensor):
        return torch.nn.functional.linear(x, weight, bias)
    if weight.ndim != 2:
        raise ValueError(f"a float8 weight to multiply with is a matrix, got shape {list(weight.shape)}")
    return linear(x, weight.qdata, weight.scale, weight.input_scale, bias, weight.recipe, weight.dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b is a linear layer with weight b transposed; with a float8 a, the transpose of b' @ a'."""
    if isinstance(b, Float8Tensor):
        return _linear(a, b.t())
    if b.ndim != 2:
        raise NotImplementedError(f"a float8 matrix times a tensor of shape {list(b.shape)}; give a matrix")
    return _linear(b.t(), a).t()


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * _matmul(a, b)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda b, a: _matmul(a, b),
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
}

# Operations that move, copy and cut.

_OPERATIONS: dict[Any, Callable[..., Any]] = {}


def _implements(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(operation: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATIONS.update(dict.fromkeys(functions, operation))
        return operation

    return register


@_implements(aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default)
def _same(func: Any, x: Float8Tensor, **kwargs: Any) -> Float8Tensor:
    return x._replace(lambda part: func(part, **kwargs))


@_implements(aten._to_copy.default)
def _to_copy(
    func: Any, x: Float8Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
) -> Float8Tensor:
    """A dtype changes what the tensor stands for, and no code; a device moves it."""
    if dtype is not None and not dtype.is_floating_point:
        raise NotImplementedError(f"Float8Tensor to {dtype}: use dequantize() first")
    kwargs.pop("memory_format", None)
    moved = x._replace(lambda part: func(part, device=device, **kwargs))
    if moved.qdata.dtype == torch.uint8 and has_float8(moved.device):
        moved = moved._replace(qdata=moved.qdata.view(DTYPES[x.recipe.format]))
    return moved._replace(dtype=dtype)


@_implements(aten.t.default)
def _t(func: Any, x: Float8Tensor) -> Float8Tensor:
    return _transposed(func, x)


@_implements(aten.transpose.int, aten.permute.default)
def _transposed(func: Any, x: Float8Tensor, *dims: Any) -> Float8Tensor:
    scale = x.scale if not x.scale.ndim else func(x.scale, *dims)
    return x._replace(qdata=func(x.qdata, *dims), scale=scale)


@_implements(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(func: Any, x: Float8Tensor, size: Sequence[int]) -> Float8Tensor:
    """Any shape under one scale; with one per row, those that keep rows whole."""
    qdata = func(x.qdata, size)
    if not x.scale.ndim:
        return x._replace(qdata=qdata)
    if not qdata.ndim or qdata.shape[-1] != x.shape[-1] or x.scale.shape[-1] != 1:
        raise NotImplementedError(
            f"{func} from {list(x.shape)} to {list(size)}: a scale per row needs rows to stay whole; dequantize() first"
        )
    return x._replace(qdata=qdata, scale=func(x.scale, [*qdata.shape[:-1], 1]))


@_implements(aten.slice.Tensor, aten.select.int, aten.narrow.default)
def _cut(func: Any, x: Float8Tensor, dim: int = 0, *where: Any, **kwargs: Any) -> Float8Tensor:
    scale = x.scale
    if scale.ndim and scale.shape[dim] != 1:
        scale = func(scale, dim, *where, **kwargs)
    elif scale.ndim and func is aten.select.int:
        scale = scale.select(dim, 0)
    return x._replace(qdata=func(x.qdata, dim, *where, **kwargs), scale=scale)


@_implements(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(func: Any, x: Float8Tensor, sizes: Any, dim: int = 0) -> list[Float8Tensor]:
    pieces = func(x.qdata, sizes, dim)
    scales = [x.scale] * len(pieces)
    if x.scale.ndim and x.scale.shape[dim] != 1:
        scales = func(x.scale, sizes, dim)
    return [x._replace(qdata=qdata, scale=scale) for qdata, scale in zip(pieces, scales, strict=True)]


@_implements(aten.cat.default)
def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Float8Tensor:
    """Codes stay as they are; tensors with different single scales get one scale per row."""
    parts = [tensor for tensor in tensors if isinstance(tensor, Float8Tensor)]
    first = parts[0]
    formats = {replace(part.recipe, granularity="row", activation="none") for part in parts}
    if len(parts) < len(tensors) or len(formats) > 1:
        raise NotImplementedError("cat of Float8Tensors with other tensors or other recipes; dequantize() first")
    qdata = func([part.qdata for part in parts], dim)
    if all(torch.equal(part.scale, first.scale) for part in parts) and (
        not first.scale.ndim or first.scale.shape[dim] == 1
    ):
        return first._replace(qdata=qdata)
    if dim % first.ndim == first.ndim - 1:
        raise NotImplementedError("cat of rows with different scales; dequantize() first")
    rows = [part.scale.expand(*part.shape[:-1], 1) for part in parts]
    recipe = replace(first.recipe, granularity="row")
    return first._replace(qdata=qdata, scale=torch.cat(rows, dim), recipe=recipe)


@_implements(aten.copy_.default)
def _copy(func: Any, into: Float8Tensor, source: Tensor, non_blocking: bool = False) -> Float8Tensor:
    """From a Float8Tensor of the same kind its codes; from any other tensor new codes and a new scale."""
    if not isinstance(into, Float8Tensor):
        return func(into, source.dequantize(), non_blocking)
    if (
        not isinstance(source, Float8Tensor)
        or source.recipe.format != into.recipe.format
        or (source.scale.shape != into.scale.shape)
    ):
        values = source.dequantize(into.dtype) if isinstance(source, Float8Tensor) else source.to(into.dtype)
        source = Float8Tensor.quantize(values.expand(into.shape).to(into.device), recipe=into.recipe)
    if not into.scale.ndim and into.qdata.untyped_storage().nbytes() > into.qdata.nbytes:
        raise NotImplementedError(
            "copy_ into a part of a Float8Tensor with one scale, which is the scale of the other parts too; "
            "quantize the whole again"
        )
    func(into.qdata.view(torch.uint8), source.qdata.view(torch.uint8), non_blocking)
    func(into.scale, source.scale, non_blocking)
    return into


@_implements(aten.equal.default)
def _equal(func: Any, a: Tensor, b: Tensor) -> bool:
    """Whether codes, scales and what they stand for are the same."""
    if not (isinstance(a, Float8Tensor) and isinstance(b, Float8Tensor)):
        return False
    if (a.recipe, a.dtype, a.shape, len(a._parts)) != (b.recipe, b.dtype, b.shape, len(b._parts)):
        return False
    same_codes = torch.equal(a.qdata.view(torch.uint8), b.qdata.view(torch.uint8))
    return same_codes and all(torch.equal(*pair) for pair in zip(a._parts[1:], b._parts[1:], strict=True))
