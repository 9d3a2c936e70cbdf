"""The order in which threads launch graphs, without a GPU; what graphs compute is tested where they are used."""

import threading
from types import SimpleNamespace

import pytest
import torch

from mmdit.runtime import graphs
from mmdit.runtime.graphs import Captured, Graphs


class Given(torch.Tensor):
    """A tensor on a GPU that logs what happens to it."""

    device = torch.device("cuda", 0)

    def copy_(self, given, *, non_blocking):
        self.log.append(f"{self.called} is written")

    def record_stream(self, stream):
        self.log.append(f"{self.called} is read by {stream.name}")


def given(log, name):
    found = torch.zeros(1).as_subclass(Given)
    found.log, found.called = log, name
    return found


class Stream:
    def __init__(self, log):
        self.log, self.name = log, threading.current_thread().name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the last graph")


class Event:
    def record(self, stream):
        stream.log.append(f"{stream.name} has run the last graph")


@pytest.fixture
def log(monkeypatch):
    """The log of a GPU on which each thread has the stream of its name."""
    log = []
    monkeypatch.setattr(graphs, "_last", {0: Event()}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(log))
    return log


def recorded(log, name, replay=lambda: None):
    """A cache with one graph, which has one input."""

    def run():
        log.append(f"the {name} runs")
        replay()

    found = Graphs()
    found._captured["a step"] = Captured(SimpleNamespace(replay=run), (given(log, f"{name}'s input"),), name, 0)
    return found


def lines_of(name, stream):
    """What a call does."""
    before = f"{stream} waits for the last graph", f"{name}'s input is written", f"{name}'s input is read by {stream}"
    return [*before, f"the {name} runs", f"{stream} has run the last graph"]


def test_different_graphs_of_a_gpu_run_one_after_the_other(log):
    """They share cuBLAS's memory, so that none may start, or copy its inputs, before the one before has ended."""
    inside, go_on = threading.Event(), threading.Event()
    encoder = recorded(log, "encoder", lambda: (inside.set(), go_on.wait(10)))
    transformer = recorded(log, "transformer")

    def call(one):
        return one("a step", print, [given([], "")])

    first = threading.Thread(target=call, args=[encoder], name="a")
    second = threading.Thread(target=call, args=[transformer], name="b")
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.05)
    go_on.set()
    first.join(10)
    second.join(10)
    assert log == [*lines_of("encoder", "a"), *lines_of("transformer", "b")]
