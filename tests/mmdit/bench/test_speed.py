"""`bench speed` and the rows of accelerated pictures: every row is measured or says why not."""

import json

import pytest
import torch

from mmdit.bench import first_picture as first_picture_module
from mmdit.bench import picture, speed
from mmdit.bench.first_picture import _CODE
from mmdit.cli.app import main
from mmdit.runtime.attention import Choice, torch_attention
from mmdit.runtime.compiled import ACCELERATED


def test_pictures_of_accelerated_pipelines_and_first_ones(monkeypatch):
    asked = []

    def first(*given, **options):
        asked.append((*given, options["fast"], options.get("fresh", False)))
        if options.get("fresh"):
            raise RuntimeError("no picture")
        return 1.5

    monkeypatch.setattr(picture, "first_picture", first)
    monkeypatch.setattr(picture, "_FEW_STEPS", 1)
    few = {"steps": 1, "size": 32, "device": "cpu", "dtype": torch.float32}
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


def test_the_first_picture_of_a_process(monkeypatch):
    few = {"steps": 1, "size": 64, "device": torch.device("cpu"), "dtype": torch.float32, "fast": True}
    words = '["demo", "", "1", "64", "cpu", "float32", "True"]'
    said = "import os, sys, time\nprint('noise'); time.sleep(0.2)\nprint('drawn at', time.time())\n"
    said += f"assert sys.argv[1:] == {words}\nassert os.listdir(os.environ['TRITON_CACHE_DIR']) == []"
    monkeypatch.setattr(first_picture_module, "_CODE", said)
    assert 0.2 < first_picture_module.first_picture("demo", None, fresh=True, **few) < 30
    monkeypatch.setattr(first_picture_module, "_CODE", "raise KeyError('huge')")
    with pytest.raises(RuntimeError, match="KeyError: 'huge'"):
        first_picture_module.first_picture("huge", None, **few)
    compile(_CODE, "first picture", "exec")


def test_the_speed_of_all_cases(capsys, monkeypatch, tmp_path):
    out = tmp_path / "speed.json"
    monkeypatch.setattr(speed, "_RECIPES", {"demo": (None,)})
    monkeypatch.setattr(speed, "TEXT", 8)
    monkeypatch.setattr(speed, "floor_of", lambda model, recipe, *, size, **_: size / 10)
    few = ["--repeats", "1", "--device", "cpu", "--dtype", "float32", "--against", "diffusers", "-o", str(out)]
    built = []

    def once(config, **options):
        built.append(options["compiled"])
        if options["compiled"]:
            raise RuntimeError("no compiler here")
        return speed.ours(config, recipe=None, compiled=False, device=options["device"], dtype=options["dtype"])

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


def test_choices_of_attention_stand_above_the_table():
    case = speed.Case("demo", 64, 2)
    built = speed.ours(speed.MODELS["demo"], recipe=None, compiled=False, fast=True, device="cpu", dtype=torch.float32)
    (fast,) = ACCELERATED[built[0]]
    for tokens in (speed.TEXT + 16, 16, 5):
        choice = Choice("cudnn", torch_attention, {"cudnn": 0.5}, {})
        fast.attention.choices[torch.Size((2, tokens, 4, 64)), torch.float32, torch.device("cpu")] = choice
    found = speed._attention(built[0], case)
    assert [one.split(":")[0] for one in found] == [f"[2, {count}, 4, 64]" for count in (speed.TEXT + 16, 16)]
    lines = speed.table([speed.Row(case, "fast", None, "failed", found)]).splitlines()
    assert len(lines) == 2 + 1 + 3
    assert "cudnn 0.500 ms" in lines[0]
