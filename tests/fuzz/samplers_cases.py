"""Generated sigmas, schedules, guidance arguments and solver options: each works with finite numbers, or is refused.

Run as a script, in a process without checked signatures: `python samplers_cases.py SEED SECONDS`. The first input that
breaks the rule is printed with its error, and the exit code is 1. `REGRESSIONS` holds every input that ever failed.
"""

import itertools
import json
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import samplers
from samplers import training

X = torch.sin(torch.arange(1, 19, dtype=torch.float64)).reshape(1, 2, 3, 3)
CONFIG_KEYS = {
    "_class_name": ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "DPMSolverMultistepScheduler"],
    "shift": [3.0, 1, 0.1], "use_dynamic_shifting": [True, False], "shift_terminal": [0.1, None, 0],
    "use_karras_sigmas": [True, False], "use_beta_sigmas": [True, False], "use_flow_sigmas": [True],
    "prediction_type": ["flow_prediction"], "flow_shift": [3.0, 0.3], "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"], "solver_type": ["midpoint", "heun", "bh2"],
    "num_train_timesteps": [1000, 500], "max_shift": [1.15, 0.2], "max_image_seq_len": [4096, 256],
    "base_image_seq_len": [256, 4096], "time_shift_type": ["exponential", "linear"], "invert_sigmas": [False, True],
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, "3", "", "nan", b"1", [], [1.0], (), {}, object(), 0, -1, -0.0, 1, 2, 7, 1.5, 1e-300, 5e-324,
    1e300, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 10**5000, 10**9, 2**63, 1j, np.float32(0.7),
    np.int64(3), np.bool_(True), np.float64("nan"), np.array(3), np.array([1, 2]), torch.tensor(2.0),
    torch.tensor([1.0, 2.0]),
    torch.tensor(True), torch.empty(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64),
]  # fmt: skip
JSON = [one for one in ODD if one is None or isinstance(one, bool | int | float | str | list | dict)]
REFUSED = (ValueError, TypeError)


class BrokenRuleError(Exception):
    """An input was neither refused nor did it give finite numbers."""


def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
    if not 0 <= sigma <= 1:
        raise BrokenRuleError(f"the model was asked for level {sigma}")
    return 0.6 * torch.tanh(x) + 0.25 * (1 - sigma) * torch.cos(2 * x)


def guided(x: torch.Tensor, sigma: float) -> samplers.Guided:
    return samplers.Guided(denoise(x, sigma), 0.5 * torch.tanh(x))


def solve(name: str, levels: Any, options: dict[str, Any]) -> None:
    """Run a solver; every latent must be finite."""
    solver = samplers.SOLVERS[name]
    steps = solver(guided if solver.guided else denoise, X, levels, **options)
    for step in itertools.islice(steps, 500):
        if not torch.isfinite(step.x).all():
            raise BrokenRuleError(f"step {step.i} at level {step.sigma} is not finite")


def schedule(name: Any, steps: Any, options: dict[str, Any]) -> None:
    """Make a schedule; it must fall from at most 1 to 0."""
    levels = samplers.sigmas(name, steps, **options)
    if levels[0] > 1 or levels[-1] != 0 or not (levels.diff() < 0).all() or levels.dtype != torch.float64:
        raise BrokenRuleError(f"levels {levels}")


def guidance(scale: Any, kind: str, options: dict[str, Any]) -> None:
    """Build guidance and call it once; the prediction must be finite, if its numbers are not huge."""
    parts = {"plain": samplers.plain, "projected": samplers.projected, "zero_star": samplers.zero_star}
    mix = parts[kind](scale, **options.get("mix", {}))
    weaker = [samplers.Weaker("w", **one) for one in options.get("weaker", [])]
    predict = lambda x, sigma, names: [denoise(x, sigma) + len(n) / 9 for n in names]  # noqa: E731
    guide = samplers.guide(predict, "c", "uu", mix, weaker=weaker, rescale=options.get("rescale", 0.0))
    x0 = guide(X, 0.5).x0
    if not torch.isfinite(x0).all() and "huge" not in options:
        raise BrokenRuleError("the prediction is not finite")


