"""Weights that are quantized while they are read: the numbers of `quantize_` afterwards, in less memory."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmdit
from mmdit.checkpoints import load, safetensors_io
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import StoredModel, build, model_in_memory, open_model
from mmdit.checkpoints.load_pipeline import load as load_parts
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.checkpoints.staging import filled
from mmdit.embedded import EMBEDDED
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from quant import scaling, tensor
from quant.quantize import quantize_, quantize_weight, report, snr
from quant.recipe import RECIPES, Recipe
from quant.spellings import Scales
from quant.tensor import Float8Tensor
from skips import SKIPS

CONFIG = MMDiTConfig(2, 64, 48, 24, 8, head_dim=16)
BF16 = torch.bfloat16


def stored_model(dtype=BF16, change=None):
    model = MMDiT(CONFIG).to(dtype).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    if change is not None:
        change(model)
    return model_in_memory("transformer", model)


def same(one, other):
    """Equal to the bit, with the same noise."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert type(value) is type(other[key])
        assert torch.equal(value, other[key]), key
    return True


@pytest.mark.parametrize("recipe", ["fp8", "fp8-tensor", "fp8-weight-only", "fp8-e5m2"])
@pytest.mark.parametrize(("stored", "dtype"), [(BF16, None), (torch.float16, BF16), (torch.float32, torch.float16)])
def test_numbers_are_those_of_quantizing_afterwards(recipe, stored, dtype):
    source = stored_model(stored)
    found = build(source, "cpu", dtype, recipe=RECIPES[recipe])
    wanted = build(source, "cpu", dtype)
    quantize_(wanted, recipe)
    assert same(found.state_dict(), wanted.state_dict())
    assert report(found) == report(wanted)
    assert {weight.requires_grad for weight in found.parameters()} == {False}


def test_pipelines_quantize_transformer_and_t5(monkeypatch):
    parts = load_parts("demo", quant=RECIPES["fp8"], dtype=torch.float32)
    after = load_parts("demo", dtype=torch.float32)
    for model in (after.transformer, after.t5):
        quantize_(model, "fp8")
    for name in ("transformer", "t5", "clip_l", "clip_g", "vae"):
        assert same(getattr(parts, name).state_dict(), getattr(after, name).state_dict())
    monkeypatch.setattr("mmdit.pipeline.base.quantize_", lambda *args: pytest.fail("quantized afterwards"))
    pipe = mmdit.Pipeline.demo(quant="fp8", dtype=None)
    assert pipe.quant == "fp8"
    assert same(pipe.transformer.state_dict(), after.transformer.state_dict())


def test_a_model_with_float8_weights_stays_as_it_is():
    weight_only = quantized = stored_model(change=lambda model: quantize_(model, "fp8-weight-only", ["*.mlp.*"]))
    found = build(quantized, "cpu", None, recipe=RECIPES["fp8"])
    assert same(found.state_dict(), build(weight_only, "cpu", None).state_dict())


def test_weights_that_are_not_finite_are_named():
    def break_one(model):
        model.joint_blocks[1].x_block.mlp.fc1.weight[3, 4] = float("nan")

    source = stored_model(change=break_one)
    with pytest.raises(CheckpointError, match=r"joint_blocks.1.x_block.mlp.fc1.weight: 1 of \d+ values are not finite"):
        build(source, "cpu", None, recipe=RECIPES["fp8"])


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most there were; storages count once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor) and not isinstance(one, Float8Tensor) and not one.is_meta:
                self.count(one.untyped_storage())
        return found

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


class Serial:
    """A pool that does everything in the thread that asks, whose tensors a dispatch mode sees."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


def test_the_peak_is_the_result_and_one_tensor(monkeypatch):
    """A transformer whose largest weights are many times what is widened at a time."""
    monkeypatch.setattr(load, "ThreadPoolExecutor", Serial)
    for module in (scaling, tensor):
        monkeypatch.setattr(module, "PIECE", 2**14)
    config = replace(CONFIG, depth=4, hidden_size=128)
    with torch.device("meta"):
        shapes = {key: one.shape for key, one in MMDiT(config).state_dict().items()}

    def drawn(shape):
        return lambda dtype, device: torch.full(shape, 0.01, dtype=dtype, device=device)

    lazy = {key: LazyTensor(tuple(shape), BF16, drawn(shape)) for key, shape in shapes.items()}
    source = StoredModel("transformer", Path("nowhere"), lazy, config, Scales("no float8"))
    gc.collect()
    with Live() as live:
        model = build(source, "cpu", None, recipe=RECIPES["fp8"])
    result = sum(one.nbytes for one in model.state_dict().values())
    rounded = [one for one in model.parameters() if isinstance(one, Float8Tensor)]
    largest = max(2 * one.numel() for one in rounded)
    whole = sum(2 * one.numel() for one in model.parameters())
    assert result < 0.75 * whole
    pieces = 40 * 2**10  # float32 copies of a piece, its float64 differences
    assert result <= live.most < result + largest + pieces
    assert largest + pieces < (whole - result) / 2, "else the bound says nothing"


def test_pieces_change_nothing(monkeypatch):
    values = {"many rows": (50, 40), "a stack": (3, 20, 16), "long rows": (2, 3000), "a vector": (900,)}
    for shape in values.values():
        x = torch.randn(shape)
        for recipe in (Recipe(), RECIPES["fp8-tensor"]):
            whole = Float8Tensor.quantize(x, recipe=recipe)
            noise = quantize_weight(x, recipe).snr if x.ndim == 2 else None
            with monkeypatch.context() as small:
                for module in (scaling, tensor):
                    small.setattr(module, "PIECE", 16 * 128)
                assert torch.equal(Float8Tensor.quantize(x, recipe=recipe), whole)
                if x.ndim == 2:
                    assert quantize_weight(x, recipe).snr == pytest.approx(noise, abs=1e-9)
                    assert noise == pytest.approx(snr(x, whole.dequantize()), abs=1e-9)
                x.view(-1)[-1] = float("inf")
                with pytest.raises(ValueError, match=f"1 of {x.numel()} values are not finite"):
                    Float8Tensor.quantize(x, recipe=recipe)
                x.view(-1)[-1] = 0.5
                whole = None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])
@pytest.mark.parametrize("recipe", [None, "fp8"])
@pytest.mark.parametrize("dtype", [None, BF16, torch.float32])
def test_a_gpu_gets_what_a_cpu_gets(monkeypatch, dtype, recipe):
    """Through staging buffers so small that every tensor takes many pieces, by four threads, twice."""
    monkeypatch.setattr(safetensors_io, "STAGING", 8192)
    monkeypatch.setattr(load, "filled", partial(filled, size=8192))
    stored = open_model(locate(EMBEDDED), "transformer")
    how = None if recipe is None else RECIPES[recipe]
    wanted = build(stored, "cpu", dtype, recipe=how).state_dict()
    for _ in range(2):
        found = build(stored, "cuda", dtype, recipe=how).state_dict()
        assert same({key: one.cpu() for key, one in found.items()}, wanted)
