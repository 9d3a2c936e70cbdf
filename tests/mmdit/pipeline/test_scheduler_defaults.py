"""What the scheduler's config of a diffusers folder says: drawn as diffusers draws it, kept, and written back."""

import json
import shutil
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch

import tiny
from mmdit import Pipeline
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.checkpoints.write import convert
from samplers import SamplingDefaults

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # their schedulers' own
ASKED = {"height": 32, "width": 64, "num_inference_steps": 5, "output_type": "latent", "guidance_scale": 3.0}
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_folder_draws_what_diffusers_draws(folder_of, tiny_folders, name):
    folder = folder_of(name)
    ours, theirs = Pipeline.from_pretrained(folder), tiny.load(folder)
    generator = torch.Generator().manual_seed(3)
    if name in ("stochastic", "lcm"):  # its pipeline gives the scheduler no generator
        theirs.scheduler.step = partial(theirs.scheduler.step, generator=generator)
    wanted = theirs(PROMPT, generator=generator, **ASKED).images
    found = ours(PROMPT, seed=3, **ASKED).images
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    plain = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])(PROMPT, seed=3, **ASKED).images
    assert float((plain - found).abs().max()) > 1e-2
    if name in ("dpm++", "dynamic"):
        ours.profile = replace(ours.profile, whole_timesteps=False)
        asked = {"sampler": "euler", "schedule": "normal", "shift": 3.0}
        assert torch.equal(ours(PROMPT, seed=3, **asked, **ASKED).images, plain), "what is asked for goes before"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_the_scheduler_says_is_written_back(folder_of, tmp_path, name):
    ours = Pipeline.from_pretrained(folder_of(name))
    assert ours.sampling is not None
    for layout in ("diffusers", "official"):
        again = Pipeline.from_pretrained(ours.save_pretrained(tmp_path / layout, layout=layout))
        assert again.sampling == ours.sampling
        assert again.shift == ours.shift
    written = convert(tmp_path / "diffusers", tmp_path / "converted", "diffusers")
    assert Pipeline.from_pretrained(written).sampling == ours.sampling
    tiny.load(written)  # the class in model_index.json is the scheduler's
    with pytest.warns(UserWarning, match=f"sampler {ours.sampling.sampler} and schedule {ours.sampling.schedule}"):
        ours.save_pretrained(tmp_path / "comfyui", layout="comfyui")


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
