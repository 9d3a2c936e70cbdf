"""Drawing on a GPU: no step waits for it, a bad step is named, and all solvers draw what they draw without graphs."""

import warnings

import pytest
import torch

import mmdit
from samplers import SOLVERS
from skips import SKIPS
from waiting import no_waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])]
PROMPT = "a red circle"
WAITS = "dpm_adaptive"  # chooses its steps by an error that it reads from the device
SETTINGS = {"num_inference_steps": 5, "guidance_scale": 4.0}


def drawing_pipe(**more):
    return mmdit.Pipeline.demo(device="cuda", dtype=torch.bfloat16, **more)


@pytest.fixture(scope="module")
def pipes():
    """Plain, fast, and fast without graphs; all with the same weights."""
    found = {"plain": drawing_pipe(), "fast": drawing_pipe(), "no graph": drawing_pipe()}
    found["fast"].accelerate(attention="cudnn")
    found["no graph"].accelerate(graph=False, attention="cudnn")
    return found


def steps_of(pipe, **more):
    cond, uncond = pipe.encode(PROMPT), pipe.encode("")
    generator = torch.Generator().manual_seed(1)
    noise = pipe.noise(generator=generator)
    return pipe.sample(cond, uncond, noise, generator=generator, **SETTINGS | more)


def latent_of(pipe, **more):
    with torch.no_grad():
        *_, last = steps_of(pipe, **more)
    return last.x.double()


@torch.no_grad()
def second_step_waits_for_nothing(pipe, **more):
    latent_of(pipe, **more)  # records graphs, compiles kernels
    steps = steps_of(pipe, **more)
    next(steps)
    with no_waiting():
        next(steps)


@pytest.mark.parametrize("which", ["fast", "plain"])
@pytest.mark.parametrize("sampler", [name for name in SOLVERS if name != WAITS])
def test_no_step_waits_for_the_gpu(pipes, sampler, which):
    second_step_waits_for_nothing(pipes[which], sampler=sampler)


def test_what_waits_is_caught():
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(2, device="cuda").sum().item()


@pytest.mark.parametrize("sampler", SOLVERS)
def test_all_solvers_draw_the_same_with_graphs(pipes, sampler):
    assert torch.equal(latent_of(pipes["fast"], sampler=sampler), latent_of(pipes["no graph"], sampler=sampler))


@pytest.mark.parametrize("which", ["fast", "plain"])
def test_a_bad_step_is_named_when_the_next_is_launched(pipes, which):
    pipe = pipes[which]
    weight = pipe.transformer.joint_blocks[1].x_block.mlp.fc1.weight
    steps, before = steps_of(pipe), weight.detach().clone()
    with torch.no_grad():
        next(steps), next(steps)
        try:
            weight[0, 0] = float("nan")
            assert next(steps).i == 2
            with pytest.raises(FloatingPointError, match=r"step 2 .*joint_blocks\.1\.x_block\.mlp\.fc1"):
                next(steps)
        finally:
            weight.copy_(before)


def test_a_bad_last_step_is_not_given_out(pipes):
    steps = steps_of(pipes["fast"], num_inference_steps=2)
    with torch.no_grad():
        step = next(steps)
        step.x = torch.full_like(step.x, float("nan"))
        with pytest.raises(FloatingPointError, match=r"step 1 .*the input of the model"):
            next(steps)


def test_noise_of_the_cpu_arrives_as_it_was_drawn():
    from samplers.noise import Fresh

    like = torch.empty(2, 16, 128, 128, device="cuda")
    noise = Fresh(like, torch.Generator().manual_seed(3))
    found = [noise(1.0, 0.5) for _ in range(8)]
    generator = torch.Generator().manual_seed(3)
    for one in found:
        assert torch.equal(one.cpu(), torch.randn(like.shape, generator=generator))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_other_profiles_and_guidance_wait_for_nothing_either(sampler):
    pipe = drawing_pipe(profile="comfyui", fast=True)
    for guidance in (mmdit.Guidance(rescale=0.7), mmdit.Guidance(kind="apg", momentum=-0.5, threshold=15.0)):
        second_step_waits_for_nothing(pipe, sampler=sampler, guidance=guidance)


def test_float8_waits_for_nothing_either():
    pipe = drawing_pipe(quant="fp8")
    second_step_waits_for_nothing(pipe)
    pipe.accelerate()
    second_step_waits_for_nothing(pipe)


def test_text_encoders_in_graphs_are_bit_equal(pipes):
    for texts in ([PROMPT], [PROMPT, ""], ["a blue star " * 40]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what is cut off
            found, wanted = (pipes[which].encode(texts) for which in ("fast", "plain"))
        assert torch.equal(found.context, wanted.context)
        assert torch.equal(found.pooled, wanted.pooled)


@pytest.mark.parametrize("more", [{"quant": "fp8"}, {"profile": "comfyui"}], ids=str)
def test_other_text_encoders_in_graphs_are_bit_equal(more):
    pipe = drawing_pipe(**more)
    wanted = pipe.encode(PROMPT)
    report = pipe.accelerate()
    assert {"CLIP-L", "CLIP-G", "T5", "VAE"} <= set(report.others)
    for _ in range(2):
        found = pipe.encode(PROMPT)
        assert torch.equal(found.context, wanted.context)
        assert torch.equal(found.pooled, wanted.pooled)


def test_graphs_of_text_encoders_notice_other_weights():
    pipe = drawing_pipe(fast=True)
    before = pipe.encode(PROMPT).context
    weight = pipe.t5.encoder.block[1].layer[1].DenseReluDense.wo.weight
    weight.data = 2 * weight.data
    after = pipe.encode(PROMPT).context
    assert not torch.equal(after, before)
    pipe.plain()
    assert torch.equal(pipe.encode(PROMPT).context, after)


def test_what_looks_into_a_graphed_encoder_is_refused(pipes):
    with pytest.raises(ValueError, match=r"pipe\.plain\(\)"), mmdit.capture(pipes["fast"], "t5.*"):
        pipes["fast"].encode(PROMPT)


def test_the_fast_vae_draws_the_pictures_of_the_plain_one(pipes):
    latent = pipes["plain"].noise(1, count=2).to(torch.bfloat16)
    found, wanted = (pipes[which].decode(latent) for which in ("fast", "plain"))
    assert float((found - wanted).abs().mean()) < 0.01
    found, wanted = (pipes[which].encode_image(wanted, seed=1) for which in ("fast", "plain"))
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_a_pipeline_that_moves_to_the_cpu_and_back(pipes):
    pipe = drawing_pipe(fast=True)
    latent = latent_of(pipe)
    picture = pipe.decode(latent.to(pipe.dtype))
    pipe.to("cpu")
    assert pipe.decode(latent.to("cpu", pipe.dtype)).shape == picture.shape
    assert pipe.encode(PROMPT).context.device.type == "cpu"
    pipe.to("cuda")
    assert torch.equal(latent_of(pipe), latent)
    assert torch.equal(pipe.decode(latent.to(pipe.dtype)), picture)
