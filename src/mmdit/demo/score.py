"""Judge which statements of a prompt a picture fulfils.

The reader (`parse`) never sees the prompt; `statements` never sees the picture; `check` compares the two:

    shape       an object of this shape exists
    colour      an object of this shape has this colour (colour and shape must meet in one object)
    size        at least as many objects as said have this description with its size
    count       exactly as many objects as said fit the description (all objects for "three shapes")
    relation    two objects that fit have this relation: the axis along which their middles differ most decides, so
                exactly one of the four relations holds each way
    background  the background has this colour

A wrong object fails its shape, its colour and its relations: each kind is reported on its own, and `macro_average`
weighs the kinds equally. Where nothing of the kind was claimed, the kind is absent.
"""

from collections.abc import Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from mmdit.demo.grammar import KINDS, Statement, What, statements
from mmdit.demo.vision import Found, Parsed, parse, parse_batch, symbolic

__all__ = [
    "Found",
    "Parsed",
    "Statement",
    "What",
    "accuracies",
    "check",
    "macro_average",
    "parse",
    "parse_batch",
    "relation_between",
    "score",
    "score_batch",
    "statements",
    "symbolic",
]


def score(picture: Float[Tensor, "3 h w"], prompt: str) -> dict[Statement, bool]:
    """Return each statement of the prompt with whether the picture (RGB in [0, 1]) fulfils it.

    Raises:
        ValueError: the prompt is not in the grammar.
    """
    return score_batch(picture[None], [prompt])[0]


def score_batch(pictures: Float[Tensor, "b 3 h w"], prompts: list[str]) -> list[dict[Statement, bool]]:
    """Score each picture with the prompt at its place.

    Raises:
        ValueError: the numbers differ, or a prompt is not in the grammar.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures but {len(prompts)} prompts")
    claims = [statements(prompt) for prompt in prompts]
    found = parse_batch(pictures)
    return [{s: check(s, parsed) for s in claim} for claim, parsed in zip(claims, found, strict=True)]


def check(statement: Statement, parsed: Parsed) -> bool:
    """Return whether what was found fulfils one statement, by the rules above.

    Raises:
        ValueError: a kind that does not exist.
    """
    if statement.kind not in KINDS:
        raise ValueError(f"unknown kind {statement.kind!r}; known: {', '.join(KINDS)}")
    if statement.kind == "background":
        return parsed.background == statement.background
    fitting = _fitting(statement.what, parsed)
    if statement.kind == "count":
        return len(fitting) == statement.count
    if statement.kind == "relation":
        others = _fitting(statement.other, parsed)
        return any(a is not b and relation_between(a, b) == statement.relation for a in fitting for b in others)
    return len(fitting) >= statement.count


def relation_between(subject: Found, other: Found) -> str:
    """Return the one relation of subject to other: along the axis on which their middles differ most."""
    right, down = subject.x - other.x, subject.y - other.y
    if abs(down) > abs(right):
        return "above" if down < 0 else "below"
    return "left of" if right < 0 else "right of"


def accuracies(verdicts: Iterable[Mapping[Statement, bool]]) -> dict[str, tuple[float, int]]:
    """Return for each kind that was claimed the share of fulfilled statements and their number."""
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for verdict in verdicts:
        for statement, holds in verdict.items():
            by_kind[statement.kind].append(holds)
    return {kind: (sum(v) / len(v), len(v)) for kind, v in by_kind.items() if v}


def macro_average(by_kind: Mapping[str, tuple[float, int]]) -> float:
    """Return the mean over kinds of what `accuracies` returned.

    Raises:
        ValueError: there is no kind.
    """
    if not by_kind:
        raise ValueError("nothing was scored")
    return sum(share for share, _ in by_kind.values()) / len(by_kind)


def _fitting(what: What | None, parsed: Parsed) -> list[Found]:
    wanted = [(name, getattr(what, name)) for name in ("shape", "colour", "size")]
    said = [(name, value) for name, value in wanted if value is not None]
    return [found for found in parsed.objects if all(getattr(found, name) == value for name, value in said)]
