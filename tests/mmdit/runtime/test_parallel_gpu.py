"""Two GPUs: NCCL and CUDA graphs give what one GPU gives, and a rank that fails or dies ends the other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skips import SKIPS

SCRIPT = Path(__file__).parents[2] / "parallel_on_gpus.py"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=SKIPS["two gpus"]),
]


def run(case, limit=100):
    """Exit code and output of each rank; started without torchrun, which would end one rank because of the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, case],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=limit) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def test_two_gpus_draw_what_one_draws():
    for code, out, err in run("equal"):
        assert code == 0, err
        found = json.loads(out.splitlines()[-1])
        limits = {"float32": 1e-4, "16 bits fast": 0.05, "fp8 fast": 0.2}
        over = {name: error for name, error in found.items() if not error < limits[name.split(",")[0]]}
        assert over == {}, found
        print(json.dumps(found, indent=1))


@pytest.mark.parametrize("layout", ["cfg", "sequence", "kernels"])
@pytest.mark.parametrize("fault", ["killed", "raised"])
def test_a_fault_on_one_gpu_ends_both(fault, layout):
    (first, out, err), (second, *_) = run(f"{fault}-{layout}")
    assert second == (-9 if fault == "killed" else 1)
    assert first == 1
    reason = "rank 1 failed: its process ended" if fault == "killed" else "rank 1 failed: OverflowError"
    assert reason in err, err
    seconds = float(out.split()[-2]) if out else 10.0  # ended by the lifeline itself, after its grace
    assert seconds < 15
