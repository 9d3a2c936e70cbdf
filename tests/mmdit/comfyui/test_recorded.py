"""ComfyUI's recorded workflows, run here: every recorded latent, and every picture that was saved."""

import numpy as np
import pytest

import recorded_workflows as recorded
from tiny import error

LATENTS = 5e-4  # the relative error that a latent may have; right code has 7e-6
# Between this decoded picture and its encoding lies a resize of 8-bit pixels, cut off: one of 27,648 values that a
# rounding error moves by 1/255 changes the latent by 4e-4. What is drawn from it stays within the bound.
CUT_OFF = {"hires.image_lanczos.encoded": 2e-3}
# Those that show something which no other does; all with MMDIT_FULL=1.
QUICK = (
    "text2img.sd35l_tiny.euler.sgm_uniform.0",
    "text2img.sd3m_tiny.dpmpp_2m.beta.2",
    "text2img.weights_batch2",
    "text2img.zeroed_negative_after_10_percent",
    "text2img.unetloader_vaeloader_clipencodesd3",
    "text2img.unetloader_fp8_e4m3fn",
    "conditioning.average",
    "img2img.sd35l_tiny.dpmpp_2m.sgm_uniform.d0.3.photo.3",
    "img2img.batch_index",
    "inpaint.set_soft.sd35l_tiny.dpmpp_2m.sgm_uniform.d0.7.1",
    "inpaint.modelcond.sd35l_tiny.euler.simple.d0.75.5",
    "inpaint.set_hard.sd35l_tiny.euler_ancestral.normal.d1.0.6",
    "inpaint.grow_feather_paste_back",
    "outpaint.forinpaint.32_0_16_24.f16",
    "hires.latent_bislerp_1.5",
    "hires.image_lanczos",
    "advanced.two_stages.euler.normal.3",
    "advanced.stopped_early_forced_to_zero",
    "custom.samplercustom",
    "custom.advanced_split",
    "custom.basicguider_inpaint",
    "custom.flipsigmas_unsample",
    "controlnet.inpainting_alimama",
    "workflow.lora_controlnet_slg",
    "workflow.lora_kohya_te1",
    "workflow.template_canny",
    "workflow.template_simple_all_in_one",
)
NAMES = [name for name in recorded.cases() if recorded.FULL or name in QUICK]


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_workflow_gives_the_recorded_values(run, name):
    case = recorded.cases()[name]
    wires = {key: tuple(wire) for key, wire in case["records"].items()}
    found = run(case["graph"], keep=wires.values())
    for key, wire in wires.items():
        assert error(found.values[wire]["samples"], recorded.golden()[key]) < CUT_OFF.get(key, LATENTS), key
    for node, key in case["pictures"].items():
        wanted = recorded.golden()[key].numpy().astype(int)
        pictures = np.stack([np.asarray(one) for one in found.images[node]]).astype(int)
        assert pictures.shape == (*wanted.shape[:3], 3)  # where wanted has one channel, all three were equal
        assert np.abs(pictures - wanted).max() <= 1


def test_quick_cases_use_every_class_that_was_recorded():
    classes = [{node["class_type"] for node in recorded.cases()[name]["graph"].values()} for name in QUICK]
    all_of_them = {node["class_type"] for case in recorded.cases().values() for node in case["graph"].values()}
    assert all_of_them - set().union(*classes) <= {"LatentUpscale", "ControlNetApplySD3", "ConditioningConcat"}
