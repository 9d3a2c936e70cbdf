"""Which blocks of a LoRA decide: it acts in one block at a time, or in all but one, and each drawing is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mmdit.checkpoints.lora_describe import block_of
from mmdit.inspection.labelled import Labelled
from mmdit.utils import bar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmdit.pipeline.pipeline import Pipeline


def sweep_lora(
    pipe: Pipeline,
    adapter_name: str,
    run: Callable[[], Any],
    *,
    blocks: Sequence[str] | None = None,
    leave_out: bool = False,
    progress: bool | None = None,
) -> Labelled:
    """Let a LoRA act in one block of the transformer, run, and go on to the next block.

        def redness():
            return pipe("a red circle", seed=1, output_type="pt").images[0, 0].mean()

        mmdit.sweep_lora(pipe, "style", redness)

    Args:
        pipe: the pipeline, whose LoRAs act afterwards as they did before.
        adapter_name: the LoRA; others keep their weights.
        run: draws and measures: a number, or a tensor that always has the same shape.
        blocks: starts of official names, such as "joint_blocks.3" or "joint_blocks.3.x_block"; None takes all blocks
            that the LoRA changes.
        leave_out: whether it acts in all blocks but one instead.
        progress: show a bar; None shows it in terminals and notebooks.

    Returns:
        What `run` gave: [block, dimensions of a result].

    Raises:
        ValueError: there is no such LoRA, it changes nothing of a block, or results have different shapes.
    """
    known = pipe.lora_report().adapters
    if adapter_name not in known:
        raise ValueError(f"there is no adapter {adapter_name!r}, known are {', '.join(map(repr, known)) or 'none'}")
    patches = known[adapter_name].lora.of("transformer")
    names = [block_of(patch.target.key)[0] or patch.target.key for patch in patches]
    places = list(dict.fromkeys(names)) if blocks is None else list(blocks)
    inside, outside = (0.0, 1.0) if leave_out else (1.0, 0.0)
    found = []
    with _as_before(pipe):
        active = pipe.get_active_adapters()
        others = [name for name in active if name != adapter_name]
        for block in bar(places, len(places), progress):
            glob = block if block in {patch.target.key for patch in patches} else f"{block}.*"
            weights = [{glob: inside, "*": outside}, *(known[name].weight for name in others)]
            pipe.set_adapters([adapter_name, *others], weights)
            found.append(torch.as_tensor(run()).detach().cpu())
    if len(shapes := {tuple(one.shape) for one in found}) > 1:
        raise ValueError(f"run() gave results of shapes {', '.join(map(str, sorted(shapes)))}; they must be one")
    results = {f"result_{i}": tuple(range(length)) for i, length in enumerate(found[0].shape)}
    return Labelled(torch.stack(found), {"block": tuple(places), **results})


@contextmanager
def _as_before(pipe: Pipeline) -> Iterator[None]:
    """Bring back which LoRAs act, and how strongly."""
    names, known = pipe.get_active_adapters(), pipe.lora_report().adapters
    weights = [known[name].weight for name in names]
    text = [known[name].text_encoder_weight for name in names]
    try:
        yield
    finally:
        pipe.set_adapters(names, weights, text_encoder_weights=text)
