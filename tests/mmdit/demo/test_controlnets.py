"""The embedded ControlNets: their files, and that drawings follow a hint whose caption leaves out shapes and places."""

import pytest
import torch

from mmdit import CANNY_NET, DEPTH_NET, Pipeline, load_controlnet
from mmdit.demo.evaluate_control import evaluate_control

NETS = {"canny": CANNY_NET, "depth": DEPTH_NET}
HOW = {"steps": 6, "guidance": 1.0, "batch": 4}


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
    found = evaluate_control(pipe, load_controlnet(NETS[kind], dtype=torch.float32), 4, **HOW)
    assert found["shape"][0] >= 0.85
    assert found["relation"][0] >= 0.85


def test_without_a_net_they_do_not(pipe: Pipeline) -> None:
    found = evaluate_control(pipe, None, 4, **HOW)
    assert found["shape"][0] <= 0.5
    assert found["relation"][0] <= 0.5
