"""Two GPUs draw what one GPU draws, over NCCL, stores into the other GPU and graphs; a failure on one ends both."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import mmdit
from skips import SKIPS

SCRIPT = Path(__file__).parents[2] / "parallel_on_gpus.py"
SOURCES = Path(mmdit.__file__).parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=SKIPS["two gpus"]),
]


class Ended(NamedTuple):
    """How a rank ended: its exit code, which is negative for a signal, None where it did not end, and its output."""

    code: int | None
    out: str
    err: str


def run(case, folder, limit=45):
    """Both ranks, started without torchrun, which would end one rank because of the other.

    They write into files: a full pipe would stop them, and what a rank said is known where it does not end in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    paths = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    ranks = []
    try:
        for rank in range(2):
            with (folder / f"out{rank}").open("wb") as out, (folder / f"err{rank}").open("wb") as err:
                of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(
                    subprocess.Popen([sys.executable, SCRIPT, case], env=common | of_rank, stdout=out, stderr=err)
                )
        end = time.monotonic() + limit
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            time.sleep(0.1)
        codes = [rank.returncode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [
        Ended(code, *((folder / f"{name}{i}").read_text() for name in ("out", "err"))) for i, code in enumerate(codes)
    ]


def said(ranks):
    """What the ranks said last, for a test that fails."""
    return "\n".join(
        f"--- rank {i} ended with {rank.code}, and wrote:\n{rank.out[-3000:]}\n{rank.err[-4000:]}"
        for i, rank in enumerate(ranks)
    )


def test_two_gpus_draw_what_one_draws(tmp_path):
    ranks = run("equal", tmp_path, limit=90)
    assert [rank.code for rank in ranks] == [0, 0], said(ranks)
    for rank in ranks:
        found = json.loads(rank.out.splitlines()[-1])
        over = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
        print(json.dumps(found, indent=1))
        assert over == {}, said(ranks)


def test_each_gpu_keeps_a_budget(tmp_path):
    ranks = run("budget", tmp_path, limit=90)
    assert [rank.code for rank in ranks] == [0, 0], said(ranks)
    for rank in ranks:
        found = json.loads(rank.out.splitlines()[-1])
        assert {name: pair for name, pair in found.items() if not pair[0] <= pair[1]} == {}, said(ranks)


@pytest.mark.parametrize("layout", ["cfg", "sequence", "kernels"])
@pytest.mark.parametrize("fault", ["killed", "raised"])
def test_a_fault_on_one_gpu_ends_both(fault, layout, tmp_path):
    ranks = run(f"{fault}-{layout}", tmp_path)
    assert [rank.code for rank in ranks] == [1, -9 if fault == "killed" else 1], said(ranks)
    reason = "rank 1 failed: its process ended" if fault == "killed" else "rank 1 failed: OverflowError"
    first = ranks[0]
    assert reason in first.err, said(ranks)
    times = re.findall(r"^ended after ([0-9.]+) s$", first.out, re.MULTILINE)
    seconds = float(times[-1]) if times else 10.0  # ended by the lifeline itself, after its grace
    assert seconds < 15, said(ranks)
