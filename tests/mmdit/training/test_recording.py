"""Recorded gradients: a replay reads the batch of its call, and gives the gradients that an eager step gives."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mmdit.training import recording
from mmdit.training.recording import RecordedGradients, eager_gradients
from skips import SKIPS


class Pair(NamedTuple):
    x: Tensor
    y: Tensor
    weight: Tensor | None = None


class Graph:
    """Replays a step as a CUDA graph does: into the memory of its first results."""

    def __init__(self, step):
        self.step, self.results = step, step()

    def replay(self):
        for into, value in zip(self.tensors(self.results), self.tensors(self.step()), strict=True):
            into.copy_(value)

    @staticmethod
    def tensors(results):
        return [results[0], *(grad for grad in results[1] if grad is not None)]


@pytest.fixture
def on_the_cpu(monkeypatch):
    def record(step, device, before):
        graph = Graph(step)
        return graph, graph.results, 0

    monkeypatch.setattr(recording, "_gpu", lambda device: device)
    monkeypatch.setattr(recording, "record", record)


def trained(gradients_of, device="cpu"):
    """The weights after some steps by two losses that take turns, and all losses."""
    torch.manual_seed(0)
    model, unused, losses = nn.Linear(6, 4).to(device), nn.Parameter(torch.ones(2, device=device)), []
    parameters = [*model.parameters(), unused]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    ways = [lambda one: (model(one.x) - one.y).square().mean(), lambda one: (model(one.x) - one.y).abs().mean()]
    steps = [None, None]
    for step in range(6):
        batch = Pair(torch.randn(3, 6).to(device), torch.randn(3, 4).to(device))
        steps[step % 2] = steps[step % 2] or gradients_of(ways[step % 2], batch, parameters)
        losses.append(steps[step % 2](batch))
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
    assert unused.grad is None
    return [*losses, *model.parameters()]


def eager(loss_of, batch, parameters):
    return lambda batch: eager_gradients(loss_of, parameters, batch)


@pytest.mark.usefixtures("on_the_cpu")
def test_two_recordings_that_take_turns_train_as_eager_steps():
    for found, wanted in zip(trained(RecordedGradients), trained(eager), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])
def test_on_a_gpu_too():
    for found, wanted in zip(trained(RecordedGradients, "cuda"), trained(eager, "cuda"), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_batch_of_other_shapes_is_refused_and_nothing_of_it_is_copied():
    weight, recorded = nn.Parameter(torch.ones(3)), Pair(torch.ones(4, 3), torch.ones(4), torch.ones(4))
    step = RecordedGradients(lambda one: ((one.x @ weight - one.y) * one.weight).sum(), recorded, [weight])
    before = [part.clone() for part in step.batch]
    for other, told in (
        (recorded._replace(x=torch.zeros(1, 3)), r"x .*\[1, 3\].*\[4, 3\]"),
        (Pair(torch.zeros(4, 3), torch.zeros(()), torch.zeros(4)), r"y .*\[\].*\[4\]"),
        (Pair(torch.zeros(4, 3), torch.zeros(4)), r"weight .*None.*\[4\]"),
    ):
        with pytest.raises(ValueError, match=told):
            step(other)
        assert all(map(torch.equal, step.batch, before))
    without = RecordedGradients(lambda one: (one.x @ weight - one.y).sum(), recorded._replace(weight=None), [weight])
    with pytest.raises(ValueError, match=r"weight .*\[4\].*None"):
        without(recorded)
    assert float(without(recorded._replace(weight=None, x=2 * recorded.x))) == 20


def test_nothing_is_recorded_elsewhere():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="cpu"):
        RecordedGradients(lambda one: (weight * one.x).sum(), Pair(torch.ones(2), torch.ones(2)), [weight])
