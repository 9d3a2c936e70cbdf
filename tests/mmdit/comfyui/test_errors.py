"""Wrong graphs: the same type of error, at the same node and input, as ComfyUI's server answered."""

import copy

import pytest

import recorded_workflows as recorded
from mmdit import NodeError, WorkflowError
from mmdit.comfyui.graph import as_graph

GRAPHS = [name for name, case in recorded.errors().items() if "graph" in case]


def answer(run, graph: dict) -> dict:
    """What ComfyUI's server would answer: status, type of the error, problems of nodes, how the run ended."""
    try:
        found = run(graph)
    except WorkflowError as error:
        return {"status": 400, "error_type": error.type, "node_errors": plain(error.node_errors)}
    except NodeError as error:
        failed = {name: getattr(error, name) for name in ("node_id", "node_type", "exception_type")}
        ran = {"run": "error", "run_errors": [failed], "outputs": []}
        return {"status": 200, "error_type": None, "node_errors": {}} | ran
    ran = {"run": "success", "run_errors": [], "outputs": list(found.images)}
    return {"status": 200, "error_type": None, "node_errors": plain(found.node_errors)} | ran


def plain(node_errors: dict) -> dict:
    return {id: [{"type": one.type, "input": one.input} for one in found] for id, found in node_errors.items()}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_wrong_graph_gets_the_recorded_answer(run, name):
    wanted = {key: value for key, value in recorded.errors()[name].items() if key not in ("id", "graph")}
    assert answer(run, copy.deepcopy(recorded.errors()[name]["graph"])) == wanted


@pytest.mark.parametrize("body", [[1], {"prompt": None}, {"prompt": [1]}, 7, "text"])
def test_a_body_without_a_graph_is_no_prompt(body):
    with pytest.raises(WorkflowError) as caught:
        as_graph(body)
    assert caught.value.type == "no_prompt"


def test_the_nearest_known_class_is_named(run):
    with pytest.raises(WorkflowError, match=r"7.*KSamplerX.*KSampler"):
        run(recorded.errors()["unknown_class"]["graph"])


def test_a_circle_is_named(run):
    with pytest.raises(WorkflowError, match="7 <- 10 <- 7"):
        run(recorded.errors()["cycle2"]["graph"])
