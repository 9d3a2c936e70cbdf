"""Previews: the recorded factors and their use, and factors fitted to a VAE of one's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import golden
from encoders.vae import VAE, VAEConfig
from mmdit import load_vae
from mmdit.demo.scenes import render, sample
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.images import to_pil
from mmdit.pipeline.previews import COMFYUI, STABILITY, fit_factors, preview
from refusals import refuses

RECORDED = golden.recorded("latent_rgb")
WEIGHTS = EMBEDDED


class LinearVAE(VAE):
    """Decodes a latent cell to 8 x 8 pixels whose mean is a linear map of it; noise that averages out lies on top."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)
        self.config = VAEConfig(latent_channels=len(weight))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def decode(self, latent: Tensor) -> Tensor:
        cells = torch.einsum("bchw,cr->brhw", latent, self.weight) + self.bias[:, None, None]
        checks = torch.tensor([[0.1, -0.1], [-0.1, 0.1]], dtype=latent.dtype)
        return F.interpolate(cells, scale_factor=8.0) + checks.repeat(*(4 * side for side in cells.shape[2:]))


def test_factors_are_the_recorded_ones():
    assert [list(row) for row in STABILITY.weight] == RECORDED["stability_ai_sd3.5"]
    assert STABILITY.bias == (0, 0, 0)
    assert [list(row) for row in COMFYUI.weight] == RECORDED["comfyui"]["factors"]
    assert list(COMFYUI.bias) == RECORDED["comfyui"]["bias"]


@pytest.mark.parametrize(("factors", "name"), [(STABILITY, "stability_ai_sd3.5"), (COMFYUI, "comfyui")])
def test_use_is_the_recorded_one(factors, name):
    """`use` of the record, cell by cell: row-vector[16] @ factors[16][3] + bias, then (x + 1) / 2, clamped."""
    entry = RECORDED[name]
    weight, bias = (entry["factors"], entry["bias"]) if name == "comfyui" else (entry, [0, 0, 0])
    latent = 2 * torch.randn(2, 16, 3, 5, dtype=torch.float64)
    pictures = preview(latent, factors)
    for b, y, x in ((0, 0, 0), (0, 2, 1), (1, 1, 4)):
        for colour in range(3):
            value = sum(float(latent[b, c, y, x]) * weight[c][colour] for c in range(16)) + bias[colour]
            assert float(pictures[b, colour, y, x]) == pytest.approx(min(max((value + 1) / 2, 0), 1), abs=1e-12)
    far = preview(100 * latent, factors)
    assert float(far.min()) == 0
    assert float(far.max()) == 1


def test_half_precision_is_computed_in_float32():
    latent = torch.randn(1, 16, 4, 4).bfloat16()
    pictures = preview(latent)
    assert pictures.dtype == torch.float32
    torch.testing.assert_close(pictures, preview(latent.double()).float(), rtol=0, atol=1e-6)
    assert to_pil(pictures, "round")[0].size == (4, 4)


def test_wrong_channels():
    refuses(lambda: preview(torch.zeros(1, 4, 2, 2)), "has 4 channels", "are for 16", error=ValueError)
    refuses(lambda: preview(torch.zeros(2, 16, 2)), "shape [2, 16, 2]", "are for 16", error=ValueError)
    vae = LinearVAE(torch.zeros(16, 3), torch.zeros(3))
    refuses(lambda: fit_factors(vae, torch.zeros(1, 8, 2, 2)), "has 8 channels", "the VAE has 16", error=ValueError)


@pytest.mark.parametrize("channels", [4, 16])
def test_fit_of_a_linear_vae_is_exact(channels):
    weight = 0.05 * torch.randn(channels, 3, dtype=torch.float64)
    bias = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    latents = 0.3 * torch.randn(5, channels, 4, 6, dtype=torch.float64) + 0.1
    vae = LinearVAE(weight, bias)
    assert float(vae.decode(latents).detach().abs().max()) < 1  # nothing is clamped, so nothing bends
    fitted = fit_factors(vae, latents)
    torch.testing.assert_close(torch.tensor(fitted.weight, dtype=torch.float64), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(fitted.bias, dtype=torch.float64), bias, rtol=0, atol=1e-6)
    assert fit_factors(vae, latents) == fitted


def test_fit_refuses_what_does_not_determine_it():
    vae = LinearVAE(torch.zeros(16, 3), torch.zeros(3))
    refuses(lambda: fit_factors(vae, torch.randn(1, 16, 4, 4)), "16 latent cells of rank 16", "17", error=ValueError)
    alike = torch.randn(1, 16, 1, 1).expand(3, 16, 4, 4)
    refuses(lambda: fit_factors(vae, alike), "48 latent cells of rank 1", "different pictures", error=ValueError)
    broken = LinearVAE(torch.full((16, 3), torch.nan), torch.zeros(3))
    refuses(lambda: fit_factors(broken, torch.randn(2, 16, 4, 4)), "not finite", error=ValueError)


@torch.no_grad()
def test_fit_of_the_embedded_vae():
    """Middles of 8 pictures, fitted to 16 others: mean error 0.155; one colour for all 0.277, ComfyUI's fit 0.265."""
    vae = load_vae(WEIGHTS, dtype=torch.float32)
    pictures = render(sample(24, 1))[..., 32:96, 32:96]
    latents = torch.cat([vae.encode(2 * part - 1).mode() for part in pictures.split(8)])
    factors = fit_factors(vae, latents[:16])
    small = F.avg_pool2d(pictures[16:], 8)

    def error(shown: Tensor) -> float:
        return float((shown - small).abs().mean())

    fitted = error(preview(latents[16:], factors))
    assert fitted < 0.16
    assert fitted < 0.6 * error(small.mean((0, 2, 3), keepdim=True))  # one colour for all
    assert fitted < 0.7 * error(preview(latents[16:], COMFYUI))  # the factors of another VAE
