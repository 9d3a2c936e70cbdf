"""Samplers, schedules, guiders and noise: ComfyUI's `nodes.py` and `comfy_extras/nodes_custom_sampler.py`."""

from __future__ import annotations

import torch
from torch import Tensor

import samplers
from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import boolean, choice, decimal, integer, node, seed, wire
from mmdit.comfyui.sampling import (
    SAMPLERS,
    SCHEDULERS,
    draw,
    flipped,
    named_sampler,
    noise_of,
    schedule,
)
from mmdit.comfyui.schedules import beta_sampling, karras
from mmdit.comfyui.values import Guider, Latent, Model, Noise, Prompts, Sampler
from mmdit.pictures.latents import from_vae_scale, to_vae_scale

_MODEL, _LATENT, _SIGMAS = wire("model", "MODEL"), wire("latent_image", "LATENT"), wire("sigmas", "SIGMAS")
_PROMPTS = (wire("positive", "CONDITIONING"), wire("negative", "CONDITIONING"))
_STEPS, _CFG = integer("steps", 20, 1, 10000), decimal("cfg", 8.0, 0.0, 100.0)
_DENOISE = decimal("denoise", 1.0, 0.0, 1.0)
_SAMPLER, _SCHEDULER = choice("sampler_name", SAMPLERS), choice("scheduler", SCHEDULERS)
_ETA, _S_NOISE = decimal("eta", 1.0, 0.0, 100.0), decimal("s_noise", 1.0, 0.0, 100.0)
_NOISE_DEVICE = choice("noise_device", ("gpu", "cpu"))


def _drawn(
    context: Context, guider: Guider, noise: Noise, latent: Latent, sampler: Sampler, sigmas: Tensor
) -> tuple[Latent, Latent]:
    context.limits.check("steps", len(sigmas) - 1)
    context.limits.check_latents(latent["samples"].shape)
    return draw(guider, noise_of(noise, latent), noise.seed, latent, sampler, sigmas)


@node(
    "KSampler",
    [_MODEL, seed(), _STEPS, _CFG, _SAMPLER, _SCHEDULER, *_PROMPTS, _LATENT, _DENOISE],
    ["LATENT"],
)
def ksampler(
    context: Context,
    model: Model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Prompts,
    negative: Prompts,
    latent_image: Latent,
    denoise: float,
) -> Latent:
    """Sample; with `denoise` below 1, start from the given latent with that share of noise."""
    context.limits.check("steps", steps)
    sampler = named_sampler(sampler_name)
    sigmas = schedule(scheduler, steps, model.shift, denoise, sampler.solver)
    guider = Guider(model, positive, negative, cfg)
    return _drawn(context, guider, Noise(seed), latent_image, sampler, sigmas)[0]


@node(
    "KSamplerAdvanced",
    [
        _MODEL,
        choice("add_noise", ("enable", "disable")),
        seed("noise_seed"),
        _STEPS,
        _CFG,
        _SAMPLER,
        _SCHEDULER,
        *_PROMPTS,
        _LATENT,
        integer("start_at_step", 0, 0, 10000),
        integer("end_at_step", 10000, 0, 10000),
        choice("return_with_leftover_noise", ("disable", "enable")),
    ],
    ["LATENT"],
)
def ksampler_advanced(
    context: Context,
    model: Model,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Prompts,
    negative: Prompts,
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
) -> Latent:
    """Sample some steps of a schedule; leftover noise is kept, or the last step goes to sigma 0."""
    context.limits.check("steps", steps)
    sampler = named_sampler(sampler_name)
    sigmas = schedule(scheduler, steps, model.shift, solver=sampler.solver)
    if end_at_step < len(sigmas) - 1:
        sigmas = sigmas[: end_at_step + 1].clone()
        if return_with_leftover_noise == "disable":
            sigmas[-1] = 0
    sigmas = sigmas[start_at_step:] if start_at_step < len(sigmas) - 1 else sigmas[:0]
    noise = Noise(noise_seed, drawn=add_noise == "enable")
    return _drawn(context, Guider(model, positive, negative, cfg), noise, latent_image, sampler, sigmas)[0]


