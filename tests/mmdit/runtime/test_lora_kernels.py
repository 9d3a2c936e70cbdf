"""What LoRAs add within the kernels of the fast path, held against plain torch; interpreted where there is no GPU."""

import pytest
import torch

from mmdit.models.layers import Mlp
from mmdit.models.lora import beside, without
from mmdit.runtime import plain_kernels
from mmdit.runtime.lora_products import PRODUCTS
from mmdit.runtime.rows import Activation, Added, Down, Part, Rounding, Rows
from quant.scaling import scale_of, to_codes
from skips import SKIPS
from triton_device import DEVICE, HAS_TRITON, quiet

if not HAS_TRITON:
    pytest.skip(SKIPS["triton"], allow_module_level=True)

from mmdit.runtime import kernels, lora_kernels
from quant import low_rank, low_rank_kernels

GPU = DEVICE == "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.bfloat16]
WIDTHS = [300, 2432, 9728] if GPU else [76]
ROWS = [Rows(2, 333, 70), Rows(3, 0, 65), Rows(1, 65, 0)] if GPU else [Rows(2, 3, 2), Rows(1, 0, 66)]
ROUNDINGS = [
    Rounding(),
    Rounding("token"),
    Rounding("static", torch.tensor(0.05, device=DEVICE), torch.tensor(0.02, device=DEVICE)),
]
CUTS = [lora_kernels._LARGEST, lora_kernels._CODES, lora_kernels.Cut(16, 16, 2, 1, 1)]
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def drawn_added(rows, width, dtype, rank=16):
    return Added(drawn(rows.total, rank, dtype=dtype), 0.3 * drawn(2, width, rank, dtype=dtype))


def in_float64(added):
    return Added(added.low.double(), added.up.double())


def near(found, wanted, dtype, sums=2**-19):
    """Rounded once: within a unit of the last place, and the errors of float32's sums, whose terms are below 16."""
    torch.testing.assert_close(found.double(), wanted, rtol=2 * EPSILON[dtype], atol=EPSILON[dtype] / 4 + sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["none", "token", "static"])
def test_down_projections_of_both_streams(kind, width, rows, dtype):
    exact = drawn(2, 16, width, dtype=dtype) / width**0.5
    exact[0] *= 1e-4  # of any size, though they are multiplied in float16
    x = drawn(rows.total, width, dtype=dtype)
    parts = []
    for index, part in enumerate((x[: rows.split], x[rows.split :])):
        scale = None if kind == "none" else ROUNDINGS[2][1 + index]
        if kind == "token" and len(part):
            scale = scale_of(part.abs().amax(1, keepdim=True), "e4m3")
        parts.append(Part(part if scale is None else to_codes(part, scale, "e4m3"), scale) if len(part) else None)
    activation, down = Activation(*parts), Down.of(exact, codes=kind != "none")
    read = exact.double() if down.halves is None else down.halves.double() * down.factor.double().unsqueeze(-1)
    torch.testing.assert_close(read, exact.double(), rtol=2**-11, atol=2**-24 * float(exact.abs().max()))
    wanted = plain_kernels.low(activation, Down(read), torch.float64)
    size = wanted.abs().amax()
    # Each of the additions of float32, one after the other, is wrong by up to 2^-24 of its sum, up or down. (TF32 would
    # give 2e-4.) Matrix units cut off what is below the last place of a long sum.
    sums = max(2**-19, width**0.5 * 2**-24) if kind == "none" else 2**-14
    near(kernels.low(activation, down, dtype) / size, wanted / size, dtype, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 48] if GPU else [8])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_joint_layout(rows, head_dim, normed, dtype):
    width = 3 * 2 * head_dim
    qkv, added = drawn(rows.total, width, dtype=dtype), drawn_added(rows, width, dtype)
    norms = drawn(2, 2, head_dim, dtype=dtype) if normed else None
    wide = None if norms is None else norms.double()
    wanted = plain_kernels.pack(qkv.double(), wide, rows, head_dim, in_float64(added))
    for one, other in zip(kernels.pack(qkv, norms, rows, head_dim, added), wanted, strict=True):
        near(one, other, dtype)


def near_codes(found, exact):
    """The codes of values under the scale of the found ones: but for few, where a float32 sum is on the other side of a
    tie."""
    codes = to_codes(exact, found.scale, "e4m3")
    different = found.data.view(torch.uint8) != codes.view(torch.uint8)
    assert float(different.float().mean()) < 1e-3
    torch.testing.assert_close(found.data.float(), codes.float(), rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda one: one.kind)
