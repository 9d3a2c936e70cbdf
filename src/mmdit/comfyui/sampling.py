"""One drawing of a sampler node, as ComfyUI runs it: `comfy/samplers.py`, `KSAMPLER.sample` and `CFGGuider`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from inspect import unwrap

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import samplers
from mmdit.comfyui.conditions import Entry, predicted, resolved
from mmdit.comfyui.values import CHANNELS, Guider, Latent, Model, Noise, Predicted, Sampler
from mmdit.pictures.composite import repeated
from mmdit.pictures.latents import from_vae_scale, to_vae_scale
from mmdit.pipeline.seeds import solver_options
from samplers import SOLVERS, Guide, Guided, Solver, Step, only_x0

_AT_ONE = 1e-9  # a guidance scale so near to 1 is 1: the negative prompt is not read
_DRAWS = 10_000  # single draws of noise that a batch_index may ask for
_LAST_LEVEL = 1e-4  # what FlipSigmas puts in the place of 0
# Names of ComfyUI's KSampler. Where noise is drawn, on a GPU or a CPU, is the only difference of *_gpu; here it is
# always drawn on the CPU.
SAMPLERS: tuple[str, ...] = (
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2"),
    *("dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp"),
    *("dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
    *("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm"),
    *("ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral"),
    *("res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2"),
    *("seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2"),
)
SCHEDULERS: tuple[str, ...] = (
    *("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic"),
    "kl_optimal",
)


def named_sampler(name: str, **options: float | int) -> Sampler:
    """The sampler of one of ComfyUI's names."""
    return Sampler(name, SOLVERS[name.removesuffix("_gpu")], options)


def schedule(scheduler: str, steps: int, shift: float, denoise: float = 1.0, solver: Solver | None = None) -> Tensor:
    """The sigmas of a scheduler: with `denoise` below 1, the last `steps` of a list that is so much longer.

    Args:
        scheduler: one of `SCHEDULERS`.
        steps: of the sampler.
        shift: of the model.
        denoise: 0 or less gives no level at all.
        solver: for some, KSampler asks for one level more and leaves out the last but one.
    """
    if denoise <= 0:
        return torch.zeros(0, dtype=torch.float64)
    whole = steps if denoise > 0.9999 else int(steps / denoise)
    one_more = solver is not None and solver.drops_second_last
    found = samplers.sigmas(scheduler, whole + one_more, shift=shift)
    if one_more:
        found = torch.cat([found[:-2], found[-1:]])
    return found if denoise > 0.9999 else found[-(steps + 1) :]


def flipped(sigmas: Tensor) -> Tensor:
    """The levels in the other order, a 0 at the start replaced, because nothing can be divided by it (FlipSigmas)."""
    found = sigmas.flip(0).clone()
    if len(found) and found[0] == 0:
        found[0] = _LAST_LEVEL
    return found


def noise_of(noise: Noise, latent: Latent) -> Tensor:
    """The noise of latents: one draw in float32 on the CPU; zeros where the node draws none.

    With `batch_index` it is drawn sample by sample, and each sample takes the draw of its number.
    """
    shape = _with_channels(latent["samples"]).shape
    if not noise.drawn:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(noise.seed)
    places = latent.get("batch_index")
    if places is None:
        return torch.randn(shape, generator=generator)
    numbers, which = np.unique(places, return_inverse=True)
    if numbers[-1] >= _DRAWS:
        raise ValueError(f"batch_index asks for the noise of sample {numbers[-1]}, at most {_DRAWS} are drawn")
    draws = [torch.randn((1, *shape[1:]), generator=generator) for _ in range(numbers[-1] + 1)]
    return torch.cat([draws[numbers[i]] for i in which.reshape(-1)])


