"""Euler's method, and its variants with fresh noise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import inf

from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.solvers.arguments import solver
from samplers.solvers.common import Churn, ancestral, descent, show, slope, toward
from samplers.types import Denoise, Step


@solver
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler's method on dx/dsigma: one model call a step, first order. On a flow it is DDIM.

    Args:
        denoise: (latent, noise level) -> predicted x0, of the latent's shape.
        x: the noise to start from, any shape.
        sigmas: [steps + 1] falling noise levels, see `samplers.sigmas`.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        x = x + slope(x, sigma, denoised) * (sigma_next - sigma) if sigma_next else denoised
        x = yield from show(i, sigma_next, x, denoised)


ddim = euler  # on a flow DDIM is Euler's method; ComfyUI's differs only in how it seeds inpainting


@solver
def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """Euler's method to below the next level, then fresh noise up to it: see `descent`.

    Args:
        denoise, x, sigmas: see `euler`.
        eta: how far below the next level: 0 is `euler`, 1 the furthest.
        s_noise: factor of the fresh noise.
        noise: (sigma, sigma_next) -> noise of unit variance, see `samplers.noise`; None draws by torch's global state.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            down, grow, renoise = descent(sigma, sigma_next, eta)
            x = grow * toward(denoised, x, down / sigma)
            x = churn.add(x, renoise, sigma, sigma_next)
        x = yield from show(i, sigma_next, x, denoised)


@solver
def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Predict the picture and add fresh noise to it, sigma' n + (1 - sigma') x0, as consistency models do.

    Song et al. 2023, arXiv 2303.01469, algorithm 1. diffusers: FlowMatchEulerDiscreteScheduler with
    `stochastic_sampling`, and FlowMatchLCMScheduler.

    Args:
        denoise, x, sigmas, noise: see `euler_ancestral`.
    """
    noise = noise or Fresh(x)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        x = sigma_next * noise(sigma, sigma_next) + (1 - sigma_next) * denoised if sigma_next else denoised
        x = yield from show(i, sigma_next, x, denoised)


@solver
def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """The posterior of DDPM in the variance exploding form, as ComfyUI runs it: wrong on a flow, see `flow_ddpm`.

    Ho et al. 2020, arXiv 2006.11239, algorithm 2, with 1 / (1 + sigma^2) for its cumulative alpha: in that form the
    step is the ancestral one with eta 1.

    Args:
        denoise, x, sigmas, noise: see `euler_ancestral`.
    """
    churn = Churn.of(x, noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            down, up = ancestral(sigma, sigma_next, churn.eta)
            x = toward(denoised, x, down / sigma)
            x = churn.add(x, up, sigma, sigma_next)
        x = yield from show(i, sigma_next, x, denoised)


@solver
def flow_ddpm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """The posterior of DDPM on a flow: the ancestral step in the ratio of noise to picture.

    Ho et al. 2020, arXiv 2006.11239, formula 7; with eta between 0 (`euler`) and 1 Song et al. 2020, arXiv 2010.02502,
    formulas 12 and 16.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `euler_ancestral`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        x = posterior(x, sigma, sigma_next, denoised, denoised, churn) if sigma_next else denoised
        x = yield from show(i, sigma_next, x, denoised)


def posterior(x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, origin: Tensor, churn: Churn) -> Tensor:
    """Return alpha' (x0 + down (x - alpha origin) / sigma + up n), with down and up in the ratio of noise to picture.

    Args:
        x: the latent at `sigma`.
        sigma, sigma_next: the ends of the step.
        denoised: the predicted x0 to go to.
        origin: the predicted x0 that the noise in x is measured from: the same, or the unconditional one (CFG++).
        churn: see `Churn`.
    """
    alpha, alpha_next = 1 - sigma, 1 - sigma_next
    down, up = ancestral(sigma / alpha if alpha > 0 else inf, sigma_next / alpha_next, churn.eta)
    x = alpha_next * (denoised + down * slope(x, sigma, alpha * origin))
    return churn.add(x, alpha_next * up, sigma, sigma_next)
