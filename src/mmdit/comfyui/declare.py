"""How a node is declared: a function, and its inputs and outputs as data. The table of all nodes is `NODES`.

Your own node is declared in the same way, with `mmdit.workflow_node`:

    @mmdit.workflow_node("Dim", [wire("image", "IMAGE"), decimal("by", 0.5, 0, 1)], ["IMAGE"])
    def dim(image, by):
        return image * (1 - by)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mmdit.comfyui.files import Folders

Function = TypeVar("Function", bound=Callable[..., Any])
MAX_SEED = 2**64 - 1
MAX_SIDE = 16384  # ComfyUI's MAX_RESOLUTION
CONTEXT = "context"  # the name of the parameter by which a function asks for the run's `Context`
VALUES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # types whose values stand in the graph
_CONTROLLED = ("seed", "noise_seed")  # ComfyUI's interface adds a value after these: fixed, randomize ...


@dataclass(frozen=True)
class Input:
    """An input of a node.

    Args:
        name: as in the graph.
        type: of the values on its wire, such as "MODEL"; one of `VALUES` where the graph may hold the value itself.
        default: what ComfyUI's interface fills in. A graph must say every required value itself.
        least, most: the range of a number, both ends included.
        choices: the values that a "COMBO" takes, or a function that lists them from the folders.
        optional: whether it may be left out; the node's function has the default then.
        check: says what is wrong with a value, or None. It takes the place of the check of `choices`.
        folder: where the file that it names lies, such as "checkpoints" or "input".
    """

    name: str
    type: str
    default: Any = None
    least: int | float | None = None
    most: int | float | None = None
    choices: Sequence[str] | Callable[[Folders], Sequence[str]] | None = None
    optional: bool = False
    check: Callable[[Any, Folders], str | None] | None = None
    folder: str | None = None

    @property
    def is_widget(self) -> bool:
        """Whether the graph may hold the value itself, instead of a link."""
        return self.type in VALUES

    @property
    def extra_widgets(self) -> int:
        """How many values ComfyUI's interface stores after this one that the graph does not have."""
        return 1 if self.name in _CONTROLLED and self.type == "INT" else 0

    def options(self, folders: Folders) -> Sequence[str] | None:
        """The values that it takes; None where anything of its type does."""
        return self.choices(folders) if callable(self.choices) else self.choices


@dataclass(frozen=True)
class Node:
    """A class of nodes: its name in graphs, its inputs in ComfyUI's order (required, then optional), and its function.

    The function takes the inputs by name, and a `context` where it asks for one. It returns the value of the only
    output, or a tuple with one value for each output.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]  # types of the values on its wires
    run: Callable[..., Any]
    is_output: bool = False  # whether it makes a result: pictures and files
    takes_context: bool = False

    def __post_init__(self) -> None:
        taken = [name for name in inspect.signature(self.run).parameters if name != CONTEXT]
        if taken != [one.name for one in self.inputs]:
            raise TypeError(f"node {self.name}: the function takes {taken}, the inputs are {[*self.by_name]}")
        if [one.optional for one in self.inputs] != sorted(one.optional for one in self.inputs):
            raise TypeError(f"node {self.name}: optional inputs must come after required ones")

    @property
    def by_name(self) -> dict[str, Input]:
        """The inputs by name."""
        return {one.name: one for one in self.inputs}


NODES: dict[str, Node] = {}


def workflow_node(
    name: str, inputs: Sequence[Input], outputs: Sequence[str] = (), *, is_output: bool = False, replace: bool = False
) -> Callable[[Function], Function]:
    """Register a function as a node of workflows.

    Args:
        name: its class in graphs.
        inputs: in the order of ComfyUI's interface, required ones first.
        outputs: the types of its outputs.
        is_output: whether the node makes a result, for whose sake a graph is run.
        replace: take the place of a node of that name.

    Raises:
        ValueError: there is such a node, and `replace` is False.
        TypeError: the function's parameters are not the inputs.
    """

    def register(run: Function) -> Function:
        if name in NODES and not replace:
            raise ValueError(f"there is a node {name!r} already; give replace=True to take its place")
        takes_context = CONTEXT in inspect.signature(run).parameters
        NODES[name] = Node(name, tuple(inputs), tuple(outputs), run, is_output, takes_context)
        return run

    return register


node = workflow_node  # its name inside of this room


def wire(name: str, type: str, *, optional: bool = False) -> Input:
    """An input that only a link can give."""
    return Input(name, type, optional=optional)


def integer(name: str, default: int, least: int, most: int, *, optional: bool = False) -> Input:
    """A whole number in a range."""
    return Input(name, "INT", default, least, most, optional=optional)


def decimal(name: str, default: float, least: int | float, most: int | float, *, optional: bool = False) -> Input:
    """A number in a range."""
    return Input(name, "FLOAT", default, least, most, optional=optional)


def text(name: str, default: str = "", *, optional: bool = False) -> Input:
    """A string."""
    return Input(name, "STRING", default, optional=optional)


def boolean(name: str, default: bool, *, optional: bool = False) -> Input:
    """True or False."""
    return Input(name, "BOOLEAN", default, optional=optional)


def choice(name: str, choices: Sequence[str], default: str | None = None, *, optional: bool = False) -> Input:
    """One of several words."""
    return Input(name, "COMBO", choices[0] if default is None else default, choices=tuple(choices), optional=optional)


def file(name: str, folder: str, extra: Sequence[str] = ()) -> Input:
    """The name of a file in one of the folders of models; `extra` are names that stand for no file."""
    return Input(name, "COMBO", choices=lambda folders: [*folders.names(folder), *extra], folder=folder)


def seed(name: str = "seed") -> Input:
    """A seed of at most 64 bits."""
    return integer(name, 0, 0, MAX_SEED)


def side(name: str, default: int, least: int = 16) -> Input:
    """A width or height in pixels."""
    return integer(name, default, least, MAX_SIDE)
