"""The bit codec of float8 equals ml_dtypes, torch and a search among all codes, also where these differ.

Codes are compared as integers, without tolerance. Expected codes are those of clamped values: the codec saturates.
"""

import functools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import codec
from quant.codec import decode, encode
from quant.formats import FLOAT8_FORMATS, Float8Format
from refusals import refuses

FORMATS = ("e4m3", "e5m2")
NUMPY = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
CODES = torch.arange(256, dtype=torch.uint8)


# The inputs.


def every(dtype):
    """All 65,536 numbers of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def reference(format):
    """Finite values of the codes without sign, ascending, by ml_dtypes."""
    values = np.arange(128, dtype=np.uint8).view(NUMPY[format]).astype(np.float64)
    return values[np.isfinite(values)]


def midpoints(format):
    """Halfway between neighbouring codes; the last is between the largest number and what would follow it."""
    values = reference(format)
    return (values + np.append(values[1:], 2 * values[-1] - values[-2])) / 2


def signed(values):
    return torch.cat([values, -values])


def around_midpoints(format):
    """Codes and midpoints, and their neighbours in float32 on both sides."""
    at = torch.from_numpy(np.concatenate([reference(format), midpoints(format)])).float()
    sides = [torch.nextafter(at, torch.tensor(side)) for side in (-math.inf, math.inf)]
    return signed(torch.cat([at, *sides]))


def beside_midpoints(format):
    """float64 values off a midpoint by less than float32 resolves: a codec that goes through float32 sees a tie."""
    at = torch.from_numpy(midpoints(format))
    return signed(torch.cat([at * (1 + side * 2.0**-power) for side in (-1, 1) for power in (26, 40, 52)]))


def patterns(dtype):
    """Random bits: all exponents, hence mostly values out of range, and NaNs of any payload."""
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    return torch.randint(limits.min, limits.max, (50_000,), dtype=integer).view(dtype)


def in_range(dtype):
    """Random mantissas, with exponents from below the smallest subnormal to beyond the largest number."""
    return torch.ldexp(1 + torch.rand(50_000, dtype=dtype), torch.randint(-20, 18, (50_000,))) * signs(50_000)


def subnormals(dtype):
    """The smallest numbers of the input's dtype, which round to the code of zero."""
    smallest_normal = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype).view(INTEGERS[dtype])
    return signed(torch.randint(0, smallest_normal.item(), (1000,), dtype=INTEGERS[dtype]).view(dtype))


def signs(count):
    return torch.randint(0, 2, (count,)) * 2 - 1


def specials(dtype):
    bounds = torch.finfo(dtype)
    ends = [0.0, bounds.max, bounds.tiny, bounds.smallest_normal, math.inf]
    return signed(torch.tensor(ends, dtype=dtype))


INPUTS = {
    "every bfloat16": lambda format: every(torch.bfloat16),
    "every float16": lambda format: every(torch.float16),
    "around midpoints": around_midpoints,
    "around midpoints, float64": lambda format: around_midpoints(format).double(),
    "float32 patterns": lambda format: patterns(torch.float32),
    "float64 patterns": lambda format: patterns(torch.float64),
    "float32 in range": lambda format: in_range(torch.float32),
    "float64 in range": lambda format: in_range(torch.float64),
    "float32 subnormals": lambda format: subnormals(torch.float32),
    "float64 subnormals": lambda format: subnormals(torch.float64),
    "specials": lambda format: specials(torch.float32),
    "float64 specials": lambda format: specials(torch.float64),
    "beside midpoints": beside_midpoints,
}


# The oracles.


def clamped(values, format):
    """Clamped values in which NaNs keep their bits, which torch.clamp does not promise."""
    top = LARGEST[format]
    return values.masked_fill(values > top, top).masked_fill(values < -top, -top)


def by_ml_dtypes(values, format):
    values = clamped(values, format)
    array = (
        values.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if values.dtype == torch.bfloat16 else values.numpy()
    )
    with np.errstate(invalid="ignore"):  # NaN
        codes = torch.from_numpy(array.astype(NUMPY[format]).view(np.uint8))
    return torch.where((codes & 0x7F) == 0x7E, codes | 1, codes) if format == "e5m2" else codes  # its NaN is 0x7e


def by_torch(values, format):
    return clamped(values, format).to(TORCH[format]).view(torch.uint8)


def by_search(values, format):
    """A code is the number of midpoints below |value|, and at a midpoint the even one; exact in float64."""
    wide, middle = values.double().numpy(), midpoints(format)
    magnitude = np.abs(wide)
    below, through = np.searchsorted(middle, magnitude, "left"), np.searchsorted(middle, magnitude, "right")
    codes = np.where(below % 2 == 0, below, through)  # they differ at midpoints only
    codes = np.minimum(codes, len(middle) - 1)
    codes = np.where(np.isnan(wide), 0x7F, codes) + 0x80 * np.signbit(wide)
    return torch.from_numpy(codes.astype(np.uint8))