def windows(values: list[Any]) -> None:
    """Windows and shifts of any numbers."""
    levels = samplers.sigmas("normal", 5)
    a, b, c = values
    for call in (
        lambda: samplers.percents(a, b, c),
        lambda: samplers.steps_inside(levels, a, b),
        lambda: samplers.first_steps(levels, a),
        lambda: samplers.level_at(a, c),
        lambda: samplers.resolution_shift(a, base_shift=b, max_shift=c),
        lambda: samplers.resolution_shift(64, base_tokens=a, max_tokens=b),
        lambda: training.uniform(a) if not isinstance(a, int | np.integer) or abs(int(a)) < 1000 else None,
        lambda: training.logit_normal(3, mean=0.0, std=b),
        lambda: training.mode(3, scale=c),
    ):
        refused_or_done(call)


def config(values: dict[str, Any]) -> None:
    """Read a scheduler's config; what is read is written and read back the same."""
    defaults = samplers.from_scheduler_config(values)
    if samplers.from_scheduler_config(samplers.to_scheduler_config(defaults)) != defaults:
        raise BrokenRuleError(f"{defaults} is written as another")


def refused_or_done(call: Callable[[], object]) -> bool:
    """Whether the call was not refused; any other error goes on."""
    try:
        call()
    except REFUSED as error:
        if len(str(error)) > 1000:
            raise BrokenRuleError(f"an error of {len(str(error))} letters") from error
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "samplers" in frame.filename]
        if own and own[-1].line and not own[-1].line.lstrip().startswith(("raise", 'f"', '"', ")")):
            raise BrokenRuleError("the error is Python's or torch's own, not one of ours") from error
        return False
    return True


def some_levels(rng: random.Random) -> Any:
    """Levels: mostly falling, with ends, gaps and values of every kind."""
    count = rng.choice([1, 2, 2, 3, 5, 9])
    levels: list[Any] = sorted((rng.random() for _ in range(count)), reverse=True)
    if rng.random() < 0.6:
        levels[0] = 1.0
    if rng.random() < 0.6:
        levels.append(0.0)
    if rng.random() < 0.4:  # two that lie close together
        at = rng.randrange(len(levels))
        levels.insert(at + 1, levels[at] * (1 - 10 ** -rng.uniform(1, 17)))
    if rng.random() < 0.2:
        levels[rng.randrange(len(levels))] = 10 ** -rng.uniform(0, 320)
        levels.sort(reverse=True)
    if rng.random() < 0.1:
        levels[rng.randrange(len(levels))] = rng.choice(ODD)
    kind = rng.random()
    if kind < 0.1:
        return rng.choice([*ODD, levels[:1], levels[::-1], [levels], {}])
    if kind < 0.15:
        return np.array([one for one in levels if not isinstance(one, torch.Tensor)], dtype=object)
    if kind < 0.5 and all(isinstance(one, float) for one in levels):
        return torch.tensor(levels, dtype=rng.choice([torch.float64, torch.float32]))
    return levels


def some(rng: random.Random, usual: list[Any], odd: list[Any] = ODD) -> Any:
    return rng.choice(odd) if rng.random() < 0.15 else rng.choice(usual)


def solver_case(rng: random.Random) -> tuple[Any, ...]:
    usual = {
        "eta": [0.0, 0.3, 1.0, 1, 2.0], "s_noise": [1.0, 0.0, 1.1], "shift": [3.0, 0.1, 1, 12.0], "gamma": [2.0, 1.5],
        "order": [1, 2, 3, 4], "rtol": [0.05, 1e-3], "atol": [0.0078, 1e-3], "h_init": [0.05, 3.0], "noise": [None],
    }  # fmt: skip
    name = rng.choice(list(samplers.SOLVERS))
    options = {key: some(rng, values) for key, values in usual.items() if rng.random() < 0.15}
    return solve, name, some_levels(rng), options


def schedule_case(rng: random.Random) -> tuple[Any, ...]:
    name = some(rng, list(samplers.SCHEDULES))
    options = {"shift": some(rng, [3.0, 1, 0.1, 10 ** rng.uniform(-8, 8), rng.uniform(0, 1)])}
    if rng.random() < 0.2:
        options["terminal"] = some(rng, [0.1, 0.001, 0.5, 0.999, 1.0])
    return schedule, name, some(rng, [1, 2, 3, 8, 28, 100, 999, 1000]), options


