"""Numbers and texts: ComfyUI's `comfy_extras/nodes_primitive.py` and `nodes_string.py`."""

from __future__ import annotations

from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import boolean, decimal, integer, node, text

_LARGEST = 2**63 - 1


@node("PrimitiveInt", [integer("value", 0, -_LARGEST, _LARGEST)], ["INT"])
def primitive_int(value: int) -> int:
    """An integer."""
    return value


@node("PrimitiveFloat", [decimal("value", 0.0, -_LARGEST, _LARGEST)], ["FLOAT"])
def primitive_float(value: float) -> float:
    """A number."""
    return value


@node("PrimitiveString", [text("value")], ["STRING"])
def primitive_string(value: str) -> str:
    """A text."""
    return value


@node("PrimitiveStringMultiline", [text("value")], ["STRING"])
def primitive_string_multiline(value: str) -> str:
    """A text of several lines."""
    return value


@node("PrimitiveBoolean", [boolean("value", False)], ["BOOLEAN"])
def primitive_boolean(value: bool) -> bool:
    """True or False."""
    return value


@node("StringConcatenate", [text("string_a"), text("string_b"), text("delimiter")], ["STRING"])
def string_concatenate(context: Context, string_a: str, string_b: str, delimiter: str) -> str:
    """Concatenate two texts with a delimiter between them."""
    context.limits.check("characters", len(string_a) + len(string_b) + len(delimiter))
    return delimiter.join((string_a, string_b))
