"""Rounding a weight so that the outputs of its Linear, not its own values, stay close.

Nearest rounding makes the error of each value least. The error of the outputs, over inputs x with second moments
H = E[x x^T], is the sum over rows of (q - w) H (q - w)^T, and where inputs are correlated the errors of values can
cancel each other in it. `round_by_moments` looks for such codes in two steps:

1. Columns are rounded one after the other, and what a column's rounding has done to the outputs is made up for by the
   columns that are not rounded yet: Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), algorithm 1, with the columns of
   the largest moments first.
2. Sweeps of coordinate descent: each value in turn moves to the code that is best with all others held fixed, as in
   Behdin et al. 2023, "QuantEase" (arXiv 2309.01885). The error of no row grows.

Where the first step leaves a row worse than nearest rounding does, the descent starts at the latter, so that no row is
worse. Errors are measured with a small multiple of the identity added to H, as in GPTQ (`_DAMPING`), and with D below.
Nagel et al. 2020 (arXiv 2004.10568) show why nearest is not best, and derive the same quadratic form.

Rounded inputs x + e have the moments H + D, where the errors e of float8 are independent of x to first order and D is
diagonal: the mean square of a channel times `input_noise`. The weight whose outputs of x + e are closest to w x is then
w H (H + D)^-1, which is rounded in place of w, and D damps step 1. A bias takes up the mean of what remains: H is then
the covariance of x, while D is still made from the mean square, because float8 rounds x with its mean.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quant.formats import FLOAT8_FORMATS, Format
from quant.recipe import Recipe
from quant.scaling import from_codes, scale_of, to_codes
from quant.tensor import Float8Tensor, amax_of

__all__ = ["Moments", "input_noise", "round_by_moments", "rounded_linear"]

_BLOCK: Final = 128  # columns that are rounded between two updates of all later ones
_DAMPING: Final = 1e-3  # of the mean moment, added to each channel's: channels that are always 0 have none of their own


class Moments(NamedTuple):
    """Mean [in] and second moments E[x x^T], [in, in], of the inputs of a Linear over all tokens."""

    mean: Tensor
    second: Tensor


def input_noise(format: Format) -> float:
    """The mean square of the error of rounding to a float8 format, relative to that of the values.

    A value of mantissa m in [1, 2) and exponent k has an error uniform within 2^k 2^-bits / 2 on both sides, so its
    mean square is 4^k 4^-bits / 12. With log m uniform, E[m^2] is 3 / (2 ln 2), and the ratio 4^-bits ln 2 / 18.
    """
    return math.log(2) / 18 * 4.0 ** -FLOAT8_FORMATS[format].mantissa_bits


def round_by_moments(
    weight: Tensor, scale: Tensor, format: Format, second: Tensor, *, noise: Tensor | None = None, sweeps: int = 3
) -> Tensor:
    """The numbers of codes, float32 [out, in], whose products with the inputs are close to those of the weight.

    They are to be multiplied by `scale`. All is in float64: beside the arguments it takes four times the memory
    of `second` and eight times that of the weight in float64, which is 4.5 GB for a weight of [2432, 9728] (from peaks
    measured at [456, 1824] and [3648, 1824]).

    Args:
        weight: [out, in].
        scale: Positive, () or [out, 1].
        format: The format of the codes.
        second: Second moments of the inputs, or their covariance where a bias takes up the mean, [in, in].
        noise: The mean square of the errors of the inputs' own rounding, [in]: `input_noise` times the mean square of
            each channel (not its variance). None: the inputs are not rounded.
        sweeps: How often coordinate descent goes over all columns; 0 is GPTQ alone.

    Raises:
        ValueError: The moments have another shape, are not finite or not positive semidefinite; or the noise has
            another shape or is not a number from 0.
    """
    _check(weight, second, noise)
    try:
        return _numbers(weight, scale, format, second.double(), noise, sweeps)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # public, but not in `__all__`
        size = list(second.shape)
        raise ValueError(f"second moments {size} are not positive semidefinite: {error}") from error


def _check(weight: Tensor, second: Tensor, noise: Tensor | None) -> None:
    size = weight.shape[1]
    if list(second.shape) != [size, size] or not bool(second.isfinite().all()):
        raise ValueError(
            f"second moments of a weight [{weight.shape[0]}, {size}] are finite numbers [{size}, {size}]; got "
            f"{list(second.shape)}, {int((~second.isfinite()).sum())} not finite"
        )
    if noise is not None and (list(noise.shape) != [size] or not bool((noise.isfinite() & (noise >= 0)).all())):
        raise ValueError(f"noise of the inputs is finite numbers from 0, [{size}]; got {list(noise.shape)}")


def _numbers(weight: Tensor, scale: Tensor, format: Format, wide: Tensor, noise: Tensor | None, sweeps: int) -> Tensor:
    """See `round_by_moments`; arguments are checked, and `wide` is its `second` in float64."""
    spread = wide.diagonal()
    damping = _DAMPING * float(spread.mean()) or 1.0  # inputs that are always 0 round as white ones
    noisy = wide + torch.diag(torch.full_like(spread, damping) if noise is None else noise.double() + damping)
    units = weight.detach().double() / scale.double()
    if noise is not None:
        # Damping holds channels without inputs at the weight's own values.
        units = torch.linalg.solve(noisy, torch.addmm(units, units, wide, beta=damping), left=False)
    order = spread.argsort(descending=True, stable=True)
    target, form = units[:, order].T.contiguous(), noisy[order[:, None], order]
    del noisy, units  # as large as the moments and the weight
    made = _better(_compensated(target, form, format), _rounded(target, format), target, form)
    if noise is not None:  # the target is not the weight
        plain = _rounded(weight.detach().double() / scale.double(), format)
        made = _better(made, plain[:, order].T, target, form)
    for _ in range(sweeps):
        _sweep(made, target, form, format)
    found = torch.empty_like(made)
    found[order] = made
    return found.T.contiguous().float()


def rounded_linear(
    weight: Tensor, bias: Tensor | None, moments: Moments, recipe: Recipe, *, input_scale: Tensor | float | None = None
) -> tuple[Float8Tensor, Tensor | None]:
    """The float8 weight and the bias of a Linear whose outputs are close to those of the 16-bit one.

    The scale of the weight is that of nearest rounding.

    Args:
        weight, bias: [out, in] and [out], or no bias.
        moments: Of the inputs before rounding.
        recipe: How the weight is stored, and whether inputs are rounded.
        input_scale: As for `Float8Tensor.quantize`.

    Raises:
        ValueError: The mean has another shape or is not finite; or see `round_by_moments`.
    """
    scale = scale_of(amax_of(weight.detach(), recipe.granularity), recipe.format)
    mean, second = (part.to(weight.device, torch.float64) for part in moments)
    _check(weight, second, None)
    size = weight.shape[1]
    if list(mean.shape) != [size] or not bool(mean.isfinite().all()):
        raise ValueError(f"the mean of the inputs is finite numbers [{size}]; got {list(mean.shape)}")
    noise = None
    if recipe.activation != "none":  # of the inputs with their mean, which a bias does not keep from rounding
        noise = input_noise(recipe.activation_format) * second.diagonal().clamp(min=0)
    if bias is not None:
        second = second - torch.outer(mean, mean)
    numbers = round_by_moments(weight, scale, recipe.format, second, noise=noise)
    # The product is within half an ulp of the code's own value, so that nearest rounding gives the code again.
    made = Float8Tensor.quantize(
        (numbers.double() * scale.double()).to(weight.dtype if weight.dtype == torch.float64 else torch.float32),
        recipe=recipe,
        scale=scale,
        input_scale=input_scale,
    )._replace(dtype=weight.dtype)
    if bias is None:
        return made, None
    drift = (numbers.double() * scale.double() - weight.double()) @ mean
    return made, (bias.double() - drift).to(bias.dtype)


def _rounded(units: Tensor, format: Format) -> Tensor:
    one = torch.ones((), device=units.device)
    return from_codes(to_codes(units.float(), one, format), format, torch.float32).to(units.dtype)


def _errors(made: Tensor, target: Tensor, form: Tensor) -> Tensor:
    """The error of the outputs of each row, [out], of columns by rows [in, out]."""
    rest = made - target
    return (rest * (form @ rest)).sum(0)


def _better(made: Tensor, other: Tensor, target: Tensor, form: Tensor) -> Tensor:
    """Of each row of the weight, the codes with the smaller error of outputs, [in, out]."""
    return torch.where(_errors(made, target, form) > _errors(other, target, form), other, made)


def _compensated(target: Tensor, form: Tensor, format: Format) -> Tensor:
    """GPTQ: codes [in, out] of a target of the same shape, columns of the weight from first to last."""
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(form)), upper=True)
    left, made = target.clone(), torch.empty_like(target)
    for first in range(0, len(target), _BLOCK):
        last = min(first + _BLOCK, len(target))
        errors = torch.empty_like(left[first:last])
        for j in range(first, last):
            made[j] = _rounded(left[j], format)
            errors[j - first] = (left[j] - made[j]) / upper[j, j]
            left[j + 1 : last] -= torch.outer(upper[j, j + 1 : last], errors[j - first])
        left[last:] -= upper[first:last, last:].T @ errors
    return made


def _sweep(made: Tensor, target: Tensor, form: Tensor, format: Format) -> None:
    """One pass of coordinate descent over all columns, in place."""
    slope = form @ (made - target)
    for first in range(0, len(made), _BLOCK):
        part = slice(first, min(first + _BLOCK, len(made)))
        moved, before = slope[part], made[part].clone()
        for j in range(part.start, part.stop):
            best = _rounded(made[j] - moved[j - first] / form[j, j], format)
            moved += torch.outer(form[part, j], best - made[j])
            made[j] = best
        slope[part.stop :] += form[part.stop :, part] @ (made[part] - before)
