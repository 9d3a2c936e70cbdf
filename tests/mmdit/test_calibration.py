"""Calibration and static quantization of the transformer; every fold of the model computes the same."""

import pytest
import torch

from mmdit import Pipeline
from mmdit.calibration import calibrate, fold, folds_of, quantize_static
from quant.convert import linears_of, quantize_
from quant.tensor import Float8Tensor

PROMPTS = ["a red circle", "a small star, left of two rings", "a blue square"]
SMALL = {"num_inference_steps": 2, "height": 32, "width": 32}
VARIANTS = ["sd3-medium", "sd3.5-medium", "sd3.5-large"]


def load(tiny_folders, variant, dtype=torch.float32) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folders[variant], dtype=dtype)


def draw(pipe: Pipeline) -> torch.Tensor:
    return pipe(PROMPTS[0], seed=5, output_type="latent", **SMALL).images


def error(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_calibration_counts_every_token_of_both_halves(tiny_folders):
    pipe = load(tiny_folders, "sd3.5-medium")
    wanted = draw(pipe)
    seen = calibrate(pipe, PROMPTS, 2, height=32, width=32, batch=2)
    chosen = [name for name, _ in linears_of(pipe.transformer) if "block" in name and "adaLN" not in name]
    assert list(seen.observed) == chosen
    tokens = 2 * 2 * len(PROMPTS)  # steps, halves, pictures
    assert seen.observed["joint_blocks.0.x_block.attn.qkv"].rows == tokens * 4
    assert seen.observed["joint_blocks.0.context_block.attn.qkv"].rows == tokens * 333
    assert torch.equal(draw(pipe), wanted)
    assert (seen.prompts, seen.steps) == (tuple(PROMPTS), 2)


def test_calibrating_what_is_quantized(tiny_folders):
    pipe = load(tiny_folders, "sd3.5-large")
    quantize_(pipe.transformer)
    with pytest.raises(ValueError, match="quantized already"):
        calibrate(pipe, PROMPTS, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{"smooth": 0.5}, {"mean": True}, {"smooth": 0.7, "mean": True}], ids=str)
def test_folds_change_weights_and_not_the_picture(tiny_folders, variant, options):
    pipe = load(tiny_folders, variant, torch.float64)
    wanted, before = draw(pipe), {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    seen = calibrate(pipe, PROMPTS[:1], **SMALL)
    assert fold(pipe.transformer, seen, **options) == len(list(folds_of(pipe.transformer)))
    torch.testing.assert_close(draw(pipe), wanted, rtol=0, atol=2e-6)  # the latent between steps is float32
    changed = {key for key, value in pipe.transformer.state_dict().items() if not torch.equal(value, before[key])}
    reached = {name for place in folds_of(pipe.transformer) for name in place.consumers}
    assert all(f"{name}.bias" in changed or f"{name}.weight" in changed for name in reached)


@pytest.mark.parametrize(
    "options", [{}, {"smooth": 0.5}, {"mean": True}, {"bias": True}, {"percentile": 99.9}], ids=str
)
def test_each_option_works_alone(tiny_folders, options):
    pipe = load(tiny_folders, "sd3.5-medium")
    wanted = draw(pipe)
    report = quantize_static(pipe, PROMPTS, **SMALL, **options)
    done = [layer for layer in report if layer.recipe is not None]
    assert len(done) == len([layer for layer in report if "block" in layer.name and "adaLN" not in layer.name])
    for layer in done:
        weight = pipe.transformer.get_submodule(layer.name).weight
        assert isinstance(weight, Float8Tensor)
        assert weight.input_scale is not None
        assert weight.recipe.activation == "static"
    found = error(draw(pipe), wanted)
    assert 1e-5 < found < 0.1  # 28.5 dB a layer are 4 %


def test_static_scales_are_those_of_the_largest_value_seen(tiny_folders):
    pipe = load(tiny_folders, "sd3.5-large")
    seen = calibrate(pipe, PROMPTS, **SMALL)
    quantize_static(pipe, PROMPTS, **SMALL)
    for name, observed in seen.observed.items():
        scale = pipe.transformer.get_submodule(name).weight.input_scale
        assert float(scale) == pytest.approx(float(observed.amax) / 448, rel=1e-6)
