"""scheduler_config.json of diffusers in our words and back, against runs of the installed diffusers' schedulers."""

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

import samplers
from samplers import ResolutionShift, SamplingDefaults, from_scheduler_config, to_scheduler_config

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # their schedulers' own
X = 1.3 * torch.sin(1.7 * torch.arange(1, 33, dtype=torch.float32)).reshape(1, 2, 4, 4)
TOKENS = 1024
EULER, HEUN, LCM = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"
DPM, UNI_PC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True}
CONFIGS = {
    "plain": (EULER, {"shift": 3.0}),
    "no shift": (EULER, {}),
    "karras": (EULER, {"shift": 3.0, "use_karras_sigmas": True}),
    "exponential": (EULER, {"shift": 3.0, "use_exponential_sigmas": True}),
    "beta": (EULER, {"shift": 3.0, "use_beta_sigmas": True}),
    "dynamic": (EULER, {"shift": 3.0, **DYNAMIC}),
    "dynamic linear": (EULER, {**DYNAMIC, "time_shift_type": "linear", "base_shift": 1.5, "max_shift": 4.0}),
    "dynamic numbers": (EULER, {**DYNAMIC, "base_image_seq_len": 64, "max_image_seq_len": 2048, "max_shift": 0.1}),
    "dynamic karras": (EULER, {**DYNAMIC, "use_karras_sigmas": True}),
    "dynamic exponential": (EULER, {**DYNAMIC, "use_exponential_sigmas": True}),
    "dynamic beta": (EULER, {**DYNAMIC, "use_beta_sigmas": True}),
    "terminal": (EULER, {"shift": 3.0, "shift_terminal": 0.1}),
    "terminal beta": (EULER, {"shift": 3.0, "shift_terminal": 0.1, "use_beta_sigmas": True}),
    "terminal dynamic karras": (EULER, {**DYNAMIC, "shift_terminal": 0.02, "use_karras_sigmas": True}),
    "stochastic": (EULER, {"shift": 3.0, "stochastic_sampling": True}),
    "heun": (HEUN, {"shift": 3.0}),
    "lcm": (LCM, {"shift": 3.0}),
    "lcm beta": (LCM, {"shift": 3.0, "use_beta_sigmas": True}),
    "dpm++": (DPM, FLOW),
    "dpm++ heun": (DPM, {**FLOW, "solver_type": "heun"}),
    "dpm++ order 1": (DPM, {**FLOW, "solver_order": 1}),
    "dpm++ dynamic": (DPM, {**FLOW, **DYNAMIC}),
    "dpm++ sde": (DPM, {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++ sde heun": (DPM, {**FLOW, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "unipc": (UNI_PC, FLOW),
    "unipc order 1": (UNI_PC, {**FLOW, "solver_order": 1}),
    "unipc order 3": (UNI_PC, {**FLOW, "solver_order": 3}),
    "unipc dynamic": (UNI_PC, {**FLOW, **DYNAMIC}),
    "unipc terminal": (UNI_PC, {**FLOW, "shift_terminal": 0.1}),
}


def toy(x, sigma):
    return 0.6 * torch.tanh(x) + 0.25 * (1 - sigma) * torch.cos(2 * x)


def config_of(name):
    """The file as diffusers itself writes it."""
    cls, values = CONFIGS[name]
    return {"_class_name": cls, "_diffusers_version": "0.42.0", **getattr(diffusers, cls)(**values).config}


def their_run(name, steps):
    """Latents after each step, and the levels; a step of Heun's takes two calls, all but the last."""
    cls, values = CONFIGS[name]
    scheduler = getattr(diffusers, cls)(**values)
    config, more = scheduler.config, {}
    if config.get("use_dynamic_shifting"):  # as StableDiffusion3Pipeline calls it
        more["mu"] = calculate_shift(
            TOKENS,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
    scheduler.set_timesteps(steps, **more)
    x, seen = X, []
    generator = torch.Generator().manual_seed(4)
    drawn = {} if cls in (HEUN, UNI_PC) else {"generator": generator}
    for t in scheduler.timesteps:
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        sigma = float(scheduler.sigmas[scheduler.step_index])
        x = scheduler.step((x - toy(x, sigma)) / sigma, t, x, return_dict=False, **drawn)[0]
        seen.append(x)
    return [*seen[1::2], seen[-1]] if cls == HEUN else seen


def our_run(defaults, steps):
    shift = defaults.shift.at(TOKENS) if isinstance(defaults.shift, ResolutionShift) else defaults.shift
    levels = samplers.sigmas(defaults.schedule, steps, shift=shift, terminal=defaults.terminal)
    solver, options = samplers.SOLVERS[defaults.sampler], dict(defaults.options)
    if solver.is_stochastic:
        options["noise"] = samplers.Fresh(X, torch.Generator().manual_seed(4))
    return [step.x for step in solver(toy, X, levels, **options)]


@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_draws_what_diffusers_draws(name, steps):
    wanted, found = their_run(name, steps), our_run(from_scheduler_config(config_of(name)), steps)
    assert len(found) == len(wanted) == steps
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


def test_configurations_differ_by_far_more_than_the_tolerance():
    """All but those that are the same formula: LCM is Euler's stochastic sampling, and order 1 of DPM++ is Euler."""
    ends = {name: our_run(from_scheduler_config(config_of(name)), 7) for name in CONFIGS if name != "lcm"}
    names = list(ends)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert max(float((x - y).abs().max()) for x, y in zip(ends[a], ends[b], strict=True)) > 1e-4, (a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_written_back(name):
    """What we write is read back as the same, and by diffusers as the same scheduler."""
    defaults = from_scheduler_config(config_of(name))
    written = to_scheduler_config(defaults)
    assert from_scheduler_config(written) == defaults
    cls = getattr(diffusers, written["_class_name"])
    theirs = {"_class_name": cls.__name__, **cls.from_config(written).config}
    assert from_scheduler_config(theirs) == defaults
    assert defaults.is_plain == (name in ("plain", "no shift"))


REFUSED = [
    ("scheduler class", {"_class_name": "DDIMScheduler"}),
    ("scheduler class", {"_class_name": "LCMScheduler"}),
    ("_class_name", {"_class_name": 3}),
    ("invert_sigmas", {"invert_sigmas": True}),
    ("invert_sigmas", {"_class_name": LCM, "invert_sigmas": True}),
    ("num_train_timesteps", {"num_train_timesteps": 500}),
    ("num_train_timesteps", {"num_train_timesteps": True}),
    ("num_train_timesteps", {"_class_name": HEUN, "num_train_timesteps": 10**5000}),
    ("shift", {"shift": 0}),
    ("shift", {"shift": "3"}),
    ("shift", {"shift": True}),
    ("shift", {"shift": None}),
    ("shift", {"shift": float("nan")}),
    ("shift", {"shift": 10**400}),
    ("scale_factors", {"_class_name": LCM, "scale_factors": [0.5, 1]}),
    ("use_beta_sigmas", {"use_beta_sigmas": 1}),
    ("use_beta_sigmas", {"use_karras_sigmas": True, "use_beta_sigmas": True}),
    ("use_beta_sigmas", {"_class_name": UNI_PC, **FLOW, "use_beta_sigmas": True}),
    ("shift_terminal", {"shift_terminal": 1.0}),
    ("shift_terminal", {"shift_terminal": -0.1}),
    ("shift_terminal", {"shift_terminal": "0.1"}),
    ("shift_terminal", {"shift_terminal": False}),
    ("time_shift_type", {**DYNAMIC, "time_shift_type": "cubic"}),
    ("time_shift_type", {"_class_name": DPM, **FLOW, **DYNAMIC, "time_shift_type": "linear"}),
    ("time_shift_type", {**DYNAMIC, "time_shift_type": []}),
    ("max_image_seq_len", {**DYNAMIC, "max_image_seq_len": 0.5}),
    ("use_flow_sigmas", {"_class_name": DPM}),
    ("use_flow_sigmas", {"_class_name": UNI_PC, "prediction_type": "flow_prediction"}),
    ("prediction_type", {"_class_name": DPM, "use_flow_sigmas": True}),
    ("algorithm_type", {"_class_name": DPM, **FLOW, "algorithm_type": "dpmsolver"}),
    ("solver_order", {"_class_name": DPM, **FLOW, "solver_order": 3}),
    ("solver_order", {"_class_name": DPM, **FLOW, "solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    ("solver_order", {"_class_name": UNI_PC, **FLOW, "solver_order": True}),
    ("solver_type", {"_class_name": UNI_PC, **FLOW, "solver_type": "logrho"}),
    ("solver_type", {"_class_name": UNI_PC, **FLOW, "solver_type": "bh1"}),  # its last step is NaN in diffusers
    ("final_sigmas_type", {"_class_name": DPM, **FLOW, "final_sigmas_type": "sigma_min"}),
    ("thresholding", {"_class_name": UNI_PC, **FLOW, "thresholding": True}),
    ("disable_corrector", {"_class_name": UNI_PC, **FLOW, "disable_corrector": [0]}),
    ("predict_x0", {"_class_name": UNI_PC, **FLOW, "predict_x0": False}),
    ("lower_order_final", {"_class_name": UNI_PC, **FLOW, "lower_order_final": False}),
    ("use_lu_lambdas", {"_class_name": DPM, **FLOW, "use_lu_lambdas": True}),
    ("variance_type", {"_class_name": DPM, **FLOW, "variance_type": "learned"}),
]


@pytest.mark.parametrize(("key", "config"), REFUSED, ids=[f"{i}-{key}" for i, (key, _) in enumerate(REFUSED)])
def test_what_has_no_equal_is_refused_by_name(key, config):
    with pytest.raises(ValueError, match=key):
        from_scheduler_config(config)


def test_what_no_scheduler_does_is_not_written():
    for defaults in (
        SamplingDefaults("seeds_2"),
        SamplingDefaults("euler", "kl_optimal"),
        SamplingDefaults("flow_heun", shift=ResolutionShift()),
        SamplingDefaults("flow_dpmpp_2m", "normal"),
    ):
        with pytest.raises(ValueError, match=defaults.sampler):
            to_scheduler_config(defaults)


def test_unknown_keys_are_ignored_as_by_diffusers():
    assert from_scheduler_config({"shift": 3.0, "beta_start": 0.1, "_x": None}) == SamplingDefaults(shift=3.0)
