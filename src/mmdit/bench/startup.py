"""Seconds from the start of a process to the picture of the embedded model on a CPU, by stage.

    python -m mmdit.bench.startup

Each process is started several times, and the least of the times counts: other work of the machine only adds to them.
CPU seconds count all threads, waiting in a loop included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mmdit.utils import markdown_table, whole

PROMPT = "a large red circle above a blue star, on a white background"
STAGES = ("start, import of torch", "import of the library", "loading", "text", "steps", "decoding", "PNG", "end")
_LIMIT = 120.0  # seconds until a process is given up
_STAGED = """
import sys, time
def mark():
    print("mark", time.process_time(), time.time())
import mmdit
from mmdit._imports import without_collections
with without_collections():
    import torch
mark()
pipe_type = mmdit.Pipeline
mark()
prompt, path, steps = sys.argv[1:]
pipe = pipe_type.demo(device="cpu")
mark()
with torch.no_grad():
    cond, uncond = pipe.encode(prompt), pipe.encode("")
    mark()
    for step in pipe.sample(cond, uncond, pipe.noise(1), num_inference_steps=int(steps)):
        pass
    mark()
    pixels = pipe.decode(step.x)
mark()
from mmdit.pipeline.images import to_pil
to_pil(pixels, pipe.profile.to_uint8)[0].save(path)
mark()
"""
_LIBRARY = """
import sys
from mmdit import Pipeline
prompt, path, steps = sys.argv[1:]
Pipeline.demo(device="cpu")(prompt, seed=1, num_inference_steps=int(steps), progress=False).images[0].save(path)
"""


class Seconds(NamedTuple):
    """Seconds of a process or a stage of it."""

    cpu: float
    wall: float


def startup(repeats: int, steps: int = 28) -> Iterator[tuple[str, Seconds]]:
    """The least seconds of each stage with one thread, then those of whole processes.

    Args:
        repeats: how often each process runs.
        steps: steps of the drawing.

    Raises:
        RuntimeError: a process failed, or took longer than two minutes.
    """
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    found = [_stages(steps, one) for _ in range(repeats)]
    for stage, seconds in zip(STAGES, zip(*found, strict=True), strict=True):
        yield stage, _least(seconds)
    generate = ["-m", "mmdit", "generate", PROMPT, "--seed", "1", "--device", "cpu", "--quiet", "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "picture.png"))
        wholes: dict[str, Sequence[str]] = {
            "`Pipeline.demo()`, whole": ["-c", _LIBRARY, PROMPT, path, str(steps)],
            "`mmdit generate`, whole": [*generate, "-o", path],
            "`mmdit generate --threads 1`, whole": [*generate, "-o", path, "--threads", "1"],
        }
        for name, words in wholes.items():
            yield name, _least([_run(words, os.environ)[0] for _ in range(repeats)])


def _least(found: Sequence[Seconds]) -> Seconds:
    return Seconds(min(one.cpu for one in found), min(one.wall for one in found))


def _stages(steps: int, environment: Mapping[str, str]) -> list[Seconds]:
    """The seconds of each stage of one process."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        words = ["-c", _STAGED, PROMPT, str(Path(folder, "picture.png")), str(steps)]
        all_of_it, said = _run(words, environment)
    marks = [Seconds(*map(float, line.split()[1:])) for line in said.splitlines() if line.startswith("mark ")]
    times = [Seconds(0.0, start), *marks, Seconds(all_of_it.cpu, start + all_of_it.wall)]
    return [Seconds(b.cpu - a.cpu, b.wall - a.wall) for a, b in pairwise(times)]


def _run(words: Sequence[str], environment: Mapping[str, str]) -> tuple[Seconds, str]:
    """The seconds of a Python process, from its start to its end, and what it printed."""
    before, start = _children_cpu(), time.time()
    command = [sys.executable, *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no picture after {_LIMIT:g} s") from error
    wall, after = time.time() - start, _children_cpu()
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
    return Seconds(after - before, wall), done.stdout


def _children_cpu() -> float:
    """CPU seconds of all processes that this one has started and that have ended."""
    try:
        import resource
    except ImportError as error:
        raise ImportError(
            "this bench counts CPU seconds by Python's module `resource`, which Windows does not have"
        ) from error
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.bench.startup", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="how often each process runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=28, help="steps of the drawing (default: %(default)s)")
    options = parser.parse_args(arguments)
    repeats, steps = whole("--repeats", options.repeats, 1), whole("--steps", options.steps, 1)
    if sys.dont_write_bytecode:
        sys.stderr.write("PYTHONDONTWRITEBYTECODE is set: what processes compile may be measured too\n")
    rows = [(name, f"{one.cpu:.2f}", f"{one.wall:.2f}") for name, one in startup(repeats, steps)]
    sys.stdout.write("\n".join(markdown_table(["", "CPU s", "wall s"], rows)) + "\n")


if __name__ == "__main__":
    main()
