"""`compare` finds nothing between equal pipelines, leaves nothing behind, and says what it finds."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import planted
import tiny
from compared import NEGATIVE, PROMPT, SETTINGS, SIZE, check, failed
from mmdit import PROFILES, Pipeline
from mmdit.parity.compare import compare
from mmdit.parity.measure import Against, Kept
from mmdit.parity.sides import side_of
from mmdit.parity.taps import Job, Run, tapped


def hooks(*models) -> int:
    modules = [module for model in models if model is not None for module in model.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def parts(pipe) -> tuple:
    if isinstance(pipe, Pipeline):
        return tuple(pipe.models.values())
    return pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3


def test_a_pipeline_equals_itself(right):
    comparison = check(right, right)
    assert comparison.first is None and comparison.explanation == ()
    assert all(stage.relative == stage.maximum == stage.carried == 0 for stage in comparison.stages)
    assert all(stage.shape_a == stage.shape_b for stage in comparison.stages)


def test_the_stages_are_those_of_a_picture(right):
    names = [stage.name for stage in check(right, right, num_inference_steps=3, steps=(0, -1)).stages]
    text = [*(f"layer {i}" for i in range(3)), "context", "pooled"]
    for name in ["tokens", "embedding", *text]:
        assert {f"prompt clip_l {name}", f"negative clip_g {name}"} <= set(names)
    blocks = ["block 0 context", "block 0 x", "block 1 context", "block 1 x", "block 2 x"]
    step = ["input latent", "input context", "input pooled", "t_embedder", "y_embedder", "x_embedder"]
    step += ["context_embedder", "patches + position", "timestep + pooled", *blocks, "final_layer"]
    step += ["velocity uncond", "velocity cond", "guided", "latent"]
    for looked in (0, 2):
        assert [name for name in names if name.startswith(f"step {looked} ")] == [
            f"step {looked} {one}" for one in step
        ]
    assert [name for name in names if name.startswith("step 1 ")] == [
        f"step 1 {one}" for one in (*step[-4:-2], "latent")
    ]
    vae = ["latent", "conv_in", "mid", "up 3", "up 2", "up 1", "up 0", "conv_out"]
    assert names[-11:] == ["final latent", *(f"vae {name}" for name in vae), "pixels", "uint8"]
    order = [
        "prompt clip_l tokens",
        "prompt t5 layer 1",
        "prompt t5 context",
        "negative clip_l tokens",
        "noise",
        "sigmas",
    ]
    assert sorted(order, key=names.index) == order


@pytest.mark.parametrize(
    ("variant", "first"), [("sd3-medium", "ours"), ("sd3.5-medium", "ours"), ("sd3.5-medium", "theirs")]
)
def test_ours_equals_live_diffusers(tiny_folders, variant, first):
    pair = [Pipeline.from_pretrained(tiny_folders[variant]), tiny.load(tiny_folders[variant])]
    comparison = check(*(pair if first == "ours" else reversed(pair)))
    assert comparison.first is None, str(comparison)
    assert max(stage.carried for stage in comparison.stages if stage.name != "uint8") < 1e-5
    assert "mmdit Pipeline" in str(comparison) and "diffusers StableDiffusion3Pipeline" in str(comparison)


@pytest.mark.usefixtures("rounded_draws")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_within_their_rounding(right, reference, dtype):
    low = deepcopy(right).to(dtype=dtype)
    said = []
    for pair in ((right, low), (low, right), (low, reference))[: 3 if dtype == torch.bfloat16 else 1]:
        comparison = check(*pair)
        said.append(str(comparison))
        assert comparison.first is None, str(comparison)
        assert max(stage.relative / (stage.tolerance or 1) for stage in comparison.stages) < 0.5, "no near miss"
    assert str(dtype).removeprefix("torch.") in said[0]


@pytest.mark.usefixtures("rounded_draws")
def test_trained_weights_in_bfloat16():
    ours, settings = Pipeline.demo(), {"num_inference_steps": 2, "steps": (0, -1), "height": 64, "width": 64}
    low = deepcopy(ours).to(dtype=torch.bfloat16)
    comparison = compare(low, ours, "a red circle above a blue square", **settings)
    assert comparison.first is None, str(comparison)
    planted.a_transposed_weight(low)
    first = compare(low, ours, "a red circle above a blue square", **settings).first
    assert first is not None and first.name == "step 0 block 1 x"


def test_without_guidance_and_without_t5(tiny_folders, right, reference):
    ours, theirs = deepcopy(right), deepcopy(reference)
    ours.t5 = theirs.text_encoder_3 = None
    comparison = check(ours, theirs, guidance_scale=1.0, steps=[1])
    assert comparison.first is None, str(comparison)
    names = [stage.name for stage in comparison.stages]
    assert "step 1 velocity cond" in names and not any("uncond" in name or "other" in name for name in names)


def test_float64_draws_other_noise(right):
    comparison = check(deepcopy(right).to(dtype=torch.float64), right)
    assert failed(comparison) == ["noise"], str(comparison)
    assert comparison.explanation == (
        "noise: drawn in torch.float64 by a, in torch.float32 by b; a seed gives other numbers in float64",
    )


def test_profiles_differ_where_they_say(right):
    """No stage is blamed for what another one does: T5's length ends at the tokens, the solver at the second step."""
    comfyui, reference = deepcopy(right), deepcopy(right)
    comfyui.profile, reference.profile = PROFILES["comfyui"], PROFILES["reference"]
    comparison = check(comfyui, right)
    text = {f"{which} {what}" for which in ("prompt", "negative") for what in ("t5 tokens", "clip_l pooled")}
    assert set(failed(comparison)) == text | {"uint8"}, str(comparison)
    for field in ("text.t5_length", "text.project_clip_l", "to_uint8"):
        assert any(line.startswith(f"profile field {field}: ") for line in comparison.explanation)
    comparison = check(reference, right, num_inference_steps=3)
    assert set(failed(comparison)) == text | {"uint8", "noise", "timesteps", "step 1 latent"}, str(comparison)
    assert "profile field sampler: 'dpmpp_2m' in a, 'euler' in b" in comparison.explanation


