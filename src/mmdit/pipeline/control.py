"""ControlNets in a drawing: the residuals that the transformer gets at a noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import Conditioning
from mmdit.models.controlnet import ControlNet, made_pos_embed
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.profiles import Profile
from mmdit.runtime.fast_control import summed
from mmdit.runtime.fast_nets import ActingNet
from mmdit.runtime.sequence import SequenceParallel
from samplers import Window, percents
from samplers.windows import ALWAYS, NEVER


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet with its encoded hint and the range of steps in which it is applied; see `Pipeline.control`.

    Each conditioning has its own controls (`mmdit.Ranged.control`). Conditionings with identical `Control` objects
    share a batch of the transformer.
    """

    net: ControlNet
    hint: Tensor  # latents [b, c, h, w], one per drawing; for an inpainting net, the last channel is the mask
    hint_uncond: Tensor  # the hint of the unconditional branch; a profile may sample it with different noise
    scale: float = 1.0  # the factor of the residuals
    start: float = 0.0  # share of the steps or of the noise levels, as the profile says
    stop: float = 1.0
    window: Window = ALWAYS  # noise levels at which the net is applied; computed by `placed`

    def placed(self, profile: Profile, sigmas: Tensor, shift: float) -> Control:
        """Return the control with its window of noise levels computed from start and stop for this schedule."""
        if profile.control_window == "percents":
            window = percents(self.start, self.stop, shift)
        else:
            window = _steps(sigmas, self.start, self.stop)
        return replace(self, window=window)

    def acts(self, sigma: float) -> bool:
        """Whether the net is applied at this noise level."""
        return self.scale != 0 and sigma in self.window

    def hints(self, names: Sequence[str | None]) -> Tensor:
        """The hints of branches with these names, concatenated along the batch."""
        return torch.cat([self.hint_of(name) for name in names])

    def hint_of(self, name: str | None) -> Tensor:
        """The hint of the branch with this name."""
        return self.hint_uncond if name == "uncond" else self.hint


def residuals(
    controls: Sequence[Control],
    transformer: MMDiT,
    profile: Profile,
    latents: Tensor,
    sigma: float,
    timestep: float,
    branches: Sequence[tuple[str | None, Conditioning]],
    sequence: SequenceParallel | None = None,
) -> list[Tensor | None] | None:
    """The sum of the nets' residuals after each block of the transformer; None if no net is applied.

    Args:
        controls: the controls, which all branches of the batch share.
        transformer, profile: the transformer and the profile of the drawing.
        latents: the input of the transformer, [branches x b, c, h, w]; sides are multiples of its patch size.
        sigma: the noise level.
        timestep: the timestep for the nets.
        branches: the names and conditionings of the branches.
        sequence: computes this rank's tokens of the residuals; None computes all.
    """
    acting = [control for control in controls if control.acts(sigma)]
    if not acting:
        return None
    names = [name for name, _ in branches]
    context, pooled = (torch.cat([getattr(text, part) for _, text in branches]) for part in ("context", "pooled"))
    given: list[list[Tensor]] = []
    for control in acting:
        hints = control.hints(names)
        found = _run(control, transformer, profile, latents, timestep, context, pooled, hints, sequence)
        given.append([(one * control.scale).to(latents.dtype) for one in found])
    return summed(given, [spread(profile, control.net, transformer.config.depth) for control in acting])


def acting_nets(
    controls: Sequence[Control],
    profile: Profile,
    sigma: float,
    timestep: float,
    names: Sequence[str | None],
    depth: int,
) -> list[ActingNet]:
    """The nets that act at a noise level, for `mmdit.runtime.accelerate.Accelerated.velocity`.

    Args:
        controls, profile, sigma, timestep: see `residuals`.
        names: the names of the branches.
        depth: number of blocks of the transformer.
    """
    return [
        ActingNet(
            control.net,
            tuple(control.hint_of(name) for name in names),
            timestep,
            control.scale,
            tuple(spread(profile, control.net, depth)),
            makes_positions=profile.control_positions != "table",
            zeroes_pooled=_zeroes_pooled(profile, control.net),
            rounds_timestep=profile.control_timestep == "net",
        )
        for control in controls
        if control.acts(sigma)
    ]


