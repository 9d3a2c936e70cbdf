"""What commands share about their options: help texts, usage errors (exit code 2), names from other programs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "float64")
_DTYPE_ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp64": "float64",
    "double": "float64",
}
DEFAULT_DEVICE = "(default: auto, which is cuda where there is one, else mps, else cpu)"
DEFAULT_DTYPE = "(default: bfloat16, float16 on older GPUs, float32 on the CPU)"
QUIET = "show no progress bar and no notes"
JSON = "print all results as JSON"
# The names of samplers.SOLVERS and SCHEDULES, so that help needs no torch.
SAMPLERS = (
    "euler, euler_ancestral, ddim, heun, heunpp2, dpm_2, dpm_2_ancestral, lms, ipndm, ipndm_v, gradient_estimation, "
    "dpmpp_2m, res_multistep, deis, uni_pc, uni_pc_bh2, dpm_fast, dpm_adaptive, dpmpp_2s_ancestral, dpmpp_sde, "
    "dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, er_sde, seeds_2, seeds_3, sa_solver, sa_solver_pece, lcm, ddpm, "
    "res_multistep_ancestral, euler_cfg_pp, euler_ancestral_cfg_pp, dpmpp_2m_cfg_pp, dpmpp_2s_ancestral_cfg_pp, "
    "res_multistep_cfg_pp, res_multistep_ancestral_cfg_pp, gradient_estimation_cfg_pp, flow_heun, flow_dpmpp_2m, "
    "flow_uni_pc, flow_deis, flow_ddpm"
)
SCHEDULES = (
    "normal, simple, sgm_uniform, ddim_uniform, beta, karras, exponential, linear_quadratic, kl_optimal, "
    "diffusers_karras, diffusers_exponential, diffusers_beta, diffusers_dynamic, diffusers_dynamic_karras, "
    "diffusers_dynamic_exponential, diffusers_dynamic_beta, diffusers_dpm, diffusers_uni_pc"
)
# Samplers of diffusers by the names of their classes.
_CLASSES = {"flowmatcheulerdiscretescheduler": "euler", "flowmatchheundiscretescheduler": "flow_heun"}


class UsageError(ValueError):
    """An option is unknown or out of range, or two options exclude each other."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within the context, turn every ValueError into a `UsageError`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def exists(text: str) -> bool:
    """Whether a file of this name exists; False for a text that cannot be a file name."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def dtype_name(text: str) -> str:
    """The name of the dtype that "fp16", "torch.float16" and the like mean; other texts are returned unchanged."""
    name = text.lower().removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def sampler_name(text: str) -> str:
    """Our name of the sampler "DPM++ 2M", "Euler a" and the like; other texts are returned unchanged.

    Raises:
        argparse.ArgumentTypeError: the text names a sampler and a schedule, such as "DPM++ 2M Karras".
    """
    samplers, schedules = SAMPLERS.split(", "), SCHEDULES.split(", ")
    if (found := _known(text, samplers)) is not None:
        return found
    words = text.split()
    schedule = _known(words[-1], schedules) if len(words) > 1 else None
    sampler = _known(" ".join(words[:-1]), samplers) if schedule else None
    if sampler is not None:
        said = f"--sampler {sampler} --schedule {schedule}"
        raise argparse.ArgumentTypeError(f"{text!r} is a sampler and a schedule; give {said}")
    return text


def schedule_name(text: str) -> str:
    """Our name of the schedule "Karras", "SGM Uniform" and the like; other texts are returned unchanged."""
    return _known(text, SCHEDULES.split(", ")) or text


def _known(text: str, names: Sequence[str]) -> str | None:
    """The name that equals the text when case, spaces, underscores and hyphens are ignored and "++" is read as "pp"."""
    table = _CLASSES | {_squeezed(name): name for name in names}
    key = _squeezed(text)
    found = table.get(key) or (table.get(f"{key[:-1]}ancestral") if re.search(r"[\s_-]a$", text.lower()) else None)
    return found if found in names else None


def _squeezed(text: str) -> str:
    return re.sub(r"[\s_-]", "", text.lower().replace("++", "pp"))


def shift_value(text: str) -> float | str:
    """A number, or a word such as "resolution"."""
    if text.isalpha():
        return text
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor the word resolution") from error


def memory_size(text: str) -> str:
    """A size such as 8GB, unchanged."""
    from mmdit.runtime.plan import parse_bytes

    try:
        parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def seed_value(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; prompts go before --seed") from error
