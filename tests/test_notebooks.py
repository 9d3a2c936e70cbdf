"""Every notebook runs from top to bottom: at reduced size here, in full with MMDIT_FULL=1 (`make test-all`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


def test_there_are_five():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    quick = {} if os.environ.get("MMDIT_FULL") == "1" else {"MMDIT_QUICK": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(path)],
        env=os.environ | quick | {"MPLBACKEND": "Agg"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert not list(tmp_path.iterdir()), "a notebook leaves files behind"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_what_to_change_for_official_weights(path):
    text = path.read_text(encoding="utf-8")
    assert "With official weights, this one line changes" in text
    assert 'from_pretrained("stabilityai/stable-diffusion-3.5-large"' in text
    assert (ROOT / "notebooks" / "rendered" / f"{path.stem}.ipynb").exists()
