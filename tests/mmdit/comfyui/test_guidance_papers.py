"""Guidance nodes against their papers' formulas, written here in numpy's float64, sample by sample."""

import numpy as np
import pytest
import torch

from encoders import Conditioning
from mmdit.comfyui import sampling
from mmdit.comfyui.nodes import NODES
from mmdit.comfyui.sampling import _combined, _DualGuidance
from mmdit.comfyui.values import Guider, Predicted, Prompt
from recorded_workflows import bare_model

SIGMA, SCALE = 0.7, 4.5
X, COND, UNCOND = np.random.default_rng(5).standard_normal((3, 2, 16, 6, 8)) + 0.3


@pytest.fixture(scope="module")
def model():
    return bare_model(12)


def found(sigma=SIGMA, cond=COND):
    x, cond, uncond = (torch.from_numpy(one.copy()) for one in (X, cond, UNCOND))
    return Predicted(x, sigma, cond, uncond, SCALE, lambda layers: uncond)


def close(result, wanted):
    np.testing.assert_allclose(result.numpy(), np.stack(list(wanted)), rtol=0, atol=1e-10)


def dot(a, b):
    return float((a * b).sum())


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_cfg(model, phi):
    """Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16, on v = alpha eps - sigma x0 of a variance-preserving x.

    ComfyUI takes x for x0 + sigma eps, so that alpha = 1 / sqrt(1 + sigma^2) and sigma_t = sigma alpha.
    """
    alpha = 1 / np.sqrt(1 + SIGMA**2)
    sigma_t = SIGMA * alpha

    def v_of(x, x0):
        return alpha * (x - x0) / SIGMA - sigma_t * x0

    def wanted():
        for x, cond, uncond in zip(X, COND, UNCOND, strict=True):
            positive, negative = v_of(x, cond), v_of(x, uncond)
            guided = negative + SCALE * (positive - negative)
            rescaled = guided * positive.std() / guided.std()
            yield alpha * (alpha * x) - sigma_t * (phi * rescaled + (1 - phi) * guided)

    close(_combined(NODES["RescaleCFG"].run(model=model, multiplier=phi), found()), wanted())


@pytest.mark.parametrize(("eta", "threshold"), [(0.0, 5.0), (0.3, 40.0), (1.0, 0.0)])
def test_apg(model, eta, threshold):
    """Sadat et al. 2024 (arXiv 2410.02416), algorithm 1, with scale in place of scale - 1, as ComfyUI has it."""
    beta, averages = -0.5, [np.zeros_like(COND[0])] * 2
    patched = NODES["APG"].run(model=model, eta=eta, norm_threshold=threshold, momentum=beta)
    (patch,) = [make() for make in patched.before]
    for sigma, cond in ((0.9, COND), (0.6, COND[::-1] + 0.5), (0.2, 2 * COND)):
        one, wanted = found(sigma, cond), []
        for i in range(2):
            averages[i] = cond[i] - UNCOND[i] + beta * averages[i]
            step = averages[i]
            if threshold > 0:
                step = step * min(1, threshold / np.sqrt(dot(step, step)))
            parallel = dot(step, cond[i]) / dot(cond[i], cond[i]) * cond[i]
            wanted.append(cond[i] + SCALE * (step - parallel + eta * parallel))
        close(_combined(patched, one._replace(cond=patch(one))), wanted)


def test_cfg_zero_star(model):
    """Fan et al. 2025 (arXiv 2503.18886): s = <v_cond, v_uncond> / |v_uncond|^2; ComfyUI mixes x0 where they mix v."""

    def wanted():
        for x, cond, uncond in zip(X, COND, UNCOND, strict=True):
            v, w = (x - cond) / SIGMA, (x - uncond) / SIGMA
            s = dot(v, w) / dot(w, w)
            yield s * uncond + SCALE * (cond - s * uncond)

    close(_combined(NODES["CFGZeroStar"].run(model=model), found()), wanted())


def test_cfg_norm(model):
    """Each cell's vector of channels is at most as long as that of cond, then times the strength."""
    wanted = UNCOND + SCALE * (COND - UNCOND)
    for i, row, column in np.ndindex(2, 6, 8):
        guided, limit = wanted[i, :, row, column], np.sqrt(dot(COND[i, :, row, column], COND[i, :, row, column]))
        wanted[i, :, row, column] = 0.5 * guided * min(1, limit / np.sqrt(dot(guided, guided)))
    result = _combined(NODES["CFGNorm"].run(model=model, strength=0.5), found())
    np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-8)  # ComfyUI adds 1e-8 to the norm


@pytest.mark.parametrize("nested", [False, True])
def test_dual_cfg(model, monkeypatch, nested):
    """Brooks et al. 2022 (arXiv 2211.09800), equation 3; nested, the outer guidance is around the inner one."""
    negative, middle, positive = groups = [(Prompt(Conditioning(*torch.zeros(2, 1, 1, 1))),) for _ in range(3)]
    entries = {group: [] for group in groups}  # of each prompt, told apart by identity
    predictions = {id(entries[group]): one for group, one in zip(groups, (UNCOND, X, COND), strict=True)}

    def predicted(model, x, sigma, asked):
        return [torch.from_numpy(predictions[id(one)].copy()) for one in asked]

    monkeypatch.setattr(sampling, "resolved", lambda asked, *_: [entries[group] for group in asked])
    monkeypatch.setattr(sampling, "predicted", predicted)
    guider = Guider(model, positive, negative, 3.0, middle, 1.5, nested)
    latents = torch.zeros(2, 16, 6, 8, dtype=torch.float64)
    both = _DualGuidance(guider, latents.shape, False)(latents, SIGMA)
    if nested:
        wanted = UNCOND + 1.5 * ((X + 3.0 * (COND - X)) - UNCOND)
    else:
        wanted = UNCOND + 1.5 * (X - UNCOND) + 3.0 * (COND - X)
    close(both.x0, wanted)
