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

_AT_ONE = 1e-9  # a guidance scale within this distance of 1 counts as 1: the unconditional branch does not run
_DRAWS = 10_000  # maximum number of noise draws that a batch_index can require
_LAST_LEVEL = 1e-4  # FlipSigmas replaces a first level of 0 with this one
# Sampler names of ComfyUI's KSampler. The *_gpu variants differ only in drawing their noise on the GPU; here, noise is
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
    """Return the sampler that ComfyUI calls by this name."""
    return Sampler(name, SOLVERS[name.removesuffix("_gpu")], options)


def schedule(scheduler: str, steps: int, shift: float, denoise: float = 1.0, solver: Solver | None = None) -> Tensor:
    """The sigmas of a scheduler, float64 [steps + 1].

    With `denoise` below 1, they are the last `steps` + 1 sigmas of a schedule of int(steps / denoise) steps.

    Args:
        scheduler: one of `SCHEDULERS`.
        steps: number of sampler steps.
        shift: the shift of the model's schedule.
        denoise: the share of the schedule to use; 0 or less returns no sigmas.
        solver: the solver. For some solvers, KSampler adds a step to the schedule and drops the second-last sigma.
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
    """Reverse the sigmas; a first sigma of 0 becomes 1e-4, because solvers divide by sigma (FlipSigmas)."""
    found = sigmas.flip(0).clone()
    if len(found) and found[0] == 0:
        found[0] = _LAST_LEVEL
    return found


def noise_of(noise: Noise, latent: Latent) -> Tensor:
    """Draw the noise of latents in float32 on the CPU, all at once; zeros if the NOISE is disabled.

    With `batch_index`, noise is drawn one sample at a time, and each sample takes the draw with its index.
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
        seed: the seed of the noise that a stochastic sampler adds.
        latent: the initial latent, with its mask.
        sampler: the solver and its options.
        sigmas: float64 [steps + 1]; they may rise, as after FlipSigmas. An empty tensor returns the latent unchanged.

    Returns:
        The final latent, and the last predicted x0, both at the VAE's scale and on the CPU.

    Raises:
        ValueError: a sigma is out of range, the last sigma is 1, or the prompts do not fit this model.
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
    return unwrap(solver.run)(denoise, x, sigmas, **options)  # without its checks: sigmas may rise


def _guide(
    guider: Guider, sampler: Sampler, noise: Tensor, seed: int, given: Tensor, latent: Latent, sigmas: Tensor
) -> Guide:
    """The function that the solver calls: the guided prediction, with the given latent where the mask is 0."""
    found = (_DualGuidance if guider.middle is not None else _Guidance)(guider, noise.shape, sampler.solver.guided)
    if "noise_mask" not in latent:
        return found
    mask = _mask_for(latent["noise_mask"], noise.shape).to(noise)
    if sampler.name == "ddim":  # ComfyUI uses different noise outside of the mask
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
    """DualCFGGuider: two prompts and a negative prompt, with a guidance scale for each pair."""

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
    """Combine cond and uncond into one prediction (ComfyUI's `cfg_function`)."""
    if model.mixing is not None:
        x0 = model.mixing(found)
    else:
        x0 = samplers.plain(found.scale)(found.x, found.cond, found.uncond)
    for patch in model.after:
        x0 = patch(found, x0)
    return x0


def _with_channels(samples: Tensor) -> Tensor:
    """Return latents with 16 channels; zeros with another number are converted (`fix_empty_latent_channels`).

    Raises:
        ValueError: nonzero latents do not have 16 channels.
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
    """Convert latents to model space; latents of zeros stay zeros, as in ComfyUI."""
    samples = samples.float()
    return from_vae_scale(samples) if bool(samples.any()) else samples


def _changed(latent: Latent, samples: Tensor) -> Latent:
    """Return the latent with these samples, and with its mask and batch_index unchanged."""
    changed = latent.copy()
    changed["samples"] = samples
    return changed


def _mask_for(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize a mask bilinearly to [b, 1, h, w], the size of latents [b, c, h, w], without rounding."""
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    return repeated(F.interpolate(mask, size=tuple(shape[2:]), mode="bilinear"), shape[0])


def _check_levels(sigmas: Tensor) -> None:
    low, high, last = float(sigmas.min()), float(sigmas.max()), float(sigmas[-1])
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the sigmas go from {low:g} to {high:g}; noise levels of this model are from 0 to 1")
    if last == 1:
        raise ValueError("the last sigma is 1, where nothing is left of the latent; stop earlier, see SplitSigmas")
