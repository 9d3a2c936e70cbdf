"""The second GPU draws what the first one does while the first one is the current one, and leaves it empty."""

import pytest
import torch

import mmdit
from quant.recipe import Recipe
from skips import SKIPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=SKIPS["two gpus"]),
]
FIRST, SECOND = "cuda:0", "cuda:1"
SETTINGS = {"num_inference_steps": 3, "output_type": "latent", "seed": [7, 8], "progress": False}


def drawn(device, *, fast=None, with_lora=False, **more):
    """Latents and pictures of two drawings, of which the second one replays what the first one has recorded."""
    pipe = mmdit.Pipeline.demo(device=device, dtype=torch.bfloat16, **more)
    if with_lora:
        pipe.load_lora_weights(mmdit.OUTLINES)
    if fast is not None:
        pipe.accelerate(attention="cudnn", **fast)
    found = []
    for _ in range(2):
        latents = pipe(["a red circle", "two green triangles"], **SETTINGS).images
        found += [latents.cpu(), pipe.decode(latents).cpu()]
    pipe.plain()
    return found


WAYS = {
    "plain": {},
    "fp8": {"quant": "fp8"},
    "emulated": {"quant": Recipe(backend="emulated")},
    "weight only": {"quant": "fp8-weight-only"},
    "fast": {"fast": {}},
    "fast, no graph": {"fast": {"graph": False}},
    "fast fp8": {"quant": "fp8", "fast": {}},
    "fast fp8, no graph": {"quant": "fp8", "fast": {"graph": False}},
    "fast fp8 with a LoRA": {"quant": "fp8", "fast": {}, "with_lora": True},
    "stages": {"offload": "stages"},
    "stages, fast": {"offload": "stages", "fast": {}},
    "a budget": {"memory": "4GB"},
}


@pytest.mark.parametrize("way", WAYS)
def test_drawings_are_those_of_the_first_gpu(way):
    wanted = drawn(FIRST, **WAYS[way])
    before = torch.cuda.memory_allocated(FIRST)
    torch.cuda.reset_peak_memory_stats(FIRST)
    found = drawn(SECOND, **WAYS[way])
    assert torch.cuda.current_device() == 0
    assert torch.cuda.max_memory_allocated(FIRST) == before
    assert all(map(torch.equal, found, wanted))
