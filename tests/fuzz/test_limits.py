"""Small inputs that once took gigabytes, in a process whose memory the system limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skips import SKIPS

LIMITED = Path(__file__).parents[1] / "limited.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason=SKIPS["memory"])
def test_no_small_input_takes_much_memory():
    """Each is read, or refused by an error of ours; an error of memory is none. One process for all of them."""
    done = subprocess.run(
        [sys.executable, str(LIMITED)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert done.returncode == 0, done.stderr[-2000:]
    ours = ("read", "ValueError", "CheckpointError", "SettingsError", "TokenizerFileError")
    assert {name: said for name, said in found.items() if not said.startswith(ours) or len(said) > 1000} == {}
    assert len(found) > 45
    assert sum(said == "read" for said in found.values()) < 25
