"""Float8Tensor: scales and codes equal those of the formula bit by bit; tensors that are no weights are refused."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from float8_law import DTYPES, FORMATS, TORCH, codes_by_law, decoded, scale_by_law
from quant import operations, tensor
from quant.recipe import Recipe
from quant.scaling import all_finite, from_codes
from quant.tensor import Float8Tensor
from refusals import refuses

GRANULARITIES = ("tensor", "row")
property_test = settings(max_examples=150, deadline=None, derandomize=True)


def quantized(*shape, granularity="row", **recipe):
    recipe = Recipe(granularity=granularity, **({"activation": "none"} | recipe))
    return Float8Tensor.quantize(torch.randn(*shape), recipe=recipe)


def finite(values):
    return values[values.isfinite()]


def every(dtype):
    """Every finite number of a 16-bit dtype, neighbours in one row."""
    return finite(torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)).reshape(-1, 256)


def shuffled(values):
    return values.flatten()[torch.randperm(values.numel())].reshape(values.shape)


def patterns(dtype, integer):
    """Random bits: all exponents of float32."""
    limits = torch.iinfo(integer)
    values = finite(torch.randint(limits.min, limits.max, (70_000,), dtype=integer).view(dtype))
    return values[values.double().abs() < 3e38][: 256 * 100].reshape(100, 256)


def ties(format, dtype):
    """Rows of codes and of midpoints between them, under scales that are powers of two."""
    numbers = decoded(torch.arange(128, dtype=torch.uint8), format)
    numbers = finite(numbers)
    between = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat([numbers, between, -between])
    powers = range(-6, 1) if dtype == torch.float16 else range(-60, 60, 7)  # what the dtype holds exactly
    return torch.stack([row * 2.0**power for power in powers]).to(dtype)


def beside_ties(format):
    """float64 values off a tie by less than float32 resolves: rounding through float32 would see ties."""
    row = ties(format, torch.float64)
    return torch.cat([row * (1 - 2.0**-40), row * (1 + 2.0**-40)], -1)


INPUTS = {
    "every float16": lambda format: every(torch.float16),
    "every bfloat16": lambda format: every(torch.bfloat16),
    "every float16, shuffled": lambda format: shuffled(every(torch.float16)),
    "every bfloat16, shuffled": lambda format: shuffled(every(torch.bfloat16)),
    "float32 patterns": lambda format: patterns(torch.float32, torch.int32),
    "float64 patterns": lambda format: patterns(torch.float64, torch.int64)[:20],
    "float32 normal": lambda format: torch.randn(50, 300),
    "float64 normal": lambda format: torch.randn(50, 300, dtype=torch.float64),
    "float32 ties": lambda format: ties(format, torch.float32),
    "bfloat16 ties": lambda format: ties(format, torch.bfloat16),
    "float16 ties": lambda format: ties(format, torch.float16),
    "float64 beside ties": beside_ties,
    "stack": lambda format: torch.randn(3, 4, 8),
    "one row": lambda format: torch.randn(1, 40),
    "vector": lambda format: torch.randn(40),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("inputs", INPUTS)
def test_quantize_is_the_law(inputs, granularity, format):
    values = INPUTS[inputs](format)
    q = Float8Tensor.quantize(values, format, granularity)
    assert torch.equal(q.scale, scale_by_law(values, format, granularity))
    assert q.scale.dtype == torch.float32
    assert torch.equal(q.qdata.view(torch.uint8), codes_by_law(values, q.scale, format))
    assert q.qdata.dtype == TORCH[format]
    assert (q.shape, q.dtype, q.device) == (values.shape, values.dtype, values.device)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_code_times_scale_rounded_once(dtype, format):
    q = Float8Tensor.quantize(torch.randn(64, 96, dtype=dtype), format)
    exact = decoded(q.qdata, format) * q.scale.double()
    expected = exact if dtype == torch.float64 else exact.float().to(dtype)  # 4 + 24 bits: float32 rounds once
    assert torch.equal(q.dequantize(), expected)
    assert torch.equal(q.dequantize(torch.float64), exact)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_exact_in_every_dtype(dtype, format):
    codes = torch.arange(256, dtype=torch.uint8)
    for stored in (codes, codes.view(TORCH[format])):
        values = from_codes(stored, format, dtype)
        assert values.dtype == dtype
        torch.testing.assert_close(values.double(), decoded(codes, format), rtol=0, atol=0, equal_nan=True)


shapes = st.tuples(st.integers(0, 4), st.integers(0, 9)) | st.tuples(st.integers(0, 2), st.just(3), st.integers(0, 4))
numbers = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32),  # subnormals
    st.sampled_from([0.0, -0.0, 1e30, -1e30, 3.4028234e38, 2.0**-149, 448 * 2.0**-126, 2.0**-126]),
)


@st.composite
def tensors(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16)):
    shape = draw(shapes)
    values = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    values = torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(dtypes))).reshape(shape)
    values = torch.where(values.isfinite(), values, 1.0)  # bfloat16 rounds the largest float32 up
    layout = draw(st.sampled_from(["contiguous", "transposed", "every other column"]))
    if layout == "transposed":
        return values.mT.contiguous().mT
    return torch.stack([values, values + 1], -1)[..., 0] if layout == "every other column" else values


@property_test
@given(values=tensors(), format=st.sampled_from(FORMATS), granularity=st.sampled_from(GRANULARITIES))
def test_law_at_the_extremes(values, format, granularity):
    """Empty, one row, not contiguous; subnormal and huge amax, zeros of both signs, outliers."""
    q = Float8Tensor.quantize(values, format, granularity)
    assert torch.equal(q.scale, scale_by_law(values, format, granularity))
    assert torch.equal(q.qdata.view(torch.uint8), codes_by_law(values, q.scale, format))
    wide = q.dequantize(torch.float64)
    assert wide.isfinite().all()
    half_step = torch.maximum(values.double().abs() / (16 if format == "e4m3" else 8), q.scale.double() * 2.0**-10)
    assert ((wide - values.double()).abs() <= half_step * (1 + 2.0**-20)).all()


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (0.0, 1.0),
        (2.0**-149, 2.0**-126),
        (448 * 2.0**-126, 2.0**-126),
        (448 * 2.0**-125, 2.0**-125),
        (448.0, 1.0),
        (448e30, 1e30),
    ],
)
def test_scales(amax, scale):
    for granularity in GRANULARITIES:
        q = Float8Tensor.quantize(torch.tensor([[-amax, 0.0]]), "e4m3", granularity)
        assert q.scale.item() == torch.tensor(scale).item()
    assert Float8Tensor.quantize(torch.zeros(3, 0)).scale.tolist() == [[1.0]] * 3
    assert Float8Tensor.quantize(torch.zeros(0, 3), granularity="tensor").scale.item() == 1.0


def test_one_outlier_takes_all_codes_under_one_scale_and_those_of_its_row_under_its_own():
    values = torch.randn(4, 8)
    values[1, 2] = -1e30
    one, rows = (Float8Tensor.quantize(values, granularity=each).dequantize() for each in GRANULARITIES)
    outlier = values == -1e30
    for found in (one, rows):
        torch.testing.assert_close(found[outlier], values[outlier], rtol=1e-7, atol=0)
    assert not one[~outlier].any()
    assert not rows[1][~outlier[1]].any()
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(rows[kept], values[kept], rtol=1 / 16, atol=0.01)


def test_values_that_are_refused():
    bad = torch.randn(4, 4)
    bad[0, 0], bad[1, 1], bad[2, 2] = math.nan, math.inf, -math.inf
    refuses(lambda: Float8Tensor.quantize(bad), "3 of 16 values are not finite", error=ValueError)
    refuses(lambda: Float8Tensor.quantize(bad.half()), "3 of 16 values are not finite", error=ValueError)
    huge = torch.tensor([[1e300, 1.0]], dtype=torch.float64)  # finite, but no float32 scale reaches it
    refuses(lambda: Float8Tensor.quantize(huge), "1 of 2 values are not finite", error=ValueError)
    refuses(lambda: Float8Tensor.quantize(torch.tensor(1.0)), "at least one dimension", error=ValueError)
    refuses(lambda: Float8Tensor.quantize(torch.ones(2, 2, dtype=torch.int32)), "torch.int32", error=ValueError)
    refuses(lambda: Float8Tensor.quantize(torch.ones(2, 2).to(TORCH["e4m3"])), "float8_e4m3fn", error=ValueError)
    refuses(lambda: Float8Tensor.quantize(torch.ones(2, 2, device="meta")), "meta", error=ValueError)
    refuses(lambda: Float8Tensor.quantize(quantized(4, 4)), "got a Float8Tensor", error=ValueError)
    for scale in (torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(math.inf), torch.ones(2)):
        refuses(lambda: Float8Tensor.quantize(torch.ones(2, 2), input_scale=scale), "input scale", error=ValueError)  # noqa: B023


@pytest.mark.parametrize("format", FORMATS)
def test_a_given_scale(format):
    values = torch.randn(4, 6)
    rows = torch.tensor([0.1, 0.01, 2.0, 1e-3])
    for value, granularity, scale in (
        (0.01, "tensor", torch.tensor(0.01)),
        (torch.tensor([[0.01]], dtype=torch.float64), "tensor", torch.tensor(0.01)),
        (0.01, "row", torch.full((4, 1), 0.01)),
        (rows, "row", rows[:, None]),
        (rows[:, None].double(), "row", rows[:, None]),
    ):
        q = Float8Tensor.quantize(values, format, granularity, scale=value)
        assert torch.equal(q.scale, scale)
        assert torch.equal(q.qdata.view(torch.uint8), codes_by_law(values, scale, format))
        q.scale.fill_(7)
        assert torch.equal(rows, torch.tensor([0.1, 0.01, 2.0, 1e-3]))
    found = Float8Tensor.quantize(values, format)
    assert torch.equal(Float8Tensor.quantize(values, format, scale=found.scale).dequantize(), found.dequantize())
    for bad, granularity in (
        (0.0, "tensor"),
        (-1.0, "row"),
        (rows, "tensor"),
        (torch.ones(6), "row"),
        (math.nan, "row"),
    ):
        with pytest.raises(ValueError, match="scale"):
            Float8Tensor.quantize(values, format, granularity, scale=bad)


def test_parts_that_do_not_go_together():
    codes, row, one = torch.zeros(4, 4).to(TORCH["e4m3"]), torch.ones(4, 1), torch.tensor(1.0)
    rows, tensor_ = Recipe(activation="none"), Recipe(activation="none", granularity="tensor")
    Float8Tensor(codes, row, None, rows, torch.float32)
    Float8Tensor(codes, one, None, tensor_, torch.float32)
    for scale, recipe in (
        (torch.ones(4), rows),
        (one, rows),
        (row.half(), rows),
        (torch.ones(3, 1), rows),
        (row, tensor_),
    ):
        said = f"of shape {list(scale.shape)}, {scale.dtype}"
        refuses(lambda: Float8Tensor(codes, scale, None, recipe, torch.float32), said, error=ValueError)  # noqa: B023
    e5m2 = Recipe(format="e5m2", activation="none")
    refuses(
        lambda: Float8Tensor(codes, row, None, e5m2, torch.float32), "qdata are torch.float8_e4m3fn", error=ValueError
    )
    for input_scale, said in ((torch.ones(4), "shape [4]"), (torch.tensor(1.0).double(), "torch.float64")):
        refuses(
            lambda: Float8Tensor(codes, one, input_scale, tensor_, torch.float32),  # noqa: B023
            "an input scale of",
            said,
            error=ValueError,
        )
    refuses(lambda: Float8Tensor(codes, row, None, rows, TORCH["e4m3"]), "logical dtype", "float8", error=ValueError)


# Devices without float8 dtypes: codes are bytes.


@pytest.fixture
def no_float8(monkeypatch):
    for module in (tensor, operations):
        monkeypatch.setattr(module, "has_float8", lambda device: False)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_same_codes(no_float8, dtype, format):
    values = torch.randn(32, 48, dtype=dtype)
    q = Float8Tensor.quantize(values, format)
    assert q.qdata.dtype == torch.uint8
    assert torch.equal(q.qdata, codes_by_law(values, q.scale, format))
    twin = Float8Tensor(q.qdata.view(TORCH[format]), q.scale, None, q.recipe, dtype)
    assert torch.equal(q.dequantize(), twin.dequantize())
    for changed in (
        q.clone(),
        q[2:9],
        q.t(),
        torch.cat([q, q]),
        q.bfloat16(),
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
    ):
        assert changed.qdata.dtype == torch.uint8
    assert twin.to(dtype, copy=True).qdata.dtype == torch.uint8  # moves to a device without float8
    assert torch.equal(q, twin)


def test_bytes_become_float8_where_there_is_float8():
    q = quantized(4, 8)
    stored = Float8Tensor(q.qdata.view(torch.uint8), q.scale, None, q.recipe, q.dtype)
    for moved in (stored.to("cpu", copy=True), stored.to("meta"), pickle.loads(pickle.dumps(stored))):
        assert moved.qdata.dtype == torch.float8_e4m3fn
    assert torch.equal(stored.to("cpu", copy=True), q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_whether_all_values_are_finite(dtype):
    largest = torch.finfo(dtype).max
    values = torch.full((7, 300), largest, dtype=dtype)  # their sum overflows
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (math.inf, -math.inf, math.nan):
        assert not all_finite(values.index_put((torch.tensor(6), torch.tensor(299)), torch.tensor(bad, dtype=dtype)))
    assert not all_finite(torch.tensor([math.inf, -math.inf, 1.0], dtype=dtype))
