"""Parse a workflow into a graph, check it as ComfyUI does, and order its nodes.

A graph has ComfyUI's API form: {node id: {"class_type": name, "inputs": {input: value or [node id, output]}}}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from encoders.json_files import described, parse_json, printable, read_bytes
from mmdit.comfyui.declare import NODES, Input, Node
from mmdit.comfyui.errors import Problem, WorkflowError
from mmdit.comfyui.files import Folders
from mmdit.comfyui.to_api import is_ui_form, to_api
from mmdit.pipeline.settings import WORKFLOW_KEYWORD, SettingsError, text_chunks

Graph = dict[str, Any]  # in API form; before `check`, it may contain arbitrary JSON values
MAX_NODES = 2000
MAX_BYTES = 8 * 2**20
_PROBE = b"\x89PNG"


@dataclass(frozen=True)
class Checked:
    """A graph of which at least one output can run.

    Args:
        graph: the graph; input values that an output needs are converted to their types.
        outputs: the ids of the output nodes that can run, in the order of the graph.
        node_errors: the problems that prevent the remaining outputs from running, by node id.
    """

    graph: Graph
    outputs: tuple[str, ...]
    node_errors: Mapping[str, Sequence[Problem]] = field(default_factory=dict)


def read_graph(source: Mapping[str, Any] | str | Path) -> Graph:
    """Read a graph in API form from a file or from parsed JSON.

    Args:
        source: a JSON file in API form, in UI form, or with the body of a request to ComfyUI; a PNG that ComfyUI or
            mmdit wrote; or the parsed value of such JSON.

    Raises:
        WorkflowError: the source is not a graph.
        JSONError: the text is not strict JSON.
        SettingsError: the PNG is broken.
    """
    if isinstance(source, Mapping):
        return as_graph(dict(source))
    path = Path(source)
    data = read_bytes(path, 64 * 2**20)
    return as_graph(_in_png(path) if data.startswith(_PROBE) else parse_json(data, path, max_bytes=MAX_BYTES))


def as_graph(value: Any) -> Graph:
    """Convert a JSON value in API form, in UI form, or the body of a request, to a graph in API form.

    Raises:
        WorkflowError: the value has none of these forms, or too many nodes.
    """
    if isinstance(value, dict) and is_ui_form(value):
        value = to_api(value, NODES)
    elif isinstance(value, dict) and "prompt" in value and "class_type" not in (value["prompt"] or {}):
        value = value["prompt"]
    if not isinstance(value, dict):
        raise WorkflowError(
            "no_prompt", f"the workflow is {described(value)}, expected an object of nodes by their ids"
        )
    if len(value) > MAX_NODES:
        raise WorkflowError("invalid_prompt", f"the workflow has {len(value)} nodes, at most {MAX_NODES} are run")
    return value


def check(graph: Graph, folders: Folders) -> Checked:
    """Check a graph as ComfyUI does: the class of every node, then all nodes that the output nodes need.

    Raises:
        WorkflowError: no output can run; `type` and `node_errors` give the reasons.
    """
    for id, found in graph.items():
        _check_class(id, found)
    outputs = [id for id, found in graph.items() if NODES[found["class_type"]].is_output]
    if not outputs:
        said = "the workflow has no output node; add one, such as SaveImage or PreviewImage"
        raise WorkflowError("prompt_no_outputs", said)
    checking = _Checking(graph, folders)
    good = tuple(id for id in outputs if checking.output(id))
    if not good:
        raise WorkflowError("prompt_outputs_failed_validation", checking.message(), checking.problems)
    return Checked(checking.converted, good, checking.problems)


def order(graph: Graph, outputs: Sequence[str]) -> list[str]:
    """The ids of all nodes that these outputs need, in topological order, except within cycles."""
    found: dict[str, None] = {}
    begun: set[str] = set()
    for output in outputs:
        waiting = [(output, iter(links_of(graph, output)))] if output not in begun else []
        begun.add(output)
        while waiting:
            id, links = waiting[-1]
            link = next((link for link in links if link.source not in begun), None)
            if link is not None:
                begun.add(link.source)
                waiting.append((link.source, iter(links_of(graph, link.source))))
            else:
                waiting.pop()
                found[id] = None
    return list(found)


@dataclass(frozen=True)
class Link:
    """The source that an input of a node is linked to."""

    input: str
    source: str  # the id of the node
    slot: int  # the number of the node's output


def links_of(graph: Graph, id: str) -> list[Link]:
    """The links of a node's declared inputs; undeclared inputs are ignored."""
    inputs, declared = graph[id].get("inputs", {}), NODES[graph[id]["class_type"]].by_name
    return [Link(name, *value) for name, value in inputs.items() if name in declared and is_link(value)]


