"""Profiles: all details on which the reference pipelines disagree. No other module asks which reference is followed.

D is diffusers 0.42.1, `StableDiffusion3Pipeline`; C is ComfyUI 0.3.64, `comfy/samplers.py`, `comfy/sd.py`, `nodes.py`;
R is Stability-AI/sd3.5, `sd3_infer.py` and `sd3_impls.py`. Two disagreements are no fields, because the results are
equal up to rounding: the order of tokens in attention (here context first, as R and C) and of the conditional and the
unconditional branch of a batch (here unconditional first, as D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from encoders import COMFYUI, DIFFUSERS, REFERENCE, TextRules
from mmdit.utils import number, whole
from samplers import SCHEDULES, SOLVERS, SamplingDefaults, pick

StepNoise = Literal["continued", "same_seed"]


@dataclass(frozen=True)
class Profile:
    """The behaviour of a reference pipeline, field by field; the defaults are D's.

    Raises:
        ValueError: a word is none of its field's choices, or a number is out of its range; the field is named.
        TypeError: `text` is not an `encoders.TextRules`.
    """

    name: str = "diffusers"
    text: TextRules = DIFFUSERS  # lengths, cuts, missing encoders, prompt weights
    steps: int = 28  # 28 (D), 20 (C: KSampler), 50 (R: all but Large)
    guidance_scale: float = 7.0  # 7 (D), 8 (C: KSampler), 5 (R: all but Large)
    sampler: str = "euler"  # (D, C), "dpmpp_2m" (R)
    schedule: str = "normal"  # evenly spaced timesteps, shifted twice (all)
    shift: float = 3.0  # where no preset and no scheduler config says otherwise (all; R's SD3-Medium: preset)
    # The dtype of sigma in the model's timestep and in x0 = x - sigma v; in R it is float16, like the first latent.
    sigma_dtype: Literal["float32", "float16"] = "float32"
    # Whether the timestep 1000 sigma is rounded down, as with diffusers' DPM-Solver++ and UniPC schedulers.
    # If a scheduler config asks for it, it applies only to the sampler of that config.
    whole_timesteps: bool = False
    # The starting noise, always drawn on the CPU or on the given generator's device: in the model's dtype (D), in
    # float32 (C), in float32 and then rounded to float16 (R).
    noise_dtype: Literal["model", "float32", "float16"] = "model"
    # One seed for several pictures: all noise in a single draw (D, C), or the same noise for each picture (R).
    one_seed: Literal["single_draw", "each_alone"] = "single_draw"
    # The noise that a sampler adds: from the generator of the starting noise (D's schedulers, if given one; R has no
    # such sampler), or from a new one with its seed on the latent's device, for *_sde through a Brownian tree (C).
    step_noise: StepNoise = "continued"
    # The starting noise of a schedule that starts below 1: of unit variance (D), or scaled by the first level (C, R).
    first_level: Literal["all_noise", "its_share"] = "all_noise"
    # dpm_2 and uni_pc: the schedule as it is (D), or with one more level, without its second-last one (C: KSampler).
    second_last: Literal["kept", "left_out"] = "kept"
    # Sigmas given by the caller whose last one is above 0: shifted, with a 0 at the end (D), or refused (C, R).
    open_sigmas: Literal["shift", "refuse"] = "shift"
    state_dtype: Literal["model", "float32"] = (
        "model"  # dtype of the latent between steps: the model's (D), float32 (C, R)
    )
    # When the negative prompt is read: guidance above 1 (D), any but 1 (C), always (R).
    uncond_pass: Literal["above_1", "unless_1", "always"] = "above_1"
    # Skip-layer guidance, where layers are given: its scale 2.8 (D), 3 (C), 2.5 (R); from .01 to .2 of the steps, both
    # outside (D, R), or from .01 to .15 of the noise levels, both inside (C); without an unconditional pass too (C, R).
    skip_scale: float = 2.8
    skip_start: float = 0.01
    skip_stop: float = 0.2
    skip_window: Literal["steps", "percents"] = "steps"
    skip_alone: bool = False
    # Latents with an odd side: refused (D; R fails), or padded from the opposite edge and cropped afterwards (C).
    odd_latents: Literal["refuse", "wrap"] = "refuse"
    to_uint8: Literal["round", "truncate"] = "round"  # conversion of pixels to 8 bits: rounded (D), truncated (C, R)
    # Pictures as input. For these D is also `StableDiffusion3Img2ImgPipeline` and `StableDiffusion3InpaintPipeline`.
    image_steps: int | None = 50  # steps where a picture is given: 50 (D), or None, those without a picture (C, R)
    strength: float = 0.6  # .6 (D), 1 (C: KSampler's denoise), .8 (R)
    # How a strength s selects noise levels: those of n steps without the first int(n - n s) (D) or int(n (1 - s)) (R),
    # which differ by rounding; or always the last n steps of a schedule of int(n / s) steps (C).
    strength_levels: Literal["without_first", "without_share", "last_of_more"] = "without_first"
    # The size of a drawing if the caller gives none: the model's own, to which the picture is resized (D, R), or the
    # picture's, cut around its centre to multiples (C: VAEEncode).
    image_size: Literal["model", "picture"] = "model"
    # Resizing of arrays and tensors whose size is not the requested one: nearest (D), or Pillow's LANCZOS on values
    # truncated to 8 bits (C: ImageScale). Pillow's pictures always take its LANCZOS (D, C, R).
    array_resize: Literal["nearest", "lanczos"] = "nearest"
    # A picture's latent: drawn from the VAE's distribution by the call's generators, before the noise (D), or from
    # torch's global state (R), or its mean (C).
    image_latent: Literal["sampled", "sampled_globally", "mean"] = "sampled"
    # Masks: 0 or 1, resized by LANCZOS, cut at 0.5 and nearest (D); or any share, bilinear (C). R has none.
    mask_values: Literal["binary", "soft"] = "binary"
    # Where the mask is applied: on the latent after every step (D), or before and after every call of the model, on its
    # input and its prediction (C). R has no inpainting; its profile follows C.
    mask_acts: Literal["after_step", "around_model"] = "after_step"
    # The sampler "ddim" outside of a mask: the noise of the start, or that of the next seed (C).
    ddim_mask_noise: Literal["of_the_start", "of_the_next_seed"] = "of_the_start"
    # Whether the VAE's shift is added before a drawing with a mask is decoded: D 0.42.1 leaves it out.
    inpaint_shift: bool = False
    # ControlNets. D is `StableDiffusion3ControlNetPipeline` and its inpainting one, C is `comfy/controlnet.py`.
    # The hint's size: as that of pictures (D, R), or cut to the aspect around its centre, then nearest (C).
    control_resize: Literal["as_pictures", "nearest_cut"] = "as_pictures"
    # The input of Stability's nets for edges x in [0, 1]: 2x - 1 (D), 127.5x + .5 (R, and D's model card), 255x (C).
    control_canny: Literal["unit", "bytes", "bytes_unit"] = "unit"
    control_depth: Literal["unit", "inverted"] = "unit"  # and for depth: 2x - 1 (D, R), 1 - 2x (C)
    # The hint's latent: drawn by torch's global state, for each branch of guidance (D) or once (R); or the mean (C).
    control_latent: Literal["sampled_each", "sampled_once", "mean"] = "sampled_each"
    # Positions of the tokens that Stability's nets get: the transformer's table (D, R), or made for the size (C).
    control_positions: Literal["table", "made"] = "table"
    # InstantX's nets: pooled text and the shift of the hint's latents as their config says (D), or neither (C). With
    # inpainting nets, D takes the shift and no pooled text.
    control_joint: Literal["as_configured", "zeros"] = "as_configured"
    # Which of several nets decides whether the VAE's shift is applied: the first for all (D), or each for itself (C).
    control_shift_of: Literal["first", "each"] = "first"
    # The residual j of n that is added after block i of d: int(i n / d) (D), or each as often as the next (R, C).
    control_spread: Literal["scaled", "repeated"] = "scaled"
    control_after_last: bool = False  # whether one is added after the last block: R, C
    # The part of sampling in which a net acts: whole steps (D), or percents of the noise levels, both ends inside (C).
    control_window: Literal["steps", "percents"] = "steps"
    control_skip: bool = True  # whether the skip-layer pass gets the residuals: yes in C, no in R; D has no such pass
    # The timestep that a net gets: the transformer's (D), the same in the net's own dtype (C), or 1000 sigma of
    # the rounded sigma, without rounding it again (R).
    control_timestep: Literal["model", "net", "wide"] = "model"

    def __post_init__(self) -> None:
        if not isinstance(self.text, TextRules):
            raise TypeError(f"Profile.text is {type(self.text).__name__}, expected encoders.TextRules")
        for name, choices in _choices().items():
            pick(dict.fromkeys(choices), getattr(self, name), f"Profile.{name}")
        pick(SCHEDULES, self.schedule, "Profile.schedule")
        for name in ("skip_alone", "whole_timesteps", "inpaint_shift", "control_after_last", "control_skip"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Profile.{name} must be True or False, got {getattr(self, name)!r}")
        _check_defaults("Profile", self.steps, self.guidance_scale, self.sampler, self.shift)
        number("Profile.skip_scale", self.skip_scale)
        number("Profile.skip_start", self.skip_start, 0, 1)
        number("Profile.skip_stop", self.skip_stop, 0, 1)
        number("Profile.strength", self.strength, 0, 1)
        if self.image_steps is not None:
            whole("Profile.image_steps", self.image_steps, 1)

    def reads_negative(self, guidance_scale: float) -> bool:
        """Whether the unconditional branch runs at this guidance scale."""
        match self.uncond_pass:
            case "above_1":
                return guidance_scale > 1
            case "unless_1":
                return guidance_scale != 1
            case "always":
                return True


@dataclass(frozen=True)
class Preset:
    """Settings of a kind of model that do not follow from its tensors.

    Raises:
        ValueError: the sampler is unknown, or a number is out of its range; the field is named.
    """

    steps: int
    guidance_scale: float
    sampler: str
    shift: float | None = None  # None keeps that of the scheduler config, or else the profile's

    def __post_init__(self) -> None:
        _check_defaults("Preset", self.steps, self.guidance_scale, self.sampler, self.shift)

    def applied(self, profile: Profile) -> Profile:
        """The profile with these settings as its defaults."""
        return replace(
            profile,
            steps=self.steps,
            image_steps=None,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            shift=profile.shift if self.shift is None else self.shift,
        )


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """The fields of `Profile` that take one of a few words, with these words."""
    hints = get_type_hints(Profile)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _check_defaults(
    kind: str, steps: int, guidance_scale: int | float, sampler: str, shift: int | float | None
) -> None:
    """Raise ValueError where a default of a profile or preset is out of range."""
    whole(f"{kind}.steps", steps, 1)
    pick(SOLVERS, sampler, f"{kind}.sampler")
    number(f"{kind}.guidance_scale", guidance_scale)
    if shift is not None and not number(f"{kind}.shift", shift, 0) > 0:
        raise ValueError(f"{kind}.shift must be above 0, got {shift!r}")


PROFILES: dict[str, Profile] = {
    "diffusers": Profile(),
    "comfyui": Profile(
        name="comfyui",
        text=COMFYUI,
        steps=20,
        guidance_scale=8.0,
        noise_dtype="float32",
        step_noise="same_seed",
        first_level="its_share",
        open_sigmas="refuse",
        second_last="left_out",
        state_dtype="float32",
        uncond_pass="unless_1",
        skip_scale=3.0,
        skip_stop=0.15,
        skip_window="percents",
        skip_alone=True,
        odd_latents="wrap",
        to_uint8="truncate",
        image_steps=None,
        strength=1.0,
        strength_levels="last_of_more",
        image_size="picture",
        array_resize="lanczos",
        image_latent="mean",
        mask_values="soft",
        mask_acts="around_model",
        ddim_mask_noise="of_the_next_seed",
        inpaint_shift=True,
        control_resize="nearest_cut",
        control_canny="bytes_unit",
        control_depth="inverted",
        control_latent="mean",
        control_positions="made",
        control_joint="zeros",
        control_shift_of="each",
        control_spread="repeated",
        control_after_last=True,
        control_window="percents",
        control_timestep="net",
    ),
    "reference": Profile(
        name="reference",
        text=REFERENCE,
        steps=50,
        guidance_scale=5.0,
        sampler="dpmpp_2m",
        sigma_dtype="float16",
        noise_dtype="float16",
        one_seed="each_alone",
        first_level="its_share",
        open_sigmas="refuse",
        state_dtype="float32",
        uncond_pass="always",
        skip_scale=2.5,
        skip_alone=True,
        to_uint8="truncate",
        image_steps=None,
        strength=0.8,
        strength_levels="without_share",
        array_resize="lanczos",
        image_latent="sampled_globally",
        mask_values="soft",
        mask_acts="around_model",
        inpaint_shift=True,
        control_canny="bytes",
        control_latent="sampled_once",
        control_shift_of="each",
        control_spread="repeated",
        control_after_last=True,
        control_skip=False,
        control_timestep="wide",
    ),
}

# "turbo" is how every reference runs a Turbo model; the others are the rows of R's `CONFIGS`.
PRESETS: dict[str, Preset] = {
    "turbo": Preset(steps=4, guidance_scale=1.0, sampler="euler"),
    "sd3_medium": Preset(steps=50, guidance_scale=5.0, sampler="dpmpp_2m", shift=1.0),
    "sd3.5_medium": Preset(steps=50, guidance_scale=5.0, sampler="dpmpp_2m", shift=3.0),
    "sd3.5_large": Preset(steps=40, guidance_scale=4.5, sampler="dpmpp_2m", shift=3.0),
    "sd3.5_large_turbo": Preset(steps=4, guidance_scale=1.0, sampler="euler", shift=3.0),
}


def with_sampling(profile: Profile, sampling: SamplingDefaults, preset: Preset | None = None) -> Profile:
    """The profile with the sampler and the schedule of a scheduler config.

    Explicit choices take precedence: the sampler of a preset, and the sampler and schedule of a profile of the caller's
    own, where these differ from the known profile of that name.
    """
    known = PROFILES.get(profile.name, profile)
    if profile.sampler != sampling.sampler and (preset is not None or profile.sampler != known.sampler):
        return profile
    return replace(
        profile,
        sampler=sampling.sampler,
        schedule=sampling.schedule if profile.schedule == known.schedule else profile.schedule,
        whole_timesteps=sampling.whole_timesteps,
    )


def is_known(profile: Profile) -> bool:
    """Whether a profile equals one of `PROFILES`, apart from defaults that presets and scheduler configs set."""
    known = PROFILES.get(profile.name)
    settings = ("steps", "image_steps", "guidance_scale", "sampler", "schedule", "shift", "whole_timesteps")
    return known is not None and profile == replace(known, **{name: getattr(profile, name) for name in settings})
