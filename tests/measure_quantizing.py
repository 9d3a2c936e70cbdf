"""Memory of quantizing a file and of loading the result: `python tests/measure_quantizing.py FOLDER` (16 GB of fp16).

Each runs in a process of its own and reports by how much its RssAnon grew at most.
"""

import importlib
import json
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


def measure(name: str, source: Path, target: Path) -> dict:
    import mmdit.checkpoints.quantize
    from mmdit.checkpoints.load import empty, open_model
    from mmdit.checkpoints.locate import locate

    assert mmdit.checkpoints.quantize
    # Imports are not what is measured, and torch has some on first use: this one with the first subclass of Tensor.
    importlib.import_module("torch.distributed.tensor")
    empty(open_model(locate(source), "transformer"))
    stop, peak, before = threading.Event(), [0], anonymous()
    watcher = threading.Thread(target=measure_loading.peak_anonymous, args=(stop, peak))
    watcher.start()
    start = time.perf_counter()
    result = ACTIONS[name](source, target)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"seconds": seconds, "grown": max(peak[0], anonymous()) - before, "peak": peak[0], "result": result}


def in_own_process(name: str, source: Path, target: Path) -> dict:
    """`measure`, undisturbed."""
    command = [sys.executable, __file__, name, str(source), str(target)]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def main() -> None:
    if sys.argv[1] in ACTIONS:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    source = measure_loading.make(Path(sys.argv[1]) / measure_loading.MANIFEST)
    target = source.with_name("quantized.safetensors")
    target.unlink(missing_ok=True)
    for name in ACTIONS:
        found = in_own_process(name, source, target)
        sizes = ", ".join(f"{path.stat().st_size / 1e9:.2f}" for path in (source, target))
        print(
            f"{name:10} {found['seconds']:6.1f} s, peak RssAnon {found['peak'] / 1e9:.2f} GB, "
            f"of it {found['grown'] / 1e9:.2f} grown (files {sizes} GB)",
            flush=True,
        )


if __name__ == "__main__":
    main()