@node(
    "SamplerCustom",
    [
        _MODEL,
        boolean("add_noise", True),
        seed("noise_seed"),
        _CFG,
        *_PROMPTS,
        wire("sampler", "SAMPLER"),
        _SIGMAS,
        _LATENT,
    ],
    ["LATENT", "LATENT"],
)
def sampler_custom(
    context: Context,
    model: Model,
    add_noise: bool,
    noise_seed: int,
    cfg: float,
    positive: Prompts,
    negative: Prompts,
    sampler: Sampler,
    sigmas: Tensor,
    latent_image: Latent,
) -> tuple[Latent, Latent]:
    """Sample over the given sigmas; the outputs are the latent and the last prediction of x0."""
    guider = Guider(model, positive, negative, cfg)
    return _drawn(context, guider, Noise(noise_seed, add_noise), latent_image, sampler, sigmas)


@node(
    "SamplerCustomAdvanced",
    [wire("noise", "NOISE"), wire("guider", "GUIDER"), wire("sampler", "SAMPLER"), _SIGMAS, _LATENT],
    ["LATENT", "LATENT"],
)
def sampler_custom_advanced(
    context: Context, noise: Noise, guider: Guider, sampler: Sampler, sigmas: Tensor, latent_image: Latent
) -> tuple[Latent, Latent]:
    """Sample over the given sigmas, with noise and guidance from other nodes."""
    return _drawn(context, guider, noise, latent_image, sampler, sigmas)


@node("RandomNoise", [seed("noise_seed")], ["NOISE"])
def random_noise(noise_seed: int) -> Noise:
    """Noise from a seed."""
    return Noise(noise_seed)


@node("DisableNoise", [], ["NOISE"])
def disable_noise() -> Noise:
    """No noise."""
    return Noise(0, drawn=False)


@node("CFGGuider", [_MODEL, *_PROMPTS, _CFG], ["GUIDER"])
def cfg_guider(model: Model, positive: Prompts, negative: Prompts, cfg: float) -> Guider:
    """Classifier-free guidance."""
    return Guider(model, positive, negative, cfg)


@node("BasicGuider", [_MODEL, wire("conditioning", "CONDITIONING")], ["GUIDER"])
def basic_guider(model: Model, conditioning: Prompts) -> Guider:
    """One prompt without guidance."""
    return Guider(model, conditioning)


@node(
    "DualCFGGuider",
    [
        _MODEL,
        wire("cond1", "CONDITIONING"),
        wire("cond2", "CONDITIONING"),
        wire("negative", "CONDITIONING"),
        decimal("cfg_conds", 8.0, 0.0, 100.0),
        decimal("cfg_cond2_negative", 8.0, 0.0, 100.0),
        choice("style", ("regular", "nested")),
    ],
    ["GUIDER"],
)
def dual_cfg_guider(
    model: Model,
    cond1: Prompts,
    cond2: Prompts,
    negative: Prompts,
    cfg_conds: float,
    cfg_cond2_negative: float,
    style: str,
) -> Guider:
    """Guidance of one prompt away from a second one, and of the second one away from the negative prompt."""
    return Guider(model, cond1, negative, cfg_conds, cond2, cfg_cond2_negative, nested=style == "nested")


@node("KSamplerSelect", [_SAMPLER], ["SAMPLER"])
def ksampler_select(sampler_name: str) -> Sampler:
    """Select a sampler by its name."""
    return named_sampler(sampler_name)


@node("SamplerEulerAncestral", [_ETA, _S_NOISE], ["SAMPLER"])
def sampler_euler_ancestral(eta: float, s_noise: float) -> Sampler:
    """euler_ancestral with its options."""
    return named_sampler("euler_ancestral", eta=eta, s_noise=s_noise)


@node(
    "SamplerDPMPP_2M_SDE",
    [choice("solver_type", ("midpoint", "heun")), _ETA, _S_NOISE, _NOISE_DEVICE],
    ["SAMPLER"],
)
def sampler_dpmpp_2m_sde(solver_type: str, eta: float, s_noise: float, noise_device: str) -> Sampler:
    """dpmpp_2m_sde with its options; the noise is always drawn on the CPU."""
    name = "dpmpp_2m_sde" if solver_type == "midpoint" else "dpmpp_2m_sde_heun"
    return named_sampler(name, eta=eta, s_noise=s_noise)


@node("SamplerDPMPP_3M_SDE", [_ETA, _S_NOISE, _NOISE_DEVICE], ["SAMPLER"])
def sampler_dpmpp_3m_sde(eta: float, s_noise: float, noise_device: str) -> Sampler:
    """dpmpp_3m_sde with its options; the noise is always drawn on the CPU."""
    return named_sampler("dpmpp_3m_sde", eta=eta, s_noise=s_noise)