def is_link(value: object) -> bool:
    """Whether the value of an input has the form [node id, slot]."""
    return isinstance(value, list) and len(value) == 2


def _check_class(id: str, found: Any) -> None:
    where = f"node {printable(id, 60)}"
    if not isinstance(found, dict) or not isinstance(found.get("class_type"), str):
        raise WorkflowError("invalid_prompt", f"{where} has no class_type; give the name of its class")
    if not isinstance(found.get("inputs", {}), dict):
        raise WorkflowError("invalid_prompt", f"{where}: its inputs are {described(found['inputs'])}, no object")
    name = found["class_type"]
    if name not in NODES:
        near = get_close_matches(name, NODES, n=3, cutoff=0.5)
        hint = f"; the nearest known are {', '.join(near)}" if near else ""
        own = "a node of your own is registered with mmdit.workflow_node"
        raise WorkflowError("invalid_prompt", f"{where}: the class {printable(name, 80)!r} is unknown{hint}; {own}")


class _BrokenLinkError(Exception):
    """A link refers to a missing node or output; ComfyUI then stops checking the node that contains the link."""


class _Checking:
    """The state of a check of a graph: the results for each node so far."""

    def __init__(self, graph: Graph, folders: Folders) -> None:
        self.graph, self.folders = graph, folders
        self.converted: Graph = {id: {**found, "inputs": {**found.get("inputs", {})}} for id, found in graph.items()}
        self.problems: dict[str, list[Problem]] = {}
        self.circle: list[str] = []
        self._valid: dict[str, bool] = {}

    def output(self, id: str) -> bool:
        """Whether an output node and all nodes that it needs are valid."""
        frames = [self._frame(id, None)]
        while frames:
            frame = frames[-1]
            link = next(frame.links, None)
            if link is None:
                frames.pop()
                self._valid[frame.id] = frame.valid
                if frames:
                    frames[-1].valid &= frame.valid
            elif link.source in self._valid:
                frame.valid &= self._valid[link.source]
            elif link.source in (path := [one.id for one in frames]):
                self.circle = [*path[path.index(link.source) :], link.source]
                frame.valid = False
            else:
                frames.append(self._frame(link.source, link.input))
        return self._valid[id]

    def message(self) -> str:
        """All problems as one message."""
        lines = [
            f"node {id} ({self.graph[id]['class_type']}){f', {one.input}' if one.input else ''}: {one.message}"
            for id, found in self.problems.items()
            for one in found
        ]
        if self.circle:
            lines.append(f"the nodes {' <- '.join(self.circle)} need each other in a circle; cut one of the links")
        return "\n".join(["no output of the workflow can run:", *(f"  {line}" for line in lines)])

    def _frame(self, id: str, used_by: str | None) -> _Frame:
        """Check a single node. `used_by` names the input, of another node, through which this node was reached."""
        try:
            problems, links = self._inputs(id)
        except _BrokenLinkError as error:
            kind = "exception_during_validation" if used_by is None else "exception_during_inner_validation"
            problems, links = [Problem(kind, str(error), used_by)], []
        if problems:
            self.problems[id] = problems
        return _Frame(id, iter(links), valid=not problems)

    def _inputs(self, id: str) -> tuple[list[Problem], list[Link]]:
        """The problems of a node's inputs, and its links that have the right type."""
        found, declared = self.converted[id]["inputs"], NODES[self.graph[id]["class_type"]]
        problems: list[Problem] = []
        links: list[Link] = []
        for one in declared.inputs:
            if one.name not in found:
                if not one.optional:
                    said = f"the required input {one.name} is missing; defaults are not filled in"
                    problems.append(Problem("required_input_missing", said, one.name))
            elif isinstance(found[one.name], list):
                checked = self._link(one, found[one.name])
                problems += [checked] if isinstance(checked, Problem) else []
                links += [checked] if isinstance(checked, Link) else []
            else:
                try:
                    found[one.name] = self._value(one, found[one.name])
                except ValueProblemError as error:
                    problems.append(error.problem)
        return problems, links

    def _link(self, one: Input, value: list[Any]) -> Problem | Link:
        if len(value) != 2:
            said = f"a link must be [node id, slot], got a list of {len(value)}"
            return Problem("bad_linked_input", said, one.name)
        source, slot = value
        if not isinstance(source, str) or source not in self.graph:
            raise _BrokenLinkError(f"{one.name} is linked to node {printable(str(source), 60)}, which does not exist")
        outputs = NODES[self.graph[source]["class_type"]].outputs
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < len(outputs):
            shown = printable(str(slot), 30)
            raise _BrokenLinkError(f"{one.name} is linked to slot {shown} of node {source}, which has {len(outputs)}")
        if not fits(outputs[slot], one.type):
            said = f"it takes {one.type}, but slot {slot} of node {source} gives {outputs[slot]}"
            return Problem("return_type_mismatch", said, one.name)
        return Link(one.name, source, slot)

    def _value(self, one: Input, value: Any) -> Any:
        """Convert the value of a widget and check that it is in its range."""
        value = value["__value__"] if isinstance(value, dict) and "__value__" in value else value
        value = converted(one, value)
        if one.check is not None:
            if said := one.check(value, self.folders):
                raise ValueProblemError("custom_validation_failed", said, one)
            return value
        for kind, bound, is_out in (
            ("value_smaller_than_min", one.least, one.least is not None and value < one.least),
            ("value_bigger_than_max", one.most, one.most is not None and value > one.most),
        ):
            if is_out:
                raise ValueProblemError(kind, f"it is {value}, and the bound is {bound}", one)
        choices = one.options(self.folders)
        if choices is not None and value not in choices:
            raise ValueProblemError("value_not_in_list", _not_in_list(one, value, choices, self.folders), one)
        return value


