"""The context that a run passes to the functions of its nodes: folders, limits, the device, and the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from encoders import Tokenizers
from mmdit.comfyui.files import Folders
from mmdit.comfyui.limits import WorkflowLimits


@dataclass(eq=False)
class Context:
    """One run of a graph.

    Args:
        folders: the folders of models, input pictures and results.
        limits: the limits of sizes and steps.
        device: the device that the models compute on.
        dtype: the dtype that the models compute in. None is float32 on a CPU, and the stored dtype elsewhere.
        graph: the graph in API form, which is written into PNGs.
        given_tokenizers: the tokenizers; None takes those beside the models.
    """

    folders: Folders
    limits: WorkflowLimits
    device: torch.device
    dtype: torch.dtype | None
    graph: Mapping[str, Any]
    given_tokenizers: Tokenizers | str | Path | None = None
    node: str = ""  # the id of the node that runs now
    images: dict[str, list[Image.Image]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @property
    def load_dtype(self) -> torch.dtype | None:
        """The dtype to load models in; None keeps the stored one."""
        return torch.float32 if self.dtype is None and self.device.type == "cpu" else self.dtype

    @cached_property
    def tokenizers(self) -> Path | Tokenizers:
        """The tokenizers, or the folder that holds them.

        Raises:
            FileNotFoundError: no tokenizers were given, and there are none beside the models.
        """
        found = self.given_tokenizers if self.given_tokenizers is not None else self.folders.tokenizers
        if found is None:
            raise FileNotFoundError(
                "there are no tokenizers beside the models; give the folder that holds tokenizer, tokenizer_2 and "
                "tokenizer_3 (of the official repository) as tokenizers="
            )
        return Path(found) if isinstance(found, str) else found

    def tokenizers_for(self, *, clip_l: bool, clip_g: bool, t5: bool) -> Tokenizers:
        """The tokenizers of these encoders; CLIP-G uses the tokenizer of CLIP-L, as in ComfyUI."""
        found = self.tokenizers
        if isinstance(found, Tokenizers):
            return found
        return Tokenizers.from_folder(found, clip_l=clip_l or clip_g, clip_g=False, t5=t5)