@pytest.mark.parametrize("width", [300, 9728] if GPU else [76])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_gelu(rows, rounding, dtype, width):
    x, added = drawn(rows.total, width, dtype=dtype), drawn_added(rows, width, dtype)
    wanted = plain_kernels.gelu(x.double(), rows, Rounding(), in_float64(added))
    found = kernels.gelu(x, rows, rounding, added)
    for part, exact in zip(found.parts, wanted.parts, strict=True):
        if part is None:
            assert exact is None
        elif rounding.kind == "none":
            near(part.data, exact.data, dtype)
        else:
            near_codes(part, exact.data)
            if rounding.kind == "token":
                near_scale(part.scale, exact.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda one: one.kind)
@pytest.mark.parametrize("cut", [None, lora_kernels.Cut(16, 16, 2, 1, 1)], ids=["usual", "several strips"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_gelu_with_the_next_down_projections(rows, cut, rounding, dtype):
    width = 300 if GPU else 76
    x, added = drawn(rows.total, width, dtype=dtype), drawn_added(rows, width, dtype)
    down = Down.of(drawn(2, 16, width, dtype=dtype), codes=rounding.kind != "none")
    found = lora_kernels.gelu(x, rows, rounding, added, down, cut)
    again = kernels.low(found, down, torch.float32 if rounding.kind != "none" else dtype)
    torch.testing.assert_close(found.low.double(), again.double(), rtol=2 * EPSILON[dtype], atol=2**-14)


def near_scale(scale, exact):
    """The sums' errors are below 2^-19, and the largest values of rows above 2^-4."""
    wanted = scale_of(exact.abs().amax(1, keepdim=True), "e4m3")
    torch.testing.assert_close(scale.double(), wanted.double(), rtol=2**-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_largest_gelu_of_rows(rows, cut, dtype):
    """Also in rows where that is the GELU of a value below zero."""
    width = 300 if GPU else 76
    x, added = drawn(rows.total, width, dtype=dtype), drawn_added(rows, width, dtype)
    added.low[::3] = 0
    x[::3] = -x[::3].abs() - 0.3
    exact = plain_kernels.gelu(x.double(), rows, Rounding(), in_float64(added))
    wanted = torch.cat([part.data for part in exact.parts if part is not None]).abs().amax(1)
    found = lora_kernels.largest_gelu(x, rows, added, cut).view(torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-15, atol=0)


def test_not_a_number_reaches_all_codes_of_its_row():
    rows, width = Rows(1, 0, 3), 300
    x, added = drawn(3, width, dtype=torch.bfloat16), drawn_added(Rows(1, 0, 3), width, torch.bfloat16)
    x[1, 7] = float("nan")
    found = kernels.gelu(x, rows, Rounding("token"), added).image
    assert found.scale.isnan().flatten().tolist() == [False, True, False]
    assert found.data.float().isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("width", [300, 128] if GPU else [140])
@pytest.mark.parametrize("rank", [16, 64] if GPU else [16])
def test_added_in_place(rank, width, rows, dtype):
    out, added = drawn(rows.total, width, dtype=dtype), drawn_added(rows, width, dtype, rank)
    wanted = out.double()
    plain_kernels.add_up(wanted, in_float64(added), rows)
    kernels.add_up(out, added, rows)
    # The root of the rank times 2^-24 times the largest sums, which are twice that root (0.3 times it, 6.7 times over).
    sums = rank * 2**-23
    near(out, wanted, dtype, sums)
    bias, up = drawn(width, dtype=dtype), added.up[0]
    exact = bias.double() + added.low.double() @ up.double().t()
    near(low_rank_kernels.up_and_bias(added.low, up, bias), exact, dtype, sums)


@torch.no_grad()
@pytest.mark.parametrize("large", [0, 2**40], ids=["kernels on a GPU", "torch"])
def test_products_of_an_attached_lora(large, monkeypatch):
    monkeypatch.setattr(low_rank, "LARGE", large)
    module = torch.nn.Sequential(torch.nn.Linear(40, 140, device=DEVICE, dtype=torch.bfloat16))
    factors = drawn(16, 40, dtype=torch.bfloat16), 0.3 * drawn(140, 16, dtype=torch.bfloat16)
    linear, x = module[0], drawn(2, 35, 40, dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    wanted += (x.double() @ factors[0].double().t()).bfloat16().double() @ factors[1].double().t()
    attached = beside(module, "0", factors=factors, products=PRODUCTS)
    assert attached.products is PRODUCTS
    size = wanted.abs().amax()
    for found in (module(x), attached.add_to(linear(x), x)):  # each rounds its sums twice
        near(found / size, wanted / size, torch.bfloat16, 2**-8)


def mlp_with_loras(names):
    """An MLP in 16 bits with LoRAs beside some Linears: itself, an input, its result in float64 and plain torch's."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(Mlp(24, 76)).to(DEVICE, torch.bfloat16).requires_grad_(False)
    x = drawn(2, 40, 24, dtype=torch.bfloat16)
    wanted, plain = x.double(), x
    for name in ("0.fc1", "0.fc2"):
        linear = module.get_submodule(name)
        rows, columns = linear.weight.shape
        down, up = drawn(16, columns, dtype=torch.bfloat16), 0.03 * drawn(rows, 16, dtype=torch.bfloat16)
        change, added = torch.zeros_like(linear.weight).double(), 0
        if name in names:
            change, added = up.double() @ down.double(), linear_of(linear_of(plain, down), up)
            beside(module, name, factors=(down, up), products=PRODUCTS)
        wanted = linear_of(wanted, linear.weight.double() + change, linear.bias.double())
        plain = linear(plain) if name not in names else linear_of(plain, linear.weight, linear.bias) + added
        if name == "0.fc1":
            wanted, plain = (torch.nn.functional.gelu(one, approximate="tanh") for one in (wanted, plain))
    return module, x, wanted, plain


def linear_of(*operands):
    return torch.nn.functional.linear(*operands)


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize("names", [("0.fc1", "0.fc2"), ("0.fc1",)], ids=["with the next product", "alone"])
def test_gelu_of_an_mlp_adds_what_its_lora_adds(names, monkeypatch):
    """The sum is rounded once less; whoever looks at a part of the MLP sees what `Mlp` computes."""
    launched = []
    monkeypatch.setattr(low_rank, "LARGE", 0)
    monkeypatch.setattr(low_rank, "by_kernels", lambda *_: True)
    gelu = lora_kernels.gelu
    monkeypatch.setattr(lora_kernels, "gelu", lambda *given: launched.append(given[4]) or gelu(*given))
    module, x, wanted, plain = mlp_with_loras(names)
    fused = module(x)
    assert [down is not None for down in launched] == [len(names) == 2]
    seen = []
    for part in ("fc1", "act"):
        handle = module[0].get_submodule(part).register_forward_hook(lambda *given: seen.append(given[2]))
        apart = module(x)
        handle.remove()
    assert len(launched) == 1, "hooks are called"
    hidden = torch.nn.functional.gelu(seen[0], approximate="tanh")
    assert torch.equal(hidden, seen[1])
    # Plain torch rounds each sum three times. Of 1,920 rounded values, norms of errors differ by few percent by chance.
    assert error(apart, wanted) <= 1.05 * error(plain, wanted)
    assert error(fused, wanted) <= 1.05 * error(apart, wanted)
    without(module, "0.fc1")
    assert type(module[0]) is Mlp
    module(x)
    assert len(launched) == 1


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize(("itemsize", "down_itemsize"), [(1, 2), (2, 2), (4, 4)])
def test_blocks_fit_the_shared_memory_of_a_card(itemsize, down_itemsize, rank, kilobytes):
    fast = low_rank_kernels._OF_CODES if itemsize == 1 else low_rank_kernels._OF_VALUES
    found = low_rank_kernels.fitting(fast, rank, itemsize, down_itemsize, 1024 * kilobytes)
    assert (found.stages - 1) * found.depth * (found.rows * itemsize + rank * down_itemsize) <= 1024 * kilobytes
    assert found.rows == fast.rows
    assert found.stages >= 3
    assert kilobytes < 227 or found == fast


@pytest.mark.parametrize(
    ("itemsize", "down_itemsize", "rank", "kilobytes", "wanted"),
    [
        (1, 2, 32, 99, (32, 256, 4)),
        (1, 2, 64, 99, (32, 256, 3)),
        (2, 2, 64, 99, (64, 128, 4)),
        (4, 4, 32, 99, (64, 128, 3)),
        (4, 4, 64, 99, (64, 64, 4)),
        (4, 4, 64, 163, (64, 128, 3)),
    ],
)
def test_blocks_of_smaller_cards(itemsize, down_itemsize, rank, kilobytes, wanted):
    fast = low_rank_kernels._OF_CODES if itemsize == 1 else low_rank_kernels._OF_VALUES
    assert low_rank_kernels.fitting(fast, rank, itemsize, down_itemsize, 1024 * kilobytes)[:3] == wanted
