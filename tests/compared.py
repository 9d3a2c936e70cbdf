"""A small comparison, and the stages that fail in it."""

from mmdit.parity.compare import Comparison, compare

PROMPT, NEGATIVE = "a red circle above a blue square", "green"
SIZE = {"num_inference_steps": 2, "height": 32, "width": 48}
SETTINGS = SIZE | {"steps": [0]}


def check(a, b, **settings) -> Comparison:
    return compare(a, b, PROMPT, NEGATIVE, **(SETTINGS | settings))


def failed(comparison: Comparison) -> list[str]:
    return [stage.name for stage in comparison.stages if not stage.ok]
