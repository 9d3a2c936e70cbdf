"""diffusers' `scheduler_config.json` <-> our sampler, schedule, shift and options, by two pure functions.

A key that a scheduler's class does not have is ignored, as diffusers ignores it. A value that changes the picture and
has no equal here is refused by name. What the values mean: diffusers 0.42, `schedulers/scheduling_*.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from samplers.checks import number, shown, whole
from samplers.names import pick
from samplers.schedules import TRAIN_STEPS, WITH_TERMINAL, resolution_shift

EULER, HEUN, LCM = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"
DPM, UNI_PC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
Config = Mapping[str, Any]


@dataclass(frozen=True)
class ResolutionShift:
    """A shift that depends on the size of the picture: `resolution_shift` with these numbers."""

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    kind: Literal["exponential", "linear"] = "exponential"

    def at(self, tokens: int) -> float:
        """Return the shift for a picture of so many image tokens."""
        return resolution_shift(
            tokens,
            base_tokens=self.base_tokens,
            max_tokens=self.max_tokens,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
            kind=self.kind,
        )


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling defaults of a model, used where the caller gives no value."""

    sampler: str = "euler"  # a key of `SOLVERS`
    schedule: str = "normal"  # a key of `SCHEDULES`
    shift: float | ResolutionShift = 3.0
    terminal: float | None = None  # the last level above 0, see `samplers.sigmas`
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the solver
    whole_timesteps: bool = False  # whether the model sees 1000 sigma without its fraction (DPM-Solver++ and UniPC)

    @property
    def is_plain(self) -> bool:
        """Whether only the shift is specified, so that the sampler is Euler on `normal`."""
        return self == SamplingDefaults(shift=self.shift) and isinstance(self.shift, float)


def from_scheduler_config(config: Config) -> SamplingDefaults:
    """Return what a `scheduler_config.json` of diffusers says, in our words.

    Args:
        config: the parsed file. Missing keys have the defaults of diffusers' class; without `_class_name` the class is
            FlowMatchEulerDiscreteScheduler.

    Raises:
        ValueError: the class or a value has no equal here, or a value is of a wrong type; the message names the key.
    """
    name = config.get("_class_name", EULER)
    if not isinstance(name, str):
        raise ValueError(f"_class_name is {shown(name)}, expected the name of a scheduler")
    read = pick(_READERS, name, "scheduler class for a flow-matching model")
    if (steps := config.get("num_train_timesteps", TRAIN_STEPS)) != TRAIN_STEPS or isinstance(steps, bool):
        raise ValueError(f"num_train_timesteps is {shown(steps)}, expected {TRAIN_STEPS}: the models take 1000 sigma")
    return read(config)


def to_scheduler_config(defaults: SamplingDefaults) -> dict[str, Any]:
    """Return the `scheduler_config.json` that says these defaults; `from_scheduler_config` reads it back.

    Raises:
        ValueError: no scheduler of diffusers does this.
    """
    for write in (_write_flow_match, _write_heun, _write_multistep):
        config = write(defaults)
        if config is not None and from_scheduler_config(config) == defaults:
            return config
    raise ValueError(
        f"no scheduler of diffusers is sampler {defaults.sampler!r} with schedule {defaults.schedule!r}, "
        f"shift {defaults.shift}, terminal {defaults.terminal} and options {dict(defaults.options)}"
    )


# ---- FlowMatchEuler, FlowMatchLCM and FlowMatchHeun


def _read_euler(config: Config) -> SamplingDefaults:
    stochastic = _flag(config, "stochastic_sampling")
    return _read_flow_match(config, "lcm" if stochastic else "euler")


def _read_lcm(config: Config) -> SamplingDefaults:
    _refuse(config, "scale_factors", None, [])
    return _read_flow_match(config, "lcm")


def _read_flow_match(config: Config, sampler: str) -> SamplingDefaults:
    _refuse(config, "invert_sigmas", False)
    spacing = _spacing(config)
    shift: float | ResolutionShift = _fixed_shift(config, "shift")
    dynamic = _flag(config, "use_dynamic_shifting")
    if dynamic:
        shift = _resolution_shift(config, 1.15)
    first = "diffusers_dynamic" if dynamic else "diffusers"
    schedule = f"{first}_{spacing}" if spacing else "diffusers_dynamic" if dynamic else "normal"
    return SamplingDefaults(sampler, schedule, shift, _terminal(config))


