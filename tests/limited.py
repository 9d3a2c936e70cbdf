"""Small inputs that once stopped the process, in a process whose memory the system limits: `python tests/limited.py`.

For each it prints one line of JSON: its name, "read" or the refusal. Nothing here may need more than `MARGIN` bytes of
address space above what the process has after its imports; what does ends in an error that is none of ours.
"""

import json
import os
import resource
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "fuzz")]
MARGIN = 400 * 2**20
Case = tuple[str, Callable[[], object]]


def files(folder: Path) -> Iterator[Case]:
    import test_headers
    import test_key_sets

    from mmdit import load_mmdit
    from mmdit.checkpoints.describe import inspect
    from sparse import HUGE, huge

    for name, text in test_headers.REGRESSIONS.items():
        path = folder / "f.safetensors"
        path.write_bytes(test_headers.with_header(text.encode()))
        yield f"header: {name}", lambda path=path: test_headers.read_all(path)
    for name, sides in test_key_sets.REGRESSIONS.items():
        path = test_key_sets.sparse(folder / "clip_l.safetensors", sides)
        yield f"key set: {name}", lambda path=path: inspect(path)
    for name in HUGE:
        path = huge(folder / "m.safetensors", name)
        yield f"256 MB of {name}", lambda path=path: load_mmdit(path)


def prompts(folder: Path) -> Iterator[Case]:
    import test_prompts

    from encoders import T5Tokenizer
    from mmdit import Pipeline
    from mmdit.embedded import EMBEDDED

    pipe = Pipeline.demo(profile="comfyui")
    for text in (*test_prompts.REGRESSIONS, "a " * 16_384, "a cat " * 160_000, "(a:" * 250_000):
        yield f"prompt {text[:6]!r} of {len(text)}", lambda text=text: pipe.encode(text)
    (folder / "spiece.model").write_bytes((EMBEDDED / "tokenizer_3" / "spiece.model").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 2000000}')
    yield "2,000,000 extra ids", lambda: T5Tokenizer.from_folder(folder)
    few = {"height": 32, "width": 32, "output_type": "latent"}
    for name, numbers in {
        "steps": {"num_inference_steps": 10**9},
        "pictures": {"num_inference_steps": 1, "num_images_per_prompt": 10**9},
        "height": {"num_inference_steps": 1, "height": 2**32},
        "T5 tokens": {"num_inference_steps": 1, "max_sequence_length": 2**40},
    }.items():
        yield f"call: {name}", lambda numbers=numbers: pipe("a", **few | numbers)


def pictures(folder: Path) -> Iterator[Case]:
    import test_png
    from PIL import Image

    from mmdit import load_capture, read_settings
    from mmdit.checkpoints.lazy import LazyTensor
    from mmdit.checkpoints.safetensors_io import write_tensors
    from mmdit.cli.app import main

    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="png")
    plain, path = file.getvalue(), folder / "x.png"
    packed = zeros(512)
    for name, kind, content in (
        ("zTXt", b"zTXt", b"mmdit\0\0" + packed),
        ("iTXt", b"iTXt", b"mmdit\0\1\0\0\0" + packed),
        ("iCCP", b"iCCP", b"mmdit\0\0" + packed),
        ("IHDR", b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)),
    ):
        path.write_bytes(plain[:33] + test_png.chunk(kind, content) + plain[33:])
        yield f"PNG: {name} of 512 MB", lambda: read_settings(path)
    notes = (
        '{"names": ["a"], "one_branch": false, "series": [["a", [' + '"x", ' * 10**5 + '"y"], {}, false, false, []]]}'
    )
    place = folder / "c.safetensors"
    write_tensors(place, dict[str, LazyTensor](), {"format": "mmdit capture 1", "capture": notes})
    yield "capture of 100,000 axes", lambda: load_capture(place)
    words = ("generate", "a", "--output", str(folder / "o.png"), "--steps", "1000000000")
    yield "--steps 1000000000", lambda: refuse_code(main(list(words)))


def zeros(megabytes: int) -> bytes:
    """A zlib stream of so many MB of zeros, put together from the stream of one: packing them all takes seconds."""
    packer, length = zlib.compressobj(wbits=-15), megabytes * 2**20
    one = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\x9c" + megabytes * one + b"\3\0" + struct.pack(">HH", length % 65521, 1)  # Adler-32 at the end


def refuse_code(code: int) -> None:
    if code:
        raise ValueError(f"exit code {code}")


def outcome(call: Callable[[], object]) -> str:
    from mmdit.utils import is_out_of_memory

    try:
        call()
    except SystemExit as error:
        return f"exit code {error.code}"
    except Exception as error:
        one: BaseException | None = error
        while one is not None:
            if is_out_of_memory(one):
                return f"OUT OF MEMORY: {error}"
            one = one.__cause__ or one.__context__
        return f"{type(error).__name__}: {error}"
    return "read"


def main() -> None:
    from mmdit._imports import without_collections

    with without_collections():
        import torch

        import mmdit

    warnings.simplefilter("ignore")
    mmdit.Pipeline.demo()("a", num_inference_steps=1, height=32, width=32)  # loads all that a drawing imports
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with tempfile.TemporaryDirectory() as name:
        for cases in (files, prompts, pictures):
            folder = Path(name, cases.__name__)
            folder.mkdir()
            for label, call in cases(folder):
                resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MARGIN,) * 2)
                print(json.dumps([label, outcome(call)]), flush=True)


if __name__ == "__main__":
    main()
