"""A group of processes that compute together over gloo: forked, so that none has to import torch again."""

import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import config as jaxtyping_config


@dataclass
class Ended:
    """How a process has ended."""

    value: Any = None  # what the work returned
    error: str = ""  # the type and message of what it raised
    code: int | None = None  # the exit code; negative is a signal
    seconds: float = 0.0
    trace: str = ""


def in_processes(world: int, work: Callable[[int], Any], limit: float = 60.0) -> list[Ended]:
    """Run `work(rank)` in `world` processes that have started torch.distributed; all are killed after `limit` seconds.

    Raises:
        TimeoutError: a process has not ended in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        children = [_fork(rank, world, work, Path(folder)) for rank in range(world)]
        found: dict[int, Ended] = {}
        while len(found) < world and time.monotonic() - start < limit:
            for rank, child in enumerate(children):
                if rank not in found and (status := os.waitpid(child, os.WNOHANG))[0]:
                    found[rank] = _ended(Path(folder) / f"{rank}.pickle", os.waitstatus_to_exitcode(status[1]))
                    found[rank].seconds = time.monotonic() - start
            time.sleep(0.005)
        for rank in set(range(world)) - set(found):
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)
    if len(found) < world:
        raise TimeoutError(f"of {world} processes, {sorted(set(range(world)) - set(found))} ran for {limit} seconds")
    return [found[rank] for rank in range(world)]


def values(ended: list[Ended]) -> list[Any]:
    """The values of processes that have all succeeded."""
    for rank, one in enumerate(ended):
        assert not one.error and one.code == 0, f"rank {rank}, exit code {one.code}: {one.trace or one.error}"
    return [one.value for one in ended]


def _fork(rank: int, world: int, work: Callable[[int], Any], folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of forks of processes with threads
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = _work(rank, world, work, folder)
    finally:
        os._exit(code)  # nothing of pytest runs in the child


def _work(rank: int, world: int, work: Callable[[int], Any], folder: Path) -> int:
    torch.set_num_threads(1)
    jaxtyping_config.update("jaxtyping_disable", True)  # the parent has checked signatures
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    ended = Ended()
    try:
        ended.value = work(rank)
    except BaseException as error:
        ended.error, ended.trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    (folder / f"{rank}.part").write_bytes(pickle.dumps(ended))
    (folder / f"{rank}.part").rename(folder / f"{rank}.pickle")
    return 1 if ended.error else 0


def _ended(path: Path, code: int) -> Ended:
    ended = pickle.loads(path.read_bytes()) if path.exists() else Ended()
    ended.code = code
    return ended
