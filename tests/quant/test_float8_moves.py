"""Float8Tensor: operations that move, cut, join and copy values.

Operations that only move values equal the same operation on the dequantized tensor; operations that quantize equal
`Float8Tensor.quantize` bit by bit. No operation changes the tensor that it is applied to, unless it is in place.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from float8_law import DTYPES
from quant.packing import pack, unpack
from quant.recipe import Recipe
from quant.tensor import Float8Tensor
from refusals import refuses

GRANULARITIES = ("tensor", "row")
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def quantized(*shape, granularity="row", **recipe):
    recipe = Recipe(granularity=granularity, **({"activation": "none"} | recipe))
    return Float8Tensor.quantize(torch.randn(*shape), recipe=recipe)


def same_bits(a: Float8Tensor, b: Float8Tensor) -> bool:
    codes = torch.equal(a.qdata.view(torch.uint8), b.qdata.view(torch.uint8))
    return codes and torch.equal(a.scale, b.scale) and (a.dtype, a.recipe) == (b.dtype, b.recipe)


# Dtypes and devices.


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_changes_what_it_stands_for_and_nothing_else(dtype):
    q = quantized(6, 8)
    spelled = {torch.float64: q.double, torch.float32: q.float, torch.bfloat16: q.bfloat16, torch.float16: q.half}
    for changed in (q.to(dtype), q.to(torch.empty(0, dtype=dtype)), q.type(dtype), spelled[dtype]()):
        assert changed.dtype == dtype
        assert torch.equal(changed.qdata.view(torch.uint8), q.qdata.view(torch.uint8))
        assert torch.equal(changed.scale, q.scale)
        assert torch.equal(changed.dequantize(), q.dequantize(dtype))
        assert (changed is q) == (dtype == q.dtype)
    assert q.dtype == torch.float32


def test_devices():
    q = quantized(6, 8, granularity="tensor", activation="static")
    q.input_scale = torch.tensor(0.5)
    assert q.cpu() is q
    there = q.to("meta", torch.bfloat16)
    assert {part.device.type for part in (there, there.qdata, there.scale, there.input_scale)} == {"meta"}
    assert (there.dtype, there.shape, there.recipe) == (torch.bfloat16, q.shape, q.recipe)
    copied = q.to("cpu", copy=True)
    assert torch.equal(copied, q)
    for mine, its in zip(copied._parts, q._parts, strict=True):
        assert mine.data_ptr() != its.data_ptr()


def test_other_kinds_of_dtype_are_refused():
    for dtype in (torch.int32, torch.bool, torch.float8_e5m2, torch.complex64):
        with pytest.raises(ValueError, match=f"logical dtype .*{dtype}"):
            quantized(4, 4).to(dtype)


def test_modules_move_with_it():
    net = nn.Sequential(nn.Linear(8, 4))
    weight = Float8Tensor.quantize(net[0].weight)
    net[0].weight = nn.Parameter(weight)
    for change, dtype in (
        (net.bfloat16, torch.bfloat16),
        (net.half, torch.float16),
        (net.double, torch.float64),
        (net.float, torch.float32),
        (net.cpu, torch.float32),
        (lambda: net.to(torch.bfloat16), torch.bfloat16),
        (lambda: net.to("cpu", torch.float32), torch.float32),
    ):
        change()
        assert type(net[0].weight) is Float8Tensor
        assert isinstance(net[0].weight, nn.Parameter)
        assert net[0].weight.dtype == net[0].bias.dtype == dtype
        assert torch.equal(net[0].weight.qdata.view(torch.uint8), weight.qdata.view(torch.uint8))
        assert net(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    assert torch.equal(net[0].weight.dequantize(), weight.dequantize())


# Views and pieces.

MOVES = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose of negative dimensions": lambda w: w.transpose(-1, -2),
    "permute": lambda w: w.permute(1, 0),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "rows": lambda w: w[3:9],
    "one row": lambda w: w[4:5],
    "no rows": lambda w: w[:0],
    "every other row": lambda w: w[::2],
    "columns": lambda w: w[:, 2:7],
    "ellipsis": lambda w: w[..., 1:3],
    "a row": lambda w: w[3],
    "last row": lambda w: w[-1],
    "a column": lambda w: w[:, 3],
    "an element": lambda w: w[2, 3],
    "narrow": lambda w: w.narrow(0, 2, 5),
    "narrow columns": lambda w: w.narrow(-1, 2, 5),
    "select": lambda w: w.select(dim=1, index=2),
    "split": lambda w: w.split(5),
    "split by sizes": lambda w: w.split([2, 10]),
    "split columns": lambda w: w.split(3, dim=-1),
    "chunk": lambda w: w.chunk(3),
    "chunk columns": lambda w: w.chunk(2, dim=1),
    "tensor_split": lambda w: w.tensor_split(5),
    "view": lambda w: w.view(3, 4, 8),
    "view of unknown size": lambda w: w.view(-1, 8),
    "view as": lambda w: w.view_as(torch.empty(6, 2, 8)),
    "reshape": lambda w: w.reshape(2, 6, 8),
    "unflatten": lambda w: w.unflatten(0, (4, 3)),
    "flatten": lambda w: w.view(3, 4, 8).flatten(0, 1),
    "select of a stack": lambda w: w.view(3, 4, 8)[1],
    "transposed stack": lambda w: w.view(3, 4, 8).transpose(1, 2)[2],
    "permuted stack": lambda w: w.view(3, 4, 8).permute(2, 0, 1)[:, 1:],
    "contiguous transpose": lambda w: w.t().contiguous(),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "unsqueeze between": lambda w: w.unsqueeze(1),
    "unsqueeze behind": lambda w: w.unsqueeze(-1),
    "None": lambda w: w[None, :, None],
    "squeeze": lambda w: w[2:3].squeeze(),
    "squeeze of a row": lambda w: w[2:3].squeeze(0),
    "squeeze of a column": lambda w: w[:, 2:3].squeeze(-1),
    "squeeze of nothing": lambda w: w.squeeze(),
    "squeeze of two": lambda w: w.view(1, 12, 1, 8).squeeze((0, 2)),
    "squeeze, then view": lambda w: w[2:3, 3:4].squeeze().view(1),
    "unbind": lambda w: w.unbind(),
    "unbind columns": lambda w: w.unbind(1),
    "iterate": list,
    "index": lambda w: w[torch.tensor([3, 1, 1, -2])],
    "index by a list": lambda w: w[[1, 5]],
    "index by a matrix": lambda w: w[torch.tensor([[0, 1], [2, 3]])],
    "index by one number": lambda w: w[torch.tensor(3)],
    "index by a mask": lambda w: w[torch.arange(12) % 2 == 0],
    "index by a whole mask": lambda w: w[torch.arange(96).view(12, 8) % 5 == 0],
    "index columns": lambda w: w[:, [1, 5]],
    "index elements": lambda w: w[[1, 2], [3, 4]],
    "index nothing": lambda w: w[torch.zeros(0, dtype=torch.long)],
    "index a stack": lambda w: w.view(3, 4, 8)[[0, 2], [1, 1]],
    "index within a stack": lambda w: w.view(3, 4, 8)[:, [1, 1]],
    "index around": lambda w: w.view(3, 4, 8)[[0, 2], :, [1, 7]],
    "index a transpose": lambda w: w.t()[[1, 2]],
    "index columns of a transpose": lambda w: w.t()[:, [1, 2]],
    "index_select": lambda w: w.index_select(0, torch.tensor([3, 1, 1])),
    "index_select columns": lambda w: w.index_select(1, torch.tensor([3, 1, 1])),
    "index_select of a transpose": lambda w: w.t().index_select(-1, torch.tensor([3, 1])),
    "expand": lambda w: w.expand(2, 12, 8),
    "expand rows": lambda w: w[:1].expand(5, -1),
    "stack": lambda w: torch.stack([w, w]),
    "stack of rows": lambda w: torch.stack([w[0], w[3]]),
    "stack between": lambda w: torch.stack([w, w[:, :8]], dim=1),
    "view of a transpose": lambda w: w.t().view(8, 12),
    "view of a transpose in parts": lambda w: w.t().view(2, 4, 12),
    "reshape of a transpose": lambda w: w.t().reshape(8, 3, 4),
    "reshape of a square transpose": lambda w: w[:8].t().reshape(2, 4, 8),
    "rows in parts": lambda w: w.view(12, 2, 4),
    "parts of rows together again": lambda w: w.view(12, 2, 4).view(12, 8),
    "as strided": lambda w: w.as_strided((12, 8), (8, 1)),
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "contiguous": lambda w: w.contiguous(),
    "cat of pieces": lambda w: torch.cat(w.chunk(3)),
    "cat of rows": lambda w: torch.cat([w, w[2:4], w[:0]], dim=-2),
    "cat of columns": lambda w: torch.cat(tensors=[w, w[:, :3]], dim=1),
    "vstack": lambda w: torch.vstack([w, w]),
}


def metadata(q):
    parts = [(part.data_ptr(), part.shape, part.stride(), part.dtype) for part in q._parts]
    return (q.shape, q.stride(), q.dtype, q.recipe, q.snr, parts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("move", MOVES)
def test_moves_are_those_of_the_values(move, granularity, mode):
    q = quantized(12, 8, granularity=granularity, activation="static")
    q.input_scale, q.snr = torch.tensor(0.5), 31.0
    before, values = metadata(q), q.dequantize()
    with MODES[mode]():
        found, expected = MOVES[move](q), MOVES[move](values)
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for mine, its in pairs:
        assert type(mine) is Float8Tensor
        assert mine.shape == its.shape
        assert torch.equal(mine.dequantize(), its)
        assert mine.recipe.format == "e4m3"
        assert torch.equal(mine.input_scale, q.input_scale)
    assert metadata(q) == before
    assert torch.equal(q.dequantize(), values)


def test_views_have_the_same_memory():
    q = quantized(12, 8)
    for view in (q.t(), q[2:4], q.view(3, 4, 8), q.detach(), q.split(4)[0]):
        assert view.qdata.untyped_storage().data_ptr() == q.qdata.untyped_storage().data_ptr()
        assert view.scale.untyped_storage().data_ptr() == q.scale.untyped_storage().data_ptr()
    assert q.clone().qdata.untyped_storage().data_ptr() != q.qdata.untyped_storage().data_ptr()


def test_rows_with_scales_of_their_own_stay_whole():
    q = quantized(12, 8)
    for break_rows in (
        lambda: q.view(-1),
        lambda: q.view(24, 4),
        lambda: q.reshape(6, 16),
        lambda: q.t().reshape(96),
        lambda: q.t().reshape(4, 24),
        lambda: q.view(12, 2, 4).view(24, 4),
        q.flatten,
    ):
        with pytest.raises(NotImplementedError, match="a scale per row needs rows to stay whole"):
            break_rows()
    one = quantized(12, 8, granularity="tensor")
    assert torch.equal(one.t().reshape(6, 16).dequantize(), one.dequantize().t().reshape(6, 16))


def test_cat_of_unlike_scales():
    a, b = (Float8Tensor.quantize(factor * torch.randn(4, 8), granularity="tensor") for factor in (1, 100))
    joined = torch.cat([a, b])
    assert joined.recipe == Recipe(activation="none")  # one scale per row
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    with pytest.raises(NotImplementedError, match="different scales"):
        torch.cat([a, b], dim=1)
    row, other = quantized(4, 8), quantized(4, 8)
    assert torch.equal(torch.cat([a, row]).dequantize(), torch.cat([a.dequantize(), row.dequantize()]))
    with pytest.raises(NotImplementedError, match="different scales"):
        torch.cat([row, other], dim=-1)
    with pytest.raises(NotImplementedError, match="transposed"):
        torch.cat([row.t(), row.t()], dim=1)


def test_cat_of_unlike_tensors():
    q = quantized(4, 8)
    static = Recipe(activation="static")
    one, two = (
        Float8Tensor.quantize(torch.ones(4, 8), recipe=static, input_scale=torch.tensor(s)) for s in (0.5, 0.25)
    )
    for others in (
        [q, torch.zeros(4, 8)],
        [torch.zeros(4, 8), q],
        [q, q.bfloat16()],
        [q, quantized(4, 8, format="e5m2")],
        [q, quantized(4, 8, activation="token")],
        [one, two],
        [one, Float8Tensor.quantize(torch.ones(4, 8), recipe=static)],
    ):
        with pytest.raises(NotImplementedError, match="cat of a Float8Tensor with other"):
            torch.cat(others)
    assert torch.cat([one, one.clone()]).input_scale == 0.5


PRODUCTS = {
    "rows": lambda w: w[3:9],
    "rows by index": lambda w: w[[4, 1, 1]],
    "columns by index": lambda w: w[:, [1, 5]],
    "columns by index_select": lambda w: w.index_select(1, torch.tensor([1, 5])),
    "view": lambda w: w.view(3, 4, 8)[1],
    "view and back": lambda w: w.view(12, 2, 4).view(12, 8),
    "transposed twice": lambda w: w.t().view(8, 12).t(),
    "unsqueeze and squeeze": lambda w: w.unsqueeze(1).squeeze(1),
    "stack": lambda w: torch.stack([w[0], w[3]]),
    "unbind": lambda w: w.view(3, 4, 8).unbind()[2],
    "expand": lambda w: w[:1].expand(5, 8),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("move", PRODUCTS)
def test_moved_weights_are_multiplied_and_packed(move, granularity):
    w = PRODUCTS[move](quantized(12, 8, granularity=granularity))
    x = torch.randn(3, w.shape[1])
    torch.testing.assert_close(F.linear(x, w), F.linear(x, w.dequantize()))
    if move != "expand":
        (found,) = unpack(*pack({"w": w})).values()
        assert torch.equal(found.dequantize(w.dtype), w.dequantize())


def test_copies_have_memory_of_their_own():
    for granularity in GRANULARITIES:
        q = quantized(12, 8, granularity=granularity, activation="static")
        q.input_scale = torch.tensor(0.5)
        before = q.clone()
        for copy in (q[[0, 1]], q.index_select(0, torch.tensor([2])), torch.cat([q, q]), torch.stack([q, q])):
            other = 100 * torch.ones(copy.shape)
            copy.copy_(Float8Tensor.quantize(other, recipe=copy.recipe, input_scale=torch.tensor(0.25)))
            assert torch.equal(copy.dequantize(), other)
            assert torch.equal(q, before)


def test_memory_of_the_same_kind():
    """`empty_like`, and `nn.Module.to_empty`, which calls it."""
    q = quantized(6, 8, granularity="tensor", activation="static")
    q.input_scale, q.snr = torch.tensor(0.5), 31.0
    for like, dtype, device in (
        (torch.empty_like(q), torch.float32, "cpu"),
        (torch.empty_like(q, dtype=torch.bfloat16), torch.bfloat16, "cpu"),
        (torch.empty_like(q, device="meta"), torch.float32, "meta"),
    ):
        assert type(like) is Float8Tensor
        assert (like.shape, like.dtype, like.recipe, like.snr) == (q.shape, dtype, q.recipe, None)
        assert {part.device.type for part in like._parts} == {device}
        assert len({part.data_ptr() for part in (*like._parts, *q._parts)}) == 6 or device == "meta"
    assert torch.empty_like(q, dtype=torch.int32).dtype == torch.int32
    net, source = nn.Sequential(nn.Linear(8, 6)), nn.Linear(8, 6)
    source.weight = nn.Parameter(q)
    net[0].weight = nn.Parameter(q.clone())
    net.to("meta").to_empty(device="cpu")
    net.load_state_dict({f"0.{key}": value for key, value in source.state_dict().items()})
    assert isinstance(net[0].weight, nn.Parameter)
    assert torch.equal(net[0].weight, q)
    x = torch.randn(3, 8)
    assert torch.equal(net(x), source(x))


# Copying into it.


def test_copy_of_plain_values_is_quantizing_them():
    for granularity in GRANULARITIES:
        q, values = quantized(6, 8, granularity=granularity), 3 * torch.randn(6, 8)
        memory = [part.data_ptr() for part in q._parts]
        assert q.copy_(values) is q
        assert same_bits(q, Float8Tensor.quantize(values, granularity=granularity))
        assert [part.data_ptr() for part in q._parts] == memory
        q.copy_(values[0])
        assert same_bits(q, Float8Tensor.quantize(values[:1].expand(6, 8), granularity=granularity))


def test_copy_of_the_same_kind_takes_codes_and_scales():
    static = {"granularity": "tensor", "activation": "static"}
    into, source = quantized(6, 8, **static), quantized(6, 8, **static)
    into.input_scale, source.input_scale, source.snr = torch.tensor(1.0), torch.tensor(0.25), 30.0
    assert torch.equal(into.copy_(source), source)
    assert into.input_scale.item() == 0.25
    assert into.snr == 30.0
    into.copy_(torch.ones(6, 8))
    assert (into.input_scale.item(), into.snr) == (0.25, None)


def test_copy_of_another_kind_is_quantized_again():
    row, one, e5m2 = quantized(6, 8), quantized(6, 8, granularity="tensor"), quantized(6, 8, format="e5m2")
    for source in (one, e5m2):
        values = source.dequantize()
        assert same_bits(quantized(6, 8).copy_(source), Float8Tensor.quantize(values))
    for into in (torch.zeros(6, 8), torch.zeros(6, 8).bfloat16(), torch.zeros(6, 8).double()):
        assert torch.equal(into.copy_(row), row.dequantize(into.dtype))
    assert same_bits(quantized(3, 8).copy_(row[:1]), Float8Tensor.quantize(row[:1].dequantize().expand(3, 8)))


def test_copy_into_rows_changes_these_rows():
    q = quantized(6, 8)
    before, values = q.clone(), 50 * torch.randn(2, 8)
    q[2:4].copy_(values)
    q[5] = values[0]
    expected = before.dequantize()
    expected[2:4], expected[5] = (
        Float8Tensor.quantize(values).dequantize(),
        Float8Tensor.quantize(values[0]).dequantize(),
    )
    assert torch.equal(q.dequantize(), expected)
    q.split(2)[0].copy_(q[4:])
    assert same_bits(q[:2], q[4:])


def test_copy_into_values_that_share_their_scale_with_others():
    row, one = quantized(6, 8), quantized(6, 8, granularity="tensor")
    stack = row.view(2, 3, 8)
    for part in (
        row[:, 2:4],
        row[:, 1],
        row[1:3, 2:],
        row.t()[2:4],
        row.t()[2:4].t(),
        row.chunk(2, 1)[0],
        row[2, :4],
        stack[0][:, 1:],
        one[2:4],
        one[2:4].detach(),
        one.split(3)[1].view(24),
        one[0],
    ):
        for source in (torch.ones(part.shape), part.clone()):
            with pytest.raises(NotImplementedError, match="scale is that of other parts"):
                part.copy_(source)
    assert same_bits(
        one[2:4].clone().copy_(torch.ones(2, 8)), Float8Tensor.quantize(torch.ones(2, 8), "e4m3", "tensor")
    )
    assert same_bits(stack[1].copy_(torch.ones(3, 8)), Float8Tensor.quantize(torch.ones(3, 8)))
    assert torch.equal(one[:].copy_(torch.ones(6, 8)).dequantize(), torch.ones(6, 8))


def test_copy_of_another_input_scale_into_a_part():
    q, other = (quantized(6, 8, activation="static") for _ in range(2))
    q.input_scale, other.input_scale = torch.tensor(0.5), torch.tensor(0.25)
    before = q.clone()
    for part in (q[2:4], q.split(2)[1], q.view(3, 2, 8)[1]):
        with pytest.raises(NotImplementedError, match="input scale"):
            part.copy_(other[:2])
        assert torch.equal(q, before)
    other.input_scale = torch.tensor(0.5)
    q[2:4].copy_(other[:2])
    q[:2].copy_(torch.ones(2, 8))
    assert torch.equal(q.dequantize()[2:4], other.dequantize()[:2])
    assert q.input_scale == 0.5
    q[:].copy_(other)
    assert torch.equal(q, other)


def test_copy_into_a_transposed_one():
    q = quantized(8, 8)
    before = q.clone()
    for source in (torch.ones(8, 8), quantized(8, 8)):
        with pytest.raises(NotImplementedError, match="copy_ into a transposed"):
            q.t().copy_(source)
    assert torch.equal(q, before)
    other = quantized(8, 8)
    q.t().copy_(other.t())
    assert torch.equal(q, other)


def test_a_refused_copy_changes_nothing():
    q = quantized(6, 8)
    before = q.clone()
    refuses(lambda: q.copy_(torch.full((6, 8), math.nan)), "48 of 48 values are not finite", error=ValueError)
    assert torch.equal(q, before)


def test_data_is_set_with_its_parts():
    """Setting `.data`, as the offloader does."""
    q, other = nn.Parameter(quantized(6, 8)), quantized(6, 8).bfloat16()
    home = q.data
    q.data = other
    assert torch.equal(q.data, other)
    assert q.qdata is other.qdata
    q.data = home
    assert q.dtype == torch.float32
    assert q.qdata is home.qdata
    with pytest.raises(NotImplementedError, match="data of a Float8Tensor"):
        q.data = torch.zeros(6, 8)
    assert torch.equal(q.data, home)
