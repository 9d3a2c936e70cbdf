"""Generated input for what reads float8: key sets with scales, packed metadata, the codec, and chains of operations.

Whatever comes in, a reader gives what a formula gives, or raises its own error in few words. MMDIT_FUZZ_SECONDS sets
how long each test draws input; an input that fails is named by its seed, which then belongs into REGRESSIONS.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from encoders.json_files import parse_json
from float8_law import NUMPY, codes_by_law, decoded
from fuzzing import SECONDS
from quant.codec import decode, encode
from quant.formats import FLOAT8, FORMAT_OF
from quant.packing import kinds_in, merge_metadata, pack, unpack
from quant.recipe import RECIPES, Recipe
from quant.spellings import find_scales, format_in, layers_in, parse_text, unread_quantization
from quant.tensor import LOGICAL, Float8Tensor

REGRESSIONS: dict[str, tuple[int, ...]] = {
    "keys": (),
    "metadata": (256,),  # a key of 100,000 characters in an error
    "codec": (),
    "operations": (159,),  # squeeze(0) of a scalar
}
FEWEST = 100  # inputs of a test, however slow the machine
LONGEST = 2000  # characters of an error


def draws(name: str) -> Iterator[tuple[int, random.Random]]:
    """Seeds that failed once, then new ones until the time is over; always the same ones, but for their number."""
    end, seed = time.monotonic() + SECONDS, 0
    for known in REGRESSIONS[name]:
        yield known, random.Random(f"{name} {known}")
    while seed < FEWEST or time.monotonic() < end:
        yield seed, random.Random(f"{name} {seed}")
        seed += 1


def in_few_words(error: Exception, seed: int) -> None:
    assert len(str(error)) < LONGEST, seed


# Key sets: weights, scales, notes and leftovers of all spellings, mixed and broken.

LAYERS = ("a", "a.b", "blocks.0.qkv", "norm", "shared", "", "x" * 300)
ENDINGS = (
    *("weight", "weight", "weight_scale", "input_scale", "scale_weight", "scale_input", "bias", "comfy_quant"),
    *("weight_scale_2", "scaled_fp8", "SCB", "qweight", "weight.absmax", "weight_input_scale"),
)
DTYPES = (
    *(torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.float32, torch.bfloat16),
    *(torch.float64, torch.uint8, torch.int8, torch.bool, torch.int64, torch.float8_e8m0fnu),
)
SHAPES = ([], [1], [3], [3, 1], [1, 3], [3, 4], [3, 4], [1, 1], [0], [0, 4], [2, 3, 4], [3, 4, 1, 1])
NOTES = (
    *('{"format": "float8_e4m3fn"}', '{"format": "float8_e5m2", "full_precision_matrix_mult": true}', '{"format": 3}'),
    *('{"format": "nvfp4"}', "[]", "", "\x00", '{"format": "float8_e4m3fn", "full_precision_matrix_mult": "yes"}'),
)


def tensor_of(r: random.Random, key: str) -> Tensor:
    if key.endswith("comfy_quant") and r.random() < 0.8:
        return torch.frombuffer(bytearray(r.choice(NOTES).encode() or b" "), dtype=torch.uint8)
    dtype, shape = r.choice(DTYPES), r.choice(SHAPES)
    if "scale" in key and r.random() < 0.8:
        dtype, shape = torch.float32, r.choice(([], [], [1], [3], [3, 1]))
    elif key.endswith("weight") and r.random() < 0.8:
        dtype, shape = r.choice(FLOAT8), [3, 4]
    values = [r.choice((0.5, 1.0, 2.0, 1e-3, 100.0)) for _ in range(math.prod(shape))]
    if values and dtype.is_floating_point and r.random() < 0.1:
        values[0] = r.choice((0.0, -1.0, math.nan, math.inf, 1e-45))
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)


def keys_of(r: random.Random) -> dict[str, Tensor]:
    """Layers as some program writes them, and as a rule a few keys too many or too few."""
    found = {}
    for layer in r.sample(LAYERS, r.randint(1, 3)):
        before = f"{layer}." if layer else ""
        scale, input_scale = r.choice((("weight_scale", "input_scale"), ("scale_weight", "scale_input")))
        found[f"{before}weight"] = torch.tensor([[1.0, 0.5, -2.0, 448.0]] * 3).to(r.choice(FLOAT8))
        found[before + scale] = torch.full(r.choice(([], [1], [3], [3, 1])), 0.25)
        found |= {before + input_scale: torch.tensor(0.5)} if r.random() < 0.5 else {}
    for _ in range(r.choice((0, 0, 1, 1, 2, 5))):
        layer, ending = r.choice(LAYERS), r.choice(ENDINGS)
        key = f"{layer}.{ending}" if layer else ending
        found[key] = tensor_of(r, key)
    for key in r.sample(list(found), r.choice((0, 0, 0, 1))):
        del found[key]
    return found


def metadata_for(r: random.Random, tensors: dict[str, Tensor]) -> dict[str, str]:
    found = {"format": "pt"}
    if r.random() < 0.3:
        layers = {key.removesuffix(".weight"): json.loads(r.choice(NOTES[:4])) for key in tensors if "weight" in key}
        found["_quantization_metadata"] = json.dumps({"layers": layers})
    if r.random() < 0.3:
        recipe = vars(r.choice(list(RECIPES.values())))
        own = {"dtype": r.choice(("float32", "bfloat16", "int8", "nn")), "recipe": recipe}
        found["mmdit_quant"] = json.dumps({"version": 1, "weights": {key: own for key in tensors if r.random() < 0.4}})
    return found


def test_key_sets_with_scales():
    read = 0
    for seed, r in draws("keys"):
        tensors = keys_of(r)
        metadata = metadata_for(r, tensors)
        dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
        other = unread_quantization(dtypes, metadata)
        assert len(other) < LONGEST, seed
        try:
            find_scales(dtypes)
            assert not unread_quantization(dtypes), seed
        except ValueError as error:
            in_few_words(error, seed)
        try:
            state = unpack(tensors, metadata)
        except ValueError as error:
            in_few_words(error, seed)
            continue
        assert not other, seed
        for key, value in state.items():
            assert value.shape == tensors[key].shape, seed
            if isinstance(value, Float8Tensor):
                read += 1
                assert value.scale.isfinite().all() and (value.scale > 0).all(), seed
                wide = decoded(value.qdata, FORMAT_OF[value.qdata.dtype]) * value.scale.double()
                assert torch.equal(value.dequantize(torch.float64).nan_to_num(7.0), wide.nan_to_num(7.0)), seed
            else:
                assert value is tensors[key], seed
        again = unpack(*pack({key: value for key, value in state.items() if isinstance(value, Float8Tensor)}))
        assert all(torch.equal(again[key], state[key]) for key in again), seed
    assert read > 5


# Metadata: what `pack` writes, with something changed.

WORDS: tuple[object, ...] = (
    *("float8_e4m3fn", "e4m3", "token", "float32", "", "x" * 5000, None, True, -1, 1.5, 10**30, [], {}, [[]]),
)
INSERTED = ("", "[" * 10**5, '{"a":' * 2000, "9" * 5000, "NaN", "\ud800", "\x00", '"')


def changed(r: random.Random, value: object) -> object:
    """A JSON value with one place in it changed."""
    if not isinstance(value, dict) or not value or r.random() < 0.1:
        return r.choice(WORDS)
    key, way = r.choice(list(value)), r.random()
    rest = {name: each for name, each in value.items() if name != key}
    if way < 0.1:
        return rest
    return rest | {r.choice(("layers", "", "version", key * 2)) if way < 0.2 else key: changed(r, value[key])}


def text_of(r: random.Random, text: str) -> str:
    """A JSON text with one place in it changed."""
    way, place = r.random(), r.randrange(len(text))
    if way < 0.6:
        return json.dumps(changed(r, json.loads(text)))
    if way < 0.8:
        return text[:place] + r.choice(INSERTED) + text[place:]
    return text[:place] if way < 0.9 else text[:place] + chr(r.randrange(32, 1000)) + text[place + 1 :]


def test_packed_metadata():
    recipes = [recipe for recipe in RECIPES.values() if recipe.activation != "static"]
    weights = {
        f"blocks.{i}.weight": Float8Tensor.quantize(torch.ones(2, 3), recipe=recipe) for i, recipe in enumerate(recipes)
    }
    tensors, metadata = pack(weights)
    assert unpack(tensors, metadata).keys() == weights.keys()
    for seed, r in draws("metadata"):
        entry = r.choice(("_quantization_metadata", "mmdit_quant"))
        broken = metadata | {entry: text_of(r, metadata[entry])}
        note = text_of(r, r.choice(NOTES[:4])).encode("utf-8", "surrogatepass")
        for parse in (parse_text, parse_json):
            for read, value in (
                (layers_in, broken),
                (kinds_in, broken),
                (merge_metadata, [metadata, broken]),
                (format_in, note),
            ):
                try:
                    read(value, parse)
                except ValueError as error:
                    in_few_words(error, seed)
        try:
            unpack(tensors, broken)
        except ValueError as error:
            in_few_words(error, seed)
        assert len(unread_quantization({}, broken)) < LONGEST, seed


# The codec, against ml_dtypes and numpy.

WIDE = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}


def numbers(r: random.Random, dtype: torch.dtype) -> Tensor:
    """Values of any kind: bits of all patterns, or near codes and midpoints between them."""
    shape = [r.randrange(6) for _ in range(r.randrange(1, 4))]
    count = math.prod(shape)
    if r.random() < 0.5:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
        return torch.tensor([r.randint(low, high) for _ in range(count)], dtype=bits).view(dtype).reshape(shape)
    halves = [1 + r.randrange(17) / 16 for _ in range(count)]  # codes, midpoints, and midpoints between those
    near = [1 + r.choice((0, 0, 1, -1)) * 2.0 ** -r.randrange(20, 50) for _ in range(count)]
    values = [
        r.choice((-1, 1)) * half * 2.0 ** r.randrange(-20, 18) * off for half, off in zip(halves, near, strict=True)
    ]
    found = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    return found.mT if found.ndim > 1 and r.random() < 0.5 else found


def test_codec():
    for seed, r in draws("codec"):
        format, dtype = r.choice(("e4m3", "e5m2")), r.choice(LOGICAL)
        values = numbers(r, dtype)
        codes = encode(values, format)
        assert codes.shape == values.shape, seed
        numeric = ~values.isnan()
        expected = codes_by_law(values.contiguous(), torch.ones(()), format)
        assert torch.equal(codes[numeric], expected[numeric]), (seed, values)
        assert (codes[~numeric] & 0x7F == 0x7F).all(), seed
        assert torch.equal(decode(codes, format).double()[numeric], decoded(codes, format)[numeric]), seed
        every = torch.tensor([r.randrange(256) for _ in range(9)], dtype=torch.uint8)
        wide = decode(every, format, dtype)
        theirs = torch.from_numpy(every.numpy().view(NUMPY[format]).astype(np.float64))
        assert torch.equal(wide.double().nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0)), seed
        finite = wide.isfinite()
        assert torch.equal(encode(wide, format)[finite], every[finite]), seed
    assert ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max == 448


# Chains of operations, against the same on the dequantized tensor.


def operation(r: random.Random, shape: list[int]) -> tuple[str, Callable[[Tensor], Tensor]]:
    """One operation, as text and as a call."""
    dims = len(shape)
    dim = r.randrange(-dims, dims) if dims else 0
    length = shape[dim] if dims else 0
    start, stop = sorted((r.randrange(length + 1), r.randrange(length + 1)))
    step, order, size = r.choice((1, 1, 2, 3)), r.sample(range(dims), dims), sizes(r, shape)
    places = [r.randrange(length) for _ in range(r.randrange(4))] if length else []
    rows = [r.randrange(-shape[0], shape[0]) for _ in range(2)] if dims and shape[0] else []
    columns = [r.randrange(shape[-1]) for _ in range(r.randrange(4))] if dims and shape[-1] else []
    return r.choice(
        (
            (f"transpose {dim}", lambda w: w.transpose(dim, -1)),
            (f"permute {order}", lambda w: w.permute(order)),
            (f"slice {dim} {start} {stop} {step}", lambda w: torch.ops.aten.slice.Tensor(w, dim, start, stop, step)),
            (f"narrow {dim} {start} {stop}", lambda w: w.narrow(dim, start, stop - start)),
            (f"select {dim} {start}", lambda w: w.select(dim, start)),
            (f"unsqueeze {dim}", lambda w: w.unsqueeze(dim)),
            (f"squeeze {dim}", lambda w: w.squeeze(dim)),
            ("squeeze", lambda w: w.squeeze()),
            (f"unbind {dim}", lambda w: w.unbind(dim)[0]),
            (f"view {size}", lambda w: w.view(size)),
            (f"reshape {size}", lambda w: w.reshape(size)),
            ("view as it is", lambda w: w.view(w.shape)),
            ("contiguous", lambda w: w.contiguous()),
            ("clone", lambda w: w.clone()),
            ("expand", lambda w: w.expand(2, *w.shape)),
            (f"index {rows}", lambda w: w[torch.tensor([rows])]),
            (f"index_select {dim} {places}", lambda w: w.index_select(dim, torch.tensor(places, dtype=torch.long))),
            (f"index the last {columns}", lambda w: w[..., columns]),
            (f"split {dim} {step}", lambda w: w.split(step, dim)[-1]),
            (f"chunk {dim}", lambda w: w.chunk(2, dim)[0]),
            (f"cat {dim}", lambda w: torch.cat([w, w], dim)),
            (f"stack {dim}", lambda w: torch.stack([w, w], dim)),
            ("None", lambda w: w[None]),
            ("to another dtype and back", lambda w: w.double().float()),
        )
    )


def sizes(r: random.Random, shape: list[int]) -> list[int]:
    """A shape of as many values, as a rule."""
    count, found = math.prod(shape), []
    while count > 1 and len(found) < 4:
        part = r.choice([n for n in range(1, count + 1) if count % n == 0])
        found.append(part)
        count //= part
    return [*found, count] if r.random() < 0.9 else [-1, 3]


def test_chains_of_operations():
    done = refused = 0
    for seed, r in draws("operations"):
        shape = r.choice(([6, 4], [6, 4], [1, 4], [4, 1], [2, 3, 4], [1, 1], [0, 4], [3, 0], [5]))
        recipe = Recipe(granularity=r.choice(("tensor", "row")), activation="none")
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        q = Float8Tensor.quantize(values, recipe=recipe)
        before, plain, said = q.clone(), q.dequantize(), [str(recipe.granularity)]
        for _ in range(r.randrange(1, 6)):
            name, call = operation(r, list(plain.shape))
            said.append(name)
            wanted = outcome(call, plain)
            found = outcome(call, q)
            if isinstance(wanted, Exception):
                assert isinstance(found, Exception), (seed, said)
                break
            if isinstance(found, Exception):
                assert isinstance(found, NotImplementedError), (seed, said, found)
                in_few_words(found, seed)
                refused += 1
                break
            assert type(found) is Float8Tensor, (seed, said)
            assert found.shape == wanted.shape, (seed, said)
            assert torch.equal(found.dequantize(), wanted), (seed, said)
            assert found.stride() == wanted.stride() or found.numel() < 2, (seed, said)
            q, plain, done = found, wanted, done + 1
        assert torch.equal(before.dequantize(), before.clone().dequantize()), seed
    assert done > 10 * refused


def outcome(call, tensor: Tensor):
    try:
        return call(tensor)
    except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
        return error


@pytest.mark.parametrize("name", REGRESSIONS)
def test_every_generator_has_its_regressions(name):
    assert all(isinstance(seed, int) for seed in REGRESSIONS[name])
