"""The transformer's predictions for a latent under several conditionings, as predicted pictures (x0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import Conditioning
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import acting_nets, residuals
from mmdit.pipeline.passes import Branch, perturbed
from mmdit.pipeline.profiles import Profile
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.fast_nets import ActingNet
from mmdit.runtime.modulation import ModulationTable
from mmdit.runtime.sequence import SequenceParallel
from mmdit.utils import whole

_SIGMA_DTYPES = {"float32": torch.float32, "float16": torch.float16}
Announce = Callable[[tuple[Branch, ...]], None]  # called with the branches of a pass before it runs
PredictInLoop = Callable[[Tensor, float | Tensor, Sequence[Branch], int], list[Tensor]]  # the last one is the step


def predict_branches(
    transformer: MMDiT,
    profile: Profile,
    x: Tensor,
    sigma: float,
    branches: Sequence[Branch],
    announce: Announce,
    accelerated: Accelerated | None = None,
    sequence: SequenceParallel | None = None,
    table: ModulationTable | None = None,
) -> list[Tensor]:
    """The predicted picture (x0 = x - sigma * velocity, a latent) of each branch.

    Branches with the same number of text tokens and the same change of the transformer share a batch. The batches run
    one after the other.

    Args:
        transformer: the model, on the device of `x`.
        profile: gives the dtype in which the model receives sigma.
        x: latents of shape [b, c, h, w], in model space.
        sigma: the noise level of `x`, in [0, 1].
        branches: the branches, each with b prompts.
        announce: called before each batch.
        accelerated: the transformer's fast forward; None runs the model's own forward.
        sequence: forwards over several ranks; None computes on this one. `accelerated` has its own.
        table: what gives the modulation to the model's own forward; None computes it in place.
    """
    batches: dict[tuple[object, ...], list[int]] = {}
    for place, branch in enumerate(branches):
        batches.setdefault(branch.kind, []).append(place)
    found: dict[int, Tensor] = {}
    for places in batches.values():
        batch = tuple(branches[place] for place in places)
        announce(batch)
        predicted = _predict_batch(transformer, profile, x, sigma, batch, accelerated, sequence, table)
        found |= zip(places, predicted, strict=True)
    return [found[place] for place in range(len(branches))]


def control_timestep_of(profile: Profile, sigma: float) -> float:
    """The timestep of a noise level for ControlNets, before it is cast to the dtype of the net."""
    if profile.control_timestep == "wide":
        return float(_seen(profile, sigma).float() * 1000)
    return timestep_of(profile, sigma)


def timestep_of(profile: Profile, sigma: float) -> float:
    """The timestep of a noise level: 1000 sigma in the profile's dtype, or rounded down to a whole number."""
    if profile.whole_timesteps:
        return float(int(1000 * sigma))
    return float((_seen(profile, sigma) * 1000).float())


def _seen(profile: Profile, sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=_SIGMA_DTYPES[profile.sigma_dtype], device="cpu")


def _predict_batch(
    transformer: MMDiT,
    profile: Profile,
    x: Tensor,
    sigma: float,
    branches: tuple[Branch, ...],
    accelerated: Accelerated | None,
    sequence: SequenceParallel | None,
    table: ModulationTable | None,
) -> list[Tensor]:
    """The predicted pictures of branches that share a batch.

    The fast forward does not support perturbed attention, with which the transformer's own forward runs.
    """
    (rows, columns), patch = x.shape[2:], transformer.config.patch_size
    filled = F.pad(x, (0, -columns % patch, 0, -rows % patch), mode="circular")
    latents = torch.cat([filled] * len(branches)).to(transformer.pos_embed.dtype)
    timestep, first = timestep_of(profile, sigma), branches[0]
    texts = [(branch.name, branch.conditioning) for branch in branches]
    level = control_timestep_of(profile, sigma)
    if accelerated is None or first.perturbed_layers:
        control = residuals(first.control, transformer, profile, latents, sigma, level, texts, sequence)
        pooled = [branch.conditioning.pooled for branch in branches]
        with nullcontext() if table is None else table.reading(timestep, pooled):
            velocity = _velocity(transformer, latents, timestep, branches, control, sequence)
    else:
        names = [branch.name for branch in branches]
        nets = acting_nets(first.control, profile, sigma, level, names, transformer.config.depth)
        velocity = _fast(accelerated, latents, timestep, branches, nets)
    velocity = velocity[..., :rows, :columns]
    known = sigma if profile.sigma_dtype == "float32" else float(_seen(profile, sigma))
    return [x - known * part for part in velocity.to(x.dtype).chunk(len(branches))]


def _velocity(
    transformer: MMDiT,
    latents: Tensor,
    timestep: float,
    branches: tuple[Branch, ...],
    control: Sequence[Tensor | None] | None,
    sequence: SequenceParallel | None,
) -> Tensor:
    """The velocity by the transformer's own forward, or by that over several ranks."""
    first = branches[0]
    forward = transformer if sequence is None else partial(sequence.velocity, transformer)
    with perturbed(transformer, first.perturbed_layers, first.conditioning.context.shape[1]):
        return forward(
            latents,
            torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device),
            torch.cat([branch.conditioning.context for branch in branches]),
            torch.cat([branch.conditioning.pooled for branch in branches]),
            control=control,
            skip_layers=first.skip_layers,
        )


def _fast(
    accelerated: Accelerated,
    latents: Tensor,
    timestep: float,
    branches: tuple[Branch, ...],
    nets: Sequence[ActingNet],
) -> Tensor:
    """The velocity by the fast forwards of transformer and ControlNets."""
    texts = [branch.conditioning for branch in branches]
    return accelerated.velocity(
        latents,
        timestep,
        [text.context for text in texts],
        [text.pooled for text in texts],
        skip_layers=branches[0].skip_layers,
        nets=nets,
    )


class Predictor:
    """`mmdit.Pipeline.predict` with fixed, named conditionings; see `mmdit.Pipeline.predictor`."""

    def __init__(self, predict: PredictInLoop, conditionings: Mapping[str, Conditioning]) -> None:
        if not conditionings:
            raise TypeError("predictor takes conditionings by name, such as cond=pipe.encode(prompt); got none")
        for name, one in conditionings.items():
            if not isinstance(one, Conditioning):
                raise TypeError(f"predictor: {name} is {type(one).__name__}, expected a Conditioning, see pipe.encode")
        self.branches = tuple(Branch(one, name) for name, one in conditionings.items())
        self._predict, self._step = predict, 0

    def __call__(self, x: Tensor, sigma: float | Tensor, *, step: int | None = None) -> list[Tensor]:
        """The predicted pictures (x0) of latents [b, c, h, w] at a noise level, one for each conditioning."""
        number = self._step if step is None else whole("step", step, 0)
        found = self._predict(x, sigma, self.branches, number)
        self._step = number + 1
        return found
