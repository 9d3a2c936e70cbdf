"""`mmdit generate` in several processes: who draws and writes what, and how a fault ends them. Forked, over gloo."""

import contextlib
import io
import os
import signal

import numpy as np
import pytest
from PIL import Image

import mmdit
from full import in_full
from mmdit.cli import drawing, main
from mmdit.pipeline import parallelize
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.settings import read_settings
from processes import in_processes

PROMPTS = ["a red circle", "a blue star", "a green square"]
QUICK = ["--steps", "1", "--height", "32", "--width", "32", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """The embedded model, loaded once; the processes are forked with it."""
    pipe = mmdit.Pipeline.demo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "load", lambda *_, **__: pipe)
        yield pipe


def run(arguments, world=2, before=lambda rank: None):
    """Exit code, stdout and stderr of each process."""

    def work(rank):
        before(rank)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["generate", *arguments, *QUICK])
        signal.alarm(0)
        return code, out.getvalue(), err.getvalue()

    return in_processes(world, work, limit=40)


def only(layout):
    """Fail in this process where pictures are split in another layout."""
    make = parallelize.PipelineParallel

    def checked(pipe, found, *others):
        assert tuple(found) == layout
        return make(pipe, found, *others)

    parallelize.PipelineParallel = checked


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_prompts_are_split_over_ranks(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    assert main(["generate", "--prompts", str(file), "-o", str(tmp_path / "one.png"), *QUICK]) == 0
    ended = run(["--prompts", str(file), "--data-parallel", "-o", str(tmp_path / "two.png")])
    said = [one.value[1] for one in ended]
    assert [one.value[0] for one in ended] == [0, 0]
    assert ["two-0" in said[0], "two-1" in said[0], "two-2" in said[0]] == [True, False, True]
    assert "picture 2 of 3" in said[1]
    for number, prompt in enumerate(PROMPTS):
        assert np.array_equal(pixels(tmp_path / f"two-{number}.png"), pixels(tmp_path / f"one-{number}.png"))
        assert read_settings(tmp_path / f"two-{number}.png")["prompt"] == prompt


@pytest.mark.parametrize(
    ("mode", "scale", "layout"), [("cfg", "7", (2, 1)), ("auto", "1", (1, 2))], ids=["cfg", "auto"]
)
def test_a_picture_is_split_and_the_first_rank_writes_it(tmp_path, mode, scale, layout):
    one, two, options = tmp_path / "one.png", tmp_path / "two.png", [PROMPTS[0], "--cfg", scale]
    assert main(["generate", *options, "-o", str(one), *QUICK]) == 0
    ended = run([*options, "--parallel", mode, "-o", str(two)], before=lambda _: only(layout))
    assert [one.value[0] for one in ended] == [0, 0]
    assert "wrote" in ended[0].value[1]
    assert ended[1].value[1] == ended[1].value[2] == ""
    assert abs(pixels(two) - pixels(one)).max() <= 1


def test_names_that_nobody_has_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture-0.png").touch()
    ended = run([*PROMPTS, "--data-parallel"])
    assert [one.value[0] for one in ended] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"picture-{number}.png" for number in range(4)]


FAULTS = [(fault, mode) for fault in ("killed", "raised") for mode in ("--parallel cfg", "--data-parallel")]


@pytest.mark.parametrize(("fault", "mode"), in_full(FAULTS, FAULTS[1:3]))
def test_a_fault_on_one_rank(tmp_path, mode, fault, monkeypatch):
    def break_one(rank):
        decode = Pipeline.decode

        def fails(*arguments, **options):
            if rank == 1 and fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1:
                raise ValueError("a broken decoder")
            return decode(*arguments, **options)

        Pipeline.decode = fails  # in this process alone

    first, second = run([*PROMPTS * 20, *mode.split(), "-o", str(tmp_path / "p.png")], before=break_one)
    if fault == "killed":
        assert second.code == -9
    else:
        assert second.value[0] == 1
        assert "a broken decoder" in second.value[2]
    code, _, err = first.value
    assert code == 1
    assert "rank 1 failed" in err
    assert ("its process ended" if fault == "killed" else "a broken decoder") in err
    assert first.seconds < 20


def test_a_number_of_processes_that_does_not_fit(tmp_path):
    for one in run([PROMPTS[0], "--parallel", "cfg", "-o", str(tmp_path / "p.png")], world=3):
        assert one.value[0] == 1
        assert "mesh of 2 processes" in one.value[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parallel", "cfg"], "torchrun"),
        (["--data-parallel"], "torchrun"),
        (["--parallel", "cfg", "--data-parallel"], "both given"),
    ],
)
def test_without_torchrun(options, said, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["generate", PROMPTS[0], *options, *QUICK]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "-", "--data-parallel"], "standard input"),
        (["--prompts", "-", "--parallel", "cfg"], "standard input"),
        ([PROMPTS[0], "--grid", "--data-parallel"], "--grid"),
    ],
)
def test_options_that_processes_cannot_share(arguments, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", *arguments, *QUICK]) == 2
    assert said in capsys.readouterr().err
