"""The arguments that all solvers take, checked before the first step, and what `denoise` returns, checked in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from inspect import signature
from typing import Any, ParamSpec

import torch
from torch import Tensor

from samplers.checks import as_levels, check_apart, number, shown, whole
from samplers.types import Guided, Step

Arguments = ParamSpec("Arguments")
_MARK = "checks_arguments"


def solver(run: Callable[Arguments, Iterator[Step]]) -> Callable[Arguments, Iterator[Step]]:
    """Return a solver that checks its arguments; its `denoise` returns x0. Sigmas may be a list or an array too.

    Raises:
        TypeError: the solver has no such option, `denoise` cannot be called or returns no tensor, or x is no dense
            tensor of numbers.
        ValueError: the levels do not fall from at most 1 to at least 0, a number is out of its bounds, or `denoise`
            returns another shape.
    """
    return checked(run, guided=False)


def guided_solver(run: Callable[Arguments, Iterator[Step]]) -> Callable[Arguments, Iterator[Step]]:
    """Return the same for a solver whose `denoise` returns `samplers.Guided`."""
    return checked(run, guided=True)


def checked(run: Callable[..., Iterator[Step]], *, guided: bool) -> Callable[..., Iterator[Step]]:
    """Return a solver that checks its arguments: `run` itself where it does so already."""
    if hasattr(run, _MARK):
        return run
    takes = signature(run)
    known, name = list(takes.parameters)[3:], name_of(run)

    @wraps(run)
    def solve(*args: object, **options: object) -> Iterator[Step]:
        given = takes.bind(*args, **{key: _option(name, known, key, value) for key, value in options.items()})
        denoise, x, sigmas, *rest = given.args
        return run(_checked_denoise(name, denoise, guided), _latent(x), _levels(sigmas), *rest, **given.kwargs)

    vars(solve)[_MARK] = True
    return solve


def name_of(run: Callable[..., object]) -> str:
    """Return the name of a function for messages; of a `partial` its function's, of an object its type's."""
    while isinstance(run, partial):
        run = run.func
    return str(getattr(run, "__name__", type(run).__name__))


def _option(name: str, known: list[str], key: str, value: object) -> Any:
    """Return a keyword argument, its number as Python's own."""
    if key in known:
        return _OPTIONS[key](key, value) if key in _OPTIONS else value
    if key in ("denoise", "x", "sigmas"):
        return value
    raise TypeError(f"{name} has no option {key!r}; it takes {', '.join(known) if known else 'none'}")


def _levels(sigmas: object) -> Tensor:
    levels = as_levels(sigmas)
    if levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas go from {float(levels[0])} to {float(levels[-1])}, expected levels between 1 and 0")
    check_apart(levels)
    return levels


def _latent(x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {shown(x)}, expected the latent to start from, a floating-point tensor")
    if not x.is_floating_point() or x.element_size() < 2 or x.layout != torch.strided:
        raise TypeError(f"x is a {x.layout} tensor of {x.dtype}, expected a dense floating-point tensor")
    return x


def _checked_denoise(name: str, denoise: object, guided: bool) -> Callable[[Tensor, float], Any]:
    """Return `denoise` with a check of what it returns."""
    if not callable(denoise):
        raise TypeError(f"denoise is {shown(denoise)}, expected a function of a latent and a noise level")
    wanted = "samplers.Guided, as functions of samplers.guide return it" if guided else "the predicted x0, a tensor"

    def predicted(x: Tensor, sigma: float) -> Any:
        found = denoise(x, sigma)
        if isinstance(found, Guided) is not guided or not isinstance(x0 := found.x0 if guided else found, Tensor):
            hint = "; samplers.only_x0 takes x0 of a guided prediction" if isinstance(found, Guided) else ""
            raise TypeError(f"denoise returned {shown(found)} to {name}, expected {wanted}{hint}")
        if x0.shape != x.shape:
            raise ValueError(f"denoise returned a tensor of shape {list(x0.shape)} for a latent {list(x.shape)}")
        return found

    return predicted


def _noise(name: str, value: object) -> Any:
    if value is not None and not callable(value):
        raise TypeError(f"{name} is {shown(value)}, expected a function of two noise levels, or None")
    return value


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "eta": partial(number, low=0, high=100),
    "s_noise": number,
    "gamma": number,
    "shift": partial(number, low=0, above=True),
    "rtol": partial(number, low=0, high=1e6, above=True),
    "atol": partial(number, low=0, high=1e6, above=True),
    "h_init": partial(number, low=0, high=1e6, above=True),
    "order": partial(whole, low=1, high=8),
    "noise": _noise,
}
