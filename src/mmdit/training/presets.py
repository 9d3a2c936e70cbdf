"""Settings that follow from the base model, for `mmdit train init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdit.checkpoints.load import open_model
from mmdit.checkpoints.locate import locate
from mmdit.models.config import MMDiTConfig
from mmdit.training.config import Method, TrainingConfig

_RATES: dict[Method, float] = {"lora": 1e-4, "full": 1e-5, "controlnet": 1e-4}
_DEMO: dict[str, Any] = {
    "size": 128,
    "multiple": 32,
    "text_tokens": 77,
    "dtype": "float32",
    "batch_size": 8,
    "learning_rate": 2e-3,
    "rank": 4,
    "control_blocks": 1,
    "checkpoint_blocks": False,
}


def config_for(model: str, *, method: Method, data: str, output: str) -> TrainingConfig:
    """A config for a base model: its picture size, and a float8 base for the LoRA of a large one.

    Args:
        model: "demo", a file or a folder, whose headers are read; a repository of the hub has the settings of Large.
        method: what is trained.
        data, output: folders, which need not be there.

    Raises:
        CheckpointError: the file or folder holds no transformer.
    """
    values: dict[str, Any] = {"method": method, "model": model, "data": data, "output": output}
    values |= {"learning_rate": _RATES[method]}
    if model == "demo":
        return TrainingConfig.from_json(values | _DEMO)
    if Path(model).exists():
        found: MMDiTConfig = open_model(locate(model), "transformer").config
        side = 8 * (found.sample_size or 128)
        values |= {"size": side, "multiple": min(64, side)}
        if found.hidden_size < 2432:
            return TrainingConfig.from_json(values)
    return TrainingConfig.from_json(values | ({"quant": "fp8", "ahead": 32} if method == "lora" else {}))
