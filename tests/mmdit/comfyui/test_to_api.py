"""From ComfyUI's UI form to its API form: the recorded file, and one rule at a time."""

import copy
import json

import pytest

import recorded_workflows as recorded
from mmdit import WorkflowError
from mmdit.comfyui.graph import as_graph

TEMPLATE = "workflow.template_simple_all_in_one"


def ui(*nodes: dict, links: list, **more: object) -> dict:
    return {"nodes": list(nodes), "links": links, "version": 0.4} | more


def node(id: int, type: str, *inputs: tuple, outputs: str = "", values: object = (), **more: object) -> dict:
    """A node in UI form; an input is (name, type, link), a widget's has True as a fourth."""
    made = [{"name": one[0], "type": one[1], "link": one[2]} | ({"widget": {}} if one[3:] else {}) for one in inputs]
    out = [{"name": kind, "type": kind} for kind in outputs.split()]
    listed = list(values) if isinstance(values, tuple) else values
    return {"id": id, "type": type, "mode": 0, "inputs": made, "outputs": out, "widgets_values": listed} | more


LATENT = node(1, "EmptyLatentImage", outputs="LATENT", values=(64, 32, 1))
SOURCE = [1, 1, 0, 2, 0, "LATENT"]


def crop(link: int, **more: object) -> dict:
    return node(9, "LatentFlip", ("samples", "LATENT", link), outputs="LATENT", values=("x-axis: vertically",), **more)


def test_the_recorded_file_becomes_the_recorded_graph():
    found = as_graph(json.loads((recorded.FOLDER / "ui.json").read_text()))
    assert all(one.pop("_meta")["title"] for one in found.values())
    assert found == recorded.cases()[TEMPLATE]["graph"]


@pytest.mark.parametrize("mode", ["reroutes", "bypass", "muted"])
def test_nodes_between_two_others(mode):
    between = node(2, "Reroute", ("", "*", 1), outputs="LATENT")
    if mode != "reroutes":
        between = node(2, "LatentRotate", ("samples", "LATENT", 1), outputs="LATENT", values=("none",))
        between["mode"] = 4 if mode == "bypass" else 2
    found = as_graph(ui(LATENT, between, crop(2), links=[SOURCE, [2, 2, 0, 9, 0, "LATENT"]]))
    assert list(found) == ["1", "9"]
    assert found["9"]["inputs"].get("samples") == (None if mode == "muted" else ["1", 0])
    assert found["1"]["inputs"] == {"width": 64, "height": 32, "batch_size": 1}


def test_a_bypassed_node_gives_the_first_input_of_exactly_the_type():
    lora = node(2, "X", ("a", "CLIP", 3), ("b", "LATENT", None), ("c", "LATENT", 1), outputs="LATENT CLIP", mode=4)
    found = as_graph(ui(LATENT, lora, crop(2), links=[SOURCE, [2, 2, 0, 9, 0, "LATENT"]]))
    assert "samples" not in found["9"]["inputs"]  # the first LATENT input, which nothing is linked to
    lora["inputs"][1]["link"], lora["inputs"][2]["link"] = 1, None
    assert as_graph(ui(LATENT, lora, crop(2), links=[SOURCE, [2, 2, 0, 9, 0, "LATENT"]]))["9"]["inputs"]["samples"] == [
        "1",
        0,
    ]


@pytest.mark.parametrize("values", [(5, "randomize", 6, 7.5), {"seed": 5, "steps": 6, "cfg": 7.5}])
def test_widgets_by_place_and_by_name(values):
    found = as_graph(ui(node(1, "KSampler", ("model", "MODEL", None), values=values), links=[]))
    assert found["1"]["inputs"] == {"seed": 5, "steps": 6, "cfg": 7.5}


def test_a_primitive_takes_the_place_of_a_widget():
    primitive = node(3, "PrimitiveNode", outputs="INT", values=(220, "fixed"))
    latent = node(1, "EmptyLatentImage", ("width", "INT", 5, True), outputs="LATENT", values=(64, 32, 1))
    found = as_graph(ui(primitive, latent, links=[[5, 3, 0, 1, 0, "INT"]]))
    assert found == {"1": found["1"]} and found["1"]["inputs"]["width"] == 220


def test_values_that_are_lists_are_wrapped():
    found = as_graph(ui(node(1, "PrimitiveString", values=([1, 2],)), links=[]))
    assert found["1"]["inputs"] == {"value": {"__value__": [1, 2]}}


