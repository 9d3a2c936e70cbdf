"""Time and memory of loading a full-size file: `python tests/measure_loading.py FOLDER [BLOCKS]`.

Makes a 16 GB file in the folder, or a smaller one with the first so many blocks. Prints, for SD3.5-Large at fp16:
reading the file into one buffer, and into memory that is kept; loading at the stored dtype; a plain read-and-cast loop
over the same tensors; loading with that cast; and reading all tensors by safetensors, at the stored dtype and cast, by
one thread and by two as we do. Each runs in a process of its own, with the page cache dropped before it where the
system allows that (else it says "as it is"), then with the file in the cache, and reports its peak RssAnon.
"""

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import golden

LAST = 37  # the last block of SD3.5-Large
MANIFEST = "sd3.5_large.safetensors"


def make(path: Path, blocks: int) -> Path:
    """A file with the official keys and shapes and random fp16 numbers, of the first so many blocks."""
    from mmdit.checkpoints.lazy import LazyTensor
    from mmdit.checkpoints.safetensors_io import write_tensors

    if not path.exists():
        entries = golden.manifest(MANIFEST)["tensors"].items()
        shapes = {name: entry["shape"] for key, entry in entries if (name := _kept(key, blocks))}
        write_tensors(path, {key: _random(tuple(shape), LazyTensor) for key, shape in shapes.items()}, {"format": "pt"})
    return path


def _kept(key: str, blocks: int) -> str | None:
    """The name of a tensor in a model of so many blocks, whose last one has shapes of its own; None if it has none."""
    found = re.search(r"joint_blocks\.(\d+)\.", key)
    block = -1 if found is None else int(found.group(1))
    last = block == LAST
    return key.replace(f".{LAST}.", f".{blocks - 1}.", 1) if last else key if block < blocks - 1 else None


def _random(shape, lazy):
    return lazy(shape, torch.float16, lambda dtype, device: torch.rand(shape).to(device, dtype))


def plain_read(path: Path) -> int:
    """The file once, into one reused buffer."""
    buffer, total = bytearray(32 << 20), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def plain_read_kept(path: Path) -> int:
    """The file once, into memory that is kept, as a loaded model is: fresh pages cost time of their own."""
    memory = torch.empty(path.stat().st_size, dtype=torch.uint8)
    rest = memoryview(memory.numpy())
    with path.open("rb", buffering=0) as file:
        while rest:
            rest = rest[file.readinto(rest[: 32 << 20]) :]
    return len(memory)


def read_and_cast(path: Path) -> int:
    """Every tensor of the file read and cast, nothing else."""
    from mmdit.checkpoints.safetensors_io import read_header

    kept = []
    with path.open("rb", buffering=0) as file:
        for entry in sorted(read_header(path).entries.values(), key=lambda entry: entry.start):
            file.seek(entry.start)
            raw = bytearray(entry.stop - entry.start)
            view = memoryview(raw)
            while view:
                view = view[file.readinto(view) :]
            kept.append(torch.frombuffer(raw, dtype=entry.dtype).to(torch.bfloat16))
    return len(kept)


def load(path: Path, dtype: torch.dtype | None) -> int:
    """What a user calls, for both models of the file."""
    from mmdit import load_mmdit, load_vae

    models = load_mmdit(path, dtype=dtype), load_vae(path, dtype=dtype)
    return sum(tensor.nbytes for model in models for tensor in model.state_dict().values())


def by_library(path: Path, dtype: torch.dtype | None, threads: int) -> int:
    """All tensors by safetensors, in memory that does not depend on the file."""
    from safetensors import safe_open

    from mmdit.checkpoints.safetensors_io import read_header

    keys = list(read_header(path).entries)  # our checks of the header

    def read(part: list[str]) -> list[torch.Tensor]:
        with safe_open(path, framework="pt") as file:
            tensors = (file.get_tensor(key) for key in part)
            return [one.clone() if dtype in (None, one.dtype) else one.to(dtype) for one in tensors]

    with ThreadPoolExecutor(threads) as pool:
        kept = list(pool.map(read, [keys[i::threads] for i in range(threads)]))
    return sum(one.nbytes for part in kept for one in part)


def by_ours(path: Path, dtype: torch.dtype | None) -> int:
    """The same by our reader."""
    from mmdit.checkpoints.load import AT_A_TIME
    from mmdit.checkpoints.safetensors_io import open_tensors

    with ThreadPoolExecutor(AT_A_TIME[0]) as pool:
        kept = list(pool.map(lambda lazy: lazy.read(dtype), open_tensors(path)[0].values()))
    return sum(one.nbytes for one in kept)


ACTIONS = {
    "read, one buffer": plain_read,
    "read, kept": plain_read_kept,
    "load fp16": lambda path: load(path, None),
    "read and cast loop": read_and_cast,
    "load bf16": lambda path: load(path, torch.bfloat16),
    "ours fp16": lambda path: by_ours(path, None),
    "library fp16, 1": lambda path: by_library(path, None, 1),
    "library fp16, 2": lambda path: by_library(path, None, 2),
    "ours bf16": lambda path: by_ours(path, torch.bfloat16),
    "library bf16, 1": lambda path: by_library(path, torch.bfloat16, 1),
    "library bf16, 2": lambda path: by_library(path, torch.bfloat16, 2),
}


def peak_anonymous(stop: threading.Event, peak: list[int]) -> None:
    """Follow this process's RssAnon in bytes."""
    while not stop.wait(0.02):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak[0] = max(peak[0], 1024 * int(line.split()[1]))


def measure(name: str, path: Path) -> dict:
    import mmdit.checkpoints.load  # imports are not what is measured

    assert mmdit.checkpoints.load
    stop, peak = threading.Event(), [0]
    watcher = threading.Thread(target=peak_anonymous, args=(stop, peak))
    watcher.start()
    start = time.perf_counter()
    result = ACTIONS[name](path)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"seconds": seconds, "rss_anon": peak[0], "result": result}


def drop_page_cache() -> str:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "as it is"
    return "dropped"


def main() -> None:
    if sys.argv[2:] and sys.argv[2] in ACTIONS:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[1]))))
        return
    blocks = int(sys.argv[2]) if sys.argv[2:] else 38
    path = make(Path(sys.argv[1]) / f"{blocks}_{MANIFEST}", blocks)
    for turn in range(2):
        for name in ACTIONS:
            subprocess.run(["sync"], check=True)
            cache = "kept" if turn else drop_page_cache()
            out = subprocess.check_output([sys.executable, __file__, str(path), name], text=True)
            found = json.loads(out.splitlines()[-1])
            print(
                f"{turn} {name:20} page cache {cache}: {found['seconds']:6.1f} s, "
                f"peak RssAnon {found['rss_anon'] / 1e9:.2f} GB (file {path.stat().st_size / 1e9:.2f} GB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
