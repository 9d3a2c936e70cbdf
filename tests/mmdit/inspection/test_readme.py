"""The guide of `mmdit.inspection` runs as it is written, from top to bottom, and names every file of the room."""

import re
from dataclasses import replace
from pathlib import Path

from mmdit import PROFILES

ROOM = Path(__file__).parents[3] / "src" / "mmdit" / "inspection"
TEXT = (ROOM / "README.md").read_text(encoding="utf-8")


def test_snippets_run(small_pictures, monkeypatch):
    diffusers = PROFILES["diffusers"]
    monkeypatch.setitem(PROFILES, "diffusers", replace(diffusers, text=replace(diffusers.text, t5_length=77)))
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(snippet, names)  # our own text
    assert names["seen"].labelled("joint_blocks.2.attend.pattern").dims[:3] == ("step", "branch", "sample")
    assert names["maps"].names == ("red", "circle")
    assert names["concepts"].maps().labels("concept") == ("circle", "star", "background")


def test_every_file_is_on_the_map():
    files = {path.name for path in ROOM.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", TEXT.split("## The files")[1])) == files