def _zeroes_pooled(profile: Profile, net: ControlNet) -> bool:
    """Whether a net reads zeros in place of the pooled text vectors."""
    config = net.config
    return config.is_joint and (config.zero_pooled or config.inpaints or profile.control_joint == "zeros")


def _run(
    control: Control,
    transformer: MMDiT,
    profile: Profile,
    latents: Tensor,
    timestep: float,
    context: Tensor,
    pooled: Tensor,
    hint: Tensor,
    sequence: SequenceParallel | None,
) -> list[Tensor]:
    """Compute the residuals of one net."""
    rows, columns = latents.shape[2:]
    hint = F.pad(hint, (0, columns - hint.shape[3], 0, rows - hint.shape[2]), mode="circular")
    levels = torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device)
    forward = None if sequence is None else partial(sequence.residuals, control.net)
    return residuals_of(
        control.net, transformer, profile, latents, levels, context, pooled, hint.to(latents.device), forward
    )


def residuals_of(
    net: ControlNet,
    transformer: MMDiT,
    profile: Profile,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor,
    pooled: Tensor,
    hint: Tensor,
    forward: Callable[..., list[Tensor]] | None = None,
) -> list[Tensor]:
    """The residuals [b, l, d] of one net, one for each of its blocks; drawings and training compute them alike.

    Args:
        net: the net; all inputs are cast to the dtype of its weights.
        transformer: embeds the latents for nets without their own embedder.
        profile: its rules for positions, the pooled text and the timestep.
        latents: the input of the transformer, [b, c, h, w].
        timesteps: 1000 x sigma, [b].
        context: text tokens [b, n, k].
        pooled: pooled text vectors [b, p].
        hint: latents of the hints, encoded by `hint_rules`, with the height and width of `latents`.
        forward: computes the net instead of `net` itself, with the same arguments.
    """
    config, dtype = net.config, net.pos_embed_input.proj.weight.dtype
    tokens = None if config.is_joint else _tokens(transformer, profile, latents).to(dtype)
    if _zeroes_pooled(profile, net):
        pooled = torch.zeros_like(pooled)
    levels = timesteps.to(dtype).float() if profile.control_timestep == "net" else timesteps
    found: list[Tensor] = (forward or net)(
        latents.to(dtype), levels, context.to(dtype), pooled.to(dtype), hint.to(dtype), tokens
    )
    return found


def _tokens(transformer: MMDiT, profile: Profile, latents: Tensor) -> Tensor:
    """The tokens of the latents with positions, for nets without their own embedder."""
    tokens: Tensor = transformer.x_embedder(latents)
    if profile.control_positions == "table":
        return tokens + transformer.cropped_pos_embed(*latents.shape[2:])
    patch = transformer.config.patch_size
    rows, columns = (side // patch for side in latents.shape[2:])
    made = made_pos_embed(transformer.config.hidden_size, rows, columns, latents.device)
    return tokens + made.to(tokens.dtype)


def spread(profile: Profile, net: ControlNet, depth: int) -> list[int | None]:
    """The index of the residual that is added after each of the transformer's `depth` blocks; None adds nothing."""
    count = net.config.depth
    if profile.control_spread == "scaled":
        found: list[int | None] = [int(i / (depth / count)) for i in range(depth)]
    else:
        copies = depth // count if net.config.is_joint else ceil(depth / count)
        repeated = [j for j in range(count) for _ in range(copies)]
        repeated = repeated[:-1] if net.config.is_joint else repeated
        found = [repeated[i] if i < len(repeated) else None for i in range(depth)]
    return found if profile.control_after_last else [*found[:-1], None]


def _steps(sigmas: Tensor, start: float, stop: float) -> Window:
    """The window of noise levels of the steps i of n with i / n >= start and (i + 1) / n <= stop, as in diffusers."""
    levels = sigmas.tolist()
    count = len(levels) - 1
    inside = [i for i in range(count) if not (i / count < start or (i + 1) / count > stop)]
    if not inside:
        return NEVER
    first = float("inf") if inside[0] == 0 else levels[inside[0]]
    return Window(first, levels[inside[-1] + 1] if inside[-1] < count - 1 else -1.0)