def _read_heun(config: Config) -> SamplingDefaults:
    return SamplingDefaults("flow_heun", "normal", _fixed_shift(config, "shift"))


def _write_flow_match(defaults: SamplingDefaults) -> dict[str, Any] | None:
    if defaults.sampler not in ("euler", "lcm") or defaults.schedule not in WITH_TERMINAL:
        return None
    config: dict[str, Any] = {"_class_name": EULER, "num_train_timesteps": TRAIN_STEPS} | _shift_keys(defaults, "shift")
    if defaults.sampler == "lcm":
        config["stochastic_sampling"] = True
    if (spacing := defaults.schedule.rpartition("_")[2]) in _SPACINGS:
        config[f"use_{spacing}_sigmas"] = True
    return config


def _write_heun(defaults: SamplingDefaults) -> dict[str, Any] | None:
    if defaults.sampler not in ("heun", "flow_heun") or isinstance(defaults.shift, ResolutionShift):
        return None
    return {"_class_name": HEUN, "num_train_timesteps": TRAIN_STEPS, "shift": defaults.shift}


# ---- DPMSolverMultistep and UniPCMultistep with use_flow_sigmas


def _read_dpm(config: Config) -> SamplingDefaults:
    _check_multistep(config)
    _refuse(config, "use_lu_lambdas", False)
    _refuse(config, "variance_type", None)
    algorithm = _word(config, "algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++"))
    kind = _word(config, "solver_type", "midpoint", ("midpoint", "heun"))
    order = whole("solver_order", config.get("solver_order", 2), 1, 3)
    sampler, options = _pick_dpm(algorithm, kind, order)
    return SamplingDefaults(sampler, "diffusers_dpm", _flow_shift(config), None, options, whole_timesteps=True)


def _pick_dpm(algorithm: str, kind: str, order: int) -> tuple[str, dict[str, Any]]:
    if order == 2:
        return _DPM_SAMPLERS[algorithm, kind]
    if (algorithm, order) == ("dpmsolver++", 1):
        return "euler", {}
    raise ValueError(f"solver_order is {order} with algorithm_type {algorithm!r}, which has no equal here; expected 2")


def _read_uni_pc(config: Config) -> SamplingDefaults:
    _check_multistep(config)
    _refuse(config, "predict_x0", True)
    _refuse(config, "disable_corrector", [], None)
    _refuse(config, "solver_p", None)
    _refuse(config, "lower_order_final", True)
    order = whole("solver_order", config.get("solver_order", 2), 1, 3)
    _word(config, "solver_type", "bh2", ("bh2",))  # the last step of "bh1", to level 0, is NaN in diffusers
    options = {"order": order} if order != 2 else {}
    shift = _flow_shift(config)
    return SamplingDefaults("flow_uni_pc", "diffusers_uni_pc", shift, _terminal(config), options, whole_timesteps=True)


def _check_multistep(config: Config) -> None:
    if not _flag(config, "use_flow_sigmas"):
        raise ValueError("use_flow_sigmas is false, expected true: the models are flow-matching models")
    _word(config, "prediction_type", "epsilon", ("flow_prediction",))
    _word(config, "final_sigmas_type", "zero", ("zero",))
    _refuse(config, "thresholding", False)
    if spacing := _spacing(config):
        raise ValueError(f"use_{spacing}_sigmas is true, which has no equal here beside use_flow_sigmas")


def _flow_shift(config: Config) -> float | ResolutionShift:
    if _flag(config, "use_dynamic_shifting"):
        _word(config, "time_shift_type", "exponential", ("exponential",))
        return _resolution_shift(config, 1.16)  # what StableDiffusion3Pipeline takes for classes without max_shift
    return _fixed_shift(config, "flow_shift")