@torch.no_grad()
def draw(
    guider: Guider, noise: Tensor, seed: int, latent: Latent, sampler: Sampler, sigmas: Tensor
) -> tuple[Latent, Latent]:
    """Run a sampler over all levels of `sigmas`.

    Args:
        guider: the prompts and their guidance.
        noise: [b, 16, h, w], of unit variance, or zeros.
        seed: of the noise that a stochastic sampler adds.
        latent: what to start from, with its mask.
        sampler: the solver.
        sigmas: float64 [steps + 1]; they may rise, as after FlipSigmas. No level at all returns the latent.

    Returns:
        The latent, and the last predicted picture as a latent, both at the VAE's scale and on the CPU.

    Raises:
        ValueError: a level is no noise level, the last one is 1, or the prompts are not for this model.
        FloatingPointError: a value is not finite.
    """
    samples = _with_channels(latent["samples"])
    if len(sigmas) == 0:
        return _changed(latent, samples), _changed(latent, samples)
    _check_levels(sigmas)
    device = guider.model.transformer.pos_embed.device
    given, noise = _to_model(samples).to(device), noise.to(device)
    first, last = float(sigmas[0]), float(sigmas[-1])
    x, denoised = first * noise + (1 - first) * given, None
    for step in _steps(_guide(guider, sampler, noise, seed, given, latent, sigmas), x, sampler, sigmas, seed, guider):
        x, denoised = step.x, step.denoised
    x = x / (1 - last)
    found = x if denoised is None else denoised
    if not (torch.isfinite(x).all() and torch.isfinite(found).all()):
        raise FloatingPointError(
            f"sampler {sampler.name} gave values that are not finite from sigma {first:g} to {last:g}; use another "
            "sampler or dtype"
        )
    return _changed(latent, to_vae_scale(x.cpu())), _changed(latent, to_vae_scale(found.cpu()))


def _steps(guide: Guide, x: Tensor, sampler: Sampler, sigmas: Tensor, seed: int, guider: Guider) -> Iterator[Step]:
    if len(sigmas) < 2:
        return iter(())
    solver, generator = sampler.solver, torch.Generator().manual_seed(seed)
    options = solver_options(solver, x, sigmas, guider.model.shift, generator, "same_seed") | sampler.options
    denoise = guide if solver.guided else only_x0(guide)
    if bool((sigmas.diff() < 0).all()):
        return solver(denoise, x, sigmas, **options)
    return unwrap(solver.run)(denoise, x, sigmas, **options)  # rising levels, which a solver's own checks refuse


def _guide(
    guider: Guider, sampler: Sampler, noise: Tensor, seed: int, given: Tensor, latent: Latent, sigmas: Tensor
) -> Guide:
    """What the solver calls: the guided prediction, kept to the latent where the mask is 0."""
    found = (_DualGuidance if guider.middle is not None else _Guidance)(guider, noise.shape, sampler.solver.guided)
    if "noise_mask" not in latent:
        return found
    mask = _mask_for(latent["noise_mask"], noise.shape).to(noise)
    if sampler.name == "ddim":  # ComfyUI's other noise for the kept part
        noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed + 1)).to(noise)
    rule = guider.model.mask_rule

    def kept(x: Tensor, sigma: float) -> Guided:
        now = mask if rule is None else rule(mask, sigma, sigmas)
        around = sigma * noise + (1 - sigma) * given
        x0, uncond = found(x * now + around * (1 - now), sigma)
        return Guided(x0 * now + given * (1 - now), uncond)

    return kept


class _Guidance:
    """Classifier-free guidance and the model's patches, for one drawing."""

    def __init__(self, guider: Guider, shape: Sequence[int], reads_uncond: bool) -> None:
        self.guider, self.model = guider, guider.model
        several = [() if guider.negative is None else guider.negative, guider.positive]
        self.negative, self.positive = resolved(several, self.model, shape)
        if not reads_uncond and math.isclose(guider.scale, 1.0, rel_tol=_AT_ONE):
            self.negative = []
        self.before = [make() for make in self.model.before]

    def __call__(self, x: Tensor, sigma: float) -> Guided:
        uncond, cond = predicted(self.model, x, sigma, [self.negative, self.positive])
        found = _found(self.model, x, sigma, cond, uncond, self.guider.scale, self.positive)
        for patch in self.before:
            found = found._replace(cond=patch(found))
        return Guided(_combined(self.model, found), uncond)


