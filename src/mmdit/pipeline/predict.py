"""What the transformer predicts of a latent under several conditionings: velocities, given as predicted pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.passes import Branch, perturbed
from mmdit.pipeline.profiles import Profile

_SIGMA_DTYPES = {"float32": torch.float32, "float16": torch.float16}
Announce = Callable[[tuple[Branch, ...]], None]  # told of the branches of a pass before it runs


def predict_branches(
    transformer: MMDiT, profile: Profile, x: Tensor, sigma: float, branches: Sequence[Branch], announce: Announce
) -> list[Tensor]:
    """The predicted picture (x0 = x - sigma velocity, a latent) of each branch.

    Branches with the same number of text tokens and the same change of the transformer share a batch. The batches run
    one after the other.

    Args:
        transformer: on the device of `x`.
        profile: says in which dtype the model sees sigma.
        x: latents of shape [b, c, h, w], in model space.
        sigma: the noise level of `x`, in [0, 1].
        branches: each with b prompts.
        announce: called before each batch.
    """
    batches: dict[tuple[object, ...], list[int]] = {}
    for place, branch in enumerate(branches):
        batches.setdefault(branch.kind, []).append(place)
    found: dict[int, Tensor] = {}
    for places in batches.values():
        batch = tuple(branches[place] for place in places)
        announce(batch)
        found |= zip(places, _predict_batch(transformer, profile, x, sigma, batch), strict=True)
    return [found[place] for place in range(len(branches))]


def _predict_batch(
    transformer: MMDiT, profile: Profile, x: Tensor, sigma: float, branches: tuple[Branch, ...]
) -> list[Tensor]:
    """The predicted pictures of branches that share a batch."""
    first, times = branches[0], len(branches)
    (rows, columns), patch = x.shape[2:], transformer.config.patch_size
    filled = F.pad(x, (0, -columns % patch, 0, -rows % patch), mode="circular")
    seen = torch.tensor(sigma, dtype=_SIGMA_DTYPES[profile.sigma_dtype], device=x.device)
    with perturbed(transformer, first.perturbed_layers, first.conditioning.context.shape[1]):
        velocity = transformer(
            torch.cat([filled] * times).to(transformer.pos_embed.dtype),
            (seen * 1000).float().expand(times * len(x)),
            torch.cat([branch.conditioning.context for branch in branches]),
            torch.cat([branch.conditioning.pooled for branch in branches]),
            skip_layers=first.skip_layers,
        )[..., :rows, :columns]
    known = sigma if profile.sigma_dtype == "float32" else float(seen)
    return [x - known * part for part in velocity.to(x.dtype).chunk(times)]
