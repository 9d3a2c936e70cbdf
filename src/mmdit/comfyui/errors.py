"""Errors in workflows, found before the run (with ComfyUI's error type and the node) or while a node runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One error in a node, as ComfyUI lists it in the response to `POST /prompt`."""

    type: str  # such as "required_input_missing"
    message: str  # a sentence
    input: str | None = None  # the name of the input; None where the error concerns the whole node


class WorkflowError(ValueError):
    """A graph cannot run; `type` and `node_errors` are those of ComfyUI's response.

    Args:
        type: "invalid_prompt", "no_prompt", "prompt_no_outputs" or "prompt_outputs_failed_validation".
        message: what is wrong, and what to do.
        node_errors: the problems of each node, by node id.
    """

    def __init__(self, type: str, message: str, node_errors: Mapping[str, Sequence[Problem]] | None = None) -> None:
        super().__init__(message)
        self.type, self.node_errors = type, dict(node_errors or {})


class NodeError(ValueError):
    """A node failed while it ran; the original exception is the cause.

    Args:
        node_id: the id of the node in the graph.
        node_type: the class of the node.
        cause: the exception that the node raised.
    """

    def __init__(self, node_id: str, node_type: str, cause: Exception) -> None:
        super().__init__(f"node {node_id} ({node_type}): {cause}")
        self.node_id, self.node_type = node_id, node_type
        self.exception_type, self.exception_message = type(cause).__name__, str(cause)


class LimitError(ValueError):
    """A workflow exceeds one of its limits; the message names the limit."""
