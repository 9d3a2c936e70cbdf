"""What the scheduler's config of a diffusers folder says: drawn as diffusers draws it, kept, and written back."""

import json
import shutil
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch

import samplers
import tiny
from full import FULL, in_full
from mmdit import PROFILES, Pipeline
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.checkpoints.write import convert
from samplers import SamplingDefaults

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # their schedulers' own
ASKED = {
    "height": 32,
    "width": 64,
    "num_inference_steps": 5,
    "output_type": "latent",
    "guidance_scale": 3.0,
    "max_sequence_length": 32,
}
PROMPT = "a red circle above a blue square"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EULER, UNI_PC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
SCHEDULERS = {
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "beta": (EULER, {"shift": 2.0, "use_beta_sigmas": True}),
    "dynamic": (EULER, {"use_dynamic_shifting": True, "base_image_seq_len": 2, "max_image_seq_len": 16}),
    "terminal": (EULER, {"shift": 3.0, "shift_terminal": 0.1}),
    "stochastic": (EULER, {"shift": 3.0, "stochastic_sampling": True}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "dpm++ heun": ("DPMSolverMultistepScheduler", {**FLOW, "solver_type": "heun"}),
    "dpm++": ("DPMSolverMultistepScheduler", FLOW),
    "unipc": (UNI_PC, {**FLOW, "solver_order": 3}),
    "unipc dynamic": (UNI_PC, {**FLOW, "use_dynamic_shifting": True}),
}


@pytest.fixture
def folder_of(tiny_folders, tmp_path):
    """A folder with the scheduler of that name, as diffusers writes it."""

    def made(name):
        folder = shutil.copytree(tiny_folders["sd3.5-medium"], tmp_path / name.replace(" ", "_"))
        cls, values = SCHEDULERS[name]
        getattr(diffusers, cls)(**values).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", cls]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return made


@pytest.fixture(scope="module")
def base(tiny_folders):
    """The pipeline of diffusers, which gets one scheduler after the other, and what ours draws without any."""
    folder = tiny_folders["sd3.5-medium"]
    return tiny.load(folder), Pipeline.from_pretrained(folder)(PROMPT, seed=3, **ASKED).images


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_folder_draws_what_diffusers_draws(folder_of, base, name):
    folder, (theirs, plain) = folder_of(name), base
    ours = Pipeline.from_pretrained(folder)
    theirs.scheduler = getattr(diffusers, SCHEDULERS[name][0]).from_pretrained(folder / "scheduler")
    generator = torch.Generator().manual_seed(3)
    if name in ("stochastic", "lcm"):  # its pipeline gives the scheduler no generator
        theirs.scheduler.step = partial(theirs.scheduler.step, generator=generator)
    wanted = theirs(PROMPT, generator=generator, **ASKED).images
    found = ours(PROMPT, seed=3, **ASKED).images
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert float((plain - found).abs().max()) > 1e-2
    if name in ("dpm++", "dynamic"):
        asked = {"sampler": "euler", "schedule": "normal", "shift": 3.0}
        assert torch.equal(ours(PROMPT, seed=3, **asked, **ASKED).images, plain), "what is asked for goes before"


@pytest.mark.parametrize("name", in_full([*SCHEDULERS], ["heun", "terminal", "lcm", "dpm++", "unipc dynamic"]))
def test_what_the_scheduler_says_is_written_back(folder_of, tmp_path, name):
    ours = Pipeline.from_pretrained(folder_of(name))
    assert ours.sampling is not None
    whole = FULL or name in ("dpm++", "unipc dynamic")
    for layout in ("diffusers", "official") if whole else ("diffusers",):
        again = Pipeline.from_pretrained(ours.save_pretrained(tmp_path / layout, layout=layout))
        assert again.sampling == ours.sampling
        assert again.shift == ours.shift
    written = convert(tmp_path / "diffusers", tmp_path / "converted", "diffusers")
    assert Pipeline.from_pretrained(written).sampling == ours.sampling
    tiny.load(written)  # the class in model_index.json is the scheduler's
    if not whole:
        return
    with pytest.warns(UserWarning, match=f"sampler {ours.sampling.sampler} and schedule {ours.sampling.schedule}"):
        ours.save_pretrained(tmp_path / "comfyui", layout="comfyui")


def timesteps(pipe, **asked):
    """What the transformer sees of each step."""
    seen = []
    handle = pipe.transformer.t_embedder.register_forward_pre_hook(lambda _, args: seen.append(float(args[0][0])))
    try:
        pipe(PROMPT, seed=3, **ASKED | {"guidance_scale": 1.0} | asked)
    finally:
        handle.remove()
    return seen


def test_whole_timesteps_belong_to_the_sampler_of_the_config(folder_of):
    """In diffusers another scheduler is another table of timesteps; ComfyUI has fractions with every sampler."""
    pipe = Pipeline.from_pretrained(folder_of("dpm++"))
    levels = [1000 * sigma for sigma in pipe.sigmas(5).tolist()[:-1]]
    assert timesteps(pipe) == timesteps(pipe, sampler="flow_dpmpp_2m") == [int(level) for level in levels]
    assert timesteps(pipe, sampler="euler") == pytest.approx(levels, rel=1e-6)
    assert timesteps(pipe, sampler="euler") != [int(level) for level in levels]
    assert timesteps(pipe) == [int(level) for level in levels]
    cond = pipe.encode(PROMPT)
    steps = list(pipe.sample(cond, None, pipe.noise(3), num_inference_steps=2, guidance_scale=1.0, sampler="euler"))
    drawn = pipe(cond, seed=3, num_inference_steps=2, guidance_scale=1.0, sampler="euler", output_type="latent").images
    assert torch.equal(steps[-1].x, drawn)


@pytest.mark.parametrize("name", ["unipc", "dynamic", "stochastic", "beta"])
def test_a_preset_goes_before_the_scheduler_of_the_folder(folder_of, tmp_path, name):
    folder = folder_of(name)
    said, pipe = Pipeline.from_pretrained(folder), Pipeline.from_pretrained(folder, preset="sd3_medium")
    assert (pipe.profile.sampler, pipe.profile.steps, pipe.shift) == ("dpmpp_2m", 50, 1.0)
    assert pipe.profile.schedule == "normal"
    assert not pipe.profile.whole_timesteps
    assert torch.equal(pipe.sigmas(4), samplers.sigmas("normal", 4, shift=1.0))
    assert timesteps(pipe) == pytest.approx([1000 * sigma for sigma in pipe.sigmas(5).tolist()[:-1]], rel=1e-6)
    turbo = Pipeline.from_pretrained(folder, preset="turbo")
    same = said.profile.sampler == "euler"
    assert (turbo.profile.sampler, turbo.profile.steps) == ("euler", 4)
    assert turbo.profile.schedule == (said.profile.schedule if same else "normal")
    assert turbo.shift == said.shift
    assert turbo.sampling == said.sampling, "which is what is saved"


def test_a_profile_of_ones_own_goes_before_the_scheduler_of_the_folder(folder_of):
    folder, known = folder_of("unipc"), PROFILES["comfyui"]
    said = Pipeline.from_pretrained(folder, profile="comfyui").profile
    assert (said.sampler, said.schedule, said.whole_timesteps) == ("flow_uni_pc", "diffusers_uni_pc", True)
    own = Pipeline.from_pretrained(folder, profile=replace(known, sampler="heun")).profile
    assert (own.sampler, own.schedule, own.whole_timesteps) == ("heun", "normal", False)
    own = Pipeline.from_pretrained(folder, profile=replace(known, schedule="beta")).profile
    assert (own.sampler, own.schedule, own.whole_timesteps) == ("flow_uni_pc", "beta", True)


def test_a_plain_scheduler_leaves_the_profile_as_it_is(tiny_folders):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"], profile="reference")
    assert pipe.sampling is None
    assert (pipe.profile.sampler, pipe.profile.schedule, pipe.shift) == ("dpmpp_2m", "normal", 3.0)
    assert SamplingDefaults(shift=1.0).is_plain


def test_what_has_no_equal_is_refused_with_the_file(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["sd3.5-medium"], tmp_path / "folder")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0, "invert_sigmas": true}')
    with pytest.raises(CheckpointError, match=r"folder.*scheduler_config.json.*invert_sigmas is True"):
        Pipeline.from_pretrained(folder)
