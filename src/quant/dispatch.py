"""The operations of a `Float8Tensor`: two tables that `quant.operations` fills and `quant.tensor` looks into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Functions of torch, and the functions that are called in their place with the same arguments.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
# Operations of aten, and the functions that are called in their place with the operation and its arguments.
OPERATIONS: dict[Any, Callable[..., Any]] = {}


def implements(*functions: object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function in `OPERATIONS` for these aten operations."""

    def register(operation: Callable[..., object]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(functions, operation))
        return operation

    return register
