"""`Float8Tensor`: float8 qdata and their scale in place of a Linear's weight.

The tensor has the shape and the dtype (its logical dtype) of the weight that it replaces, so that model code works
unchanged. `quant.operations` holds the operations that it supports; any other operation raises and names itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from quant.dispatch import FUNCTIONS, OPERATIONS
from quant.formats import DTYPES, Format
from quant.recipe import Granularity, Recipe, as_recipe
from quant.scaling import (
    PIECE,
    all_finite,
    checked_input_scale,
    has_float8,
    positive,
    scale_of,
    slices,
    to_codes,
    values_of,
)

LOGICAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Float8Tensor(Tensor):
    """A weight, or a stack of weights, as float8 codes and their scale: value = qdata * scale.

    A Float8Tensor cannot be trained: a small gradient step is less than the distance between two codes. Gradients pass
    through products to the other factor, so biases, norms and adapters around it train. `requires_grad_(True)`,
    `requires_grad = True` and `module.requires_grad_(True)` raise; `nn.Parameter(tensor)` and
    `load_state_dict(assign=True)`, which ask for gradients by default, keep `requires_grad` False.

    Args:
        qdata: The codes, [..., out, in]: float8 of the recipe's format, or uint8 on devices that have no float8.
        scale: float32, () for one scale, or [..., out, 1] for one per row.
        input_scale: The scale of static activations, float32 (); None where activations get one in every call, or none.
        recipe: How the weight is stored and multiplied.
        dtype: The logical dtype: the dtype of `dequantize()`, and of inputs of a product.

    Raises:
        ValueError: qdata, scale, input scale and recipe do not go together.
    """

    qdata: Tensor
    scale: Tensor
    input_scale: Tensor | None
    recipe: Recipe
    snr: float | None  # signal-to-noise ratio in dB, as `quantize_` measured it
    _shares_scale: bool  # whether values outside of this view have the same scale
    _is_part: bool  # whether there are values outside of this view, which have the same input scale
    prepared: Any = None  # a `quant.prepared.Prepared`, from the first product on
    not_copied = ("prepared",)  # attributes that refer to this tensor's memory, which a copy must not have

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
        _check_parts(qdata, scale, input_scale, recipe, dtype)
        self.qdata, self.scale, self.input_scale, self.recipe = qdata, scale, input_scale, recipe
        self.snr, self._shares_scale, self._is_part = None, False, False

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        format: Format = "e4m3",
        granularity: Granularity = "row",
        *,
        recipe: Recipe | str | None = None,
        scale: Tensor | float | None = None,
        input_scale: Tensor | float | None = None,
    ) -> Self:
        """The nearest codes, by default under the smallest scale that reaches the largest value.

        Args:
            tensor: Finite values, [..., out, in].
            format: The format of the codes.
            granularity: The granularity of the scale.
            recipe: A recipe, or the name of one in `RECIPES`, instead of format and granularity.
            scale: The scale to use: one positive number, or for granularity "row" one per row as [out] or
                [..., out, 1]. Values beyond its reach saturate. None finds the scale in the values.
            input_scale: The static scale of the activations, one positive number.

        Raises:
            ValueError: The tensor is a scalar, on the meta device, not floating point, or has values that are not
                finite (the error says how many); or a scale that is given has another shape, or is not positive.
        """
        recipe = Recipe(format, granularity, activation="none") if recipe is None else as_recipe(recipe)
        check_values(tensor)
        tensor = tensor.detach()
        if scale is None:
            scale = scale_of(amax_of(tensor, recipe.granularity), recipe.format)
        else:
            scale = _given_scale(scale, tensor, recipe.granularity)
        qdata = _codes(tensor, scale, recipe.format, as_bytes=not has_float8(tensor.device))
        if input_scale is not None:
            input_scale = checked_input_scale(input_scale).to(tensor.device)
        return cls(qdata, scale, input_scale, recipe, tensor.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values qdata * scale, multiplied in float32 (float64 for float64) and rounded once.

        Args:
            dtype: The dtype of the result, a floating dtype of 16 bits or more; None is the logical dtype.

        Raises:
            ValueError: The dtype is another one.
        """
        if dtype is not None and dtype not in LOGICAL:
            raise ValueError(f"dequantize gives {', '.join(map(str, LOGICAL))}; got {dtype}")
        return values_of(self.qdata, self.scale, self.recipe.format, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        recipe = self.recipe
        static = "" if self.input_scale is None else ", static input scale"
        return (
            f"Float8Tensor({list(self.shape)}, {recipe.format}, scale per {recipe.granularity}{static}, "
            f"activation={recipe.activation!r}, dtype={self.dtype}, device='{self.device}')"
        )

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes of qdata and scales."""
        return sum(part.nbytes for part in self._parts)

    @property
    def _parts(self) -> list[Tensor]:
        return [part for part in (self.qdata, self.scale, self.input_scale) if part is not None]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return self where gradients are not asked for, or only by a default of torch; see the class.

        Raises:
            RuntimeError: The caller asks for gradients.
        """
        if requires_grad and not _asked_by_default():
            raise RuntimeError(NOT_TRAINED)
        return self

    def as_parameter(self) -> nn.Parameter:
        """Mark this tensor as a parameter and return it: `nn.Parameter(tensor)` without a second tensor.

        `nn.Parameter` detaches, and when torch dispatches an operation to a tensor subclass for the first time, it
        imports `torch.distributed.tensor` and sympy: 520 modules, 41 MB of host memory and a second. No other operation
        is dispatched where float8 models are loaded and drawn with.
        """
        self._is_param = True
        return self  # type: ignore[return-value] # isinstance(self, nn.Parameter) is true now

    def storage(self) -> Any:
        """Refuse: no memory holds the values. safetensors' `save_file` asks for it.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a Float8Tensor has no storage of its values, so safetensors' save_file and save_model cannot write it: "
            "use pipe.save_pretrained(folder), or `tensors, metadata = quant.pack(state_dict)` and then "
            "`save_file(tensors, path, metadata)`; quant.unpack reads it back"
        )

    def share_memory_(self) -> Self:
        """Move qdata and scales to memory that processes share."""
        for part in self._parts:
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether qdata and scales are in shared memory."""
        return all(part.is_shared() for part in self._parts)

    def pin_memory(self, device: object = None) -> Float8Tensor:
        """A copy in page-locked memory, from where copies to a GPU are fast."""
        return self._map(lambda part: part.pin_memory())

    def is_pinned(self, device: object = None) -> bool:
        """Whether qdata and scales are in page-locked memory."""
        return all(part.is_pinned() for part in self._parts)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Pickle qdata as bytes, because pickle knows no float8."""
        parts = (self.qdata.view(torch.uint8), self.scale, self.input_scale, self.recipe, self.dtype)
        return _rebuilt, (*parts, self.snr, isinstance(self, nn.Parameter), self._shares_scale, self._is_part)

    def __dlpack__(self, *args: object, **kwargs: object) -> Any:
        """Refuse: no memory holds the values.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("dlpack of a Float8Tensor; give dequantize(), or qdata and scale")

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
        """The key under which torch caches compiled code on disk: everything that such code depends on.

        It contains a digest of this package's source, so that code compiled before an edit is not run after it.
        """
        parts = [(tuple(part.shape), part.stride(), part.dtype, part.device) for part in self._parts]
        return repr((_source(), self.recipe, self.dtype, parts))

    def _replace(self, **parts: object) -> Float8Tensor:
        """A new tensor in which `parts` replace its own."""
        mine = {name: getattr(self, name) for name in ("qdata", "scale", "input_scale", "recipe", "dtype")}
        return Float8Tensor(**(mine | parts))

    def _map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Float8Tensor:
        """A new tensor of the same values, with `change` applied to qdata and scales."""
        input_scale = None if self.input_scale is None else change(self.input_scale)
        new = self._replace(
            qdata=change(self.qdata), scale=change(self.scale), input_scale=input_scale, dtype=dtype or self.dtype
        )
        new.snr = self.snr
        return new

    def _view(self, qdata: Tensor, scale: Tensor) -> Float8Tensor:
        """A view; it is an inference tensor where this tensor is one, as torch requires of views."""
        with torch.inference_mode(self.is_inference()) if torch.is_inference_mode_enabled() else nullcontext():
            view = self._replace(qdata=qdata, scale=scale)
        fewer = qdata.numel() < self.qdata.numel()
        view._shares_scale = self._shares_scale or (fewer and scale.numel() == self.scale.numel())
        view._is_part = self._is_part or fewer
        return view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (own := FUNCTIONS.get(func)) is not None:
            if "out" in kwargs:
                kwargs = dict(kwargs)
                if kwargs.pop("out") is not None:
                    raise NotImplementedError(f"{func.__name__} of a Float8Tensor with out=")
            return own(*args, **kwargs)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        except _UndefinedError as error:
            raise NotImplementedError(f"{torch.overrides.resolve_name(func) or func}: {error}") from error

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in OPERATIONS:
            return OPERATIONS[func](func, *args, **(kwargs or {}))
        # Under inference_mode, operations that torch composes of others arrive here undivided.
        composed = func.decompose(*args, **(kwargs or {}))
        if composed is NotImplemented:
            raise _UndefinedError(
                f"{func} is not defined for Float8Tensor; compute it on tensor.dequantize(), or quantize its result"
            )
        return composed


NOT_TRAINED = (
    "a Float8Tensor is not trained, so it cannot require gradients. What trains: everything around it (biases, norms, "
    "adapters; gradients pass through it), e.g. `for p in module.parameters(): p.requires_grad_(not isinstance(p, "
    "quant.Float8Tensor))`; or the weight itself after quant.dequantize_(module), and quantize it again afterwards"
)
# Code of torch that asks for gradients because that is its default, without anybody wanting to train the tensor.
_ASK_BY_DEFAULT = (nn.Parameter.__new__.__code__, nn.Module._load_from_state_dict.__code__)


def _asked_by_default() -> bool:
    """Whether torch asks; only the call stack tells `nn.Parameter(tensor)` from a user who wants to train."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code not in _ASK_BY_DEFAULT:
        frame = frame.f_back
    return frame.f_code in _ASK_BY_DEFAULT


class _UndefinedError(NotImplementedError):
    """An aten operation that Float8Tensor does not support."""


def check_values(tensor: Tensor) -> None:
    """Raise unless it is a tensor that can be quantized: finite floats of at least one dimension."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a tensor to quantize, got {type(tensor).__name__}")
    if tensor.dtype not in LOGICAL or isinstance(tensor, Float8Tensor):
        what = "a Float8Tensor" if isinstance(tensor, Float8Tensor) else str(tensor.dtype)
        raise ValueError(f"a tensor to quantize has {', '.join(map(str, LOGICAL))}; got {what}")
    if not tensor.ndim:
        raise ValueError("a tensor to quantize needs at least one dimension, got a scalar")
    if tensor.is_meta:
        raise ValueError("a tensor on the meta device has no values to quantize")
    if bad := _not_finite(tensor):
        raise ValueError(f"{bad} of {tensor.numel()} values are not finite; float8 keeps finite weights only")


