"""Files of a training run of the demo, written whole."""

from __future__ import annotations

from pathlib import Path

import torch

from mmdit.utils import replacing

__all__ = ["save_whole"]


def save_whole(value: object, path: Path) -> None:
    """torch.save under a random name first, so that a killed run leaves the old file or the new one."""
    with replacing(path) as part, part.open("wb") as file:  # torch.save takes no name that begins with a dot
        torch.save(value, file)
