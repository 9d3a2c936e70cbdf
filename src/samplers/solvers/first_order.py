"""Euler's method, and what differs from it by the noise that it adds."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.solvers.common import Interval, ancestral, descent, slope, toward, walk
from samplers.types import Denoise, Step


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler's method on dx/dsigma: one model call a step, first order. On a flow it is DDIM.

    Args:
        denoise: x0 prediction of a latent at a noise level.
        x: the noise to start from, any shape.
        sigmas: [steps + 1] falling levels, see `samplers.sigmas`.
    """

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        return x + slope(x, over.sigma, denoised) * over.width

    return walk(denoise, x, sigmas.tolist(), move)


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """Euler's method to below the next level, then fresh noise up to it: see `descent`.

    Args:
        denoise, x, sigmas: see `euler`.
        eta: how far below: 0 is `euler`, 1 the most.
        s_noise: factor of the fresh noise.
        noise: see `samplers.noise`; None draws from torch's global state.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        to = descent(over, eta)
        x = to.grow * toward(denoised, x, to.down / over.sigma)
        return x + to.renoise * s_noise * noise(over.sigma, over.following) if eta else x

    return walk(denoise, x, sigmas.tolist(), move)


def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Predict the picture and noise it anew, sigma' n + (1 - sigma') x0, as consistency models do.

    Song et al. 2023, arXiv 2303.01469, algorithm 1. diffusers: FlowMatchEulerDiscreteScheduler with
    `stochastic_sampling`.

    Args:
        denoise, x, sigmas, noise: see `euler_ancestral`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        return over.following * noise(over.sigma, over.following) + (1 - over.following) * denoised

    return walk(denoise, x, sigmas.tolist(), move)


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """The posterior of DDPM with sigma as noise added to a whole picture, as ComfyUI runs it: not a flow's.

    Ho et al. 2020, arXiv 2006.11239, algorithm 2, with 1 / (1 + sigma^2) for its cumulative alpha: in that scale its
    step is the ancestral one with eta 1. `flow_ddpm` is right on flows.

    Args:
        denoise, x, sigmas, noise: see `euler_ancestral`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        down, up = ancestral(over.sigma, over.following, 1.0)
        return toward(denoised, x, down / over.sigma) + up * noise(over.sigma, over.following)

    return walk(denoise, x, sigmas.tolist(), move)


def flow_ddpm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """The posterior of DDPM on a flow: the ancestral step in the ratio of noise to picture.

    Ho et al. 2020, arXiv 2006.11239, formula 7; with eta between 0 (`euler`) and 1 Song et al. 2020, arXiv 2010.02502,
    formulas 12 and 16.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `euler_ancestral`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        return posterior(over, eta, x, denoised, denoised, s_noise, noise)

    return walk(denoise, x, sigmas.tolist(), move)


def posterior(
    over: Interval, eta: float, x: Tensor, denoised: Tensor, origin: Tensor, s_noise: float, noise: Noise
) -> Tensor:
    """alpha' (x0 + down (x - alpha origin) / sigma + up n), with down and up in the ratio of noise to picture.

    Args:
        over: from where to where.
        eta: see `ancestral`.
        x: at `over.sigma`.
        denoised: the picture to go to.
        origin: the picture that the noise in x is reckoned from.
        s_noise, noise: see `euler_ancestral`.
    """
    alpha, alpha_following = 1 - over.sigma, 1 - over.following
    before = over.sigma / alpha if alpha > 0 else float("inf")
    down, up = ancestral(before, over.following / alpha_following, eta)
    x = alpha_following * (denoised + down * slope(x, over.sigma, alpha * origin))
    return x + alpha_following * up * s_noise * noise(over.sigma, over.following) if eta else x
