"""Distillation into float8: latents of drawings, the guided loss, and two ways of training that lessen the error."""

import copy

import pytest
import torch

from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.training.distil import States, distil, distil_blocks, guided, guided_loss, states_of
from quant import is_quantized
from quant.training import fake_quantize_, quantize_trained_
from tiny_training import demo

GUIDANCE = 4.5


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = MMDiTConfig(depth=2, hidden_size=64, context_dim=32, pooled_dim=24, pos_embed_size=8, sample_size=4)
    model = MMDiT(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    return model


@pytest.fixture(scope="module")
def states():
    g = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    sigma, weight = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.9, 0.9, 1.2])
    texts = (random(6, 5, 32), random(6, 24), random(1, 5, 32), random(1, 24))
    return States(random(6, 3, 16, 4, 4), sigma, weight, *texts, GUIDANCE)


def error(student, teacher, states):
    batch = states.draw(16, torch.Generator().manual_seed(7))
    with torch.no_grad():
        return float(guided_loss(student, guided(teacher, batch, GUIDANCE), batch, GUIDANCE))


def test_states_are_the_latents_before_each_step_and_each_step_leads_to_the_next():
    pipe = demo()
    found = states_of(pipe, ["a red circle", "a blue star"], num_inference_steps=2, guidance_scale=3.0, seed=5)
    assert found.x.shape == (2, 2, 16, 16, 16)
    assert torch.equal(found.x[:, 0], torch.cat([pipe.noise(seed=seed) for seed in (5, 6)]))
    sigma = pipe.sigmas(2).float()
    torch.testing.assert_close(found.weight * (sigma[0] - sigma[2]) / 2, sigma[:-1] - sigma[1:])
    batch = states_batch(found, step=0)
    _, _, velocity = guided(pipe.transformer, batch, 3.0)
    torch.testing.assert_close(found.x[:, 0] + (sigma[1] - sigma[0]) * velocity, found.x[:, 1], atol=1e-4, rtol=1e-4)


def states_batch(states, step):
    only = states._replace(x=states.x[:, [step]], sigma=states.sigma[[step]], weight=states.weight[[step]])
    draws = (only.draw(2, torch.Generator().manual_seed(seed)) for seed in range(100))
    return next(one for one in draws if torch.equal(one.x, states.x[:, step]))


def test_distillation_lessens_the_error_and_ends_in_float8(teacher, states):
    student = copy.deepcopy(teacher).requires_grad_(True)
    fake_quantize_(student, "fp8-e5m2")
    before = error(student, teacher, states)
    shares = [one.share for one in distil(student, teacher, states, steps=30, rate=1e-4, batch=6)]
    assert shares == pytest.approx([(i + 1) / 30 for i in range(30)])
    student.requires_grad_(False)
    quantize_trained_(student)
    assert is_quantized(student)
    assert error(student, teacher, states) < 0.3 * before


def test_block_by_block_trains_one_block_at_a_time(teacher, states):
    student = copy.deepcopy(teacher)
    fake_quantize_(student, "fp8-e5m2")
    before, weights = error(student, teacher, states), copy.deepcopy(student.state_dict())
    for found in distil_blocks(student, teacher, states, steps=15, rate=1e-4, batch=6):
        if found.block == 0:
            assert all(torch.equal(weights[k], v) for k, v in student.state_dict().items() if "joint_blocks.1." in k)
    changed = [k for k, v in student.state_dict().items() if not torch.equal(weights[k], v)]
    assert {key.split(".")[1] for key in changed} == {"0", "1"}
    assert error(student, teacher, states) < 0.9 * before


def test_a_run_goes_on_from_its_share(teacher, states):
    student = copy.deepcopy(teacher)
    fake_quantize_(student, "fp8")
    assert [one.share for one in distil(student, teacher, states, steps=2, done=0.5)] == [0.75, 1.0]


def test_refusals(teacher, states):
    with pytest.raises(ValueError, match="steps=, seconds="):
        next(distil(teacher, teacher, states))
    for ends in ({"steps": 0}, {"seconds": 0.0}, {"steps": 3, "seconds": -1.0}):
        with pytest.raises(ValueError, match=f"{[*ends][-1]} above 0"):
            next(distil(teacher, teacher, states, **ends))
    with pytest.raises(ValueError, match="requires gradients"):
        next(distil(teacher, teacher, states, steps=1))
    with pytest.raises(ValueError, match="needs prompts"):
        states_of(demo(), [])
