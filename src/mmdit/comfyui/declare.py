"""Declarations of nodes: a function, with its inputs and outputs as data. `NODES` is the table of all nodes.

Declare your own nodes in the same way, with `mmdit.workflow_node`:

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
CONTEXT = "context"  # a function with a parameter of this name gets the run's `Context`
VALUES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # types whose values the graph can hold
_CONTROLLED = ("seed", "noise_seed")  # ComfyUI's interface stores "fixed", "randomize" ... after these values


@dataclass(frozen=True)
class Input:
    """An input of a node.

    Args:
        name: the name of the input in the graph.
        type: the type of the values on its wire, such as "MODEL"; one of `VALUES` where the graph can hold the value.
        default: the value that ComfyUI's interface fills in. A graph must contain every required value.
        least, most: the range of a number, both ends included.
        choices: the values that a "COMBO" accepts, or a function that lists them from the folders.
        optional: whether a graph may omit the input; the default of the function's parameter then applies.
        check: a function that returns the error in a value, or None. It replaces the check against `choices`.
        folder: the kind of folder that holds the named file, such as "checkpoints" or "input".
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
        """The number of values after this one that ComfyUI's interface stores and the API form does not contain."""
        return 1 if self.name in _CONTROLLED and self.type == "INT" else 0

    def options(self, folders: Folders) -> Sequence[str] | None:
        """The accepted values; None where every value of the type is accepted."""
        return self.choices(folders) if callable(self.choices) else self.choices


@dataclass(frozen=True)
class Node:
    """A class of nodes: its name in graphs, its inputs in ComfyUI's order (required, then optional), and its function.

    The function takes the inputs by name, and the run's `Context` if it has a parameter `context`. It returns the value
    of the single output, or a tuple with one value for each output.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]  # types of the output values
    run: Callable[..., Any]
    is_output: bool = False  # whether it produces a result of the run: pictures or files
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
        name: the class name of the node in graphs.
        inputs: the inputs in the order of ComfyUI's interface, required inputs first.
        outputs: the types of the outputs.
        is_output: whether the node produces a result of the run; only such nodes, and those they need, run.
        replace: whether to replace a registered node of this name.

    Raises:
        ValueError: a node of this name is registered, and `replace` is False.
        TypeError: the parameters of the function differ from the inputs.
    """

    def register(run: Function) -> Function:
        if name in NODES and not replace:
            raise ValueError(f"there is a node {name!r} already; give replace=True to take its place")
        takes_context = CONTEXT in inspect.signature(run).parameters
        NODES[name] = Node(name, tuple(inputs), tuple(outputs), run, is_output, takes_context)
        return run

    return register


node = workflow_node  # the short name that the modules of this package use


def wire(name: str, type: str, *, optional: bool = False) -> Input:
    """An input whose value must come through a link."""
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
    """The name of a file in one of the model folders; `extra` are accepted names without a file."""
    return Input(name, "COMBO", choices=lambda folders: [*folders.names(folder), *extra], folder=folder)


def seed(name: str = "seed") -> Input:
    """A seed of at most 64 bits."""
    return integer(name, 0, 0, MAX_SEED)


def side(name: str, default: int, least: int = 16) -> Input:
    """A width or height in pixels."""
    return integer(name, default, least, MAX_SIDE)