def _write_multistep(defaults: SamplingDefaults) -> dict[str, Any] | None:
    common = {"num_train_timesteps": TRAIN_STEPS, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    common |= _shift_keys(defaults, "flow_shift")
    if defaults.sampler == "flow_uni_pc":
        return {"_class_name": UNI_PC, "solver_order": defaults.options.get("order", 2)} | common
    said = (defaults.sampler, dict(defaults.options))
    for (algorithm, kind), known in _DPM_SAMPLERS.items():
        if known == said:
            return {"_class_name": DPM, "algorithm_type": algorithm, "solver_type": kind} | common
    return {"_class_name": DPM, "solver_order": 1} | common if said == ("euler", {}) else None


# ---- values


def _resolution_shift(config: Config, max_shift: float) -> ResolutionShift:
    kind = _word(config, "time_shift_type", "exponential", ("exponential", "linear"))
    return ResolutionShift(
        whole("base_image_seq_len", config.get("base_image_seq_len", 256), 1, 2**31),
        whole("max_image_seq_len", config.get("max_image_seq_len", 4096), 1, 2**31),
        number("base_shift", config.get("base_shift", 0.5)),
        number("max_shift", config.get("max_shift", max_shift)),
        "linear" if kind == "linear" else "exponential",
    )


def _fixed_shift(config: Config, key: str) -> float:
    return number(key, config.get(key, 1.0), 0, 1e6, above=True)


def _shift_keys(defaults: SamplingDefaults, key: str) -> dict[str, Any]:
    """Return the keys that say shift and terminal; the fixed shift is called `key`."""
    shift = defaults.shift
    terminal = {} if defaults.terminal is None else {"shift_terminal": defaults.terminal}
    if not isinstance(shift, ResolutionShift):
        return {key: shift} | terminal
    return terminal | {
        "use_dynamic_shifting": True,
        "base_image_seq_len": shift.base_tokens,
        "max_image_seq_len": shift.max_tokens,
        "base_shift": shift.base_shift,
        "max_shift": shift.max_shift,
        "time_shift_type": shift.kind,
    }


def _terminal(config: Config) -> float | None:
    terminal = config.get("shift_terminal")
    if terminal is None or (terminal == 0 and not isinstance(terminal, bool)):  # diffusers stretches for neither
        return None
    return number("shift_terminal", terminal, 0, 1 - 1e-6, above=True)


def _spacing(config: Config) -> str:
    """Return "karras", "exponential", "beta", or "" where no such key is true."""
    given = [name for name in _SPACINGS if _flag(config, f"use_{name}_sigmas")]
    if len(given) > 1:
        raise ValueError(f"use_{given[0]}_sigmas and use_{given[1]}_sigmas are both true, expected one")
    return given[0] if given else ""


def _flag(config: Config, key: str) -> bool:
    value = config.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} is {shown(value)}, expected true or false")
    return bool(value)


def _word(config: Config, key: str, default: str, known: tuple[str, ...]) -> str:
    value = config.get(key, default)
    if value not in known:
        raise ValueError(f"{key} is {shown(value)}, which has no equal here; expected {' or '.join(map(repr, known))}")
    return str(value)


def _refuse(config: Config, key: str, *same: object) -> None:
    """Raise ValueError unless the key is missing or one of these values, which change nothing."""
    if key in config and not any(config[key] == value and type(config[key]) is type(value) for value in same):
        raise ValueError(f"{key} is {shown(config[key])}, which has no equal here; expected {shown(same[0])}")


_SPACINGS = ("karras", "exponential", "beta")
_DPM_SAMPLERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("dpmsolver++", "midpoint"): ("flow_dpmpp_2m", {}),
    ("dpmsolver++", "heun"): ("dpmpp_2m_sde_heun", {"eta": 0.0}),
    ("sde-dpmsolver++", "midpoint"): ("dpmpp_2m_sde", {}),
    ("sde-dpmsolver++", "heun"): ("dpmpp_2m_sde_heun", {}),
}
_READERS: dict[str, Callable[[Config], SamplingDefaults]] = {
    EULER: _read_euler,
    HEUN: _read_heun,
    LCM: _read_lcm,
    DPM: _read_dpm,
    UNI_PC: _read_uni_pc,
}
