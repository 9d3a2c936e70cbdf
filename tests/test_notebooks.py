"""Every notebook runs from top to bottom: at reduced size here, in full with MMDIT_FULL=1 (`make test-all`)."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from full import FULL

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


def test_they_are_numbered():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 9


def in_a_process(path, folder):
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(path)],
        env=os.environ | {"MPLBACKEND": "Agg"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def here(path, monkeypatch, folder):
    """In this process, which has everything imported already."""
    import matplotlib.pyplot as plt

    monkeypatch.setenv("MMDIT_QUICK", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(folder)
    try:
        with plt.ioff():
            runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_grad_enabled(True)
        plt.close("all")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as for a script: torch's own, of __array__
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch, request):
    if FULL:
        in_a_process(path, tmp_path)
    else:
        request.getfixturevalue("small_pictures")
        request.getfixturevalue("few_tokens")
        here(path, monkeypatch, tmp_path)
    assert not list(tmp_path.iterdir()), "a notebook leaves files behind"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_what_to_change_for_official_weights(path):
    text = path.read_text(encoding="utf-8")
    assert "With official weights, this one line changes" in text
    assert 'from_pretrained("stabilityai/stable-diffusion-3.5-large"' in text
    assert (ROOT / "notebooks" / "rendered" / f"{path.stem}.ipynb").exists()
