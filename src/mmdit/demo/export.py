"""The trained model as a folder in the official layout, and as pieces small enough to carry."""

from __future__ import annotations

import copy
import hashlib
import io
import tarfile
from pathlib import Path

import torch

from mmdit.checkpoints.load_pipeline import Components
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import replacing_folder

__all__ = ["MAX_BYTES", "cast_copy", "export", "write_pieces"]

MAX_BYTES = 30_000_000  # largest size of the committed folder
PIECE = 15 * 2**20
ARCHIVE = "embedded.tar"


def cast_copy(parts: Components, device: torch.device | str, dtype: torch.dtype) -> Components:
    """The parts on another device in another dtype, in eval mode; the given ones stay as they are."""
    models = {
        name: copy.deepcopy(getattr(parts, name)).to(device, dtype).eval().requires_grad_(False)
        for name in ("transformer", "vae", "clip_l", "clip_g", "t5")
    }
    return Components(**models, tokenizers=parts.tokenizers, shift=parts.shift)


def export(parts: Components, folder: Path) -> int:
    """Write float16 weights in the official layout over what is at `folder`; returns the bytes of all files.

    Raises:
        ValueError: the folder is larger than `MAX_BYTES`; it is written all the same.
    """
    with replacing_folder(folder, over=True) as part:
        Pipeline(cast_copy(parts, "cpu", torch.float16)).save_pretrained(part / "model", layout="official")
        for path in (part / "model").iterdir():
            path.rename(part / path.name)
        (part / "model").rmdir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"{folder} has {size} bytes, more than the {MAX_BYTES} that may be committed")
    return size


def write_pieces(folder: Path, target: Path) -> list[Path]:
    """Pack `folder` as a tar in pieces of at most 15 MiB with SHA256SUMS, over what is at `target`.

    To unpack: `cat embedded.tar.* | tar x` beside `sha256sum -c SHA256SUMS`.
    """
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(folder, arcname=folder.name)
        data = file.getvalue()
    sums = [f"{hashlib.sha256(data).hexdigest()}  {ARCHIVE}\n"]
    with replacing_folder(target, over=True) as part:
        for i, first in enumerate(range(0, len(data), PIECE)):
            piece = part / f"{ARCHIVE}.{i:02}"
            piece.write_bytes(data[first : first + PIECE])
            sums.append(f"{hashlib.sha256(piece.read_bytes()).hexdigest()}  {piece.name}\n")
        (part / "SHA256SUMS").write_text("".join(sums))
    return sorted(target.iterdir())
