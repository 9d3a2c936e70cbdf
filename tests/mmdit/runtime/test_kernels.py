"""The fused kernels, held against plain torch and against the law of float8; interpreted where there is no GPU."""

import pytest
import torch

from mmdit.runtime import plain_kernels
from mmdit.runtime.rows import Activation, Columns, Output, Part, Rounding, Rows, Update
from quant.scaling import scale_of, to_codes, to_values
from skips import SKIPS
from triton_device import DEVICE, HAS_TRITON, quiet

if not HAS_TRITON:
    pytest.skip(SKIPS["triton"], allow_module_level=True)

from mmdit.runtime import kernels
from quant.kernels import quantize_rows

GPU = DEVICE == "cuda"
# The interpreter takes milliseconds for a value, so the CPU sees the sizes that differ in kind only.
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.bfloat16]
WIDTHS = [300, 1536, 2432, 9728] if GPU else [32, 76]
ROWS = [Rows(2, 5, 9), Rows(1, 3, 8), Rows(3, 0, 4)] if GPU else [Rows(2, 2, 3), Rows(1, 3, 6), Rows(4, 0, 2)]
TEXT, IMAGE = torch.tensor(0.05, device=DEVICE), torch.tensor(0.02, device=DEVICE)
HALF = torch.float16  # values of codes, for GPUs without FP8 units
ROUNDINGS = [Rounding(), Rounding("token"), Rounding("static", TEXT, IMAGE), Rounding("static", TEXT, IMAGE, HALF)]


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float32).to(DEVICE, dtype)


