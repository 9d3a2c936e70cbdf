"""`quant=` of a pipeline: one word, both large models, every mix of dtypes; settings and command line keep it."""

from functools import partial

import pytest
import torch

from mmdit import Pipeline
from mmdit.checkpoints.quantize import quantize_checkpoint
from mmdit.cli.app import main
from mmdit.embedded import EMBEDDED
from quant.quantize import is_quantized, quantize_
from quant.recipe import RECIPES, Recipe

PROMPT = "a large red circle above a blue star, on a white background"
FEW = {"num_inference_steps": 4, "guidance_scale": 4.5, "seed": 1, "output_type": "pt"}
FEW |= {"height": 64, "width": 64, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return Pipeline.demo()(PROMPT, **FEW).images


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.activation != "static"])
def test_one_word_quantizes_transformer_and_t5(plain, name):
    pipe = Pipeline.demo(quant=name)
    assert is_quantized(pipe.transformer)
    assert is_quantized(pipe.t5)
    assert not any(is_quantized(model) for model in (pipe.clip_l, pipe.clip_g, pipe.vae))
    drawn = pipe(PROMPT, **FEW)
    assert 20 < psnr(drawn.images, plain) < 80
    assert drawn.settings[0].quant == name


@pytest.mark.usefixtures("rounded_draws")
@pytest.mark.parametrize("t5", [None, "fp8", "fp8-e5m2"])
@pytest.mark.parametrize("transformer", [None, "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mix_of_precisions_draws(plain, t5, transformer, dtype):
    pipe = Pipeline.demo(dtype=dtype)
    for model, recipe in ((pipe.t5, t5), (pipe.transformer, transformer)):
        if recipe is not None:
            quantize_(model, recipe)
    assert psnr(pipe(PROMPT, **FEW).images.float(), plain) > 20


def test_recipes_that_cannot_be_a_word():
    with pytest.raises(ValueError, match="unknown quant 'fp9'; did you mean 'fp8'"):
        Pipeline.demo(quant="fp9")
    with pytest.raises(ValueError, match="needs scales of the activations"):
        Pipeline.demo(quant="fp8-static")
    assert Pipeline.demo(quant=Recipe(format="e5m2", activation="none", granularity="tensor")).quant == "custom"


def test_a_file_that_is_float8_already(tmp_path):
    """Its own recipe may be asked for again; another is no other word for it."""
    file = tmp_path / "a.safetensors"
    with pytest.warns(UserWarning, match="a scale per row"):
        quantize_checkpoint(EMBEDDED, file, "fp8", progress=False)
    load = partial(Pipeline.from_single_file, file, tokenizers=EMBEDDED)
    assert torch.equal(
        load().transformer.joint_blocks[0].x_block.mlp.fc1.weight,
        load(quant="fp8").transformer.joint_blocks[0].x_block.mlp.fc1.weight,
    )
    with pytest.raises(ValueError, match=r"a\.safetensors.*quantized already .*fp8\).*fp8-tensor"):
        load(quant="fp8-tensor")


def test_a_quantized_picture_is_drawn_again_from_its_file(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert main(["generate", PROMPT, "--quant", "fp8", "--steps", "2", "-o", str(one), "--quiet"]) == 0
    assert main(["generate", "--settings", str(one), "-o", str(two), "--quiet"]) == 0
    assert one.read_bytes() == two.read_bytes()
    assert main(["generate", PROMPT, "--quant", "fp9", "-o", str(two)]) == 2
