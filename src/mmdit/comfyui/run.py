"""Run a workflow: each node that an output needs runs once, in topological order."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from encoders import Tokenizers
from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import Node
from mmdit.comfyui.errors import LimitError, NodeError, Problem
from mmdit.comfyui.files import Folders, as_folders
from mmdit.comfyui.graph import Checked, Graph, check, is_link, links_of, order, read_graph
from mmdit.comfyui.limits import WorkflowLimits
from mmdit.comfyui.nodes import NODES
from mmdit.runtime.devices import resolve_device

Wire = tuple[str, int]  # the id of a node, and the number of one of its outputs


@dataclass
class WorkflowResult:
    """The results of a workflow.

    `images`: the pictures of each output node, by node id. `values`: the values of the wires in `keep`. `files`: the
    files that were written. `node_errors`: the problems of outputs that could not run while others could.
    """

    images: dict[str, list[Image.Image]]
    values: dict[Wire, Any]
    files: list[Path]
    node_errors: Mapping[str, Sequence[Problem]]


@dataclass
class WorkflowCache:
    """The node outputs of the previous run, so that the next run computes only what has changed; models stay loaded.

    The key of a node consists of its class, its input values, the keys of its linked nodes, and the size and
    modification time of its files. Outputs that a run does not need are dropped at its end, as in ComfyUI.
    """

    outputs: dict[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    tokenizers: Tokenizers | str | Path | None = field(default=None, repr=False)

    def begin(self, tokenizers: Tokenizers | str | Path | None) -> None:
        """Drop all outputs if they were made with other tokenizers."""
        if tokenizers != self.tokenizers:
            self.outputs.clear()
        self.tokenizers = tokenizers


def run_workflow(
    graph: Mapping[str, Any] | str | Path,
    *,
    models: str | Path | Sequence[str | Path] = "demo",
    input: str | Path | None = None,
    output: str | Path | None = None,
    tokenizers: Tokenizers | str | Path | None = None,
    keep: Iterable[Wire] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    limits: WorkflowLimits | None = None,
    cache: WorkflowCache | None = None,
) -> WorkflowResult:
    """Run a ComfyUI workflow under the rules of ComfyUI 0.3.64 (profile "comfyui").

    Args:
        graph: a graph in API form or UI form, or the path of a JSON file or of a PNG that contains a graph.
        models: ComfyUI's folder or its `models` folder, or several; "demo" provides the embedded model as
            demo.safetensors.
        input: the folder that LoadImage reads from.
        output: the folder that SaveImage writes to; None returns the pictures and writes nothing.
        tokenizers: the folder that holds tokenizer, tokenizer_2 and tokenizer_3; None takes those beside the models.
        keep: the wires (node id, output number) whose values to return. Latents are at the scale of the VAE.
        device: the device that the models compute on.
        dtype: the dtype that the models compute in; None is float32 on a CPU, and the stored dtype elsewhere.
        limits: the limits of sizes, steps and nodes.
        cache: outputs of the previous run to reuse; it is updated for the next run.

    Returns:
        The pictures, the kept values and the files that were written.

    Raises:
        WorkflowError: the graph is invalid; raised before any node runs, with ComfyUI's error type and the node.
        NodeError: a node failed; the original exception is the cause.
        LimitError: the workflow exceeds a limit; the message names the node.
        FileNotFoundError: a folder does not exist.
    """
    folders = as_folders(models, input, output)
    parsed = read_graph(graph)
    checked = check(parsed, folders)
    context = Context(folders, limits or WorkflowLimits(), resolve_device(device), dtype, parsed, tokenizers)
    kept = WorkflowCache() if cache is None else cache
    kept.begin(tokenizers)
    running = _Running(checked, context, _wires(checked, keep), kept)
    running.run(drops=cache is None)
    return WorkflowResult(context.images, running.kept, context.files, checked.node_errors)


def overridden(graph: Graph, changes: Iterable[str]) -> Graph:
    """Return a graph with changed values: each change is "node.input=value", with the value as JSON or as text.

    Raises:
        ValueError: there is no such node or input, or the input is a link.
    """
    changed = copy.deepcopy(graph)
    for change in changes:
        place, equals, value = change.partition("=")
        id, _, name = place.rpartition(".")
        if not equals or id not in changed:
            raise ValueError(f"{change!r}: expected NODE.INPUT=VALUE with one of the nodes {', '.join(changed)}")
        declared = NODES.get(changed[id].get("class_type", ""))
        if declared is None or name not in declared.by_name or not declared.by_name[name].is_widget:
            names = [] if declared is None else [one.name for one in declared.inputs if one.is_widget]
            raise ValueError(f"{change!r}: node {id} has no value {name!r}; it has {', '.join(names) or 'none'}")
        changed[id].setdefault("inputs", {})[name] = value
    return changed


class _Running:
    """The state of a run."""

    def __init__(self, checked: Checked, context: Context, keep: Collection[Wire], cache: WorkflowCache) -> None:
        self.graph, self.context, self.cache, self.keep = checked.graph, context, cache, keep
        self.order = order(checked.graph, [*checked.outputs, *(id for id, _ in keep)])
        self.keys: dict[str, str] = {}
        self.kept: dict[Wire, Any] = {}
        context.limits.check("nodes", len(self.order))

    def run(self, *, drops: bool) -> None:
        """Run all nodes; with `drops`, free each output once no later node needs it."""
        for id in self.order:
            self.keys[id] = self._key(id)
        users = Counter(self.keys[link.source] for id in self.order for link in links_of(self.graph, id))
        for id in self.order:
            self._run(id)
            for link in links_of(self.graph, id) if drops else ():
                users[self.keys[link.source]] -= 1
                if not users[self.keys[link.source]]:
                    del self.cache.outputs[self.keys[link.source]]
        used = set(self.keys.values())
        self.cache.outputs = {key: value for key, value in self.cache.outputs.items() if key in used}

    def _run(self, id: str) -> None:
        declared, key = NODES[self.graph[id]["class_type"]], self.keys[id]
        if declared.is_output or key not in self.cache.outputs:
            self.cache.outputs[key] = self._outputs(id, declared)
        for wire in (wire for wire in self.keep if wire[0] == id):
            self.kept[wire] = self.cache.outputs[key][wire[1]]

    def _outputs(self, id: str, declared: Node) -> tuple[Any, ...]:
        """Run a node and return its outputs, checked against the limits."""
        self.context.node = id
        arguments: dict[str, Any] = {"context": self.context} if declared.takes_context else {}
        try:
            for name, value in self.graph[id].get("inputs", {}).items():
                if name in declared.by_name:
                    arguments[name] = self._value(value)
            with torch.no_grad():
                found = declared.run(**arguments)
            outputs = found if len(declared.outputs) > 1 else (found,)[: len(declared.outputs)]
            if len(outputs) != len(declared.outputs):
                raise TypeError(f"its function returned {len(outputs)} values, expected {len(declared.outputs)}")
            for value in outputs:
                _check_size(value, self.context.limits)
        except LimitError as error:
            raise LimitError(f"node {id} ({declared.name}): {error}") from error
        except Exception as error:
            raise NodeError(id, declared.name, error) from error
        return tuple(outputs)

    def _value(self, value: Any) -> Any:
        if not is_link(value):
            return value
        source, slot = value
        return self.cache.outputs[self.keys[source]][slot]

    def _key(self, id: str) -> str:
        """The cache key of a node; nodes with equal keys have equal outputs."""
        declared, parts = NODES[self.graph[id]["class_type"]], []
        for one in declared.inputs:
            value = self.graph[id].get("inputs", {}).get(one.name)
            if is_link(value):
                parts.append((one.name, self.keys[value[0]], value[1]))
            elif value is not None:
                parts.append((one.name, repr(value), _stamp(one.folder, value, self.context.folders)))
        own = id if declared.is_output else ""
        device = f"{self.context.device} {self.context.dtype}"
        return sha256(json.dumps([declared.name, own, device, parts]).encode()).hexdigest()


def _stamp(folder: str | None, name: Any, folders: Folders) -> str:
    """A text that changes when the file that an input names changes."""
    if folder is None:
        return ""
    try:
        path = folders.picture(str(name)) if folder == "input" else folders.model(folder, str(name))
        status = path.stat()
    except (OSError, ValueError):  # the name does not refer to a file
        return ""
    return f"{path} {status.st_mtime_ns} {status.st_size}"


def _wires(checked: Checked, keep: Iterable[Wire]) -> list[Wire]:
    """Check the wires to keep.

    Raises:
        ValueError: the graph has no such wire, or its node does not run.
    """
    found = []
    running = set(order(checked.graph, checked.outputs))
    for id, slot in keep:
        if id not in running:
            raise ValueError(f"keep: node {id!r} is not run; the nodes that an output needs are {', '.join(running)}")
        outputs = NODES[checked.graph[id]["class_type"]].outputs
        if not 0 <= slot < len(outputs):
            raise ValueError(f"keep: node {id} has {len(outputs)} outputs, and no output {slot}")
        found.append((id, slot))
    return found


def _check_size(value: Any, limits: WorkflowLimits) -> None:
    """Check the size of an output value: a batch of pictures, a mask or a latent."""
    if isinstance(value, dict) and isinstance(value.get("samples"), Tensor):
        limits.check_latents(value["samples"].shape)
        if isinstance(value.get("noise_mask"), Tensor):
            limits.check_pictures(len(value["noise_mask"]), *value["noise_mask"].shape[-2:])
    elif isinstance(value, Tensor) and value.ndim in (3, 4):
        limits.check_pictures(*value.shape[:3])
