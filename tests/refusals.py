"""Checking errors by what they say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmdit import CheckpointError


def refuses(call: Callable[[], object], *said: object, error: type[Exception] = CheckpointError) -> str:
    """The message of the error that `call` raises; it holds every one of `said`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in map(str, said)), message
    return message


def weights(folder: Path, name: str) -> Path:
    """The one weights file of a component of a diffusers folder."""
    return next((folder / name).glob("*.safetensors"))
