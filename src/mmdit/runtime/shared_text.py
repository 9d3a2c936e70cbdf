"""Text encoders over several ranks: each of them runs on one rank, and one message gives its output to all others."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from encoders import CLIPOutput, CLIPText
from encoders.conditioning import EncoderCall, EncoderName, EncoderOutput
from mmdit.runtime.mesh import Team

_ORDER: tuple[EncoderName, ...] = ("t5", "clip_g", "clip_l")  # the largest one first
_ALIGNED = 16  # bytes: where each tensor of a message begins is a multiple


class SharedText:
    """Runs encoders on the ranks of a team, the largest one on the first rank; all ranks call this together.

    Args:
        team: the ranks, all with the same encoders and the same prompts.
    """

    def __init__(self, team: Team) -> None:
        self.team = team

    def __call__(self, calls: Mapping[EncoderName, EncoderCall]) -> dict[EncoderName, EncoderOutput]:
        """The output of each encoder, bit-equal to that of one rank."""
        if self.team.size == 1 or not calls:
            return {name: call.run() for name, call in calls.items()}
        owners = {name: min(i, self.team.size - 1) for i, name in enumerate(name for name in _ORDER if name in calls)}
        layouts = {name: _shapes(call) for name, call in calls.items()}
        places, ends = dict[EncoderName, list[int]](), [0] * self.team.size
        for name, owner in owners.items():
            places[name] = []
            for shape in layouts[name]:
                places[name].append(ends[owner])
                ends[owner] += -(-prod(shape) * calls[name].dtype.itemsize // _ALIGNED) * _ALIGNED
        first = next(iter(calls.values()))
        message = torch.empty(max(ends), dtype=torch.uint8, device=next(first.model.parameters()).device)
        for name, owner in owners.items():
            if owner == self.team.rank:
                for tensor, view in zip(
                    _tensors(calls[name].run()), _views(message, calls[name], places[name]), strict=True
                ):
                    assert tensor.dtype == view.dtype, f"{name} computes in {tensor.dtype}, expected {view.dtype}"
                    view.copy_(tensor)
        found = self.team.gathered(message)
        return {
            name: _output(calls[name], _views(found[owner], calls[name], places[name]))
            for name, owner in owners.items()
        }


def _shapes(call: EncoderCall) -> list[tuple[int, ...]]:
    """The shapes of the tensors of an output."""
    config = call.model.config
    states = (call.rows, call.length, config.width)
    if not isinstance(call.model, CLIPText):
        return [states]
    projection = call.model.config.projection_dim
    return [states, states, (call.rows, config.width), *([] if projection is None else [(call.rows, projection)])]


def _views(message: Tensor, call: EncoderCall, places: list[int]) -> list[Tensor]:
    """The tensors of an output in a message."""
    shapes = _shapes(call)
    ends = [place + prod(shape) * call.dtype.itemsize for place, shape in zip(places, shapes, strict=True)]
    parts = zip(places, ends, shapes, strict=True)
    return [message[place:end].view(call.dtype).view(shape) for place, end, shape in parts]


def _tensors(output: EncoderOutput) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [one for one in output if one is not None]


def _output(call: EncoderCall, tensors: list[Tensor]) -> EncoderOutput:
    if not isinstance(call.model, CLIPText):
        return tensors[0]
    penultimate, last, pooled, *projected = tensors
    return CLIPOutput(penultimate, last, pooled, projected[0] if projected else None)
