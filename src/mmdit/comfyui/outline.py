"""A readable outline of a workflow: its nodes in the order in which they run, and the models that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from encoders.json_files import printable
from mmdit.comfyui.errors import WorkflowError
from mmdit.comfyui.files import MODEL_FOLDERS, Folders
from mmdit.comfyui.graph import Graph, check, is_link, order, read_graph
from mmdit.comfyui.nodes import NODES

_SHOWN = 60  # maximum number of characters shown of a value


def outline(source: Mapping[str, Any] | str | Path, folders: Folders | None = None) -> str:
    """Describe a workflow: its nodes, the files that it needs, those that are missing, and whether it can run.

    Args:
        source: a graph, as `read_graph` accepts it.
        folders: the folders of models and pictures; None lists the files without looking for them.

    Raises:
        WorkflowError, JSONError, SettingsError: see `read_graph`.
    """
    graph = read_graph(source)
    lines = [f"{len(graph)} nodes", *_nodes(graph), "", "files that it wants:", *_files(graph, folders)]
    if folders is not None:
        lines += ["", *_verdict(graph, folders)]
    return "\n".join(lines)


def _nodes(graph: Graph) -> Iterator[str]:
    """A line for each node and each of its inputs; those that no output needs come last."""
    known = {id: one for id, one in graph.items() if isinstance(one, dict) and str(one.get("class_type")) in NODES}
    outputs = [id for id in known if NODES[str(known[id]["class_type"])].is_output]
    needed = _order(graph, outputs)
    for id in [*needed, *(id for id in graph if id not in needed)]:
        one = graph[id]
        name = printable(str(one.get("class_type")), _SHOWN) if isinstance(one, dict) else "no node"
        remark = "" if id in needed else "  (unknown class)" if id not in known else "  (no output needs it)"
        yield f"  {printable(id, 40)} {name}{remark}"
        inputs = one.get("inputs") if isinstance(one, dict) else None
        for name, value in inputs.items() if isinstance(inputs, dict) else ():
            yield f"      {printable(name, 40)}: {_value(graph, value)}"


def _order(graph: Graph, outputs: list[str]) -> list[str]:
    """The nodes in the order in which they run; an empty list if the graph is too broken to be ordered."""
    try:
        return order(graph, outputs)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return []


def _value(graph: Graph, value: Any) -> str:
    if not is_link(value):
        return printable(value if isinstance(value, str) else str(value), _SHOWN)
    source, slot = value
    one = graph.get(source) if isinstance(source, str) else None
    declared = NODES.get(str(one.get("class_type"))) if isinstance(one, dict) else None
    kinds = declared.outputs if declared is not None else ()
    kind = kinds[slot] if isinstance(slot, int) and 0 <= slot < len(kinds) else "?"
    return f"<- {printable(str(source), 40)} {declared.name if declared else '(unknown)'} {kind}"


def _files(graph: Graph, folders: Folders | None) -> Iterator[str]:
    """One line for each distinct file that the nodes name."""
    wanted: dict[tuple[str, str], None] = {}
    for one in graph.values():
        declared = NODES.get(str(one.get("class_type"))) if isinstance(one, dict) else None
        inputs = one.get("inputs") if isinstance(one, dict) else None
        for each in declared.inputs if declared is not None else ():
            value = inputs.get(each.name) if isinstance(inputs, dict) else None
            if each.folder is not None and isinstance(value, str):
                wanted[each.folder, value] = None
    if not wanted:
        yield "  none"
    for folder, name in wanted:
        yield f"  {folder}/{printable(name, 100)}{'' if folders is None else _state(folders, folder, name)}"


def _state(folders: Folders, folder: str, name: str) -> str:
    if folder in MODEL_FOLDERS:
        names = folders.names(folder)
        return ": there" if name in names else f": MISSING in {folders.where(folder)}"
    try:
        folders.picture(name)
    except (OSError, ValueError) as error:
        return f": MISSING ({error})"
    return ": there"


def _verdict(graph: Graph, folders: Folders) -> Iterator[str]:
    try:
        checked = check(graph, folders)
    except WorkflowError as error:
        yield f"it cannot run ({error.type}): {error}"
        return
    yield f"it can run; its outputs are {', '.join(checked.outputs)}"
    for id, problems in checked.node_errors.items():
        for one in problems:
            yield f"  but node {id}: {one.message}"
