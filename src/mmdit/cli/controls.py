"""The ControlNets of `mmdit generate`: options and hints are checked before a model is loaded, and nets afterwards."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmdit.cli.usage import UsageError

if TYPE_CHECKING:  # the help of the command line imports no torch
    from mmdit.pipeline.pipeline import Pipeline
    from mmdit.pipeline.settings import Settings

KINDS = ("blur", "canny", "depth", "tile", "pose")  # without masks; as `mmdit.models.controlnet.CONTROL_KINDS`
_PARTS = re.compile(":net=|:hint=")  # between the parts of `Settings.control`
_NAMES = ("scales or windows", "ControlNets", "hints")  # what they say
FORM = "FILE:KIND[:SCALE[:START[:END]]]"


class Hint(NamedTuple):
    """A hint from the option --control."""

    path: str
    kind: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


def control_option(text: str) -> Hint:
    """The value of --control.

    Raises:
        ArgumentTypeError: the text does not have the form `FORM`.
    """
    parts = text.split(":")
    place = next((i for i in range(1, len(parts)) if parts[i] in KINDS), None)  # a path may hold colons
    try:
        if place is None or len(parts) > place + 4:
            raise ValueError
        return Hint(":".join(parts[:place]), parts[place], *map(float, parts[place + 1 :]))
    except ValueError:
        example = f"such as edges.png:canny:0.7:0:0.8; kinds are {', '.join(KINDS)}"
        raise ArgumentTypeError(f"{text!r} is not {FORM}, {example}") from None


def check_controls(ask: Namespace, before: Settings | None) -> None:
    """Check that each net has a hint, and read the hints; a picture that is drawn again names its own files.

    Raises:
        UsageError: the numbers of nets and hints differ, or one kind is given without the other.
        ValueError, OSError: a hint cannot be read; or a picture that is drawn again had nets or hints whose files are
            missing or not recorded.
    """
    from mmdit.pictures.read import load_image

    if before is not None and before.control and not ask.controlnet and not ask.control:
        _fill_in(ask, before)
    nets, hints = ask.controlnet or [], ask.control or []
    if len(nets) != len(hints):
        raise UsageError(
            f"--controlnet names {len(nets)} nets and --control {len(hints)} hints; give one --control {FORM} for each "
            "--controlnet FILE, in the same order"
        )
    for hint in hints:
        load_image(hint.path, "--control")


def _fill_in(ask: Namespace, before: Settings) -> None:
    """Take nets and hints from the picture that is drawn again, if their files are recorded and there."""
    from mmdit.pipeline.used_files import nets_of

    drawn, used = before.control.split(";"), nets_of(before.control_files, ask.settings)
    kinds = " and ".join(one.partition(":")[0] for one in drawn)
    said, give = f"{ask.settings} was drawn with a ControlNet for {kinds}", f"give --controlnet FILE --control {FORM}"
    if len(used) != len(drawn) or any(one.partition(":")[0] not in KINDS for one in drawn):
        raise ValueError(f"{said}; {give}")
    if missing := [path for one in used for path in (one.net, one.hint) if not Path(path).exists()]:
        raise ValueError(f"{said}, and {' and '.join(missing)} is not there; {give}")
    ask.controlnet = [one.net for one in used]
    ask.control = []
    for text, one in zip(drawn, used, strict=True):
        kind, *numbers = text.partition(":net=")[0].split(":")
        try:
            scale, start, end = map(float, numbers)
        except ValueError:
            raise ValueError(
                f"{ask.settings}: control is {text[:100]!r}, expected KIND:SCALE:START:END:net=..."
            ) from None
        ask.control.append(Hint(one.hint, kind, scale, start, end))


def control_settings(ask: Namespace) -> dict[str, str]:
    """The files of nets and hints, for the settings of the pictures."""
    from mmdit.pipeline.used_files import UsedNet, to_text

    pairs = zip(ask.controlnet or (), ask.control or (), strict=True)
    return {"control_files": to_text(UsedNet(net=net, hint=hint.path) for net, hint in pairs)}


def note_other_control(path: str, before: str, now: str, note: Callable[[str], object]) -> None:
    """Print a note if a picture that is drawn again had other nets, hints, scales or windows.

    Args:
        path: the picture whose settings are used.
        before: `Settings.control` of that picture; empty if it was drawn without a net.
        now: `Settings.control` of the new picture.
        note: prints a note.
    """
    if not before or now == before:
        return
    had, has = ([_PARTS.split(one) for one in each.split(";")] for each in (before, now))
    numbers = " and ".join(one[0] for one in had)
    same = len(had) == len(has) and all(len(one) == len(_NAMES) for one in (*had, *has))
    others = [name for i, name in enumerate(_NAMES) if same and [one[i] for one in had] != [one[i] for one in has]]
    note(
        f"{path} was drawn with other {' and '.join(others) or 'ControlNets'} (KIND:SCALE:START:END was {numbers}), "
        "so its picture will differ"
    )


def control_arguments(ask: Namespace, pipe: Pipeline) -> dict[str, Any]:
    """Load the nets, and return the ControlNet arguments of `mmdit.Pipeline.__call__`.

    Raises:
        ValueError, OSError: a net cannot be loaded, or is for another kind of hint.
    """
    from mmdit.checkpoints.load import load_controlnet

    hints: list[Hint] = ask.control or []
    if not hints:
        return {}
    place = pipe.transformer.pos_embed.device
    nets = [
        load_controlnet(path, device=place, dtype=pipe.dtype, kind=hint.kind)
        for path, hint in zip(ask.controlnet, hints, strict=True)
    ]
    return {
        "controlnet": nets,
        "control_image": [Path(hint.path) for hint in hints],
        "controlnet_conditioning_scale": [hint.scale for hint in hints],
        "control_guidance_start": [hint.start for hint in hints],
        "control_guidance_end": [hint.end for hint in hints],
    }