def hard_rows(rows, width, dtype):
    """Rows that rounding finds hard: zeros, tiny and huge values, ties, NaN and infinities."""
    x = drawn(rows.total, width, dtype=dtype)
    x[:, ::7] *= 10
    x[0] = 0
    x[1] *= 1e-30
    x[2, ::2] = torch.linspace(1, 2, width // 2, device=DEVICE, dtype=dtype)
    x[3, 1] = float("nan")
    x[4, 2] = float("inf")
    x[5, 3] = -float("inf")
    x[6] *= 1e30 if dtype != torch.float16 else 1
    x[7] = -0.0
    return x


def same(found, wanted):
    """Bit for bit; NaN equals NaN."""
    if found.dtype == torch.float8_e4m3fn:
        found, wanted = found.view(torch.uint8), wanted.view(torch.uint8)
        nan = (found & 127 == 127) & (wanted & 127 == 127)
        return bool(((found == wanted) | nan).all())
    return torch.equal(found.nan_to_num(12345.0), wanted.nan_to_num(12345.0))


def obeys_law(found, values, rounding):
    """Whether an activation is what `quant.scaling` makes of these values."""
    for part, wide, static in zip(found.parts, values.parts, (rounding.text, rounding.image), strict=True):
        if part is None:
            assert wide is None
            continue
        scale = static
        if rounding.kind == "token":
            scale = scale_of(wide.data.abs().amax(1, keepdim=True), "e4m3")
        assert same(part.scale, scale)
        law = to_values if rounding.codes == HALF else to_codes
        assert same(part.data, law(wide.data, scale, "e4m3"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda one: one.kind)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_unpacked_rows_are_rounded_bit_for_bit(rows, rounding, width, dtype):
    x = hard_rows(rows, width, dtype).view(rows.samples, rows.text + rows.image, 1, width)
    for text in (True, False):
        found = kernels.unpack(x, rows, rounding, text=text)
        wanted = plain_kernels.unpack(x, rows, rounding, text=text)
        for one, other in zip(found.parts, wanted.parts, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert same(one.data, other.data)
                assert rounding.kind == "none" or same(one.scale, other.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantized_rows_obey_the_law(width, dtype):
    x = hard_rows(Rows(1, 0, 12), width, dtype)
    codes, scales = quantize_rows(x, "e4m3")
    scale = scale_of(x.abs().amax(1, keepdim=True), "e4m3")
    assert same(scales, scale)
    assert same(codes, to_codes(x, scale, "e4m3"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda one: one.kind)
def test_gelu(rounding, dtype):
    rows, width = ROWS[0], WIDTHS[-1]
    x = hard_rows(rows, width, dtype)
    wanted = torch.nn.functional.gelu(x.double(), approximate="tanh")
    wide = kernels.gelu(x.float(), rows, Rounding())
    assert close(torch.cat([part.data for part in wide.parts]), wanted, 1e-6)
    found = kernels.gelu(x, rows, rounding)
    if rounding.kind == "none":
        assert same(
            torch.cat([part.data for part in found.parts]), torch.cat([part.data for part in wide.parts]).to(dtype)
        )
    else:
        obeys_law(found, wide, rounding)


def close(found, wanted, tolerance):
    """Equal where not finite; elsewhere near, beside the largest of a row."""
    finite = wanted.isfinite() & (wanted.abs() < 1e37)
    size = torch.where(finite, wanted, 0).abs().amax(1, keepdim=True)
    error = torch.where(finite, found.double() - wanted, 0).abs()
    assert torch.equal(found.double().isnan(), wanted.isnan())
    return bool((error <= tolerance * size + 1e-37).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda one: one.kind)
@pytest.mark.parametrize(("updates", "outputs"), [(0, 1), (1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_norm_modulate(width, outputs, updates, rounding, dtype):
    rows = Rows(2, 3, 6) if GPU else Rows(2, 1, 2)
    x, table = drawn(rows.total, width, dtype=dtype), drawn(2, 9, width, dtype=dtype)
    x[0], x[1, 3], x[2] = 0, float("nan"), 30 * x[2]
    asked = [Output(Columns(0, 4), Columns(1, 5), rounding), Output(Columns(2, 6), Columns(3, 7), rounding)][:outputs]
    added = [Update(drawn(rows.total, width, dtype=dtype), gate) for gate in (Columns(8, 3), Columns(2, 0))][:updates]
    asked = [one._replace(wide=torch.full((rows.total, width), -1.0, device=DEVICE)) for one in asked]
    exact_stream, some = x.double(), [Update(one.value.double(), one.gate) for one in added]
    plain = [one._replace(rounding=Rounding(), wide=None) for one in asked]
    exact = plain_kernels.norm_modulate(exact_stream, table.double(), rows, plain, some)
    stream = x.clone()
    found = kernels.norm_modulate(stream, table, rows, asked, added)
    assert close(stream, exact_stream, max(torch.finfo(dtype).eps, 1e-6))
    for one, output, other in zip(found, asked, exact, strict=True):
        assert close(output.wide, torch.cat([part.data for part in other.parts]), 3e-6)
        if rounding.kind == "none":
            assert same(torch.cat([part.data for part in one.parts]), output.wide.to(dtype))
        else:
            values = Activation(Part(output.wide[: rows.split]), Part(output.wide[rows.split :]))
            obeys_law(one, values, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("head_dim", [64, 12])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_pack(rows, head_dim, normed, dtype):
    heads = 3
    qkv = drawn(rows.total, 3 * heads * head_dim, dtype=dtype)
    norms = drawn(2, 2, head_dim, dtype=dtype) if normed else None
    wanted = plain_kernels.pack(qkv.double(), None if norms is None else norms.double(), rows, head_dim)
    for one, other in zip(kernels.pack(qkv, norms, rows, head_dim), wanted, strict=True):
        assert one.shape == other.shape == (rows.samples, rows.text + rows.image, heads, head_dim)
        assert one.is_contiguous()
        assert close(one.flatten(1), other.flatten(1), 4 * torch.finfo(dtype).eps)
        assert normed or same(one, other.to(dtype))


def test_scales_of_the_image_are_aligned():
    rows = Rows(1, 3, 2)
    found = kernels.unpack(drawn(1, 5, 1, 64), rows, Rounding("token"))
    assert found.image.scale.data_ptr() % 16 == 0


def test_one_kind_of_rounding_per_launch():
    outputs = [Output(Columns(0, 0), Columns(0, 0), Rounding(kind)) for kind in ("none", "token")]
    with pytest.raises(ValueError, match="token"):
        kernels.norm_modulate(drawn(4, 64), drawn(2, 1, 64), Rows(2, 1, 1), outputs)
