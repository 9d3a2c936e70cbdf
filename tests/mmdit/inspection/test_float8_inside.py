"""What float8 loses, layer by layer: by hand for one, and found where it was planted."""

import copy

import pytest
import torch

import mmdit
from mmdit.inspection.float8 import LayerErrors
from quant import RECIPES, quantize_
from quant.tensor import Float8Tensor

FEW = {"num_inference_steps": 2, "seed": 1, "guidance_scale": 4.5, "height": 64, "width": 64, "max_sequence_length": 32}
NAME = "joint_blocks.1.x_block.mlp.fc1"


@pytest.fixture
def demo():
    return mmdit.Pipeline.demo()


def test_errors_are_those_by_hand(demo):
    original = copy.deepcopy(demo.transformer)
    scale = torch.tensor(0.004)  # so small that large inputs saturate
    quantize_(demo.transformer, "fp8-static", [NAME], input_scales={NAME: scale})
    seen = []
    linear = demo.transformer.get_submodule(NAME)
    handle = linear.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    found = mmdit.float8_errors(demo, "a red circle", original, **FEW)
    handle.remove()
    assert not linear._forward_hooks
    assert not demo.watchers
    assert [(one.layer, one.step) for one in found] == [(NAME, 0), (NAME, 1)]
    for one, (x, output) in zip(found, seen, strict=True):
        assert one.amax == float(x.abs().max())
        assert one.saturated == pytest.approx(float((x.abs() > 448 * scale * (1 + 1e-6)).float().mean()), abs=1e-6)
        assert one.saturated > 0
        small = (x.abs() <= scale * 2**-10) & (x != 0)  # branch of the smallest code becomes the even one, zero
        assert one.underflown == pytest.approx(float(small.float().mean()), abs=1e-5)
        wanted = original.get_submodule(NAME)(x)
        noise = (output - wanted).double().square().sum()
        assert one.snr == pytest.approx(float(10 * torch.log10(wanted.double().square().sum() / noise)), abs=1e-6)
    assert found.grid("snr").shape == (1, 2)
    assert NAME in repr(found)


def test_weight_only_has_no_shares_of_activations(demo):
    original = copy.deepcopy(demo.transformer)
    quantize_(demo.transformer, "fp8-weight-only", [NAME])
    (one, _) = mmdit.float8_errors(demo, "a red circle", original, **FEW)
    assert one.saturated != one.saturated
    assert 25 < one.snr < 40


def test_no_rows_print_as_a_header():
    errors = LayerErrors()
    assert errors.grid().shape == (0, 0)
    assert "SNR dB" in repr(errors)


def test_blame_finds_the_planted_layer_and_puts_all_back(demo):
    names = [f"joint_blocks.{i}.x_block.attn.proj" for i in range(3)]
    scales = {name: torch.tensor(0.05) for name in names} | {names[1]: torch.tensor(1e-4)}  # which saturates
    before = {key: value.clone() for key, value in demo.transformer.state_dict().items()}
    found = mmdit.float8_blame(demo, "a red circle", "fp8-static", layers=names, input_scales=scales, **FEW)
    assert next(iter(found)) == names[1]
    assert list(found.values()) == sorted(found.values())
    after = demo.transformer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_error_inside_puts_the_weight_back(demo, monkeypatch):
    calls = []
    drawn = type(demo).__call__

    def fails(self, *args, **settings):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("enough")
        return drawn(self, *args, **settings)

    monkeypatch.setattr(type(demo), "__call__", fails)
    with pytest.raises(RuntimeError, match="enough"):
        mmdit.float8_blame(demo, "a red circle", layers=[NAME], **FEW)
    assert not isinstance(demo.transformer.get_submodule(NAME).weight, Float8Tensor)


def test_what_cannot_be_asked(demo):
    with pytest.raises(ValueError, match="no Linear of the transformer is float8"):
        mmdit.float8_errors(demo, "a", demo.transformer, **FEW)
    with pytest.raises(ValueError, match="'nothing' is no Linear"):
        mmdit.float8_blame(demo, "a", layers=["nothing"])
    quantize_(demo.transformer, RECIPES["fp8"])
    demo.transformer.joint_blocks[2].compile(backend="eager")
    with pytest.raises(ValueError, match=r"joint_blocks.2 is compiled \(torch.compile\)"):
        mmdit.float8_errors(demo, "a", demo.transformer, **FEW)
    with pytest.raises(ValueError, match="quantized already"):
        mmdit.float8_blame(demo, "a")