def _not_finite(tensor: Tensor) -> int:
    """How many values are not finite in float32, which is the dtype of scales."""
    narrow = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    parts = (part.to(narrow) for part in _rows(tensor))
    return sum(0 if all_finite(part) else int((~part.isfinite()).sum()) for part in parts)


def amax_of(tensor: Tensor, granularity: Granularity) -> Tensor:
    """The largest absolute value of a tensor, (), or of each of its rows, [..., 1]; see `scale_of`."""
    rows = (*tensor.shape[:-1], 1)
    if not tensor.numel():
        return tensor.new_zeros(() if granularity == "tensor" else rows)
    found = torch.cat([part.abs().amax(dim=-1, keepdim=True) for part in _rows(tensor)])
    return found.amax() if granularity == "tensor" else found.view(rows)


def _codes(tensor: Tensor, scale: Tensor, format: Format, *, as_bytes: bool) -> Tensor:
    """`to_codes`, some rows at a time, so that beside the tensor and its codes there is little else."""
    if tensor.numel() <= PIECE // 16 or not tensor.is_contiguous():
        return to_codes(tensor, scale, format, as_bytes=as_bytes)
    codes = torch.empty_like(tensor, dtype=torch.uint8 if as_bytes else DTYPES[format])
    scales = _rows(scale.expand(*tensor.shape[:-1], 1).contiguous(), like=tensor)
    for part, values, factor in zip(_rows(codes), _rows(tensor), scales, strict=True):
        part.copy_(to_codes(values, factor, format, as_bytes=as_bytes))
    return codes


