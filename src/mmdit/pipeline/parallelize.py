"""`mmdit.parallelize`: a pipeline that draws together with those of other processes."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from datetime import timedelta
from typing import Literal

import torch

from mmdit.pipeline.base import PipelineModels
from mmdit.runtime import mesh
from mmdit.runtime.compiled import PARALLEL
from mmdit.runtime.lifeline import RanksDifferError
from mmdit.runtime.mesh import Layout, layout_of
from mmdit.runtime.parallel import Parallel
from mmdit.runtime.peer_setup import EXCHANGES, Exchange
from quant.tensor import Float8Tensor
from samplers.names import pick


def parallelize(
    pipe: PipelineModels,
    cfg: int | Literal["auto"] = "auto",
    sequence: int | None = None,
    *,
    exchange: Exchange = "auto",
    timeout: float = 600.0,
) -> Parallel:
    """Draw on several GPUs from now on: every process of a `torchrun` calls this, and then draws the same pictures.

        # torchrun --nproc-per-node 2 draw.py
        pipe = mmdit.Pipeline.from_pretrained(folder, device=f"cuda:{os.environ['LOCAL_RANK']}", fast=True)
        mmdit.parallelize(pipe, cfg=2)
        image = pipe("a cat").images[0]  # the same picture on both ranks

    The branches of guidance are split over `cfg` ranks, with one small exchange in each step. The image tokens of a
    branch are split over `sequence` ranks, with two exchanges in each attention. Decoding is split over all ranks.
    Results equal those of one process up to rounding. Float8 activations with a scale per tensor are scaled per rank.

    All ranks must make the same calls in the same order; different prompts, seeds or settings are refused on all of
    them. Random seeds and noise are those of rank 0. Where a rank fails or dies, all others raise `mmdit.ParallelError`
    with its number and reason. `mmdit.capture` and others refuse a parallel pipeline.

    With `memory` each rank keeps the budget on its own GPU, by a plan for a whole drawing, of which it computes a part.

    Args:
        pipe: a pipeline with equal models on all ranks, each on a GPU of its own, or on CPUs.
        cfg: the number of ranks that share the branches; "auto" is 2 where the profile guides and the number of
            processes is even, else 1.
        sequence: the number of ranks that share the tokens of a branch, at most the number of attention heads; None is
            what `cfg` leaves of the processes.
        exchange: how the ranks of a sequence exchange tokens for heads in fast forwards. "peers" stores into the memory
            of the other GPUs of the host; "nccl" uses a collective; "auto" takes peers where they work, and its choice
            is in the result's `exchange`. Models of another dtype or head size that join later, and cannot be exchanged
            by peers, use a collective; the result's `choices` say so.
        timeout: seconds after which a collective that never ends is an error.

    Returns:
        The mesh and this rank's place in it. `close` leaves it at the end; the end of the program does so too.

    Raises:
        ValueError: the mesh does not fit the processes, the model or the GPUs; the processes were not started by
            torchrun; or the pipeline is parallel already.
        RuntimeError: exchange="peers" is not possible here.
        mmdit.RanksDifferError: the ranks have different models, devices or layouts.
    """
    if pipe.parallel is not None:
        raise ValueError("the pipeline is parallel already; call pipe.parallel.close() on every rank first")
    pick({name: name for name in EXCHANGES}, exchange, "exchange")
    mesh.start(pipe.device, timedelta(seconds=timeout))
    _check_alike(pipe, cfg, sequence, exchange)
    guided = pipe.profile.reads_negative(pipe.profile.guidance_scale)
    world = torch.distributed.get_world_size()
    layout = layout_of(world, cfg, sequence, guided=guided, heads=pipe.transformer.config.heads)
    pipe.parallel = PipelineParallel(pipe, layout, exchange)
    if pipe.accelerated is not None:
        pipe.accelerated.share(pipe.parallel.sequence)
    if pipe._budget is not None:
        pipe.parallel.connect()
        pipe._replan()  # what exchanges take of the GPU is known now
    return pipe.parallel


class PipelineParallel(Parallel):
    """The parallel run of a pipeline, which draws alone again after `close`."""

    def __init__(self, pipe: PipelineModels, layout: Layout, exchange: Exchange) -> None:
        head_dim, dtype = pipe.transformer.config.head_dim, pipe.transformer.pos_embed.dtype
        super().__init__(layout, pipe.device, exchange, head_dim=head_dim, dtype=dtype)
        self.pipe = pipe
        PARALLEL.add(pipe.transformer)

    def close(self) -> None:
        """Leave the run; the pipeline draws alone again, and shared memory is freed, also where something raises.

        Raises:
            ValueError: the transformer was changed meanwhile, so that its fast forward cannot run it.
        """
        with ExitStack() as last:
            if self.sequence is not None and self.sequence.peers is not None:
                last.callback(self.sequence.peers.close)
            if self.pipe.parallel is self:
                self.pipe.parallel = None
                if self.pipe.accelerated is not None:
                    last.callback(self.pipe.accelerated.share, None)
            last.callback(PARALLEL.discard, self.pipe.transformer)
            super().close()


def _check_alike(pipe: PipelineModels, cfg: object, sequence: object, exchange: object) -> None:
    """Raise RanksDifferError where the ranks could not draw one picture together."""
    recipes = sorted({repr(one.recipe) for one in pipe.transformer.parameters() if isinstance(one, Float8Tensor)})
    facts: dict[str, object] = {
        "cfg": cfg,
        "sequence": sequence,
        "exchange": exchange,
        "the transformer's config": repr(pipe.transformer.config),
        "dtype": str(pipe.dtype),
        "float8 recipes": recipes,
        "the transformer's weights": pipe.digest,
        "profile": pipe.profile.name,
        "memory budget": pipe._budget,
        "fast path": pipe.accelerated is not None,
        "kind of device": pipe.device.type,
    }
    mesh.check_equal(facts, "parallelize")
    places = mesh.of_all((socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"), str(pipe.device)))
    for rank, place in enumerate(places):
        if pipe.device.type == "cuda" and places.index(place) != rank:
            raise RanksDifferError(
                f"parallelize: the pipelines of ranks {places.index(place)} and {rank} are both on {place[2]}; each "
                "needs a GPU of its own: device=f\"cuda:{os.environ['LOCAL_RANK']}\""
            )
