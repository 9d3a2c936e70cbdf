"""What attention maps cost in time and memory: `mmdit bench maps --model large --words 5 --steps 20`.

Random weights and inputs, as in `mmdit bench`. The same steps run without and with maps, in turn; outputs are compared
bit by bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoders import Conditioning, TokenSpan
from encoders.conditioning import EncoderName
from mmdit.bench.random_models import MODELS, Inputs, check_names, check_size, fill
from mmdit.inspection.attention import Direction
from mmdit.inspection.attention_maps import AttentionMaps, Heads, attention_maps
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.passes import Branch, Pass, Watcher

CLIP = 77  # tokens before those of T5
TOKENS = 2  # tokens of a word, in each encoder


@dataclass(frozen=True)
class Cost:
    """The cost without maps and with them; memory is None where the device does not count it."""

    plain_seconds: float
    maps_seconds: float
    extra_bytes: int | None  # peak with maps less peak without
    kept_bytes: int
    equal: bool  # outputs of all steps, bit by bit
    how: str  # where the log-sum-exp came from

    @property
    def ratio(self) -> float:
        """The ratio of the time with maps to the time without."""
        return self.maps_seconds / self.plain_seconds


class Loop:
    """The transformer on both branches of the guidance, a step after another: all that a pipeline would do with it."""

    def __init__(self, model: MMDiT, inputs: Inputs, words: int) -> None:
        self.transformer, self.inputs = model, inputs
        self.watchers: list[Watcher] = []
        prompt, spans = _prompt(words)
        uncond, cond = inputs.context.split(1)
        pooled = inputs.pooled.split(1)
        self.branches = (
            Branch(Conditioning(uncond, pooled[0], ((),), ("",)), "uncond"),
            Branch(Conditioning(cond, pooled[1], (spans,), (prompt,))),
        )

    def run(self, steps: int) -> list[Tensor]:
        """The velocity of each step."""
        found = []
        for step in range(steps):
            for watcher in self.watchers:
                watcher(Pass(step, 1 - step / steps, self.branches, 1))
            inputs = self.inputs
            found.append(self.transformer(inputs.latent, inputs.timestep, inputs.context, inputs.pooled))
        return found


@torch.inference_mode()
def cost(
    model: str,
    *,
    words: int = 5,
    steps: int = 20,
    blocks: Sequence[int] | None = None,
    heads: Heads = "mean",
    directions: Sequence[Direction] = ("i2t",),
    quadrants: bool = True,
    size: int | None = None,
    text: int = 333,
    rounds: int = 3,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Measure `rounds` drawings without and with maps; times are medians.

    Args:
        model: A name of `mmdit.bench.random_models.MODELS`.
        words: Number of words, of two tokens each in CLIP and in T5.
        steps: Steps of a drawing; only the transformer runs, with both branches in one batch.
        blocks, heads, directions, quadrants: see `mmdit.attention_maps`.
        size, text: pixels a side, and text tokens.
        rounds: Number of drawings without and with maps.
        device, dtype: The device and dtype of the model.
    """
    check_names((model,), MODELS)
    size = check_size(model, size)
    device, config = torch.device(device), MODELS[model]
    if text < CLIP + TOKENS * words:
        raise ValueError(f"{words} words need a text of at least {CLIP + TOKENS * words} tokens, got {text}")
    with torch.inference_mode(False), torch.device("meta"):
        transformer = MMDiT(config)
    with torch.inference_mode(False):
        fill(transformer.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    loop = Loop(transformer, Inputs.random(config, size, text, 2, device, dtype), words)
    loop.run(1)
    plain, watched = [], []
    for _ in range(rounds):
        plain.append(_measured(loop, steps, device))
        with attention_maps(loop, blocks=blocks, heads=heads, direction=directions, quadrants=quadrants) as maps:
            watched.append(_measured(loop, steps, device))
    same = all(torch.equal(a, b) for a, b in zip(plain[-1].outputs, watched[-1].outputs, strict=True))
    peaks = [max(one.peak for one in kind) for kind in (watched, plain)] if device.type == "cuda" else None
    return Cost(
        statistics.median(one.seconds for one in plain),
        statistics.median(one.seconds for one in watched),
        None if peaks is None else peaks[0] - peaks[1],
        maps.nbytes,
        same,
        _how(maps),
    )


@dataclass(frozen=True)
class _Run:
    seconds: float
    peak: int  # bytes above what was there before
    outputs: list[Tensor]


def _measured(loop: Loop, steps: int, device: torch.device) -> _Run:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    start = time.perf_counter()
    outputs = loop.run(steps)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return _Run(seconds, torch.cuda.max_memory_allocated(device) - before if cuda else 0, outputs)


def _prompt(words: int) -> tuple[str, tuple[TokenSpan, ...]]:
    """A prompt of `words` words, and the tokens of each word."""
    prompt, spans = "", list[TokenSpan]()
    for i in range(words):
        start, prompt = len(prompt), f"{prompt}word{i} "
        firsts: dict[EncoderName, int] = {"clip_l": 1, "clip_g": 1, "t5": CLIP}
        spans += [
            TokenSpan(first + TOKENS * i + j, encoder, start, len(prompt) - 1)
            for encoder, first in firsts.items()
            for j in range(TOKENS)
        ]
    return prompt, tuple(spans)


def _how(maps: AttentionMaps) -> str:
    return ", ".join(f"{source} (kernel {call.kernel}, {call.keys[2]} keys)" for call, source in maps.how.items())


def lines(found: Cost, steps: int) -> list[str]:
    """Return the measurements as text."""
    extra = "not counted on this device" if found.extra_bytes is None else f"{found.extra_bytes / 1e9:.3f} GB"
    return [
        f"without maps  {found.plain_seconds:.3f} s for {steps} steps",
        f"with maps     {found.maps_seconds:.3f} s, {found.ratio:.3f} times",
        f"extra peak    {extra}; maps and quadrants keep {found.kept_bytes / 1e9:.3f} GB",
        f"outputs       {'equal bit by bit' if found.equal else 'DIFFER'}",
        f"log-sum-exp   {found.how}",
    ]
