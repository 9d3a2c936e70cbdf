"""Measures of pictures: PSNR and SSIM of pairs, Fréchet distance of sets, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from encoders import VAE

__all__ = ["bootstrap", "features", "frechet_distance", "psnr", "ssim"]


def psnr(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each pair in dB, pictures in [0, 1]; infinite where they are equal."""
    return -10 * (a.double() - b.double()).square().mean(dim=(1, 2, 3)).log10()


def ssim(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each pair, mean over pixels and channels; pictures in [0, 1].

    Wang et al. 2004, IEEE Transactions on Image Processing 13(4): Gaussian window of 11 pixels and sigma 1.5,
    K1 = 0.01, K2 = 0.03, only where the window fits.
    """
    place = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    weights = (line / line.sum()).tolist()

    def blurred(x: Tensor) -> Tensor:
        rows, columns = x.shape[-2] - 10, x.shape[-1] - 10
        x = sum((weight * x[..., i : i + rows, :] for i, weight in enumerate(weights)), x.new_zeros(()))
        return sum((weight * x[..., i : i + columns] for i, weight in enumerate(weights)), x.new_zeros(()))

    a, b = a.double(), b.double()
    mean_a, mean_b = blurred(a), blurred(b)
    variance_a, variance_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    first, second = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + first) * (2 * covariance + second)
    bottom = (mean_a**2 + mean_b**2 + first) * (variance_a + variance_b + second)
    return (top / bottom).mean(dim=(1, 2, 3))


@torch.no_grad()
def features(vae: VAE, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 64"]:
    """64 numbers of a picture in [0, 1]: the VAE's mean, averaged over each quarter, 16 channels x 2 x 2; float64."""
    first = next(vae.parameters())
    latent = vae.encode((2 * pictures - 1).to(first.device, first.dtype)).mode()
    return F.adaptive_avg_pool2d(latent.float(), 2).flatten(1).double().cpu()


def frechet_distance(a: Float[Tensor, "n f"], b: Float[Tensor, "m f"]) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features with covariances A and B.

    Dowson and Landau 1982, Journal of Multivariate Analysis 12(3); with other features, Heusel et al. 2017's FID.
    """
    drift = (a.mean(0) - b.mean(0)).square().sum()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return float(drift + covariance_a.trace() + covariance_b.trace() - 2 * shared)


def bootstrap(
    statistic: Callable[[Tensor], float], count: int, *, times: int = 1000, seed: int = 0, share: float = 0.95
) -> tuple[float, float]:
    """The interval that holds `share` of a statistic's values when its items are drawn again with replacement.

    Args:
        statistic: Computes the statistic from the items with the given indices, [count], which may repeat. To compare
            two conditions item by item, compute both from the same indices: the interval is then that of a paired
            difference or ratio.
        count: Number of items.
        times: Number of draws.
        seed: Seed of the draws.
        share: Share of the values that the interval holds.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(count, (count,), generator=generator) for _ in range(times))
    values = torch.tensor([statistic(indices) for indices in draws], dtype=torch.float64)
    low, high = values.quantile(torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)).tolist()
    return low, high