def wrong(encoder, oracle, format, inputs=tuple(INPUTS)):
    """The inputs whose codes differ from the oracle's, by name."""
    found = {}
    for name in inputs:
        values = INPUTS[name](format)
        codes = encoder(values, format)
        assert codes.dtype == torch.uint8
        assert codes.shape == values.shape
        differ = codes != oracle(values, format)
        if differ.any():
            found[name] = values[differ]
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_encode_is_the_nearest_code(inputs, format):
    assert wrong(encode, by_search, format, [inputs]) == {}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("oracle", [by_ml_dtypes, by_torch])
@pytest.mark.parametrize("inputs", [name for name in INPUTS if name != "beside midpoints"])
def test_encode_is_the_cast_of_others(inputs, oracle, format):
    assert wrong(encode, oracle, format, [inputs]) == {}


@pytest.mark.parametrize("format", FORMATS)
def test_float64_is_not_rounded_twice(format):
    """Through float32 each of these values is a tie, and three of six are rounded to the wrong side."""
    values = beside_midpoints(format)
    ties = torch.from_numpy(midpoints(format))
    assert torch.isin(values.abs().float().double(), ties).all()
    assert not torch.isin(values.abs(), ties).any()
    assert len(wrong(through(torch.float32), by_search, format)["beside midpoints"]) == 6 * (len(ties) - 1)
    assert "beside midpoints" in wrong(by_torch, by_search, format)  # why they are not among the inputs of that test


@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_zero(format):
    for dtype in (torch.float32, torch.float64):
        integer = INTEGERS[dtype]
        first = torch.tensor(math.inf, dtype=dtype).view(integer).item() + 1
        last = torch.iinfo(integer).max
        bits = torch.randint(first, last, (1000,), dtype=integer)
        bits[:2] = torch.tensor([first, last])
        assert bits.view(dtype).isnan().all()
        for sign, code in ((0, 0x7F), (torch.iinfo(integer).min, 0xFF)):
            assert encode((bits | sign).view(dtype), format).unique().tolist() == [code]
    assert encode(torch.tensor([0.0, -0.0]), format).tolist() == [0x00, 0x80]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_too_large_saturates(format):
    largest = LARGEST[format]
    values = torch.tensor(
        [largest, math.nextafter(largest, math.inf), 2 * largest, 1e300, math.inf], dtype=torch.float64
    )
    code = FLOAT8_FORMATS[format].largest_code
    assert encode(values, format).tolist() == [code] * 5
    assert encode(-values, format).tolist() == [code + 0x80] * 5


# Deliberately broken codecs: the comparison above must reject each of them.


def through(dtype):
    return lambda values, format: encode(values.to(dtype), format)


def overflowing(values, format):
    return torch.where(values.abs() > LARGEST[format], 0x7F, encode(values, format).int()).to(torch.uint8)


def flushing(values, format):
    tiny = values.abs() < FLOAT8_FORMATS[format].smallest_normal
    return encode(torch.where(tiny, torch.zeros_like(values).copysign(values), values), format)


def unsigned_zero(values, format):
    return encode(torch.where(values == 0, 0.0, values), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "broken",
    [through(torch.float32), through(torch.float16), through(torch.bfloat16), overflowing, flushing, unsigned_zero],
    ids=["through float32", "through float16", "through bfloat16", "overflowing", "flushing", "unsigned zero"],
)
def test_broken_encoders_are_found(broken, format):
    assert wrong(broken, by_search, format) != {}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "drop_bits",
    [
        lambda number, count: (number + (1 << (count - 1))) >> count,
        lambda number, count: (number + (1 << (count - 1)) - 1) >> count,
        lambda number, count: number >> count,
    ],
    ids=["half up", "half down", "down"],
)
@pytest.mark.parametrize("oracle", [by_search, by_ml_dtypes, by_torch])
def test_broken_rounding_is_found(monkeypatch, oracle, drop_bits, format):
    monkeypatch.setattr(codec, "_drop_bits", drop_bits)
    found = wrong(encode, oracle, format)
    assert {"every bfloat16", "every float16", "around midpoints"} <= found.keys()


