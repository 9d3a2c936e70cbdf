"""Convert the pictures of a run to 8 bits, and save them as PNG files that contain the graph, named as in ComfyUI."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mmdit.comfyui.context import Context
from mmdit.comfyui.files import inside
from mmdit.pictures.checks import check_picture
from mmdit.pipeline.settings import WORKFLOW_KEYWORD
from mmdit.utils import replacing


def save_pictures(context: Context, images: Tensor, prefix: str | None) -> list[Image.Image]:
    """Convert pictures to 8 bits by truncation, and save them if the run has an output folder.

    Args:
        context: the run, which records the paths of the files.
        images: the pictures, [b, h, w, c] in [0, 1].
        prefix: the prefix of the file names, with "/" for sub-folders and ComfyUI's variables such as %width% and
            %date%; None writes no files.
    """
    check_picture("images", images)
    if not torch.isfinite(images).all():
        raise FloatingPointError(f"the pictures of node {context.node} are not finite; use a wider dtype")
    levels = np.clip(255.0 * images.cpu().float().numpy(), 0, 255).astype(np.uint8)
    found = [Image.fromarray(one[..., 0] if one.shape[2] == 1 else one) for one in levels]
    folder = context.folders.output
    if prefix is None:
        return found
    start = _start(prefix, *found[0].size)
    if folder is None:
        return found
    base = inside(folder, start)
    for number, picture in enumerate(found):
        context.files.append(_written(picture, base, number, context.graph))
    return found


def with_graph(picture: Image.Image, path: Path, graph: Mapping[str, Any], *, new: bool = False) -> Path:
    """Write a PNG whose text chunk `prompt` holds a graph in API form, as ComfyUI writes it."""
    info = PngInfo()
    info.add_text(WORKFLOW_KEYWORD, json.dumps(graph, allow_nan=False))
    with replacing(path, new=new) as part:
        picture.save(part, format="png", pnginfo=info)
    return path


def _written(picture: Image.Image, base: Path, number: int, graph: Mapping[str, Any]) -> Path:
    """Write the next free file prefix_00001_.png."""
    name = base.name.replace("%batch_num%", str(number))
    pattern = re.compile(re.escape(name) + r"_(\d{1,15})_?.*", re.IGNORECASE | re.DOTALL)
    while True:
        taken = [pattern.fullmatch(path.name) for path in base.parent.iterdir()] if base.parent.is_dir() else []
        counter = max((int(one[1]) for one in taken if one), default=0) + 1
        try:
            return with_graph(picture, base.with_name(f"{name}_{counter:05}_.png"), graph, new=True)
        except FileExistsError:  # another process has created the file
            continue


def _start(prefix: str, width: int, height: int) -> str:
    """Replace ComfyUI's variables in the prefix."""
    now = datetime.now()  # local time, as in ComfyUI
    values = {"width": str(width), "height": str(height), "year": f"{now.year}"}
    values |= {name: f"{getattr(now, name):02}" for name in ("month", "day", "hour", "minute", "second")}
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix
