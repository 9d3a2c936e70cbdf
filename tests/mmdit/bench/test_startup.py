"""`python -m mmdit.bench.startup`: stages of a process, and whole processes."""

import sys

import pytest
from PIL import Image

from mmdit.bench import startup

MARKS = """
import time
for i in range(7):
    print("mark", 0.5 * i, time.time())
"""


def test_the_table_has_every_stage_and_whole_processes(monkeypatch, capsys):
    asked, run = [], startup._run

    def faked(words, environment):
        asked.append((words[1], environment.get("OMP_NUM_THREADS")))
        return run(words if words[0] == "-c" else ["-c", "pass"], environment)

    monkeypatch.setattr(startup, "_run", faked)
    monkeypatch.setattr(startup, "_STAGED", MARKS)
    monkeypatch.setattr(startup, "_LIBRARY", "pass")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    startup.main(["--repeats", "2", "--steps", "1"])
    rows = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [row[0].strip() for row in rows]
    assert tuple(names[:8]) == startup.STAGES
    assert len(names) == 11
    assert [float(row[1]) for row in rows[:7]] == [0.0, *[0.5] * 6]
    assert asked == [(MARKS, "1")] * 2 + [("pass", "2")] * 2 + [("mmdit", "2")] * 4


def test_a_process_that_fails_is_said(monkeypatch):
    monkeypatch.setattr(startup, "_STAGED", "raise KeyError('torch')")
    with pytest.raises(RuntimeError, match="KeyError: 'torch'"):
        startup.main(["--repeats", "1"])


@pytest.mark.parametrize(("code", "marks"), [("_STAGED", 7), ("_LIBRARY", 0)])
def test_the_code_of_the_processes_draws(monkeypatch, capsys, tmp_path, code, marks):
    path = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["-c", "a red ring", str(path), "1"])
    exec(compile(getattr(startup, code), code, "exec"), {})
    assert capsys.readouterr().out.count("mark ") == marks
    with Image.open(path) as picture:
        assert picture.size == (128, 128)


def test_a_system_without_the_count_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(startup.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ImportError, match=r"resource.*Windows"):
        startup.main([])
