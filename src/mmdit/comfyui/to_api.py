"""Convert a workflow from ComfyUI's UI form (which its interface saves) to its API form (which its server runs).

The rules are those of ComfyUI's frontend (`graphToPrompt`, `ExecutableNodeDTO`): notes, reroutes, primitives and muted
nodes are removed, bypassed nodes pass through an input of the requested type, and subgraphs are expanded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from encoders.json_files import described, printable
from mmdit.comfyui.declare import Node
from mmdit.comfyui.errors import WorkflowError

MUTED, BYPASSED = 2, 4  # the modes of a node
NOTES = ("Note", "MarkdownNote")
_MAX_NESTING = 8  # maximum depth of nested subgraphs
_MAX_NODES = 5000  # maximum number of nodes after all subgraphs are expanded
_MAX_HOPS = 100  # maximum number of reroutes and bypassed nodes between an output and an input
_INPUTS, _OUTPUTS = -10, -20  # the ids that stand for a subgraph's own inputs and outputs in its links


def is_ui_form(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a workflow in UI form."""
    return isinstance(value.get("nodes"), list) and isinstance(value.get("links", []), list)


def to_api(ui: Mapping[str, Any], nodes: Mapping[str, Node]) -> dict[str, dict[str, Any]]:
    """Convert a workflow in UI form to a graph in API form.

    Args:
        ui: {"nodes": [...], "links": [...], "definitions": {"subgraphs": [...]}}.
        nodes: the known node classes; their inputs assign widget values to input names.

    Raises:
        WorkflowError: the form is broken, or the class of a node that would run is unknown.
    """
    whole = _Level.of(ui, _Forms(_subgraphs(ui)))
    return {one.id: _converted(one, nodes) for one in whole.every() if one.runs}


@dataclass(frozen=True)
class _Link:
    source: Any  # a node's id, or _INPUTS
    slot: int
    target: Any
    target_slot: int


@dataclass
class _Forms:
    """The definitions of subgraphs, and the number of nodes that have been created so far."""

    by_id: Mapping[str, Mapping[str, Any]]
    nodes: int = 0

    def count(self, more: int) -> None:
        """Count more nodes, and raise WorkflowError if there are more than `_MAX_NODES`."""
        self.nodes += more
        if self.nodes > _MAX_NODES:
            raise _broken(f"it has more than {_MAX_NODES} nodes, with those of its subgraphs")


@dataclass(frozen=True, eq=False)
class _Level:
    """The nodes and links of a workflow, or of one use of a subgraph."""

    prefix: str  # the prefix of the ids of its nodes
    nodes: dict[str, _Placed]  # by their ids, which are strings in API form
    links: dict[Any, _Link]
    forms: _Forms
    used_by: _Placed | None = None  # the node that stands for the subgraph, one level up

    @classmethod
    def of(cls, form: Mapping[str, Any], forms: _Forms, used_by: _Placed | None = None) -> _Level:
        """Make a level from the UI form of a workflow or subgraph."""
        prefix = "" if used_by is None else f"{used_by.id}:"
        level = cls(prefix, {}, _links(form), forms, used_by)
        nodes = _listed(form, "nodes")
        forms.count(len(nodes))
        for raw in nodes:
            if not isinstance(raw, dict) or not _is_id(raw.get("id")) or not isinstance(raw.get("type"), str):
                raise _broken(f"a node is {described(raw)} without id and type")
            if (id := str(raw["id"])) in level.nodes:
                raise _broken(f"two nodes have the id {id}; give one of them another, and its links too")
            level.nodes[id] = _Placed(level, raw)
        return level

    def every(self) -> Iterator[_Placed]:
        """All nodes; each subgraph node is replaced by the nodes inside it."""
        for one in self.nodes.values():
            if one.inner is None:
                yield one
            else:
                yield from one.inner.every()

    def origin(self, link: Any, wanted: str, depth: int = 0) -> _Source | None:
        """Follow a link through reroutes, bypassed nodes and subgraph borders to its source; None if there is none."""
        found = self.links.get(link) if _is_id(link) else None
        if found is None:
            return None
        if depth > _MAX_HOPS:
            raise _broken(f"more than {_MAX_HOPS} reroutes or bypassed nodes follow each other, maybe in a circle")
        if found.source == _INPUTS:
            return self._from_above(found.slot, wanted, depth)
        one = self.nodes.get(str(found.source))
        return None if one is None else one.given(found.slot, wanted, depth + 1)

    def _from_above(self, slot: int, wanted: str, depth: int) -> _Source | None:
        """The source that the outer level provides for an input of this subgraph."""
        if self.used_by is None or slot >= len(self.used_by.inputs):
            return None
        return self.used_by.source_of(self.used_by.inputs[slot], wanted, depth + 1)