def _rows(tensor: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """Rows of a tensor of at least one dimension as matrices of about PIECE values, or as `like` is cut; views."""
    cut = tensor if like is None else like
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    rows = tensor.view(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, 1)
    return (rows[part] for part in slices(len(rows), cut.numel(), rows.device))


def _given_scale(scale: Tensor | float, tensor: Tensor, granularity: Granularity) -> Tensor:
    """A scale from outside as float32, () or [..., out, 1], on the tensor's device."""
    scale = scale if isinstance(scale, Tensor) else torch.tensor(float(scale), device="cpu")
    scale = positive(scale, "quantize", "a scale").to(tensor.device)
    rows = [*tensor.shape[:-1], 1]
    if scale.numel() == 1:
        return scale.reshape(()) if granularity == "tensor" else scale.reshape(()).expand(rows).contiguous()
    if granularity == "row" and list(scale.shape) in (rows, rows[:-1]):
        return scale.reshape(rows).clone()
    expected = "one number" if granularity == "tensor" else f"one number, {rows[:-1]} or {rows}"
    raise ValueError(
        f"a scale of shape {list(scale.shape)} for a tensor of shape {list(tensor.shape)} and granularity "
        f"{granularity!r}; expected {expected}"
    )


def _check_parts(qdata: Tensor, scale: Tensor, input_scale: Tensor | None, recipe: Recipe, dtype: torch.dtype) -> None:
    if qdata.dtype not in (DTYPES[recipe.format], torch.uint8):
        raise ValueError(f"qdata are {qdata.dtype}, expected {DTYPES[recipe.format]} or torch.uint8")
    if dtype not in LOGICAL:
        raise ValueError(f"the logical dtype of a Float8Tensor is one of {', '.join(map(str, LOGICAL))}; got {dtype}")
    dims = qdata.ndim if recipe.granularity == "row" else 0
    fits = all(size in (1, rows) for size, rows in zip(scale.shape, qdata.shape, strict=False))
    if scale.dtype != torch.float32 or scale.ndim != dims or not fits:
        raise ValueError(
            f"scale per {recipe.granularity} of shape {list(scale.shape)}, {scale.dtype}, for qdata of shape "
            f"{list(qdata.shape)}; expected torch.float32, {[*qdata.shape[:-1], 1] if dims else []}"
        )
    if input_scale is not None and (input_scale.dtype != torch.float32 or input_scale.ndim):
        raise ValueError(
            f"an input scale of shape {list(input_scale.shape)}, {input_scale.dtype}; expected [], torch.float32"
        )


@cache
def _source() -> str:
    """A digest of this package's source, also of files in folders."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return blake2b(b"\0".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


def _rebuilt(
    codes: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
    snr: float | None,
    is_parameter: bool,
    shares_scale: bool = False,
    is_part: bool = False,
) -> Tensor:
    qdata = codes.view(DTYPES[recipe.format]) if has_float8(codes.device) else codes
    tensor = Float8Tensor(qdata, scale, input_scale, recipe, dtype)
    tensor.snr, tensor._shares_scale, tensor._is_part = snr, shares_scale, is_part
    return tensor.as_parameter() if is_parameter else tensor


torch.serialization.add_safe_globals([_rebuilt, Recipe])  # torch.load(weights_only=True) may build these
