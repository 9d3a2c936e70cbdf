"""Many pictures in one process: the same to the bit each time, and memory does not grow."""

import gc
from pathlib import Path

import pytest
import torch

from full import FULL
from mmdit import Pipeline
from skips import SKIPS

STATM = Path("/proc/self/statm")
PAGE = 4096
COUNT = 200 if FULL else 45


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * PAGE


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_many_generations(tiny_folders):
    if not STATM.exists():
        pytest.skip(SKIPS["memory"])
    pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"], profile="comfyui")
    settings = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}
    first = {seed: pipe(f"a ring {seed}", "blue", seed=seed, **settings).images for seed in range(4)}
    for i in range(COUNT):
        drawn = pipe(f"a ring {i % 4}", "blue", seed=i % 4, **settings).images
        assert torch.equal(drawn, first[i % 4]), i
        if i == 20:  # by then every buffer that is kept for good is there
            memory, count = resident(), tensors()
    assert tensors() == count
    assert resident() - memory < (4 if FULL else 3) * 2**20
