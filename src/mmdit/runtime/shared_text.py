"""Text encoders over several ranks: each runs for a batch of prompts on one rank, and all get the outputs at once."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from encoders import CLIPOutput, CLIPText
from encoders.conditioning import EncoderCall, EncoderOutput, Place
from mmdit.runtime.mesh import Team

_ALIGNED = 16  # bytes: where each tensor of a message begins is a multiple


class SharedText:
    """Runs encoders on the ranks of a team, so that each rank has about as much to do; all ranks call this together.

    Args:
        team: the ranks, all with the same encoders and the same prompts.
    """

    def __init__(self, team: Team) -> None:
        self.team = team

    def __call__(self, calls: Mapping[Place, EncoderCall]) -> dict[Place, EncoderOutput]:
        """The outputs of encoders, bit-equal to those of one rank."""
        if self.team.size == 1 or not calls:
            return {place: call.run() for place, call in calls.items()}
        owners, begins, ends = _owners(calls, self.team.size), dict[Place, list[int]](), [0] * self.team.size
        for place, call in calls.items():
            begins[place] = []
            for shape in _shapes(call):
                begins[place].append(ends[owners[place]])
                ends[owners[place]] += -(-prod(shape) * call.dtype.itemsize // _ALIGNED) * _ALIGNED
        device = next(next(iter(calls.values())).model.parameters()).device
        message = torch.empty(max(ends), dtype=torch.uint8, device=device)
        for place, call in calls.items():
            if owners[place] == self.team.rank:
                _put(call.run(), _views(message, call, begins[place]))
        found = self.team.gathered(message)
        return {
            place: _output(call, _views(found[owners[place]], call, begins[place])) for place, call in calls.items()
        }


def _owners(calls: Mapping[Place, EncoderCall], ranks: int) -> dict[Place, int]:
    """The rank that runs each encoder: the largest ones first, each on the rank with the least to do."""
    costs = {place: call.model.config.layers * call.model.config.width**2 for place, call in calls.items()}
    found, loads = dict[Place, int](), [0] * ranks
    for place in sorted(calls, key=lambda place: -costs[place]):
        found[place] = loads.index(min(loads))
        loads[found[place]] += costs[place]
    return found


def _put(output: EncoderOutput, views: list[Tensor]) -> None:
    tensors = [output] if isinstance(output, Tensor) else [one for one in output if one is not None]
    for tensor, view in zip(tensors, views, strict=True):
        assert tensor.dtype == view.dtype, f"an encoder computes in {tensor.dtype}, expected {view.dtype}"
        view.copy_(tensor)


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


def _output(call: EncoderCall, tensors: list[Tensor]) -> EncoderOutput:
    if not isinstance(call.model, CLIPText):
        return tensors[0]
    penultimate, last, pooled, *projected = tensors
    return CLIPOutput(penultimate, last, pooled, projected[0] if projected else None)