@dataclass(frozen=True)
class _Source:
    """The source of an input: a link to an output of a node, or a value."""

    value: Any


class _Placed:
    """A node, and the level that it belongs to."""

    def __init__(self, level: _Level, raw: Mapping[str, Any]) -> None:
        self.level, self.raw = level, raw
        self.id, self.type = f"{level.prefix}{raw['id']}", str(raw["type"])
        self.inputs = [one for one in _listed(raw, "inputs") if isinstance(one, dict)]
        self.outputs = [one for one in _listed(raw, "outputs") if isinstance(one, dict)]
        form = level.forms.by_id.get(self.type)
        if form is not None and level.prefix.count(":") >= _MAX_NESTING:
            raise _broken(f"subgraphs nest more than {_MAX_NESTING} deep")
        self.inner = _Level.of(form, level.forms, self) if form is not None and self.is_active else None
        self.output_links = _output_links(form)

    @property
    def is_active(self) -> bool:
        """Whether the node is neither muted nor bypassed."""
        return self.raw.get("mode", 0) not in (MUTED, BYPASSED)

    @property
    def runs(self) -> bool:
        """Whether the node appears in the API form."""
        return self.is_active and self.type not in (*NOTES, "Reroute", "PrimitiveNode")

    @property
    def values(self) -> Any:
        """The values of the node's widgets: a list, or a dict by name."""
        return self.raw.get("widgets_values")

    def source_of(self, one: Mapping[str, Any], wanted: str, depth: int = 0) -> _Source | None:
        """The source of one of the node's inputs: its link or, for a subgraph node, the value of its widget."""
        if one.get("link") is not None:
            return self.level.origin(one["link"], wanted, depth)
        if "widget" in one and self.inner is not None:
            return self._promoted(one)
        return None

    def given(self, slot: int, wanted: str, depth: int) -> _Source | None:
        """The source that one of the node's outputs provides."""
        if self.raw.get("mode", 0) == MUTED or self.type in NOTES:
            return None
        if self.type == "Reroute":
            return None if not self.inputs else self.source_of(self.inputs[0], wanted, depth)
        if self.raw.get("mode", 0) == BYPASSED:
            return self._bypassed(slot, wanted, depth)
        if self.type == "PrimitiveNode":
            return _Source(_literal(self.values[0])) if isinstance(self.values, list) and self.values else None
        if self.inner is not None:
            link = self.output_links.get(slot)
            return None if link is None else self.inner.origin(link, wanted, depth + 1)
        return _Source([self.id, slot])

    def _bypassed(self, slot: int, wanted: str, depth: int) -> _Source | None:
        """The source of the input with the same index if its type fits, else of the first input of that exact type."""
        kind = str(self.outputs[slot].get("type", wanted)) if slot < len(self.outputs) else wanted
        same = self.inputs[slot : slot + 1]
        chosen = [one for one in same if str(one.get("type")) in (kind, "*") or kind == "*"]
        chosen = chosen or [one for one in self.inputs if one.get("type") == kind]
        return self.source_of(chosen[0], wanted, depth) if chosen else None

    def _promoted(self, one: Mapping[str, Any]) -> _Source | None:
        """The value of a subgraph node's own widget; the values are in the order of the inputs that have widgets."""
        with_widgets = [each for each in self.inputs if "widget" in each]
        place = next(i for i, each in enumerate(with_widgets) if each is one)
        if isinstance(self.values, list) and place < len(self.values) and self.values[place] is not None:
            return _Source(_literal(self.values[place]))
        return None


