"""Memory of quantizing a file and of loading the result: `python tests/measure_quantizing.py FOLDER` (16 GB of fp16).

Each runs in a process of its own, forked from one that has imported everything, and reports by how much its RssAnon
grew at most.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import measure_loading


def anonymous() -> int:
    """This process's RssAnon in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def quantize(source: Path, target: Path) -> int:
    """What `mmdit quantize` does."""
    from mmdit.checkpoints.quantize import quantize_checkpoint

    return quantize_checkpoint(source, target, "fp8-tensor", progress=False).layers


def load(source: Path, target: Path) -> int:
    """What was written, kept in float8."""
    from mmdit import load_mmdit

    return sum(tensor.nbytes for tensor in load_mmdit(target).state_dict().values())


ACTIONS = {"quantize": quantize, "load": load}


def imports(source: Path) -> None:
    """What both actions load: imports are not what is measured, and torch has some on first use."""
    import mmdit.checkpoints.quantize
    from mmdit.checkpoints.load import empty, open_model
    from mmdit.checkpoints.locate import locate

    assert mmdit.checkpoints.quantize
    importlib.import_module("torch.distributed.tensor")  # with the first subclass of Tensor
    empty(open_model(locate(source), "transformer"))


def measure(name: str, source: Path, target: Path) -> dict:
    stop, peak, before = threading.Event(), [0], anonymous()
    watcher = threading.Thread(target=measure_loading.peak_anonymous, args=(stop, peak))
    watcher.start()
    start = time.perf_counter()
    result = ACTIONS[name](source, target)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"seconds": seconds, "grown": max(peak[0], anonymous()) - before, "peak": peak[0], "result": result}


def undisturbed(source: Path, target: Path) -> dict[str, dict]:
    """`measure` of every action, one after the other, each in a process that has done nothing before."""
    command = [sys.executable, __file__, "measure", str(source), str(target)]
    lines = subprocess.check_output(command, text=True).splitlines()
    return dict(json.loads(line) for line in lines if line.startswith("["))


def measure_all(source: Path, target: Path) -> None:
    """Print a line of JSON for every action: its name, and what it took."""
    imports(source)
    for name in ACTIONS:
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0, f"{name} has failed"
        else:
            print(json.dumps([name, measure(name, source, target)]), flush=True)
            os._exit(0)


def main() -> None:
    if sys.argv[1] == "measure":
        measure_all(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    source = measure_loading.make(Path(sys.argv[1]) / measure_loading.MANIFEST)
    target = source.with_name("quantized.safetensors")
    target.unlink(missing_ok=True)
    for name, found in undisturbed(source, target).items():
        sizes = ", ".join(f"{path.stat().st_size / 1e9:.2f}" for path in (source, target))
        print(
            f"{name:10} {found['seconds']:6.1f} s, peak RssAnon {found['peak'] / 1e9:.2f} GB, "
            f"of it {found['grown'] / 1e9:.2f} grown (files {sizes} GB)",
            flush=True,
        )


if __name__ == "__main__":
    main()
