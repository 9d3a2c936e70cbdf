"""Settings that combine the predictions of a step: the argument of `pipe(prompt, guidance=Guidance(...))`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, get_args, get_type_hints

import numpy as np
from torch import Tensor

from mmdit.pipeline.passes import Branch
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import Ranged
from mmdit.utils import number, shortened, whole
from samplers import (
    Guide,
    Mix,
    Predict,
    Weaker,
    Window,
    Within,
    averaged,
    first_steps,
    guide,
    one_by_one,
    percents,
    pick,
    plain,
    projected,
    steps_inside,
    zero_init,
    zero_star,
)

# A function of the caller: (x, sigma, cond, uncond) -> x0. x is the latent [b, c, h, w] at noise level sigma; cond and
# uncond are the pictures that the model predicts for it with the prompts and with the negative prompts.
GuidanceFunction = Callable[[Tensor, float, Tensor, Tensor], Tensor]
_MIXES: dict[str, Callable[[Guidance, float, list[Tensor] | None], Mix]] = {
    "cfg": lambda _, scale, __: plain(scale),
    "apg": lambda one, scale, kept: projected(
        scale, eta=one.eta, threshold=one.threshold, momentum=one.momentum, kept=kept
    ),
    "zero_star": lambda _, scale, __: zero_star(scale),
}


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance beyond, or instead of, plain classifier-free guidance at `guidance_scale`; all settings can be combined.

    None takes the profile's value. `samplers.plain` ("cfg"), `samplers.projected` ("apg"), `samplers.zero_star`,
    `samplers.zero_init`, `samplers.rescaled`, `samplers.guide` (interval) and `samplers.Weaker` give the formulas and
    papers.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    kind: str | GuidanceFunction = "cfg"  # formula that mixes cond and uncond: "cfg", "apg", "zero_star", or a function
    interval: tuple[float, float] = (0.0, 1.0)  # range of sigma, low < sigma <= high, in which they are mixed
    rescale: float = 0.0  # share of `samplers.rescaled`, 0 to 1; the paper uses 0.7
    eta: float = 0.0  # "apg": factor of the part parallel to cond
    threshold: float = 0.0  # "apg": largest norm of the difference; 15 in diffusers, 5 in ComfyUI's node, 0 for none
    momentum: float = 0.0  # "apg": factor of the previous difference; negative in the paper, such as -0.5
    zero_init: int = 0  # number of first steps with velocity 0; 1 with "zero_star" is CFG-Zero*
    skip_guidance_layers: tuple[int, ...] = ()  # skip-layer guidance: blocks to skip, 7, 8, 9 for SD3.5-Medium
    skip_layer_guidance_scale: float | None = None  # skip-layer guidance: its weight
    skip_layer_guidance_start: float | None = None  # skip-layer guidance: share of the steps at its start, 0 to 1
    skip_layer_guidance_stop: float | None = None  # skip-layer guidance: share of the steps at its end, 0 to 1
    skip_layer_rescale: float = 0.0  # skip-layer guidance: rescaling_scale of ComfyUI's SkipLayerGuidanceDiT
    perturbed_layers: tuple[int, ...] = ()  # perturbed attention: its blocks, see `mmdit.pipeline.passes.perturbed`
    perturbed_scale: float = 3.0  # perturbed attention: its weight
    perturbed_interval: tuple[float, float] = (0.0, 1.0)  # perturbed attention: its range of sigma, as in `interval`
    sequential: bool = False  # run one pass per conditioning instead of a batch, which takes less memory

    def __post_init__(self) -> None:
        if not callable(self.kind):
            pick(_MIXES, self.kind, "guidance kind")
        for name in ("skip_guidance_layers", "perturbed_layers"):
            object.__setattr__(self, name, _layers(name, getattr(self, name)))
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, number(f"guidance {name}", value, least, most))
        for name in ("interval", "perturbed_interval"):
            object.__setattr__(self, name, _interval(name, getattr(self, name)))
        object.__setattr__(self, "zero_init", whole("guidance zero_init", self.zero_init, 0))
        start, stop = self.skip_layer_guidance_start, self.skip_layer_guidance_stop
        if start is not None and stop is not None:
            _check_order(start, stop)

    @property
    def is_own(self) -> bool:
        """Whether a function of the caller mixes cond and uncond."""
        return callable(self.kind)

    def of(self, profile: Profile) -> Self:
        """Fill in the profile's numbers for skip-layer guidance where they are None."""
        if not self.skip_guidance_layers:
            return self
        ours = (self.skip_layer_guidance_scale, self.skip_layer_guidance_start, self.skip_layer_guidance_stop)
        theirs = (profile.skip_scale, profile.skip_start, profile.skip_stop)
        scale, start, stop = (its if own is None else own for own, its in zip(ours, theirs, strict=True))
        _check_order(start, stop)
        return replace(
            self, skip_layer_guidance_scale=scale, skip_layer_guidance_start=start, skip_layer_guidance_stop=stop
        )

    def check(self, profile: Profile, scale: float, *, mixed: bool, depth: int, steps: int) -> None:
        """Raise ValueError for settings that are impossible in a drawing, before any model runs.

        Args:
            profile, scale: the profile and the guidance scale of the drawing.
            mixed: whether an unconditional pass runs.
            depth: number of blocks of the transformer.
            steps: number of steps of the solver.
        """
        for name in ("skip_guidance_layers", "perturbed_layers"):
            if outside := [i for i in getattr(self, name) if i >= depth]:
                raise ValueError(f"{name} {outside} do not exist; this model has layers 0 to {depth - 1}")
        if self.zero_init >= steps:
            raise ValueError(f"guidance zero_init {self.zero_init} leaves none of {steps} steps; give less")
        if not mixed and (alone := list(self._about_uncond())):
            raise ValueError(
                f"guidance {alone[0]} is about the unconditional pass, which profile {profile.name!r} does not run at "
                f"guidance_scale {scale:g}; give another scale"
            )
        self.of(profile)

    def build(
        self,
        predict: Predict,
        cond: Sequence[Ranged],
        uncond: Sequence[Ranged] | None,
        scale: float,
        *,
        profile: Profile,
        sigmas: Tensor,
        shift: float,
        read_uncond: bool = False,
        kept: list[Tensor] | None = None,
    ) -> Guide:
        """The function that a solver calls in one drawing; shares of the steps become noise levels here.

        Args:
            predict: predicts x0 for `Branch`s.
            cond, uncond: the conditionings, with the ranges in which they are used.
            scale: the guidance scale.
            profile: gives the rule by which skip-layer guidance counts steps.
            sigmas, shift: the noise levels of the drawing, and the shift of their schedule.
            read_uncond: see `samplers.guide`.
            kept: what momentum keeps of the calls before, see `samplers.projected`.
        """
        own = self.of(profile)
        now = [math.nan]  # the noise level, which a guidance function is told

        def noting(x: Tensor, sigma: float, branches: Sequence[object]) -> list[Tensor]:
            now[:] = [sigma]
            return predict(x, sigma, branches)

        found = guide(
            averaged(one_by_one(noting) if self.sequential else noting),
            _branches(cond, shift, "cond"),
            None if uncond is None else _branches(uncond, shift, "uncond"),
            _own_mix(self.kind, now) if callable(self.kind) else _MIXES[self.kind](self, scale, kept),
            window=_between(self.interval),
            weaker=list(own._weaker(cond, profile, sigmas, shift, mixed=uncond is not None)),
            rescale=self.rescale,
            read_uncond=read_uncond,
        )
        return zero_init(found, first_steps(sigmas, self.zero_init)) if self.zero_init else found

    def to_text(self) -> str:
        """The settings that differ from the defaults, as `from_text` reads them: "kind=apg momentum=-0.5"."""
        return " ".join(
            f"{field.name}={_written(value)}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        )

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse words NAME=VALUE, in which commas separate several numbers.

        Raises:
            ValueError: a name is unknown or given twice, or a value cannot be read.
        """
        found: dict[str, Any] = {}
        types = get_type_hints(cls) | {"kind": str}
        for word in text.split():
            name, equals, value = word.partition("=")
            kind = pick(types, name, "guidance setting")
            if not equals or name in found:
                raise ValueError(f"guidance {word!r}: expected {name}=VALUE, once")
            found[name] = _read(word, value, kind)
        return cls(**found)

    def _about_uncond(self) -> Iterator[str]:
        """The names of the settings that need an unconditional pass."""
        if self.kind != "cfg":
            yield f"kind={self.kind!r}"
        if self.interval != (0.0, 1.0):
            yield f"interval={self.interval}"
        if self.rescale and not (self.skip_guidance_layers or self.perturbed_layers):
            yield f"rescale={self.rescale}"

    def _weaker(
        self, cond: Sequence[Ranged], profile: Profile, sigmas: Tensor, shift: float, *, mixed: bool
    ) -> Iterator[Weaker]:
        if self.skip_guidance_layers and (mixed or profile.skip_alone):
            start, stop, scale = (getattr(self, f"skip_layer_guidance_{name}") for name in ("start", "stop", "scale"))
            steps = profile.skip_window == "steps"
            window = steps_inside(sigmas, start, stop) if steps else percents(start, stop, shift)
            text = cond if profile.control_skip else [replace(one, control=()) for one in cond]
            skipping = _branches(text, shift, "skip", skip_layers=self.skip_guidance_layers)
            yield Weaker(skipping, scale, window, self.skip_layer_rescale)
        if self.perturbed_layers:
            perturbed = _branches(cond, shift, "perturbed", perturbed_layers=self.perturbed_layers)
            yield Weaker(perturbed, self.perturbed_scale, _between(self.perturbed_interval))


GuidanceLike = Guidance | GuidanceFunction  # what `guidance=` takes


def as_guidance(guidance: GuidanceLike | None) -> Guidance:
    """The argument `guidance` as settings: None is plain classifier-free guidance, and a function becomes the `kind`.

    Raises:
        TypeError: `guidance` is of another type.
    """
    if guidance is None or isinstance(guidance, Guidance):
        return guidance or Guidance()
    if callable(guidance):
        return Guidance(kind=guidance)
    hint = "; give mmdit.Guidance(**guidance)" if isinstance(guidance, Mapping) else ""
    raise TypeError(f"guidance is {type(guidance).__name__}, expected mmdit.Guidance or a function{hint}")


def _own_mix(function: GuidanceFunction, now: Sequence[float]) -> Mix:
    def mix(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        found = function(x, now[0], cond, uncond)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"the guidance function returned {shape}, expected a tensor x0 of shape {list(x.shape)}")
        return found

    return mix


def with_skip_layers(
    guidance: GuidanceLike | None, layers: Sequence[int] | None, *rest: float | None
) -> GuidanceLike | None:
    """Add skip-layer guidance, given by the arguments of diffusers' names, to the settings.

    Args:
        guidance: the settings; None is plain classifier-free guidance.
        layers, rest: skip_guidance_layers, and scale, start and stop; None where they are not given.

    Raises:
        ValueError: a value is given twice, or without layers.
    """
    names = ("skip_guidance_layers", *(f"skip_layer_guidance_{name}" for name in ("scale", "start", "stop")))
    values = zip(names, (None if layers is None else _layers(names[0], layers), *rest), strict=True)
    given: dict[str, Any] = {name: value for name, value in values if value is not None}
    if not given:
        return guidance
    base = as_guidance(guidance)
    if twice := [name for name in given if getattr(base, name) not in (None, ())]:
        raise ValueError(f"{twice[0]} is given, and in guidance too; give one of them")
    found = replace(base, **given)
    if not found.skip_guidance_layers and layers is None:
        raise ValueError(f"{next(iter(given))} is given without skip_guidance_layers; say which layers to skip")
    return found


# The numbers of `Guidance`, with the smallest and the largest value of each.
_RANGES = (
    ("rescale", 0, 1),
    ("eta", -math.inf, math.inf),
    ("threshold", 0, math.inf),
    ("momentum", -math.inf, math.inf),
    ("skip_layer_guidance_scale", -math.inf, math.inf),
    ("skip_layer_guidance_start", 0, 1),
    ("skip_layer_guidance_stop", 0, 1),
    ("skip_layer_rescale", 0, 10),
    ("perturbed_scale", -math.inf, math.inf),
)


def _branches(
    ranges: Sequence[Ranged],
    shift: float,
    name: str,
    skip_layers: tuple[int, ...] = (),
    perturbed_layers: tuple[int, ...] = (),
) -> list[Within]:
    return [
        Within(Branch(one.conditioning, name, skip_layers, perturbed_layers, one.control), one.window(shift))
        for one in ranges
    ]


def _between(interval: tuple[float, float]) -> Window:
    """An interval of noise levels as a window; an upper end of 1 includes every first level, also above 1."""
    low, high = interval
    return Window(math.inf if high == 1 else high, low if low else -math.inf)


def _layers(name: str, layers: Sequence[int]) -> tuple[int, ...]:
    if isinstance(layers, str | bytes) or not isinstance(layers, Sequence | np.ndarray):
        raise TypeError(f"{name} is {type(layers).__name__}, expected a list of numbers of blocks")
    return tuple(sorted({whole(f"{name}[{i}]", layer, 0) for i, layer in enumerate(layers)}))


def _interval(name: str, interval: Sequence[float]) -> tuple[float, float]:
    said = f"guidance {name} must be two noise levels 0 <= low < high <= 1, got {shortened(interval)}"
    if isinstance(interval, str | bytes) or not isinstance(interval, Sequence) or len(interval) != 2:
        raise ValueError(said)
    low, high = (number(f"guidance {name}", one) for one in interval)
    if not 0 <= low < high <= 1:
        raise ValueError(said)
    return low, high


def _check_order(start: float, stop: float) -> None:
    if start > stop:
        raise ValueError(f"skip_layer_guidance_start {start} is after skip_layer_guidance_stop {stop}")


def _written(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read(word: str, text: str, kind: object) -> Any:
    """Parse the value of a field of this type."""
    parts = get_args(kind)
    try:
        if kind is bool:
            return {"True": True, "False": False}[text]
        if kind is str:
            return text
        if parts and type(None) not in parts:
            return tuple(parts[0](part) for part in text.split(",")) if text else ()
        return int(text) if kind is int else float(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"guidance {word!r}: {text!r} is no value of it") from error
