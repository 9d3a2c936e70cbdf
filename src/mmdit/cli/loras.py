"""LoRAs as the command line names them: FILE, FILE:WEIGHT or FILE:WEIGHT:TEXT_WEIGHT."""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple


class LoraOption(NamedTuple):
    """A file and its strengths on the transformer and the text encoders (None: as on the transformer)."""

    file: str
    weight: float = 1.0
    text_weight: float | None = None


def lora_option(text: str) -> LoraOption:
    """Parse FILE[:WEIGHT[:TEXT_WEIGHT]]; colons of a path that no number follows belong to the path."""
    weights: list[float] = []
    while len(weights) < 2 and ":" in text:
        before, _, last = text.rpartition(":")
        try:
            number = float(last)
        except ValueError:
            break
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"the weight {last} of {before} is no finite number")
        text, weights = before, [number, *weights]
    if not text:
        raise argparse.ArgumentTypeError("the name of a file comes before the weight: FILE:0.8")
    return LoraOption(text, *weights)