@node("SamplerDPMPP_SDE", [_ETA, _S_NOISE, decimal("r", 0.5, 0.0, 100.0), _NOISE_DEVICE], ["SAMPLER"])
def sampler_dpmpp_sde(eta: float, s_noise: float, r: float, noise_device: str) -> Sampler:
    """dpmpp_sde with its options; the noise is always drawn on the CPU, and r is 1/2."""
    if r != 0.5:
        raise ValueError(f"r is {r:g}; the solver takes its middle prediction at r = 0.5, so give 0.5")
    return named_sampler("dpmpp_sde", eta=eta, s_noise=s_noise)


@node("BasicScheduler", [_MODEL, _SCHEDULER, _STEPS, _DENOISE], ["SIGMAS"])
def basic_scheduler(context: Context, model: Model, scheduler: str, steps: int, denoise: float) -> Tensor:
    """The sigmas of a schedule; with `denoise` below 1, the last `steps` steps of a longer schedule."""
    context.limits.check("steps", steps)
    if 0.9999 < denoise < 1:  # here, unlike in KSampler, the list is longer
        return samplers.sigmas(scheduler, int(steps / denoise), shift=model.shift)[-(steps + 1) :]
    return schedule(scheduler, steps, model.shift, denoise)


@node(
    "KarrasScheduler",
    [
        _STEPS,
        decimal("sigma_max", 14.614642, 0.0, 5000.0),
        decimal("sigma_min", 0.0291675, 0.0, 5000.0),
        decimal("rho", 7.0, 0.0, 100.0),
    ],
    ["SIGMAS"],
)
def karras_scheduler(context: Context, steps: int, sigma_max: float, sigma_min: float, rho: float) -> Tensor:
    """Sigmas evenly spaced in sigma^(1/rho), followed by 0."""
    context.limits.check("steps", steps)
    return karras(steps, sigma_max, sigma_min, rho)


@node(
    "BetaSamplingScheduler",
    [_MODEL, _STEPS, decimal("alpha", 0.6, 0.0, 50.0), decimal("beta", 0.6, 0.0, 50.0)],
    ["SIGMAS"],
)
def beta_sampling_scheduler(context: Context, model: Model, steps: int, alpha: float, beta: float) -> Tensor:
    """Sigmas at the quantiles of a beta distribution, followed by 0."""
    context.limits.check("steps", steps)
    return beta_sampling(steps, model.shift, alpha, beta)


@node("SplitSigmas", [_SIGMAS, integer("step", 0, 0, 10000)], ["SIGMAS", "SIGMAS"])
def split_sigmas(sigmas: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Split sigmas at a step; the sigma of that step is in both parts."""
    return sigmas[: step + 1], sigmas[step:]


@node("SplitSigmasDenoise", [_SIGMAS, _DENOISE], ["SIGMAS", "SIGMAS"])
def split_sigmas_denoise(sigmas: Tensor, denoise: float) -> tuple[Tensor, Tensor]:
    """Split sigmas so that the second part has the share `denoise` of the steps."""
    later = round(max(len(sigmas) - 1, 0) * denoise)
    return sigmas[:-later], sigmas[-(later + 1) :]


@node("FlipSigmas", [_SIGMAS], ["SIGMAS"])
def flip_sigmas(sigmas: Tensor) -> Tensor:
    """Reverse the sigmas, to go from a picture to noise."""
    return flipped(sigmas)


@node("AddNoise", [_MODEL, wire("noise", "NOISE"), _SIGMAS, _LATENT], ["LATENT"])
def add_noise(model: Model, noise: Noise, sigmas: Tensor, latent_image: Latent) -> Latent:
    """Add noise to a latent; its level is the difference between the first and the last sigma."""
    if not len(sigmas):
        return latent_image
    level = float(abs(sigmas[0] - sigmas[-1]) if len(sigmas) > 1 else sigmas[0])
    samples = latent_image["samples"]
    given = from_vae_scale(samples) if bool(samples.any()) else samples
    found = to_vae_scale(level * noise_of(noise, latent_image) + (1 - level) * given)
    changed = latent_image.copy()
    changed["samples"] = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
    return changed