@pytest.mark.filterwarnings("ignore:.*this part of the prompt was cut")
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_prompts_of_other_lengths_and_weights_end_at_the_conditioning(right, reference, first):
    ours = deepcopy(right)
    ours.profile = PROFILES["comfyui"]
    pair = (ours, reference) if first == "ours" else (reference, ours)
    comparison = compare(*pair, "a (red:1.3) circle", "green square " * 60, **SETTINGS)
    others = [name for name in failed(comparison) if not name.startswith(("prompt ", "negative "))]
    assert others == ["uint8"], str(comparison)


# What it leaves behind, and what it says


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_run_that_is_looked_into_is_the_run(right, reference, side):
    pipe = right if side == "ours" else reference
    settings = {"guidance_scale": 4.0, "latents": torch.randn(1, 16, 4, 6), "output_type": "pt", **SIZE}
    before = [value.clone() for model in parts(pipe) for value in model.state_dict().values()]
    wanted = pipe(PROMPT, negative_prompt=NEGATIVE, **settings).images
    count, attributes = hooks(*parts(pipe)), set(vars(pipe))
    kept = Kept()
    job = Job(PROMPT, NEGATIVE, 2, 4.0, 0, "euler", 32, 48, frozenset({0, 1}))
    run_of(side_of(pipe), job, settings["latents"], kept)
    assert torch.equal(torch.stack(kept.rows["pixels"]), wanted)
    assert check(right, reference).first is None
    assert torch.equal(pipe(PROMPT, negative_prompt=NEGATIVE, **settings).images, wanted)
    assert hooks(*parts(pipe)) == count and set(vars(pipe)) == attributes
    after = [value for model in parts(pipe) for value in model.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@torch.no_grad()
def run_of(side, job, noise, tap):
    from mmdit.parity.runs import run

    run(side, job, noise, tap)


@pytest.mark.parametrize(
    ("side", "where"),
    [("ours", "clip_g"), ("ours", "transformer"), ("ours", "vae"), ("theirs", "transformer"), ("theirs", "vae")],
)
def test_an_error_in_the_middle_leaves_nothing_behind(right, reference, side, where):
    pipe = deepcopy(right if side == "ours" else reference)
    model = side_of(pipe).models[where]
    check(pipe, pipe, num_inference_steps=1)  # transformers leaves its own hooks at the first call
    stack = getattr(model, "decoder", model)
    layer = next(module for module in stack.modules() if isinstance(module, torch.nn.ModuleList))[-1]

    def fail(*_):
        raise RuntimeError("in the middle")

    scheduler = getattr(pipe, "scheduler", pipe)
    count, attributes, levels = hooks(*parts(pipe)), set(vars(pipe)), dict(vars(scheduler))
    handle = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        check(pipe, pipe)
    handle.remove()
    assert hooks(*parts(pipe)) == count and set(vars(pipe)) == attributes
    changed = [name for name, value in vars(scheduler).items() if name not in levels or value is not levels[name]]
    assert set(changed) <= {"_sizes"}  # of the last drawing, for errors that speak of memory
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_table_is_aligned_and_sums_up_what_agrees(right):
    ours = deepcopy(right)
    planted.a_transposed_weight(ours)
    comparison = check(ours, right)
    lines = str(comparison).splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    table = lines[top : lines.index("", top)]
    assert len({len(line) for line in table if "BEYOND" not in line}) == 1, "the numbers end in one column"
    assert any(line.startswith("step 0 block 0 context … block 1 context (3) ") for line in table)
    assert any(line.startswith("step 0 block 1 x ") and line.endswith("BEYOND") for line in table)
    assert any(line.startswith("First stage beyond rounding: step 0 block 1 x: relative error ") for line in lines)
    assert len(table) < len(comparison.stages)


def test_json_is_strict(right):
    ours = deepcopy(right)
    planted.a_nan(ours)

    def refuse(constant):
        raise AssertionError(constant)

    comparison = check(ours, right)
    read = json.loads(comparison.to_json(), parse_constant=refuse)
    assert read["first"] == "vae conv_out" and len(read["stages"]) == len(comparison.stages)
    broken = next(stage for stage in read["stages"] if stage["name"] == "vae conv_out")
    assert broken["relative"] is None and not broken["ok"] and broken["note"] == "not finite in a"
    assert broken["shape_a"] == [1, 3, 32, 48] and read["explanation"] == list(comparison.explanation)


def test_what_only_one_side_has_is_a_difference(right):
    ours = deepcopy(right)
    ours.t5 = None
    comparison = check(ours, right)
    assert comparison.first is not None and comparison.first.name == "prompt t5 tokens"
    assert comparison.first.shape_a is None and comparison.first.note == "only b has it"
    assert "a has no T5 encoder" in comparison.explanation
    names = [stage.name for stage in comparison.stages]
    assert names.index("prompt clip_g layer 2") < names.index("prompt t5 tokens") < names.index("prompt t5 context")
    assert not [name for name in failed(comparison) if " t5 " not in name], "the rest is compared as ever"


def test_arguments_are_checked(right):
    with pytest.raises(ValueError, match=r"steps \[2, -3\] do not exist; of 2 steps give numbers from -2 to 1"):
        check(right, right, steps=(0, 2, -3))
    with pytest.raises(TypeError, match="got Linear, which has no transformer, vae, "):
        check(right, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown sampler 'euller'"):
        check(right, right, sampler="euller")
    other = deepcopy(right)
    noise = right.noise
    other.noise = lambda seed, **sizes: noise(seed, **sizes)[:, :4]
    with pytest.raises(ValueError, match=r"a draws latents of shape \[1, 16, 4, 6\], b \[1, 4, 4, 6\]"):
        check(right, other)


def test_defaults_are_those_of_the_first(right):
    pipe = deepcopy(right)
    pipe.profile = replace(right.profile, steps=2, guidance_scale=3.0)
    comparison = compare(pipe, right, PROMPT)
    assert "64 x 64 pixels, 2 steps, guidance 3, seed 0, sampler of each; steps looked into: 0, 1" in str(comparison)
    assert comparison.first is None


# The taps alone


def test_rows_are_compared_however_batches_are_cut():
    kept = Kept()
    one, two = torch.ones(1, 3), torch.full((1, 3), 2.0)
    kept("a", torch.cat([one, two]))
    fed = Against(kept, feed=True)
    assert torch.equal(fed("a", one * 5), one) and torch.equal(fed("a", two * 5), two)
    score = fed.scores["a"]
    assert score.shape == (2, 3) and score.fits and score.maximum == 8
    assert score.relative(1) == pytest.approx(4) and score.relative(0) == pytest.approx(4 / 5)
    assert torch.equal(fed("a", one * 5), one * 5), "there is no third row to go on with"
    assert not fed.scores["a"].fits


def test_of_other_lengths_the_shared_tokens_are_measured():
    kept = Kept()
    kept("a", torch.ones(1, 4, 2))
    fed = Against(kept, feed=True)
    assert fed("a", torch.full((1, 3, 2), 2.0)).shape == (1, 4, 2)
    assert fed.scores["a"].relative(1) == 1 and not fed.scores["a"].fits
    assert fed("b", one := torch.ones(1, 3, 2)) is one, "what the other run does not have passes"
    batch = Against(kept, feed=True)
    assert batch("a", torch.ones(1, 3, 5)).shape == (1, 3, 5) and batch.scores["a"].relative(1) == float("inf")


def test_taps_that_change_nothing_change_nothing(right):
    side = side_of(right)
    job = Job(PROMPT, NEGATIVE, 1, 1.0, 0, "euler", 32, 48, frozenset())
    with tapped(side.modules, Run(lambda _, value: value, job, prompt="prompt")), torch.no_grad():
        inside = side.encode(PROMPT)
    assert torch.equal(inside.context, right.encode(PROMPT).context)
