"""Which way a training step is quickest: `python -m mmdit.demo.bench_step --out FOLDER`, on a GPU, in four minutes.

Each variant is checked against float32 without compilation on the same batch (loss, norm and direction of the
gradient) and timed with drawing, clipping, optimizer and averages. Latents are noise, captions real. The table comes
last; variants for which time ran out are missing. FOLDER/compiled is what `train --cache` takes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmdit.checkpoints.load import load_vae
from mmdit.checkpoints.load_pipeline import Components
from mmdit.demo.captions import training_captions
from mmdit.demo.data import tokenize
from mmdit.demo.recipe import FULL
from mmdit.demo.run import Run
from mmdit.demo.scenes import render, sample
from mmdit.demo.train_mmdit import Batch, Batches, Engine, flow_loss, make_optimizer
from mmdit.demo.trainee import T5Form, initial_parts, save_compiled, trainee_of
from mmdit.embedded import EMBEDDED
from mmdit.runtime.profiler import kernels_of
from mmdit.training.ema import Ema
from mmdit.training.journal import Journal
from mmdit.training.rates import set_rate

__all__ = ["main"]

STEPS = 15
REGIONS = ("blocks", "text")
BEST = ("graphs", "lookup", "bf16")


@dataclass(frozen=True)
class Variant:
    """One row of the table; it is left out if fewer than `seconds` remain."""

    form: T5Form
    quick: tuple[str, ...]
    seconds: float
    compiled: tuple[str, ...] = REGIONS
    profiled: bool = False
    cudnn: bool = False

    def __str__(self) -> str:
        cudnn = " cudnn" if self.cudnn else ""
        return f"{self.form:8} {'+'.join(self.compiled):12} {' '.join(self.quick) or '-'}{cudnn}"


# Ordered by expected benefit; graphs of torch.compile are shared between rows wherever they are the same.
VARIANTS = (
    Variant("short", (), 90.0, profiled=True),
    Variant("short", ("graphs",), 6.0),
    Variant("short", ("graphs", "lookup"), 6.0),
    Variant("short", BEST, 50.0, profiled=True),
    Variant("long", BEST, 30.0, profiled=True),
    Variant("omitted", BEST, 25.0),
    Variant("long", (*BEST, "plain"), 20.0),
    Variant("short", (*BEST, "plain"), 15.0),
    Variant("zeros", BEST, 4.0),
    Variant("short", BEST, 55.0, compiled=("models",)),
    Variant("short", BEST, 40.0, cudnn=True),
)


class Bench:
    """The models, batches and references that all variants share."""

    def __init__(self, run: Run, backend: str) -> None:
        self.run, self.backend = run, backend
        self.parts = _awake(initial_parts(run.recipe.architecture, 0), run.device)
        latents = torch.randn(4 * run.recipe.batch, 16, 16, 16, generator=run.generator(1), device=run.device)
        captions = [texts[0] for texts in training_captions(sample(len(latents), 1), 1, 1)]
        tokens = tokenize(captions).to(run.device)
        self.batches = Batches(latents, tokens, 1, run.recipe.dropped, run.recipe.shift, run.generator(2))
        self.batch = self.batches.draw(run.recipe.batch)
        self.references: dict[T5Form, tuple[float, Tensor]] = {}

    def reference(self, form: T5Form) -> tuple[float, Tensor]:
        """Loss and gradient in float32 (not TF32), without compilation, in eighths of the batch to fit in memory."""
        if form not in self.references:
            trainee, size = trainee_of(copy.deepcopy(self.parts)), max(self.run.recipe.batch // 8, 1)
            loss, count = 0.0, self.run.recipe.batch // size
            with _full_precision():
                for i in range(count):
                    part = flow_loss(trainee, _slice(self.batch, slice(i * size, (i + 1) * size)), form) / count
                    part.backward()
                    loss += part.item()
            self.references[form] = loss, _flat([p.grad for p in trainee.parameters()], list(trainee.parameters()))
        return self.references[form]

    def measure(self, variant: Variant) -> str:
        """One row of the table."""
        wanted_loss, wanted = self.reference(variant.form)
        run = replace(self.run, compiled=variant.compiled, quick=variant.quick)
        started = time.monotonic()
        engine = Engine(run, copy.deepcopy(self.parts), self.backend)
        loss = engine.gradients(self.batch, variant.form)
        grad = _flat([p.grad for p in engine.masters], engine.masters)
        run.synchronize()
        first = time.monotonic() - started
        off = abs(loss.item() / wanted_loss - 1)
        norm = (grad.norm() / wanted.norm() - 1).abs().item()
        cosine = torch.nn.functional.cosine_similarity(grad.double(), wanted.double(), dim=0).item()
        sound = "ok" if off < 0.01 and norm < 0.05 and cosine > 0.99 else "WRONG"
        lost = "graphs" in variant.quick and not engine.captures
        step = self._stepper(engine, variant.form)
        device_ms, host_ms = _timed(run, step)
        busy = _profiled(run, step, str(variant)) if variant.profiled else float("nan")
        engine.trainee.zero_grad(set_to_none=True)
        return (
            f"{variant!s:52} {device_ms:8.2f} {host_ms:8.2f} {busy:8.2f} {first:8.1f} {_peak(run):6.1f} "
            f"{off:8.1e} {norm:8.1e} {1 - cosine:8.1e} {sound}{' (NO GRAPH)' if lost else ''}"
        )

    def _stepper(self, engine: Engine, form: T5Form) -> Callable[[], None]:
        recipe = self.run.recipe
        optimizer, ema = make_optimizer(engine.trainee), Ema(engine.trainee, recipe.ema)
        set_rate(optimizer, 1e-6)

        def step() -> None:
            engine.gradients(self.batches.draw(recipe.batch), form)
            torch.nn.utils.clip_grad_norm_(engine.masters, recipe.clip)
            optimizer.step()
            engine.refresh()
            ema.update()

        return step


HEADER = (
    f"{'form     compiled     quick':52} {'ms/step':>8} {'host ms':>8} {'busy ms':>8} {'first s':>8} {'GiB':>6} "
    f"{'loss':>8} {'norm':>8} {'1-cos':>8}"
)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.demo.bench_step", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for compiled code; default a temporary one")
    parser.add_argument("--seconds", type=float, default=250.0, help="start nothing that ends later")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, no inductor, on the CPU")
    args = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cpu" if args.smoke else "cuda")
    with ThreadPoolExecutor(1) as pool, tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        recipe = replace(FULL, batch=2) if args.smoke else FULL
        run = Run(recipe, device, folder, Journal(folder), pool, args.seconds)
        bench = Bench(run, "aot_eager" if args.smoke else "inductor")
        run.journal.say(f"torch {torch.__version__}, ready")
        rows = list(_rows(run, bench, VARIANTS[:4] if args.smoke else VARIANTS))
        if not args.smoke:
            list(_guarded(run, "compiled code", lambda: f"compiled code: {save_compiled(folder / 'compiled')} bytes"))
        run.journal.say("table\n" + "\n".join([HEADER, *rows]))
    return 0


def _rows(run: Run, bench: Bench, variants: tuple[Variant, ...]) -> Iterator[str]:
    """Yield rows as they are measured, the encoding of latents after the fifth; what fails is a row too."""
    for i, variant in enumerate(variants):
        if i == min(5, len(variants) - 1) and run.left > 15:
            yield from _guarded(run, "latents", lambda: _encoding(run))
        if variant.seconds > run.left:
            yield f"{variant!s:52} left out: {run.left:.0f} s left"
            continue
        with _cudnn_attention(variant.cudnn):
            yield from _guarded(run, str(variant), lambda variant=variant: bench.measure(variant))  # type: ignore[misc]
        if run.device.type == "cuda":
            gc.collect()  # compiled modules are in reference cycles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(run.device)


def _guarded(run: Run, name: str, work: Callable[[], str]) -> Iterator[str]:
    started = time.monotonic()
    try:
        row = work()
    except Exception as error:  # a variant that fails becomes a row of the table, and the others still run
        row = f"{name:52} failed: {type(error).__name__}: {str(error)[:300]}"
    run.journal.say(f"{row} ({time.monotonic() - started:.0f} s)")
    yield row


@torch.no_grad()
def _encoding(run: Run) -> str:
    """Milliseconds to draw and to encode 1,024 scenes, as `latents_of` does and as it might."""
    count = 1024 if run.device.type == "cuda" else 2
    scenes = sample(count, 3).to(run.device)
    vae = load_vae(EMBEDDED, device=run.device, dtype=torch.float32)
    pictures = 2 * render(scenes) - 1
    half = copy.deepcopy(vae).half()
    last = copy.deepcopy(half)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latent = vae.encode(pictures[:64]).mode()

    def autocast() -> Tensor:
        with run.autocast():
            return vae.encode(pictures).mode()

    ways: dict[str, Callable[[], Tensor]] = {
        "render": lambda: render(scenes),
        "autocast": autocast,
        "half": lambda: half.encode(pictures.half()).mode(),
        "half channels last": lambda: last.encode(pictures.half().contiguous(memory_format=torch.channels_last)).mode(),
    }
    if run.device.type != "cuda":
        ways = {"render": ways["render"]}  # half precision takes minutes on a CPU
    said = []
    for name, way in ways.items():
        out = way()
        run.synchronize()
        started = time.monotonic()
        for _ in range(3):
            way()
        run.synchronize()
        off = "" if name == "render" else f" (off {(out[:64].float() - latent).abs().max().item():.1e})"
        said.append(f"{name} {1000 * (time.monotonic() - started) / 3:.1f} ms{off}")
    return f"{count} scenes: " + ", ".join(said)


def _timed(run: Run, step: Callable[[], None]) -> tuple[float, float]:
    """Median milliseconds per step, and those in which the host only issued it."""
    step()
    run.synchronize()
    times, started = [], time.monotonic()
    if run.device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
        marks[0].record(torch.cuda.current_stream(run.device))
        for mark in marks[1:]:
            step()
            mark.record(torch.cuda.current_stream(run.device))
        host = time.monotonic() - started
        run.synchronize()
        times = [one.elapsed_time(two) for one, two in itertools.pairwise(marks)]
    else:
        for _ in range(STEPS // 5):
            before = time.monotonic()
            step()
            times.append(1000 * (time.monotonic() - before))
        host = time.monotonic() - started
    return statistics.median(times), 1000 * host / len(times)


def _profiled(run: Run, step: Callable[[], None], title: str, most: int = 18) -> float:
    """Milliseconds per step in which a kernel ran; prints the kernels that take most of them."""
    if run.device.type != "cuda":
        return float("nan")
    rounds = 2

    def steps() -> None:
        for _ in range(rounds):
            step()

    kernels = kernels_of(steps, run.device)
    spent = {name: (ms / rounds, count // rounds) for name, count, ms in kernels}
    total, count = sum(ms for ms, _ in spent.values()), sum(n for _, n in spent.values())
    lines = [f"{title}: {total:.1f} ms in {count} kernels a step"]
    for name, (ms, n) in list(spent.items())[:most]:
        lines.append(f"  {ms:7.2f} ms {n:5} x {name[:80]}")
    run.journal.say("\n".join(lines))
    return total


@contextmanager
def _cudnn_attention(on: bool) -> Iterator[None]:
    """Switch cuDNN attention on; the kernel is chosen while tracing, so graphs cached without it must not be used."""
    if not on:
        yield
        return
    torch._dynamo.reset()
    torch.backends.cuda.enable_cudnn_sdp(True)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def _full_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high")


def _awake(parts: Components, device: torch.device) -> Components:
    """Give small weights to layers that start at zero; otherwise nearly all gradients would be zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainee_of(parts).parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    for model in (parts.transformer, parts.clip_l, parts.clip_g, parts.t5):
        assert model is not None
        model.to(device).train().requires_grad_(True)
    return parts


def _slice(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.x0[rows], batch.noise[rows], batch.t[rows], batch.tokens[rows])


def _flat(grads: list[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, like, strict=True)])


def _peak(run: Run) -> float:
    return torch.cuda.max_memory_allocated(run.device) / 2**30 if run.device.type == "cuda" else 0.0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
