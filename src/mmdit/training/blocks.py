"""Blocks of a model in training: activations computed again in the backward pass, and blocks compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from mmdit.training.barriers import with_barriers

aten = torch.ops.aten
# What computes attention: its output is as large as the residual stream, and costs more than a product to make again.
_ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
_VARIANTS = 256  # of compiled blocks
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def recompute(blocks: Iterable[nn.Module], *, keep_attention: bool) -> None:
    """Let blocks keep their inputs alone for the backward pass, and compute the rest again there.

    Outputs of attention are kept in compiled blocks alone: elsewhere torch would call Python for each operation of a
    block, which takes longer on a GPU than attention does.

    `mmdit.capture` sees the first computation. `mmdit.patch` does not act in the second one, which torch reports as an
    error: patch a model in training before blocks compute again, or after `keep_all`.

    Args:
        blocks: modules whose forward is replaced, on the instance.
        keep_attention: in compiled blocks, also keep the outputs of attention, which is then not computed again.
    """
    contexts: Contexts = partial(create_selective_checkpoint_contexts, _policy) if keep_attention else noop_context_fn
    for block in blocks:
        _replace_forward(block, partial(_checkpointed, block.forward, contexts))


def keep_all(blocks: Iterable[nn.Module]) -> None:
    """Undo `recompute`."""
    for block in blocks:
        vars(block).pop("forward", None)


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile each block, with what `recompute` made of it, for static shapes.

    Kernels get the barriers of `mmdit.training.barriers`, without which gradients on GPUs are wrong now and then.

    Sets `torch._dynamo.config.recompile_limit`, which counts kinds of blocks times shapes times modes of gradients, of
    all blocks together: beyond torch's own limit, 8, a step would fail.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, **with_barriers(backend))


def _checkpointed(forward: Callable[..., Any], contexts: Contexts, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    if not torch.compiler.is_compiling():
        contexts = noop_context_fn
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    vars(block)["forward"] = forward


def _policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
