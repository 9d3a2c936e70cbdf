"""Where Triton's kernels run in tests: on the GPU, or interpreted on the CPU with the arithmetic of a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _interpreted() -> None:
    """What a GPU does and Triton's interpreter does not.

    A GPU rounds to nearest where the interpreter cuts off what does not fit float8 and bfloat16; its fma rounds once,
    not twice; its plain maximum passes NaN by. Its matrix units read bfloat16.
    """
    import ml_dtypes
    import numpy as np
    from triton.runtime import interpreter

    types = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn, "fp16": np.float16, "fp32": np.float32}

    def convert(data, source, target, mode):
        wide = np.ascontiguousarray(data).view(types[str(source)]).astype(np.float32)
        return wide.astype(types[str(target)]).view(getattr(np, f"uint{target.primitive_bitwidth}"))

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    def reduce(self, found):  # by halves, where the interpreter would go value by value
        data, dtype = np.moveaxis(found[0].handle.data, self.axis, 0), found[0].dtype
        while len(data) > 1:
            halves = (self.to_tensor(half, dtype) for half in np.split(data, 2))
            data = self.combine_fn.fn(*halves).handle.data
        return self.to_tensor(data[0], dtype)

    def maxnum(self, a, b):
        return self.binary_op(a, b, np.fmax)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (np.asarray(one.data).view(types[str(one.dtype)]).astype(np.float32) for one in (a, b))
        return interpreter.TensorHandle(left @ right + d.data, d.dtype.scalar)

    patched = interpreter._patch_lang_tensor

    def patch(tensor, scope):  # Triton 3.6 gives `int` an array of one value, which numpy refuses since 2.5
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_maxnumf = maxnum
    interpreter.ReduceOps.generic_reduce = reduce
    interpreter.InterpreterBuilder.create_fma = fma


if DEVICE == "cpu" and HAS_TRITON:
    _interpreted()


@contextmanager
def quiet() -> Iterator[None]:
    """Without numpy's warnings of NaN and of infinities, which the interpreter meets where a GPU says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