def _converted(one: _Placed, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Convert the inputs of a node to API form."""
    declared = nodes.get(one.type)
    if declared is None:  # take the widgets from the node itself; the check of the graph refuses the class
        widgets = [str(each["name"]) for each in one.inputs if "widget" in each and "name" in each]
        inputs = dict(zip(widgets, one.values, strict=False)) if isinstance(one.values, list) else {}
    else:
        inputs = _widget_values(one, declared)
    for each in one.inputs:
        name, wanted = str(each.get("name")), str(each.get("type", "*"))
        source = one.source_of(each, wanted) if each.get("link") is not None else None
        if source is not None:
            inputs[name] = source.value
    title = str(one.raw.get("title") or one.type)
    return {"inputs": inputs, "class_type": one.type, "_meta": {"title": title}}


def _widget_values(one: _Placed, declared: Node) -> dict[str, Any]:
    """The values of a node's widgets, by input name."""
    widgets = [each for each in declared.inputs if each.is_widget]
    if isinstance(one.values, dict):
        return {each.name: _literal(one.values[each.name]) for each in widgets if each.name in one.values}
    if one.values is not None and not isinstance(one.values, list):
        raise _broken(f"widgets_values of node {one.id} are {described(one.values)}, expected an array or an object")
    values = iter(one.values or [])
    found: dict[str, Any] = {}
    for each in widgets:
        value = next(values, _NOTHING)
        if value is _NOTHING:
            break
        found[each.name] = _literal(value)
        for _ in range(each.extra_widgets):
            next(values, None)
    return found


_NOTHING = object()


def _literal(value: Any) -> Any:
    """Convert a value to the API form; a list is wrapped, because a plain list is a link there."""
    return {"__value__": value} if isinstance(value, list) else value


def _links(form: Mapping[str, Any]) -> dict[Any, _Link]:
    """The links of a form by id."""
    found: dict[Any, _Link] = {}
    for id, link in map(_link, _listed(form, "links")):
        if found.setdefault(id, link) != link:
            raise _broken(f"two links have the id {id}: give one of them another, at its nodes too")
    return found


def _link(one: Any) -> tuple[Any, _Link]:
    """Parse a link: [id, from node, from slot, to node, to slot, type] in a workflow, or an object in a subgraph."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    found = [one.get(name) for name in names] if isinstance(one, dict) else one
    if not isinstance(found, list) or len(found) < len(names) or not all(map(_is_id, found[: len(names)])):
        raise _broken(f"a link is {printable(str(one), 80)}, expected [id, node, slot, node, slot, type]")
    id, source, slot, target, target_slot = found[: len(names)]
    if not all(isinstance(place, int) and place >= 0 for place in (slot, target_slot)):
        raise _broken(f"a link goes from slot {slot} to slot {target_slot}, expected whole numbers of at least 0")
    return id, _Link(source, slot, target, target_slot)


def _listed(form: Mapping[str, Any], name: str) -> list[Any]:
    """Return an array of the UI form; an empty list if it is missing or null."""
    found = form.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise _broken(f"{name} are {described(found)}, expected an array")
    return found


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _subgraphs(ui: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    definitions = ui.get("definitions") or {}
    found = _listed(definitions, "subgraphs") if isinstance(definitions, dict) else []
    if any(not isinstance(one, dict) or "nodes" not in one for one in found):
        raise _broken("its subgraphs are no array of objects with nodes")
    return {str(one.get("id")): one for one in found}


def _output_links(form: Mapping[str, Any] | None) -> dict[int, Any]:
    """The id of the link that leads to each output of a subgraph, by output number."""
    if form is None:
        return {}
    return {link.target_slot: id for id, link in map(_link, _listed(form, "links")) if link.target == _OUTPUTS}


def _broken(what: str) -> WorkflowError:
    return WorkflowError("invalid_prompt", f"the workflow in UI form is broken: {what}")
