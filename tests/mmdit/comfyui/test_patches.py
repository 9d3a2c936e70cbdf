"""Model patches: ComfyUI's formulas, written here as its files have them, and when a patch acts."""

import pytest
import torch
from torch import Tensor

from mmdit.comfyui.nodes import NODES
from mmdit.comfyui.sampling import _combined
from mmdit.comfyui.values import Model, Predicted
from recorded_workflows import bare_model

SCALE, SIGMA = 4.5, 0.7


@pytest.fixture
def model() -> Model:
    return bare_model(12)


def draws(count: int) -> list[Tensor]:
    return list(torch.randn(count, 2, 16, 6, 8, generator=torch.Generator().manual_seed(3)))


def found(sigma: float = SIGMA) -> Predicted:
    x, cond, uncond, weak = draws(4)
    return Predicted(x, sigma, cond, uncond, SCALE, lambda layers: weak * len(layers))


def plain(one: Predicted) -> Tensor:
    return one.uncond + (one.cond - one.uncond) * one.scale


def patched(model: Model, name: str, **inputs: object) -> Model:
    return NODES[name].run(model=model, **inputs)


def test_rescale_cfg(model):
    one, multiplier = found(), 0.7
    sigma = torch.tensor(SIGMA)
    cond, uncond = one.x - one.cond, one.x - one.uncond
    x = one.x / (sigma * sigma + 1.0)
    cond = ((x - (one.x - cond)) * (sigma**2 + 1.0) ** 0.5) / sigma
    uncond = ((x - (one.x - uncond)) * (sigma**2 + 1.0) ** 0.5) / sigma
    x_cfg = uncond + SCALE * (cond - uncond)
    ro_pos = torch.std(cond, dim=(1, 2, 3), keepdim=True)
    ro_cfg = torch.std(x_cfg, dim=(1, 2, 3), keepdim=True)
    x_final = multiplier * (x_cfg * (ro_pos / ro_cfg)) + (1.0 - multiplier) * x_cfg
    wanted = one.x - (one.x - (x - x_final * sigma / (sigma * sigma + 1.0) ** 0.5))
    assert torch.allclose(_combined(patched(model, "RescaleCFG", multiplier=multiplier), one), wanted, atol=1e-5)


def test_cfg_zero_star_and_norm(model):
    one = found()
    positive, negative = ((one.x - each).reshape(2, -1) for each in (one.cond, one.uncond))
    alpha = (positive * negative).sum(1, keepdim=True) / ((negative**2).sum(1, keepdim=True) + 1e-8)
    alpha = alpha.reshape(2, 1, 1, 1)
    wanted = plain(one) + one.uncond * (alpha - 1.0) + SCALE * one.uncond * (1.0 - alpha)
    star = patched(model, "CFGZeroStar")
    assert torch.allclose(_combined(star, one), wanted, atol=1e-5)
    norms = [torch.norm(each, dim=1, keepdim=True) for each in (one.cond, wanted)]
    wanted = wanted * (norms[0] / (norms[1] + 1e-8)).clamp(min=0.0, max=1.0) * 0.5
    assert torch.allclose(_combined(patched(star, "CFGNorm", strength=0.5), one), wanted, atol=1e-5)


def apg_of_comfyui(eta: float, norm_threshold: float, momentum: float):
    running_avg, prev_sigma = 0, None

    def pre_cfg(one: Predicted) -> Tensor:
        nonlocal running_avg, prev_sigma
        if prev_sigma is not None and one.sigma > prev_sigma:
            running_avg = 0
        prev_sigma = one.sigma
        guidance = one.cond - one.uncond
        if momentum != 0:
            running_avg = momentum * running_avg + guidance if torch.is_tensor(running_avg) else guidance
            guidance = running_avg
        if norm_threshold > 0:
            norm = guidance.norm(p=2, dim=[-1, -2, -3], keepdim=True)
            guidance = guidance * torch.minimum(torch.ones_like(norm), norm_threshold / norm)
        unit = torch.nn.functional.normalize(one.cond, dim=[-1, -2, -3])
        parallel = (guidance * unit).sum(dim=[-1, -2, -3], keepdim=True) * unit
        return (one.uncond + guidance - parallel + eta * parallel) + (one.cond - one.uncond) / one.scale

    return pre_cfg


def test_apg_remembers_until_the_noise_rises(model):
    numbers = {"eta": 0.3, "norm_threshold": 5.0, "momentum": -0.5}
    (make,), reference = patched(model, "APG", **numbers).before, apg_of_comfyui(**numbers)
    ours = make()
    for i, sigma in enumerate((0.9, 0.6, 0.3, 0.8)):
        one = found(sigma)._replace(cond=draws(6)[i] + 1)
        assert torch.allclose(ours(one), reference(one), atol=1e-5), sigma
    first = found(0.9)
    assert torch.equal(make()(first), make()(first))  # another drawing begins anew


@pytest.mark.parametrize("sigma", [0.99, 0.7])
def test_skip_layer_guidance_acts_in_its_window(model, sigma):
    one = found(sigma)
    numbers = {"scale": 3.0, "start_percent": 0.01, "end_percent": 0.15, "rescaling_scale": 0.4}
    dit = patched(model, "SkipLayerGuidanceDiT", double_layers="7, 8,9", single_layers="", **numbers)
    wanted = plain(one)
    if sigma == 0.99:  # the window goes from 0.9966 to 0.9444
        wanted = wanted + (one.cond - one.weaker([7, 8, 9])) * 3.0
        wanted = wanted * (0.4 * (one.cond.std() / wanted.std()) + 0.6)
    assert torch.allclose(_combined(dit, one), wanted, atol=1e-5)


def test_skip_layer_guidance_without_layers_and_with_wrong_ones(model):
    numbers = {"scale": 3.0, "start_percent": 0.01, "end_percent": 0.15}
    assert patched(model, "SkipLayerGuidanceSD3", layers="none", **numbers) is model
    with pytest.raises(ValueError, match=r"12.*0 to 11"):
        patched(model, "SkipLayerGuidanceSD3", layers="3, 12", **numbers)


def test_perturbed_attention_changes_nothing_and_says_so(model):
    with pytest.warns(UserWarning, match="perturbed_layers"):
        assert patched(model, "PerturbedAttentionGuidance", scale=3.0) is model


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_differential_diffusion_opens_the_mask_bit_by_bit(model, strength):
    mask, sigmas = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)
    rule = patched(model, "DifferentialDiffusion", strength=strength).mask_rule
    low = 3 * 0.001 / (1 + 2 * 0.001)  # the least level of the table, with shift 3
    threshold = (0.6 - low) / (1.0 - low)
    hard = (mask >= threshold).float()
    wanted = hard if strength == 1 else strength * hard + (1 - strength) * mask
    assert torch.allclose(rule(mask, 0.6, sigmas), wanted)
    assert float(rule(mask, 1.0, sigmas)[2]) == pytest.approx(0 if strength == 1 else 0.75 * 0.9)
