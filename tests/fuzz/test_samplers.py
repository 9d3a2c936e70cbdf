"""Generated sigmas, schedules, guidance arguments, solver options and scheduler configs: see `samplers_cases`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import samplers
from fuzzing import SECONDS

SCRIPT = Path(__file__).with_name("samplers_cases.py")


def test_every_input_works_or_is_refused_by_one_of_our_errors():
    """In a process of its own, because in this one signatures are checked, which would refuse first."""
    source = str(Path(samplers.__file__).parents[1])
    seed = "0" if SECONDS < 30 else str(os.getpid())  # the same cases in every short run
    run = subprocess.run(
        [sys.executable, str(SCRIPT), seed, str(SECONDS)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=SECONDS * 3 + 120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    counts = json.loads(run.stdout)
    assert counts["cases"] > counts["ran"] > 30, "some are refused, and some are not"
