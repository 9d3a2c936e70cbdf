"""LoRAs as the command line names them: FILE, FILE:WEIGHT or FILE:WEIGHT:TEXT_WEIGHT."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmdit.cli.usage import exists

if TYPE_CHECKING:  # the help of the command line imports no torch
    from mmdit.pipeline.pipeline import Pipeline
    from mmdit.pipeline.settings import Settings


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
            if exists(before) and not exists(text):
                raise argparse.ArgumentTypeError(f"the weight {last!r} of {before} is no number") from None
            break
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"the weight {last} of {before} is no finite number")
        text, weights = before, [number, *weights]
    if not text:
        raise argparse.ArgumentTypeError("the name of a file comes before the weight: FILE:0.8")
    return LoraOption(text, *weights)


def check_loras(ask: argparse.Namespace, before: Settings | None) -> None:
    """Check that the files are there, those of a picture that is drawn again too, before a model is loaded.

    Raises:
        ValueError: a file is missing; or a picture was drawn with a LoRA whose file is missing or not recorded.
    """
    from mmdit.pipeline.used_files import loras_of

    if ask.lora:
        if missing := [Path(one.file) for one in ask.lora if not Path(one.file).is_file()]:
            what = "a folder is there, and a file is expected" if missing[0].is_dir() else "there is no such file"
            raise ValueError(f"--lora {missing[0]}: {what}")
        return
    for one in [] if before is None else loras_of(before.loras, ask.settings):
        if not one.file or not Path(one.file).is_file():
            where = "which is not there" if one.file else "which were in no file"
            raise ValueError(f"{ask.settings} was drawn with the LoRA {one}, {where}; give it with --lora FILE:WEIGHT")


def add_loras(ask: argparse.Namespace, before: Settings | None, pipe: Pipeline, note: Callable[[str], object]) -> None:
    """Load the LoRAs of the command line, or else those of the picture that is drawn again."""
    from mmdit.pipeline.used_files import digest_of_lora, loras_of

    for one in ask.lora or ():
        note(str(pipe.load_lora_weights(one.file, weight=one.weight, text_encoder_weight=one.text_weight)))
    if ask.lora or before is None:
        return
    for number, used in enumerate(loras_of(before.loras, ask.settings)):
        name = f"settings_{number}"
        pipe.load_lora_weights(
            used.file, name, used.weight, text_encoder_weight=used.text_encoder_weight, form=used.form
        )
        if used.form == "merged" and used.scale != 1:
            pipe.fuse_lora(name, lora_scale=used.scale)
        found = digest_of_lora(pipe.lora_report().adapters[name].lora)
        said = f"{ask.settings} was drawn with the LoRA {used}"
        note(
            said if found == used.digest else f"{said}; that file is another one now ({found}), so its picture differs"
        )


def note_other_loras(path: str, before: str, now: str, note: Callable[[str], object]) -> None:
    """Print a note if a picture that is drawn again had other LoRAs, or other weights of them, than those given now.

    Args:
        path: the picture whose settings are used.
        before, now: `Settings.loras` of that picture and of the new one.
        note: prints a note.
    """
    from mmdit.pipeline.used_files import loras_of

    had, has = loras_of(before, path), loras_of(now)
    if [one.effect for one in had] != [one.effect for one in has]:
        said = [" and ".join(map(str, each)) or "none" for each in (had, has)]
        note(f"{path} was drawn with other LoRAs, so its picture will differ: {said[0]}; now: {said[1]}")