def subgraph(depth: int = 0) -> dict:
    """A workflow whose node 5 is a subgraph: a flip of its input, whose method is a widget of the node."""
    inner = [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 9, "target_slot": 0, "type": "LATENT"},
        {"id": 2, "origin_id": 9, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
        {"id": 3, "origin_id": -10, "origin_slot": 1, "target_id": 9, "target_slot": 1, "type": "COMBO"},
    ]
    flip = crop(1)
    flip["inputs"].append({"name": "flip_method", "type": "COMBO", "link": 3, "widget": {}})
    outer = node(5, "sub", ("in", "LATENT", 1), ("how", "COMBO", None, True), outputs="LATENT")
    outer["widgets_values"] = ["y-axis: horizontally"]
    after = crop(2) | {"id": 7}
    definitions = {"subgraphs": [{"id": "sub", "nodes": [flip], "links": inner}]}
    links = [[1, 1, 0, 5, 0, "LATENT"], [2, 5, 0, 7, 0, "LATENT"]]
    return ui(LATENT, outer, after, links=links, definitions=definitions)


def test_a_subgraph_is_opened():
    found = as_graph(subgraph())
    assert list(found) == ["1", "5:9", "7"]
    assert found["5:9"]["inputs"] == {"flip_method": "y-axis: horizontally", "samples": ["1", 0]}
    assert found["7"]["inputs"]["samples"] == ["5:9", 0]


def test_a_bypassed_subgraph_hands_its_input_on():
    form = subgraph()
    form["nodes"][1]["mode"] = 4
    assert as_graph(form)["7"]["inputs"]["samples"] == ["1", 0]


def test_subgraphs_that_multiply_are_refused():
    form = subgraph()
    uses = [node(i, "b", ("in", "LATENT", None)) for i in range(100)]
    names = "bcdef"
    levels = [
        {"id": name, "nodes": [one | {"type": after} for one in uses], "links": []}
        for name, after in zip(names, [*names[1:], "sub"], strict=True)
    ]
    form["definitions"]["subgraphs"] += levels
    with pytest.raises(WorkflowError, match="5000"):
        as_graph(form | {"nodes": uses})
    form["definitions"]["subgraphs"] = [{"id": "b", "nodes": uses[:1], "links": []}]  # in itself
    with pytest.raises(WorkflowError, match="8 deep"):
        as_graph(form | {"nodes": uses[:1]})


def test_reroutes_in_a_circle_are_refused():
    circle = [node(2, "Reroute", ("", "*", 2), outputs="*"), node(3, "Reroute", ("", "*", 1), outputs="*")]
    links = [[1, 2, 0, 3, 0, "*"], [2, 3, 0, 2, 0, "*"], [3, 2, 0, 9, 0, "*"]]
    with pytest.raises(WorkflowError, match="circle"):
        as_graph(ui(*circle, crop(3), links=links))


@pytest.mark.parametrize(
    "damage",
    [
        lambda form: form["nodes"].append(7),
        lambda form: form["nodes"].append({"id": 3}),
        lambda form: form["links"].append([1, 2]),
        lambda form: form["links"].append("x"),
        lambda form: form["links"].append([1, [2], 0, 3, 0]),
        lambda form: form["links"].append([1, 1, -1, 3, 0]),
        lambda form: form["nodes"].append({"id": {}, "type": "Note"}),
        lambda form: form["nodes"][0].update(inputs=7),
        lambda form: form.update(definitions={"subgraphs": [3]}),
        lambda form: form["nodes"][0].update(widgets_values="x"),
    ],
)
def test_a_broken_form_is_one_error(damage):
    form = copy.deepcopy(subgraph())
    damage(form)
    with pytest.raises(WorkflowError) as caught:
        as_graph(form)
    assert caught.value.type == "invalid_prompt"


def test_an_id_of_two_is_an_error():
    """The second of them replaced the first without a word."""
    for second in (LATENT | {"type": "Note"}, LATENT, LATENT | {"id": "1"}):
        with pytest.raises(WorkflowError, match="two nodes have the id 1"):
            as_graph(ui(LATENT, second, crop(1), links=[]))
    straight, other = [1, 1, 0, 9, 0, "LATENT"], [1, 9, 0, 9, 0, "LATENT"]
    assert as_graph(ui(LATENT, crop(1), links=[straight, straight]))["9"]["inputs"]["samples"] == ["1", 0]
    with pytest.raises(WorkflowError, match="two links have the id 1"):
        as_graph(ui(LATENT, crop(1), links=[straight, other]))