def guidance_case(rng: random.Random) -> tuple[Any, ...]:
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["rescale"] = some(rng, [0.0, 0.7, 1.0])
    if rng.random() < 0.3:
        options["weaker"] = [{"scale": some(rng, [2.8, 0.0]), "rescale": some(rng, [0.0, 0.5])}]
    kind = rng.choice(["plain", "projected", "zero_star"])
    if kind == "projected":
        usual = {"eta": [0.0, 1.0], "threshold": [0.0, 5.0], "momentum": [0.0, -0.5]}
        options["mix"] = {key: some(rng, values) for key, values in usual.items()}
    scale = some(rng, [4.5, 1.0, 7, 0.0])
    numbers = [scale, options.get("rescale", 0), *options.get("mix", {}).values()]
    numbers += [value for one in options.get("weaker", []) for value in one.values()]
    if any(isinstance(one, float | int) and not isinstance(one, bool) and abs(one) > 1e6 for one in numbers):
        options["huge"] = True
    return guidance, scale, kind, options


def window_case(rng: random.Random) -> tuple[Any, ...]:
    return windows, [some(rng, [0.1, 0.5, 1.0, 3, 256, 4096]) for _ in range(3)]


def config_case(rng: random.Random) -> tuple[Any, ...]:
    return config, {key: some(rng, values, JSON) for key, values in CONFIG_KEYS.items() if rng.random() < 0.35}


CASES = [solver_case, solver_case, schedule_case, guidance_case, window_case, config_case]
# Every input that ever failed, as the case that it was.
REGRESSIONS: list[tuple[Any, ...]] = [
    *((solve, name, [1.0, 0.999999, 0.0], {}) for name in samplers.SOLVERS),  # "math domain error" of the SDE solvers
    *((solve, name, [1.0, 1 - 1e-8, 0.0], {}) for name in samplers.SOLVERS),
    *((solve, name, [0.5, 0.5 * (1 - 1e-16), 0.0], {}) for name in samplers.SOLVERS),  # equal after rounding
    (solve, "res_multistep_ancestral", [1.0, 0.43, 0.28, 0.2799, 0.15, 0.0], {"eta": 2.0}),  # the logarithm of 0
    (solve, "res_multistep_ancestral_cfg_pp", [1.0, 0.43, 0.28, 0.2799, 0.15, 0.0], {"eta": 2.0}),
    (solve, "dpm_2_ancestral", [1.0, 0.5, 0.1, 0.0], {"eta": 2.0}),  # a level below 0
    (solve, "dpm_adaptive", [1.0, 0.5, 0.1], {"rtol": 1e-300, "atol": 1e-300}),  # it went on for ever
    (solve, "euler", ["1", "0"], {}),
    (solve, "euler", [1.0, 0.5, 0.0], {"eta": 1.0}),
    (schedule, [], 4, {"shift": 3.0}),  # no name can be looked up by a list
    (schedule, "normal", True, {"shift": 3.0}),
    (schedule, "normal", 10**9, {"shift": 3.0}),
    (schedule, "normal", np.int64(4), {"shift": np.float32(3.0)}),
    (schedule, "simple", 4, {"shift": 10**400}),
    (schedule, "exponential", 4, {"shift": 1e-60}),
    *((schedule, name, 28, {"shift": 0.1}) for name in samplers.SCHEDULES),  # began at 1.0000000000000002
    (guidance, 10**400, "plain", {}),
    (guidance, "7", "plain", {}),
    (windows, [10**400, 0.5, 3.0]),
    (windows, [0.1, 0.2, 0.0]),
    (config, {"_class_name": []}),
]


def described(case: tuple[Any, ...]) -> str:
    return f"({case[0].__name__}, {', '.join(map(repr, case[1:]))})"[:2000]


def main(seed: int, seconds: float) -> int:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    end, counts = time.monotonic() + seconds, {"cases": 0, "ran": 0}
    for number in itertools.count(seed * 10**9):
        before = number - seed * 10**9
        if before >= len(REGRESSIONS) and time.monotonic() > end:
            break
        rng = random.Random(number)
        case = REGRESSIONS[before] if before < len(REGRESSIONS) else rng.choice(CASES)(rng)
        torch.manual_seed(number)
        started = time.process_time()
        try:
            counts["ran"] += refused_or_done(lambda case=case: case[0](*case[1:]))
            if (took := time.process_time() - started) > 3:
                raise BrokenRuleError(f"it took {took:.1f} s")
        except Exception:
            print(f"case {number}: {described(case)}")
            traceback.print_exc()
            return 1
        counts["cases"] += 1
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
