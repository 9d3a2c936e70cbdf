"""Seconds from the start of a process to its first picture, on random weights that are made on the device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

# By name: whether the pipeline is accelerated, and whether Triton finds kernels that an earlier process compiled.
FIRSTS: dict[str, dict[str, Any]] = {
    "first picture, plain": {"fast": False},
    "first picture, fast": {"fast": True},
    "first picture, fast, nothing compiled before": {"fast": True, "fresh": True},
}
_LIMIT = 120.0  # seconds until a process is given up
_CODE = """
import sys, time
import torch
from mmdit.bench.picture import PROMPT, random_pipeline
from mmdit.bench.random_models import quantized
model, recipe, steps, size, device, dtype, fast = sys.argv[1:]
pipe = random_pipeline(model, torch.device(device), getattr(torch, dtype))
if recipe:
    for part in (pipe.transformer, pipe.t5):
        quantized(part, recipe)
if fast == "True":
    pipe.accelerate()
size = int(size)
pipe(PROMPT, seed=0, num_inference_steps=int(steps), guidance_scale=4.5, height=size, width=size, progress=False)
print("drawn at", time.time())
"""


def first_picture(
    model: str,
    recipe: str | None,
    *,
    steps: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    fast: bool,
    fresh: bool = False,
) -> float:
    """Run a process that imports the library, makes a pipeline and draws a picture; the seconds that it takes.

    Args:
        model, recipe, steps, size, device, dtype: see `mmdit.bench.picture.pictures`.
        fast: whether the pipeline is accelerated.
        fresh: whether Triton's cache is empty.

    Raises:
        RuntimeError: the process failed, or took longer than two minutes.
    """
    options = (model, recipe or "", steps, size, device, str(dtype).removeprefix("torch."), fast)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ({"TRITON_CACHE_DIR": folder} if fresh else {})
        command = [sys.executable, "-c", _CODE, *map(str, options)]
        start = time.time()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no picture after {_LIMIT:g} s") from error
    found = [line.removeprefix("drawn at ") for line in done.stdout.splitlines() if line.startswith("drawn at ")]
    if done.returncode or not found:
        raise RuntimeError(f"the process ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
    return float(found[0]) - start
