"""Reasons for stages that differ: profiles, configs, the schedule's shift, tokens, weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.checkpoints.components import Component, title
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.parity.sides import Side

# Regular expressions of the stages in which each field of a profile first has an effect; other fields always appear.
_CONCERN = {
    # Both sides run with the same numbers and draw one picture; the effective shift is compared separately.
    r"name|steps|guidance_scale|shift|one_seed|odd_latents|skip_.*": r"(?!)",
    r"schedule": r"sigmas|timesteps",
    r"first_level": r"step 0 input latent",
    r"second_last": r"sigmas|timesteps",
    r"step_noise|sampler": r"step \d+ latent",
    r"whole_timesteps": r"timesteps|step \d+ (guided|latent)",
    r"sigma_dtype": r"timesteps|step \d+ (guided|latent)",
    r"uncond_pass": r"step \d+ .*",
    r"noise_dtype": r"noise",
    r"state_dtype": r".* latent",
    r"to_uint8": r"uint8",
    r"text\.(clip_length|long_clip|missing_clip)": r"\w+ clip_[lg] .*",
    r"text\.clip_g_tokenizer": r"\w+ clip_g .*",
    r"text\.project_clip_l": r"\w+ clip_l pooled",
    r"text\.(t5_.*|long_t5|missing_t5)": r"\w+ t5 .*",
    r"text\..*": r"(prompt|negative) .*",
}
# Entries of config.json files that do not affect the picture, or that one side does not keep.
_UNSAID = r"_.*|architectures|model_type|sample_size|force_upcast|tie_.*|is_encoder_decoder|(bos|pad|eos)_token_id"


class Part(NamedTuple):
    """A weight that differs."""

    key: str
    relative: float


def explain(a: Side, b: Side, failed: Sequence[str], tokens: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """Lines with the known reasons why these stages differ.

    Args:
        a, b: The two sides.
        failed: Names of the stages that differ beyond rounding.
        tokens: Token ids of a and of b, by the name of their stage.
    """
    return (
        *_fields(a, b, failed),
        *(line for name in failed if name in tokens for line in _ids(a, b, name, *tokens[name])),
        *_schedule(a, b, failed),
        *(line for component in _components(failed) for line in _models(a, b, component)),
    )


def component_of(stage: str) -> Component | None:
    """The component that computes a stage; None where no model does."""
    if text := re.match(r"(prompt|negative) (clip_l|clip_g|t5) (?!tokens)", stage):
        return text[2]
    if re.match(r"vae |pixels", stage):
        return "vae"
    sampler = r"step \d+ (guided|latent|input .*|timestep \+ pooled)"
    return "transformer" if stage.startswith("step ") and not re.fullmatch(sampler, stage) else None


def differing_ids(a: Tensor, b: Tensor) -> str:
    """Describe how two sequences of token ids differ: the number of different ids, the first one, and the lengths."""
    shared = min(len(a), len(b))
    places = (a[:shared] != b[:shared]).nonzero().flatten().tolist()
    said = [f"{len(a)} tokens in a, {len(b)} in b"] if len(a) != len(b) else []
    if places:
        first = places[0]
        said.append(f"{len(places)} of {shared} ids differ, the first at {first}: {int(a[first])} | {int(b[first])}")
    return "; ".join(said)


def _components(failed: Sequence[str]) -> list[Component]:
    return [component for component in dict.fromkeys(map(component_of, failed)) if component is not None]


def _fields(a: Side, b: Side, failed: Sequence[str]) -> Iterator[str]:
    ours, theirs = dict(_flat(a.profile)), dict(_flat(b.profile))
    names = [name for name in ours | theirs if a.models.keys() ^ b.models.keys() or ".missing_" not in name]
    for name in names:
        stages = next((stages for field, stages in _CONCERN.items() if re.fullmatch(field, name)), r".*")
        if ours.get(name) != theirs.get(name) and any(re.fullmatch(stages, stage) for stage in failed):
            yield f"profile field {name}: {ours.get(name)!r} in a, {theirs.get(name)!r} in b"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass and of those inside it, by dotted name."""
    for field in fields(value):
        found = getattr(value, field.name)
        if is_dataclass(found):
            yield from _flat(found, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, found


def _ids(a: Side, b: Side, stage: str, ids_a: Tensor, ids_b: Tensor) -> Iterator[str]:
    which, encoder, _ = stage.split()
    text = "the negative prompt" if which == "negative" else "the prompt"
    if len(ids_a) != len(ids_b):
        yield f"{encoder} reads {len(ids_a)} tokens of {text} in a, {len(ids_b)} in b"
    ends: Iterator[Tensor] = (ids == side.end_token(encoder) for side, ids in ((a, ids_a), (b, ids_b)))
    places = [one.nonzero().flatten().tolist() for one in ends]
    for who, mine, other in (("a", *places), ("b", *reversed(places))):
        if other and not mine:
            yield f"{encoder} tokens of {text} have no EOS in {who}; the other side's is at position {other[0]}"
    if places[0] and places[1] and places[0][0] != places[1][0]:
        yield f"{encoder} tokens of {text} end (first EOS) at position {places[0][0]} in a, {places[1][0]} in b"


def _schedule(a: Side, b: Side, failed: Sequence[str]) -> Iterator[str]:
    if "sigmas" in failed and a.shift != b.shift:
        yield f"shift: {a.shift:g} in a, {b.shift:g} in b"
    drawn = a.dtype("transformer"), b.dtype("transformer")
    if "noise" in failed and drawn[0] != drawn[1] and torch.float64 in drawn:
        yield f"noise: drawn in {drawn[0]} by a, in {drawn[1]} by b; a seed gives other numbers in float64"


def _models(a: Side, b: Side, component: Component) -> Iterator[str]:
    for who, side in (("a", a), ("b", b)):
        if component not in side.models:
            yield f"{who} has no {title(component)}"
            return
    config_a, config_b = a.config(component), b.config(component)
    for key in sorted(config_a.keys() & config_b.keys()):
        values = _plain(config_a[key]), _plain(config_b[key])
        if values[0] != values[1] and not re.fullmatch(_UNSAID, key):
            yield f"{component} config {key}: {values[0]!r} in a, {values[1]!r} in b"
    yield from _weights(component, a.weights(component), b.weights(component), _eps(a, b, component))


def _plain(value: object) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _eps(a: Side, b: Side, component: Component) -> float:
    return max(torch.finfo(side.dtype(component)).eps for side in (a, b))


def _weights(
    component: Component, a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor], eps: float
) -> Iterator[str]:
    for who, mine, other in (("a", a, b), ("b", b, a)):
        if only := [key for key in mine if key not in other]:
            yield f"{component} weights: {len(only)} only in {who}: {', '.join(only[:3])}{' …' * (len(only) > 3)}"
    shared = [key for key in a if key in b]
    parts = [Part(key, _relative(a[key].read(), b[key].read())) for key in shared]
    differing = [part for part in parts if part.relative > eps]
    if differing:
        found = f"{len(differing)} of {len(shared)} differ"
        yield f"{component} weights: {found}, the first is {differing[0].key} (relative {differing[0].relative:.1e})"


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    a, b = a.to("cpu", torch.float32), b.to("cpu", torch.float32)
    error = float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return error if math.isfinite(error) else math.inf
