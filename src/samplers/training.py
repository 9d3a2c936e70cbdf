"""The flow-matching training side of Stable Diffusion 3: times, noising, velocity target, loss and its weightings.

Formulas follow Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(arXiv 2403.03206), sections 2 to 5. Time t runs from 0 (data) to 1 (noise); the model's timestep input is 1000 t.
Every random function takes a `torch.Generator`, which lives on the device that it draws on.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from samplers import schedules
from samplers.checks import number, tensor, whole

__all__ = [
    "MODE_SCALES",
    "WEIGHTINGS",
    "cosmap",
    "cosmap_weight",
    "logit_normal",
    "logit_normal_weight",
    "mode",
    "mode_map",
    "noised",
    "plain_weight",
    "sample_losses",
    "shifted",
    "sigma_sqrt_weight",
    "uniform",
    "velocity",
    "velocity_loss",
]

# The scales between which the map of eq. 20 is monotone.
MODE_SCALES = (-1.0, 2.0 / (math.pi - 2.0))


def uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `n` times uniformly from [0, 1): float32 [n], on the generator's device (CPU without one).

    Raises:
        ValueError: `n` is negative.
    """
    _check_count(n)
    return torch.rand(n, generator=generator, device=_device(generator), dtype=torch.float32)


def logit_normal(n: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw `n` times t with logit(t) ~ N(mean, std^2) (eq. 19): float32 [n], on the generator's device.

    A positive mean favours noise, a negative one data.

    Raises:
        ValueError: `n` is negative or `std` is not positive.
    """
    _check_count(n)
    _check_std(std)
    normal = torch.randn(n, generator=generator, device=_device(generator), dtype=torch.float32)
    return torch.sigmoid(mean + std * normal)


def mode(n: int, scale: float = 1.29, generator: torch.Generator | None = None) -> Tensor:
    """Draw `n` times by mode sampling with heavy tails (eq. 20): float32 [n], on the generator's device.

    A positive scale favours the middle, a negative one both ends, 0 is uniform; 1.29 is the paper's best.

    Raises:
        ValueError: `n` is negative or `scale` is outside `MODE_SCALES`, where the map is not monotone.
    """
    return mode_map(uniform(n, generator), scale)


def mode_map(u: Tensor, scale: float) -> Tensor:
    """Map u in [0, 1] to f(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u) (eq. 20); falls from 1 to 0; any shape.

    Raises:
        ValueError: `scale` is outside `MODE_SCALES`.
    """
    scale = number("mode scale", scale, *MODE_SCALES)
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def cosmap(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `n` times whose log-SNR follows the cosine schedule (eq. 21): float32 [n], on the generator's device.

    t = 1 - 1 / (tan(pi u / 2) + 1) for uniform u; its density is `cosmap_weight`.

    Raises:
        ValueError: `n` is negative.
    """
    return 1 - 1 / (torch.tan(math.pi / 2 * uniform(n, generator)) + 1)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise: shift t / (1 + (shift - 1) t) (eq. 23 with shift = sqrt(m / n)); any shape.

    shifted(shifted(t, a), b) = shifted(t, a b), and 1 / shift is the inverse. `samplers.shifted`, with a check.

    Raises:
        ValueError: `shift` is not a positive finite number.
    """
    return schedules.shifted(t, number("shift", shift, 0, above=True))


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return z_t = (1 - t) x0 + t noise (eq. 13) in `x0`'s dtype; x0 and noise [b, ...], t [b].

    Raises:
        ValueError: shapes disagree.
    """
    _check_pair(x0, noise, "x0", "noise")
    level = _per_sample(t, x0).to(x0.dtype)
    return (1 - level) * x0 + level * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """Return the target dz_t/dt = noise - x0 of the straight path (eq. 13); both [b, ...].

    Raises:
        ValueError: shapes disagree.
    """
    _check_pair(x0, noise, "x0", "noise")
    return noise - x0


def velocity_loss(predicted: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean of weight (predicted - (noise - x0))^2 as a scalar, in float32 or wider.

    With t drawn uniformly, weight = pi(t) gives in expectation what drawing t from pi gives (section 3.1; the paper's
    t / (1 - t) pi(t) is the same weighting, of the error in the noise rather than in the velocity).

    Args:
        predicted: velocity of the model [b, ...].
        x0: data [b, ...].
        noise: the noise that was mixed in [b, ...].
        weight: one factor per sample [b]; None is 1.

    Raises:
        ValueError: shapes disagree.
    """
    _check_pair(predicted, x0, "predicted", "x0")
    wide = torch.promote_types(predicted.dtype, torch.float32)
    error = (predicted.to(wide) - velocity(x0.to(wide), noise.to(wide))) ** 2
    return error.mean() if weight is None else (_per_sample(weight, error) * error).mean()


def sample_losses(predicted: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the terms of `velocity_loss`, whose mean it is: one for each sample [b], in float32 or wider.

    Args:
        predicted, x0, noise, weight: see `velocity_loss`.

    Raises:
        ValueError: shapes disagree.
    """
    _check_pair(predicted, x0, "predicted", "x0")
    wide = torch.promote_types(predicted.dtype, torch.float32)
    errors = ((predicted.to(wide) - velocity(x0.to(wide), noise.to(wide))) ** 2).flatten(1).mean(1)
    return errors if weight is None else _per_sample(weight, errors) * errors


def plain_weight(t: Tensor) -> Tensor:
    """Return 1 for each time: the plain velocity loss of rectified flow; any shape."""
    return torch.ones_like(t)


def sigma_sqrt_weight(t: Tensor) -> Tensor:
    """Return t^-2 (`sigma_sqrt` of diffusers' SD3 training): infinite at t = 0; any shape."""
    return t**-2.0


def cosmap_weight(t: Tensor) -> Tensor:
    """Return the density 2 / (pi - 2 pi t + 2 pi t^2) of `cosmap` (eq. 21); any shape."""
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


def logit_normal_weight(t: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return the density exp(-(logit t - mean)^2 / (2 std^2)) / (std sqrt(2 pi) t (1 - t)) (eq. 19), 0 < t < 1.

    Raises:
        ValueError: `std` is not positive.
    """
    _check_std(std)
    normal = torch.exp(-((torch.logit(t) - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    return normal / (t * (1 - t))


# By the names that diffusers' SD3 training scripts use; logit_normal here with its default mean and width.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": plain_weight,
    "sigma_sqrt": sigma_sqrt_weight,
    "cosmap": cosmap_weight,
    "logit_normal": logit_normal_weight,
}


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    if tensor("the times or weights", value).shape != like.shape[:1]:
        raise ValueError(f"expected one value per sample, shape {tuple(like.shape[:1])}, got {tuple(value.shape)}")
    return value.reshape(-1, *[1] * (like.ndim - 1))


def _check_pair(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if tensor(name_a, a).shape != tensor(name_b, b).shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)} but {name_b} has {tuple(b.shape)}")


def _check_count(n: int) -> None:
    whole("the number of times", n, 0, 2**31)


def _check_std(std: float) -> None:
    number("std", std, 0, above=True)