class _DualGuidance:
    """DualCFGGuider: two prompts and a negative one, each pair with a scale."""

    def __init__(self, guider: Guider, shape: Sequence[int], reads_uncond: bool) -> None:
        self.guider, self.model = guider, guider.model
        assert guider.middle is not None and guider.negative is not None
        self.positive, self.middle, self.negative = resolved(
            [guider.positive, guider.middle, guider.negative], self.model, shape
        )
        outer, inner = (math.isclose(one, 1.0, rel_tol=_AT_ONE) for one in (guider.middle_scale, guider.scale))
        if not guider.nested and not reads_uncond and outer:
            self.negative = []
            self.middle = [] if inner else self.middle

    def __call__(self, x: Tensor, sigma: float) -> Guided:
        uncond, middle, cond = predicted(self.model, x, sigma, [self.negative, self.middle, self.positive])
        inner, outer = self.guider.scale, self.guider.middle_scale
        if self.guider.nested:
            text = _combined(self.model, _found(self.model, x, sigma, cond, middle, inner, self.positive))
            return Guided(uncond + outer * (text - uncond), middle)
        base = _combined(self.model, _found(self.model, x, sigma, middle, uncond, outer, self.middle))
        return Guided(base + inner * (cond - middle), uncond)


def _found(
    model: Model, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float, prompts: Sequence[Entry]
) -> Predicted:
    def weaker(layers: Sequence[int]) -> Tensor:
        return predicted(model, x, sigma, [prompts], layers)[0]

    return Predicted(x, sigma, cond, uncond, scale, weaker)


def _combined(model: Model, found: Predicted) -> Tensor:
    """cond and uncond as one prediction (ComfyUI's `cfg_function`)."""
    if model.mixing is not None:
        x0 = model.mixing(found)
    else:
        x0 = samplers.plain(found.scale)(found.x, found.cond, found.uncond)
    for patch in model.after:
        x0 = patch(found, x0)
    return x0


def _with_channels(samples: Tensor) -> Tensor:
    """Latents of 16 channels: of another number only where all are zeros (`fix_empty_latent_channels`).

    Raises:
        ValueError: they have another number of channels and are not empty.
    """
    if samples.shape[1] == CHANNELS:
        return samples
    if bool(samples.any()):
        raise ValueError(
            f"the latent has {samples.shape[1]} channels, but the model's have {CHANNELS}; encode with its own VAE, or "
            "begin with EmptySD3LatentImage"
        )
    return samples.new_zeros(samples.shape[0], CHANNELS, *samples.shape[2:])


def _to_model(samples: Tensor) -> Tensor:
    """Latents in model space; an empty one is zeros there too, as in ComfyUI."""
    samples = samples.float()
    return from_vae_scale(samples) if bool(samples.any()) else samples


def _changed(latent: Latent, samples: Tensor) -> Latent:
    """The latent with other samples; its mask and batch_index stay."""
    changed = latent.copy()
    changed["samples"] = samples
    return changed


def _mask_for(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask at the size of latents [b, c, h, w], bilinear, not rounded: [b, 1, h, w]."""
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    return repeated(F.interpolate(mask, size=tuple(shape[2:]), mode="bilinear"), shape[0])


def _check_levels(sigmas: Tensor) -> None:
    low, high, last = float(sigmas.min()), float(sigmas.max()), float(sigmas[-1])
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the sigmas go from {low:g} to {high:g}; noise levels of this model are from 0 to 1")
    if last == 1:
        raise ValueError("the last sigma is 1, where nothing is left of the latent; stop earlier, see SplitSigmas")