# Decoding.


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_that_of_others(dtype, format):
    found = decode(CODES, format, dtype)
    assert found.dtype == dtype
    for expected in (
        torch.from_numpy(CODES.numpy().view(NUMPY[format]).astype(np.float64)),
        CODES.view(TORCH[format]).double(),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~found.isnan()  # a cast to bfloat16 loses their sign
    assert torch.equal(found.signbit()[numbers], (CODES > 0x7F)[numbers])


@pytest.mark.parametrize(("format", "infinities"), [("e4m3", []), ("e5m2", [0x7C, 0xFC])])
def test_special_codes(format, infinities):
    values, spec = decode(CODES, format), FLOAT8_FORMATS[format]
    assert CODES[values.isinf()].tolist() == infinities
    assert CODES[values.isnan()].tolist() == [*spec.nan_codes, *(code + 0x80 for code in spec.nan_codes)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype, format):
    numbers = CODES[decode(CODES, format).isfinite()]
    assert torch.equal(encode(decode(numbers, format, dtype), format), numbers)


@pytest.mark.parametrize(
    ("format", "bits", "bias", "numbers"),
    [("e4m3", (4, 3), 7, (448.0, 2.0**-6, 2.0**-9)), ("e5m2", (5, 2), 15, (57344.0, 2.0**-14, 2.0**-16))],
)
def test_formats_are_those_of_the_paper(format, bits, bias, numbers):
    spec = FLOAT8_FORMATS[format]
    assert (spec.exponent_bits, spec.mantissa_bits) == bits
    assert spec.bias == bias
    assert (spec.largest, spec.smallest_normal, spec.smallest_subnormal) == numbers
    codes = torch.tensor([spec.largest_code, 1 << spec.mantissa_bits, 1], dtype=torch.uint8)
    assert decode(codes, format).tolist() == list(numbers)


# Properties of any numbers.

near = st.floats(-500, 500) | st.floats(-60000, 60000) | st.floats(-(2.0**-5), 2.0**-5)
numbers = st.lists(near | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4)
property_test = settings(max_examples=100, deadline=None, derandomize=True)


@property_test
@given(values=numbers, format=st.sampled_from(FORMATS))
def test_nearest_of_all_codes_ties_to_even(values, format):
    every_number = [Fraction(number) for number in reference(format).tolist()]
    for value, code in zip(values, encode(torch.tensor(values, dtype=torch.float64), format).tolist(), strict=True):
        distances = [abs(abs(Fraction(value)) - number) for number in every_number]
        least = min(distances)
        nearest = [each for each, distance in enumerate(distances) if distance == least]
        assert code & 0x7F == min(nearest, key=lambda each: each % 2)
        assert code >> 7 == (math.copysign(1, value) < 0)


@property_test
@given(values=st.lists(near, min_size=2, max_size=50), format=st.sampled_from(FORMATS))
def test_monotone(values, format):
    decoded = decode(encode(torch.tensor(sorted(values), dtype=torch.float64), format), format)
    assert (decoded.diff() >= 0).all()


@property_test
@given(values=numbers, format=st.sampled_from(FORMATS))
def test_negative_is_the_other_sign_bit(values, format):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(encode(-tensor, format), encode(tensor, format) ^ 0x80)


# Devices, layouts and compiling.


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(dtype, format):
    base = torch.randn(6, 8, 4).to(dtype)
    for values in (base.mT, base[::2, 1::3], base[0, 0, 0], base[:0], base[:, :0], base[:1].expand(3, -1, -1)):
        codes = encode(values, format)
        assert torch.equal(codes, encode(values.contiguous(), format))
        assert codes.shape == values.shape
    codes = encode(base, format)
    for some in (codes.mT, codes[::2, 1::3], codes[0, 0, 0], codes[:0]):
        assert torch.equal(decode(some, format), decode(some.contiguous(), format))


def test_a_parameter_is_encoded_without_a_graph():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    assert torch.equal(encode(weight, "e4m3"), encode(weight.detach(), "e4m3"))


@pytest.mark.parametrize("format", FORMATS)
def test_flushing_of_subnormals_changes_nothing(format):
    halves = every(torch.float16)
    codes, values = encode(halves, format), decode(CODES, format)
    assert torch.set_flush_denormal(True)
    try:
        flushed = encode(halves, format), decode(CODES, format), decode(CODES, format, torch.float16).float()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed[0], codes)
    for found in flushed[1:]:
        torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_in_one_graph(format):
    """Graph and autograd stages only: inductor needs a C++ compiler, which a machine may lack."""
    compile = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.float64):
        values = in_range(dtype)
        assert torch.equal(compile(encode)(values, format), encode(values, format))
    values = compile(decode)(CODES, format)
    torch.testing.assert_close(values, decode(CODES, format), rtol=0, atol=0, equal_nan=True)


def test_refused():
    values = torch.zeros(3)
    refuses(lambda: encode(values, "e3m4"), "float8 format 'e3m4', expected one of 'e4m3', 'e5m2'", error=ValueError)
    refuses(lambda: decode(CODES, "float8"), "float8 format 'float8'", error=ValueError)
    refuses(lambda: encode(values.int(), "e4m3"), "torch.int32 is not supported", "torch.float16", error=ValueError)
    refuses(lambda: decode(values, "e4m3"), "codes are torch.float32, expected torch.uint8", error=ValueError)
    refuses(lambda: decode(CODES, "e4m3", torch.int32), "torch.int32 is not supported", error=ValueError)
    refuses(
        lambda: Float8Format(4, 2, 0x3E, None, range(0x3F, 0x40), torch.uint8, "odd"),
        "4 + 2 bits, expected 7",
        error=ValueError,
    )