class _Frame:
    """A node whose links are being followed."""

    def __init__(self, id: str, links: Iterator[Link], *, valid: bool) -> None:
        self.id, self.links, self.valid = id, links, valid


class ValueProblemError(Exception):
    """The value of an input is invalid; `problem` describes why."""

    def __init__(self, type: str, message: str, one: Input) -> None:
        super().__init__(message)
        self.problem = Problem(type, message, one.name)


def fits(given: str, taken: str) -> bool:
    """Whether an input of type `taken` accepts values of type `given`; "*" is any type, and "A,B" is A or B."""
    if "*" in (given, taken):
        return True
    return bool({one.strip() for one in given.split(",")} & {one.strip() for one in taken.split(",")})


def converted(one: Input, value: Any) -> Any:
    """Convert the value of an input as ComfyUI does: text to numbers, numbers to text, any value to True or False.

    Raises:
        ValueProblemError: the value cannot be converted, or the number is not finite.
    """
    kinds: dict[str, Any] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
    if one.type not in kinds:
        return value
    try:
        found = kinds[one.type](value)
    except (ValueError, TypeError, OverflowError):
        found = math.nan
    if isinstance(found, float) and not math.isfinite(found):
        said = f"it takes {one.type}, got {described(value)}"
        raise ValueProblemError("invalid_input_type", said, one)
    return found


def _not_in_list(one: Input, value: Any, choices: Sequence[str], folders: Folders) -> str:
    near = get_close_matches(str(value), choices, n=3) or list(choices[:5])
    listed = f"there are {', '.join(near)}" if near else "there is none"
    where = f" in {folders.where(one.folder)}" if one.folder is not None and not near else ""
    return f"{described(value)} is not among its {len(choices)} choices; {listed}{where}"


def _in_png(path: Path) -> Any:
    """Read the graph in the text chunks of a PNG: "prompt" in API form, else "workflow" in UI form."""
    texts = text_chunks(path)
    for name in (WORKFLOW_KEYWORD, "workflow"):
        if name in texts:
            return parse_json(texts[name], f"{path}: its {name!r} chunk", max_bytes=MAX_BYTES)
    raise SettingsError(f"{path} has no workflow: no 'prompt' or 'workflow' among its text chunks")


def node_of(graph: Graph, id: str) -> Node:
    """Look up the declaration of a node's class."""
    return NODES[graph[id]["class_type"]]
