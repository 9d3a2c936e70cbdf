"""`mmdit bench parallel`: the table of rank 0, rows that fail, and the prediction."""

import contextlib
import io

import pytest
import torch

import mmdit
from mmdit.bench import links, parallel
from mmdit.bench.links import Link
from mmdit.bench.parallel import Row, predicted_step, table
from mmdit.cli import benches, main
from mmdit.runtime.mesh import Layout
from processes import in_processes, values

LINK = Link(300e9, 300e9, 1e-5)
LARGE = {"tokens": 4096, "text": 333, "heads": 38, "link": LINK, "exchanges": 76}


@pytest.fixture(scope="module", autouse=True)
def built():
    """The embedded model, loaded once; the processes are forked with it."""
    pipe = mmdit.Pipeline.demo()
    assert benches.parallel is parallel  # imported here once, not in every process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_TURBO_STEPS", 1)
        patch.setattr(parallel, "_build", lambda setting: pipe)
        yield


def test_it_prints_a_table_on_the_first_rank_alone():
    options = ["--model", "demo", "--size", "32", "--steps", "1", "--repeats", "1", "--prompts", "2", "--quant", "none"]

    def work(rank):

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["bench", "parallel", *options, "--device", "cpu", "--dtype", "float32", "--only", "Turbo"])
        return code, out.getvalue()

    (first, said), (second, nothing) = values(in_processes(2, work, limit=60))
    assert (first, second, nothing) == (0, 0, "")
    rows = [line.split("|") for line in said.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == ["Turbo, 1 steps, one GPU", "Turbo, cfg 1 x sequence 2"]
    assert all(float(cell) > 0 for row in rows for cell in row[2:6])
    assert float(rows[1][-2]) < 1e-4  # difference of the latents
    assert float(rows[1][11]) > 0  # MB sent a step


def test_the_links():
    """Three ranks: a row for each way that works there, and why stores do not; late sizes are not measured."""

    def work(rank):
        found = [list(links.links(torch.device("cpu"), seconds)) for seconds in (25, -1)]
        return found, links.link_of(torch.device("cpu"))

    for (rows, late), link in values(in_processes(3, work)):
        assert [row[0] for row in rows] == ["stores", "all_to_all of tensors", "all_to_all_single", "gather"]
        assert "cpu" in rows[0][1]
        assert all(int(row[2].split()[2]) > 0 for row in rows[1:])  # microseconds
        assert all(row[2] == "not measured" for row in late[1:])
        assert all(len(row) == 2 + len(links.SIZES) for row in rows)
        assert link.gather > 0
        assert link.way.startswith("gloo")


def test_rows_that_failed_and_their_comparison():
    rows = [
        Row("one", seconds={"steps": 2.0, "text": 0.1, "decode": 0.1, "picture": 2.2}, steps=20),
        Row(
            "two",
            "one",
            seconds={"steps": 1.0, "text": 0.1, "decode": 0.1, "picture": 1.2},
            steps=20,
            exchanged=3 * 10**8,
        ),
        Row("three", "one", failed="ValueError: no memory"),
    ]
    lines = table(rows, LINK).splitlines()[2:]
    assert "| 1.833" in lines[1]
    assert "| 50.00" in lines[1]
    assert "| 1.00 " in lines[1]  # ms at the link's speed
    assert "no memory" in lines[2]


def test_a_row_that_fails_does_not_end_the_others():
    setting = parallel.Setting("demo", None, 32, 1, 2, 1, torch.device("cpu"), torch.float32)

    def plans(*_):
        yield "bad", "", lambda row, latents: (_ for _ in ()).throw(ValueError("no memory\nis left"))
        yield "good", "", lambda row, latents: row.seconds.update(picture=1.0)

    def work(rank):
        parallel._plans = plans
        found = list(parallel.bench(setting, LINK))
        late = list(parallel.bench(setting, LINK, seconds=-1))
        return [row.failed for row in found], [row.failed for row in late]

    for found, late in values(in_processes(2, work)):
        assert found == ["ValueError: no memory", ""]
        assert all("not measured" in one for one in late)


def test_the_prediction():
    assert predicted_step(0.05, Layout(1, 1), exchanged=0, **LARGE) == pytest.approx(0.05)
    two = predicted_step(0.05, Layout(1, 2), exchanged=0, **LARGE)
    assert 0.025 < two < 0.035
    sent = predicted_step(0.05, Layout(1, 2), exchanged=3 * 10**9, **LARGE)
    assert sent - two == pytest.approx(0.01)
    four = predicted_step(0.05, Layout(1, 4), exchanged=0, **LARGE)  # the rank with ten of 38 heads is the slowest
    assert four > 0.05 * (0.6 * (83 + 1024) / 4429 + 0.4 * 10 / 38)
