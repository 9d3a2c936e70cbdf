"""On a GPU, accelerated drawings with everything that a drawing can have: as exact as plain ones, graphs bit-equal."""

import pytest
import torch
from PIL import Image

from mmdit import PROFILES, ControlNet, ControlNetConfig, Hires, Pipeline
from skips import SKIPS
from triton_device import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason=SKIPS["gpu"])]
PICTURE = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB")
MASK = Image.new("L", (128, 128))
MASK.paste(255, (32, 40, 90, 128))
SETTINGS = {"num_inference_steps": 3, "seed": 1, "output_type": "latent", "progress": False}
KEY = "diffusion_model.joint_blocks.{}.x_block.{}.lora_{}.weight"


def error(found, wanted):
    """Relative error; without `tiny`, because diffusers is not on every machine with a GPU."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@torch.no_grad()
def net():
    made, generator = ControlNet(ControlNetConfig(2, 256, 192, kind="canny")), torch.Generator().manual_seed(3)
    for weight in made.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / max(weight[0].numel(), 16) ** 0.5)
    return made.eval().requires_grad_(False)


def lora():
    """A LoRA of two Linears of each block."""
    tensors = {}
    for block in range(4):
        for name, rows in (("mlp.fc1", 1024), ("attn.qkv", 768)):
            tensors[KEY.format(block, name, "A")] = 0.1 * torch.randn(4, 256)
            tensors[KEY.format(block, name, "B")] = 0.1 * torch.randn(rows, 4)
    return tensors


WAYS = {
    "nothing more": {},
    "from a picture": {"image": PICTURE, "strength": 0.7},
    "several pictures": {"image": PICTURE, "strength": 0.7, "num_images_per_prompt": 2},
    "a mask": {"image": PICTURE, "mask_image": MASK, "strength": 0.9},
    "a mask and a crop": {"image": PICTURE, "mask_image": MASK, "padding_mask_crop": 8, "output_type": "pt"},
    "a mask by ComfyUI's rules": {"image": PICTURE, "mask_image": MASK, "profile": "comfyui"},
    "a second pass": {"hires": Hires(scale=1.5, strength=0.7)},
    "a second pass of pixels": {"hires": Hires(scale=1.5, strength=0.7, space="pixel", filter="lanczos")},
    "a LoRA": {"lora": True},
    "a ControlNet": {"control": True},
    "a ControlNet for a part of the steps": {"control": True, "control_guidance_end": 0.7},
    "all of them": {"image": PICTURE, "lora": True, "control": True, "hires": Hires(scale=1.5, strength=0.7)},
    "a second-order solver and a skipped layer": {"sampler": "heun", "skip_guidance_layers": [1]},
}


@pytest.fixture(scope="module")
def pipes():
    return [Pipeline.demo(device=DEVICE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]


def draw(pipe, control=False, **how):
    if control:
        how |= {"controlnet": net().to(DEVICE, pipe.transformer.pos_embed.dtype), "control_image": PICTURE}
    torch.manual_seed(0)  # a profile may draw the noise of hints from torch's global generator
    return pipe("a red circle", **SETTINGS | how).images.float().cpu()


@pytest.mark.parametrize("quant", [None, "fp8"])
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_accelerated_drawings(pipes, how, quant):
    how = dict(how)
    profile, with_lora = how.pop("profile", "diffusers"), how.pop("lora", False)
    exact, low = pipes if quant is None else (pipes[0], Pipeline.demo(device=DEVICE, dtype=torch.bfloat16, quant=quant))
    found = {}
    try:
        for pipe in (exact, low):
            pipe.profile = PROFILES[profile]
            if with_lora:
                torch.manual_seed(0)
                pipe.load_lora_weights(lora())
        found["exact"], found["plain"] = draw(exact, **how), draw(low, **how)
        low.accelerate()
        found["graphs"] = draw(low, **how)
        assert len(low.accelerated.graphs) > 0
        choices = low.accelerated.attention.choices
        low.accelerate(graph=False)
        low.accelerated.attention.choices.update(choices)
        found["no graphs"] = draw(low, **how)
    finally:
        for pipe in (exact, low):
            pipe.plain()
            pipe.unload_lora_weights()
    assert torch.equal(found["graphs"], found["no graphs"])
    errors = {name: error(one, found["exact"]) for name, one in found.items()}
    assert errors["graphs"] < 1.3 * errors["plain"] + 0.003, errors


def test_inversion(pipes):
    _, low = pipes
    plain = low.invert(PICTURE, "a red circle", num_inference_steps=3, progress=False).latents
    low.accelerate()
    try:
        found = low.invert(PICTURE, "a red circle", num_inference_steps=3, progress=False).latents
    finally:
        low.plain()
    assert error(found.cpu(), plain.cpu()) < 0.05


def test_a_changed_lora_is_drawn(pipes):
    """Weights of adapters, merged ones, and none: each drawing is that of a new pipeline, graphs or not."""
    _, low = pipes
    torch.manual_seed(0)
    tensors, found = lora(), []
    low.accelerate()
    try:
        found.append(draw(low))
        low.load_lora_weights(tensors, "one")
        for change in (
            lambda: low.set_adapters("one", 0.5),
            lambda: low.set_adapters("one", -1.0),
            low.fuse_lora,
            low.unfuse_lora,
            low.disable_lora,
        ):
            change()
            found.append(draw(low))
    finally:
        low.plain()
        low.unload_lora_weights()
    first, half, minus, fused, attached, off = found
    assert torch.equal(off, first)
    assert torch.equal(attached, minus)
    assert error(fused, minus) < 0.15  # merged weights are rounded to 16 bits; the LoRA moves it by 0.9
    assert error(half, first) > 0.01
    assert error(minus, half) > 0.01
