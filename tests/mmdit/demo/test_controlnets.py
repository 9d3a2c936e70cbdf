"""The embedded ControlNets: their files, and that drawings follow a hint whose caption leaves out shapes and places."""

import pytest
import torch

from mmdit import CANNY_NET, DEPTH_NET, Pipeline, load_controlnet
from mmdit.demo.evaluate_control import evaluate_control

NETS = {"canny": CANNY_NET, "depth": DEPTH_NET}
COUNT = 6  # drawings, with 15 statements about shapes and 14 about positions
HOW = {"steps": 4, "guidance": 1.0, "t5_tokens": 77}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.demo()


@pytest.mark.parametrize("kind", NETS)
def test_the_files(kind: str) -> None:
    net = load_controlnet(NETS[kind])
    assert net.config.kind == kind
    assert {weight.dtype for weight in net.parameters()} == {torch.float16}
    assert NETS[kind].stat().st_size <= 4e6


@pytest.mark.parametrize("kind", NETS)
def test_drawings_follow_the_hint(kind: str, pipe: Pipeline) -> None:
    """The nets gave 14 (canny) and 15 (depth) of 15 shapes and all 14 positions."""
    found = evaluate_control(pipe, load_controlnet(NETS[kind], dtype=torch.float32), COUNT, **HOW)
    assert found["shape"][0] >= 0.8
    assert found["relation"][0] >= 0.7


def test_without_a_net_they_do_not(pipe: Pipeline) -> None:
    """The captions alone gave 3 of 15 shapes and no position."""
    found = evaluate_control(pipe, None, COUNT, **HOW)
    assert found["shape"][0] <= 0.5
    assert found["relation"][0] <= 0.3
