"""`bench speed` and the rows of accelerated pictures: every row is measured or says why not."""

import json

import pytest
import torch

from mmdit.bench import picture, speed
from mmdit.bench.first_picture import first_picture
from mmdit.cli.app import main


def test_pictures_of_accelerated_pipelines_and_first_ones(monkeypatch):
    asked = []

    def first(*given, **options):
        asked.append((*given, options["fast"], options.get("fresh", False)))
        if options.get("fresh"):
            raise RuntimeError("no picture")
        return 1.5

    monkeypatch.setattr(picture, "first_picture", first)
    few = {"steps": 1, "size": 64, "device": "cpu", "dtype": torch.float32}
    found = list(picture.pictures("demo", [], fast=True, first=True, compiled=False, **few))
    drawn = {row.name: row.seconds for row in found if "picture" in row.seconds}
    assert list(drawn) == ["mmdit float32 fast", "mmdit float32 eager"]
    assert all(set(seconds) == {"text", "steps", "decode", "picture", "turbo", "encode"} for seconds in drawn.values())
    assert asked == [("demo", None, False, False), ("demo", None, True, False), ("demo", None, True, True)]
    *_, last = picture.table(found).splitlines()
    assert "RuntimeError: no picture" in last
    assert [row.failed for row in picture.pictures("demo", ["fp8"], compiled=False, seconds=-1.0, **few)] == [
        "no time was left"
    ] * 2


def test_a_process_that_fails_says_why():
    few = {"steps": 1, "size": 64, "device": torch.device("cpu"), "dtype": torch.float32, "fast": True}
    with pytest.raises(RuntimeError, match="KeyError: 'huge'"):
        first_picture("huge", None, **few)


def test_the_speed_of_all_cases(capsys, monkeypatch, tmp_path):
    out = tmp_path / "speed.json"
    monkeypatch.setattr(speed, "_RECIPES", {"demo": (None,)})
    monkeypatch.setattr(speed, "floor_of", lambda model, recipe, *, size, **_: size / 10)
    few = ["--repeats", "1", "--device", "cpu", "--dtype", "float32", "--against", "diffusers", "-o", str(out)]
    built, theirs = [], speed.theirs

    def once(config, **options):
        built.append(options["compiled"])
        if options["compiled"]:
            raise RuntimeError("no compiler here")
        return theirs(config, **options)

    monkeypatch.setattr(speed, "theirs", once)
    assert main(["bench", "speed", "--cases", "demo:64:2", "demo:32:1", *few]) == 0
    rows = json.loads(out.read_text())
    names = ["mmdit float32 fast", "diffusers eager float32"]
    assert [row["name"] for row in rows if row["timed"]] == [name for name in names for _ in range(2)]
    assert {row["timed"]["floor"] for row in rows if row["timed"]} == {6.4, 3.2}
    assert built == [False, True, True]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 2 * 3
    assert sum("no compiler here" in line for line in table) == 2
    assert [row.failed for row in speed.speed([speed.Case("demo", 64, 1)], seconds=-1.0, device="cpu")] == [
        "no time was left"
    ]


@pytest.mark.parametrize("case", ["demo", "huge:64:1", "demo:63:1", "demo:64:0", "demo:64:-1"])
def test_cases_that_cannot_be(case, capsys):
    assert main(["bench", "speed", "--cases", case, "--device", "cpu"]) == 2
    assert case.split(":")[0] in capsys.readouterr().err
