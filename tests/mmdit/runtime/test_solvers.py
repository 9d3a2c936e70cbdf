"""Every solver draws on the fast forward what it draws on the model's own, and the table of graphs knows them all."""

import pytest
import torch

from full import in_full
from mmdit.bench.samplers import graphs_markdown
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.accelerate import Accelerated
from samplers import SOLVERS, Guided, sigmas

CONFIG = MMDiTConfig(2, 32, 24, 16, 8, head_dim=16, in_channels=4, out_channels=4)


@pytest.fixture(scope="module")
def model():
    found = MMDiT(CONFIG)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.15)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def fast(model):
    return Accelerated(model)


def drawn(name, velocity, planned=lambda steps: steps):
    """The last latent, and the timesteps at which the model was called."""
    generator = torch.Generator().manual_seed(1)
    noise, text = torch.randn(1, 4, 4, 6, generator=generator), torch.randn(2, 5, 24, generator=generator)
    pooled, asked = torch.randn(2, 16, generator=generator), []
    branches = list(zip(text.split(1), pooled.split(1), strict=True))  # the same tensors at all steps: tables are kept

    def denoise(x, sigma):
        asked.append(1000 * sigma)
        cond, uncond = (x - sigma * velocity(x, 1000 * sigma, *branch) for branch in branches)
        found = uncond + 1.5 * (cond - uncond)
        return Guided(found, uncond) if SOLVERS[name].guided else found

    torch.manual_seed(2)  # of fresh noise
    options = {"rtol": 1.0, "atol": 1.0} if name == "dpm_adaptive" else {}  # few steps
    *_, last = planned(SOLVERS[name](denoise, noise, sigmas("normal", 4, shift=3.0), **options))
    return last.x, asked


# One of each way to call the model: once a step, several times, at levels of its own, from both branches, with noise.
KINDS = ["euler", "heun", "lms", "dpm_2_ancestral", "dpmpp_3m_sde", "dpm_fast", "dpm_adaptive", "seeds_3"]
KINDS += ["sa_solver_pece", "uni_pc", "res_multistep_ancestral_cfg_pp", "flow_heun", "flow_ddpm"]


@pytest.mark.parametrize("name", in_full([*SOLVERS], KINDS))
def test_a_loop_of_fast_steps_is_the_plain_loop(model, fast, name):
    timesteps = [1000 * level for level in sigmas("normal", 4, shift=3.0).tolist()]
    wanted, asked = drawn(name, lambda x, t, text, pooled: model(x, torch.full((1,), t), text, pooled))
    found, asked_fast = drawn(
        name,
        lambda x, t, text, pooled: fast.velocity(x, t, [text], [pooled]),
        lambda steps: fast.drawing(steps, timesteps),
    )
    assert len(asked_fast) == len(asked)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_the_table_of_graphs():
    lines = graphs_markdown().splitlines()
    cells = {
        cells[1].strip("`"): cells[2:-1] for line in lines if (cells := [one.strip() for one in line.split("|")])[1:2]
    }
    assert set(SOLVERS) <= set(cells)
    for name, solver in SOLVERS.items():
        graph, replays, beside = cells[name]
        assert graph == "step by step"
        assert replays.startswith("chosen" if solver.own_steps else str(solver.calls))
        assert ("noise" in beside) == solver.is_stochastic
        assert ("waits" in beside) == (name == "dpm_adaptive")
