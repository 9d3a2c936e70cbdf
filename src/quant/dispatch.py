"""What torch calls on a `Float8Tensor`: two tables that `quant.operations` fills and `quant.tensor` looks into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FUNCTIONS: dict[Any, Callable[..., Any]] = {}  # functions of torch, in place of which ours are called
OPERATIONS: dict[
    Any, Callable[..., Any]
] = {}  # operations of aten; ours are called with the operation and its arguments


def implements(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated function into `OPERATIONS` under these operations of aten."""

    def register(operation: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(functions, operation))
        return operation

    return register
