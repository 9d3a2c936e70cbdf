"""Load a checkpoint of any layout into diffusers' pipeline, the live reference of comparisons.

It needs the extra `test`, which brings diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from encoders import Tokenizers
from mmdit.checkpoints.hub import fetch, is_repo_id
from mmdit.checkpoints.load import open_model
from mmdit.checkpoints.locate import Found, locate, open_weights, with_neighbours
from mmdit.checkpoints.missing import absent
from mmdit.checkpoints.write import write_checkpoint
from quant.formats import FLOAT8


def libraries() -> tuple[Any, Any]:
    """The modules diffusers and transformers.

    Raises:
        ImportError: one of them is missing; the message names the extra.
    """
    try:
        return import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"a comparison with diffusers needs diffusers and transformers, which the extra `test` brings ({error}): "
            'pip install "mmdit-lab[test]"'
        ) from error


def load_diffusers(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, str]:
    """Load diffusers' `StableDiffusion3Pipeline` from any layout; also returns where the weights come from.

    A checkpoint that diffusers cannot read directly is rewritten to a temporary folder, which temporarily takes as much
    disk space as the checkpoint.

    Args:
        folder: A folder or file of any layout, or owner/name on the Hugging Face Hub.
        device, dtype: The device and dtype of all models. float8 weights are dequantized to the dtype.

    Raises:
        ImportError: diffusers or transformers is missing.
        FileNotFoundError, mmdit.CheckpointError: see `Pipeline.from_pretrained`.
    """
    diffusers, _ = libraries()
    found = with_neighbours(locate(fetch(str(folder)) if is_repo_id(folder) else folder))
    for component in found.weights:
        open_model(found, component)  # our errors say more than those of diffusers
    without = {} if "t5" in found.weights else {"text_encoder_3": None, "tokenizer_3": None}
    with _readable(found, dtype) as (reference, how):
        load = diffusers.StableDiffusion3Pipeline.from_pretrained
        pipe = load(reference, local_files_only=True, **without).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, how


@contextmanager
def _readable(found: Found, dtype: torch.dtype) -> Iterator[tuple[Path, str]]:
    """A folder that diffusers can read, and where its weights come from."""
    if _is_readable(found):
        yield found.path, "the same files"
        return
    how = f"a copy of these ({found.layout}), under names from our own key map, which tests prove against recorded ones"
    with TemporaryDirectory(prefix="mmdit-diffusers-") as place:
        yield _rewritten(found, Path(place, "diffusers"), dtype), how


def _is_readable(found: Found) -> bool:
    """Whether diffusers finds all models where they are, in dtypes that it computes in."""
    if found.layout != "diffusers" or not (found.path / "model_index.json").is_file():
        return False
    return not _has_float8(found) and not any(".fp16." in file.name for file in found.weights.values())


def _has_float8(found: Found) -> bool:
    return any(lazy.dtype in FLOAT8 for file in set(found.weights.values()) for lazy in open_weights(file)[0].values())


def _rewritten(found: Found, target: Path, dtype: torch.dtype) -> Path:
    if "transformer" not in found.weights:
        raise absent(found, "transformer")
    if found.tokenizers is None:
        raise FileNotFoundError(
            f"{found.path} has no tokenizer folders, which diffusers needs: put tokenizer, tokenizer_2 and tokenizer_3 "
            "of the official repository beside the weights"
        )
    tokenizers = Tokenizers.from_folder(found.tokenizers, t5="t5" in found.weights)
    return write_checkpoint(
        [open_model(found, component) for component in found.weights],
        target,
        "diffusers",
        shift=3.0 if found.shift is None else found.shift,
        sampling=found.sampling,
        tokenizers=tokenizers.save,
        dtype=dtype if _has_float8(found) else None,
    )
