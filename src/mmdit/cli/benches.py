"""What `mmdit bench` does: each bench yields the lines to print, or an exit code other than 0."""

from __future__ import annotations

import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from mmdit.bench import cold as bench_cold
from mmdit.bench import controlnet, fp8_quality, host_memory, links, lora, maps, parallel
from mmdit.bench import errors as bench_errors
from mmdit.bench import layers as bench_layers
from mmdit.bench import loading as bench_loading
from mmdit.bench import memory as bench_memory
from mmdit.bench import picture as bench_picture
from mmdit.bench import speed as bench_speed
from mmdit.bench import step as bench
from mmdit.bench import training as bench_training
from mmdit.bench import ways as bench_ways
from mmdit.bench.random_models import MODELS, check_names, check_peers, check_size, recipe_of
from mmdit.bench.rows import Cells
from mmdit.bench.samplers import MEASURES, Plan, measure
from mmdit.cli.console import Note, say
from mmdit.cli.console import note as say_note
from mmdit.cli.devices import device_of, dtype_of, load
from mmdit.cli.long_runs import duration, seconds_of
from mmdit.cli.usage import usage_errors
from mmdit.demo.data import workers
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime import mesh
from mmdit.runtime.plan import parse_bytes
from mmdit.utils import markdown_table, whole
from quant.recipe import RECIPES
from samplers import pick

_ENDING = 20  # seconds in which communicators must end
_LONG = 120.0  # seconds of which users are told beforehand


def _steps(options: Namespace, note: Note) -> Iterator[str]:
    sizes = _sizes(options, "batch", "text", "repeats")
    repeats = sizes.pop("repeats")
    _check(options, bench.PEERS)
    work, rows = bench.work_of(options.model, **sizes), []
    _note_long(options, (repeats + 2) * (1 + len(options.quant) + len(options.against)), sizes["batch"], note)
    for row in bench.bench(
        options.model,
        **sizes,
        recipes=options.quant,
        against=options.against,
        compiled=not options.eager,
        fast=options.fast,
        only=options.only,
        repeats=repeats,
        seconds=options.seconds,
        **_where(options),
    ):
        rows.append(row)
        note(f"{row.name}: {row.failed or f'{row.milliseconds:.1f} ms'}")
        if options.output is not None:
            bench.save(Path(options.output), work, rows)
    yield bench.table(work, rows)


def _speed(options: Namespace, note: Note) -> Iterator[str]:
    with usage_errors():
        cases = bench_speed.CASES if options.cases is None else [bench_speed.Case.of(text) for text in options.cases]
        repeats = whole("--repeats", options.repeats, 1)
        check_names(options.against, bench.PEERS)
    check_peers(options.against, bench.PEERS)
    rows, seconds = [], 60 * options.minutes
    for row in bench_speed.speed(cases, against=options.against, repeats=repeats, seconds=seconds, **_where(options)):
        rows.append(row)
        note(f"{row.case}, {row.name}: {f'{row.timed.milliseconds:.2f} ms' if row.timed else row.failed}")
        if options.output is not None:
            bench_speed.save(Path(options.output), rows)
    yield bench_speed.table(rows)


def _errors(options: Namespace, note: Note) -> Iterator[str | int]:
    with usage_errors():
        for name in options.quant:
            recipe_of(name)
    sizes, rows = _sizes(options, "text", "steps"), []
    _note_long(options, 4 * sizes["steps"] * (2 + len(options.quant)), 2, note)
    for row in bench_errors.errors(options.model, options.quant, **sizes, **_where(options)):
        rows.append(row)
        note(f"{row.name}: at most {row.worst:.3f} of the plain forward's error")
    yield bench_errors.table(rows)
    yield 0 if all(row.worst <= bench_errors.LIMIT for row in rows) else 1


def _layers(options: Namespace, note: Note) -> Iterator[str]:
    sizes = _sizes(options, "batch", "text")
    with usage_errors():
        check_names(options.quant, bench_layers.DYNAMIC)
    shapes = bench_layers.shapes_of(options.model, **sizes)
    _note_long(options, len(options.quant), sizes["batch"], note)
    yield bench_layers.table(list(bench_layers.layers(shapes, options.quant, **_where(options))))


def _ways(options: Namespace, note: Note) -> Iterator[str]:
    sizes = _sizes(options, "batch", "text")
    shapes = bench_layers.shapes_of(options.model, **sizes)
    rows = bench_ways.ways(shapes, seconds=options.seconds, **_where(options))
    yield bench_ways.table(list(rows))


def _loading(options: Namespace, note: Note) -> Iterator[str]:
    with usage_errors():
        check_names((options.model,), MODELS)
        blocks = None if options.blocks is None else whole("--blocks", options.blocks, 1)
        readers = [whole("--readers", count, 1) for count in options.readers]
    folder, rows = None if options.folder is None else Path(options.folder), []
    more: dict[str, Any] = {"blocks": blocks, "folder": folder, "seconds": options.seconds} | _where(options)
    columns: Sequence[str] = bench_cold.COLUMNS if options.cold else bench_loading.COLUMNS
    run = bench_loading.from_disk if options.cold else partial(bench_loading.loading, readers=readers)
    for row in run(options.model, **more):
        rows.append(row)
        note(f"{row[0]}: {row[2]} s")
    yield "\n".join(markdown_table(columns, rows))


def _picture(options: Namespace, note: Note) -> Iterator[str]:
    _check(options, ("diffusers",))
    sizes, rows = _sizes(options, "steps"), []
    calls = 2 * sizes["steps"] * (2 - options.eager) * (1 + len(options.quant))
    _note_long(options, calls, 2, note)
    for row in bench_picture.pictures(
        options.model,
        options.quant,
        **sizes,
        compiled=not options.eager,
        fast=options.fast,
        first=options.first,
        seconds=60 * options.minutes,
        against=options.against,
        **_where(options),
    ):
        rows.append(row)
        note(f"{row.name}: {row.failed or ', '.join(f'{stage} {time:.3f} s' for stage, time in row.seconds.items())}")
    yield bench_picture.table(rows)


def _check(options: Namespace, peers: Sequence[str]) -> None:
    """Raise, before anything is built, for recipes and peers that are unknown or missing."""
    with usage_errors():
        for name in options.quant:
            recipe_of(name)
        check_names(options.against, peers)
    check_peers(options.against, peers)


def _sizes(options: Namespace, *names: str) -> dict[str, Any]:
    """The size of the picture, by default the model's, and other whole numbers by option."""
    with usage_errors():
        check_names((options.model,), MODELS)
        size = check_size(options.model, options.size)
        return {"size": size} | {name: whole(f"--{name}", getattr(options, name), 1) for name in names}


def _note_long(options: Namespace, calls: int, batch: int, note: Note) -> None:
    """Say how long so many steps will take on a CPU, if that is long; float8 is emulated there and takes longer."""
    device, dtype = device_of(options.device), dtype_of(options.dtype)
    if device.type != "cpu" or options.model == "demo":
        return
    with torch.device("meta"):
        model = MMDiT(MODELS[options.model])
    assert dtype is not None
    seconds = calls * seconds_of(model, _sizes(options)["size"], batch, dtype)
    if seconds > _LONG:
        note(f"on this CPU this will take more than {duration(seconds)}; --model demo or a smaller --size is quick")


def _where(options: Namespace) -> dict[str, Any]:
    return {"device": device_of(options.device, say_note), "dtype": dtype_of(options.dtype)}


def _samplers(options: Namespace, note: Note) -> Iterator[str]:
    """Measure; yields a line for each file that is written.

    Raises:
        ValueError, OSError, ImportError: one sentence that says what is wrong, before anything is measured.
    """
    with usage_errors():
        for name in options.measure:
            pick(dict.fromkeys(MEASURES), name, "measure")
        for option in ("prompts", "fine", "batch", "workers"):
            if (value := getattr(options, option)) is not None:
                whole(f"--{option}", value, 1)
        for steps in options.steps or ():
            whole("--steps", steps, 1)
        plan = _plan(options)

    @cache
    def loaded() -> Pipeline:
        device, dtype = device_of(options.device), dtype_of(options.dtype)
        return load(options.model, device=device, dtype=dtype, profile=options.profile)

    with workers(options.workers) if options.workers else nullcontext() as pool:
        for name in options.measure:
            for path in measure(name, loaded, replace(plan, pool=pool), Path(options.output)):
                yield f"wrote {path}"


def _plan(options: Namespace) -> Plan:
    return Plan(
        samplers=tuple(options.samplers or Plan.samplers),
        schedules=tuple(options.schedules or Plan.schedules),
        steps=None if options.steps is None else tuple(options.steps),
        prompts=options.prompts,
        guidance=options.guidance_scale,
        fine=options.fine,
        batch=options.batch,
        minutes=options.minutes,
    )


def _quality(options: Namespace, note: Note) -> Iterator[str]:
    names = ("prompts", "seeds", "pictures", "steps", "calibration", "batch")
    with usage_errors():
        numbers: dict[str, Any] = {name: whole(f"--{name}", getattr(options, name), 1) for name in names}
        tuned = dict(_name_and_folder(one) for one in options.tuned)
    folder, rows = Path(options.output), options.rows or range(len(fp8_quality.ROWS))
    device, dtype = device_of(options.device, note), dtype_of(options.dtype)
    assert dtype is not None
    if device.type == "cpu":
        note(
            "this takes minutes on a GPU and hours on a CPU; --prompts, --seeds, --pictures and --rows make it smaller"
        )
    more: dict[str, Any] = {
        "rows": tuple(rows),
        "fast": options.fast,
        "device": str(device),
        "dtype": dtype,
        "processes": options.workers,
    }
    more["tuned"] = tuned
    for row in fp8_quality.run(folder, **numbers, **more):
        note(f"{row.name}: {row.seconds:.0f} s")
    yield (folder / "fp8_quality.md").read_text(encoding="utf-8")


def _name_and_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and Path(folder).is_dir()):
        raise ValueError(f"--tuned takes NAME=FOLDER with the folder of a model; got {text!r}")
    return name, Path(folder)


def _maps(options: Namespace, note: Note) -> Iterator[str | int]:
    sizes = _sizes(options, "words", "steps", "text", "rounds")
    _note_long(options, 2 * sizes["steps"] * sizes["rounds"], 2, note)
    found = maps.cost(
        options.model,
        **sizes,
        blocks=options.blocks,
        heads=options.heads,
        directions=options.directions,
        quadrants=not options.no_quadrants,
        **_where(options),
    )
    yield from maps.lines(found, sizes["steps"])
    yield 0 if found.equal else 1


def _lora(options: Namespace, note: Note) -> Iterator[str]:
    """Two tables: steps with an attached LoRA, and merges."""
    with usage_errors():
        check_names(options.quant, RECIPES)
        attached, merged = (whole("--ranks", rank, 1) for rank in options.ranks)
    sizes = _sizes(options, "batch", "text", "repeats")
    common: dict[str, Any] = {"recipes": options.quant, "seconds": options.seconds, **_where(options)}
    steps = _noted(lora.steps(options.model, rank=attached, **sizes, **common), note)
    merges = _noted(lora.merges(options.model, rank=merged, **common), note)
    yield "\n".join([*markdown_table(lora.STEPS, steps), "", *markdown_table(lora.MERGES, merges)])


def _controlnet(options: Namespace, note: Note) -> Iterator[str]:
    with usage_errors():
        check_names(options.quant, RECIPES)
    sizes = _sizes(options, "batch", "text", "repeats")
    common: dict[str, Any] = {"recipes": options.quant, "seconds": options.seconds, **_where(options)}
    rows = _noted(controlnet.steps(options.model, **sizes, **common), note)
    net = controlnet.net_config(MODELS[options.model])
    flops = controlnet.flops_of_net(net, sizes["size"], sizes["batch"]) / 1e12
    head = (
        f"The net has {net.depth} blocks of width {net.hidden_size}; its operations are {flops:.2f} TFLOP a step. Its "
        "floor is its products and attention at the rates of the device's own kernels, without the bytes between them."
    )
    yield "\n".join([head, "", *markdown_table(controlnet.STEPS, rows)])


def _parallel(options: Namespace, note: Note) -> Iterator[str | int]:
    with usage_errors():
        check_names(() if options.quant == "none" else (options.quant,), RECIPES)
    sizes = _sizes(options, "steps", "prompts", "repeats")
    device = mesh.own_device(device_of(options.device))
    dtype = dtype_of(options.dtype)
    assert dtype is not None
    recipe = None if options.quant == "none" else options.quant
    setting = parallel.Setting(options.model, recipe, **sizes, device=device, dtype=dtype)
    mesh.start(device)
    first, rows = torch.distributed.get_rank() == 0, list[parallel.Row]()
    timer = parallel.stop_after(1.25 * options.seconds, rows, say if first else lambda _: None)
    if options.links:
        found = _noted(links.links(device), note if first else lambda _: None)
        timer.cancel()
        if first:
            yield links.table(found)
        return
    link = links.link_of(device)
    for row in parallel.bench(setting, link, seconds=options.seconds, only=options.only):
        rows.append(row)
        if first:
            note(f"{row.name}: {row.failed or format(row.seconds['picture'], '.3f') + ' s'}")
    timer.cancel()
    if first:
        speeds = f"gather {link.gather / 1e9:.1f} GB/s, exchange {link.exchange / 1e9:.1f} GB/s"
        yield f"Links, one direction: {speeds} and {1e6 * link.latency:.0f} us each, by {link.way}."
        yield from (f"{row.name}: {row.choices}." for row in rows if row.choices)
        yield f"\n{parallel.table(rows, link)}"
    yield int(any(row.failed for row in rows))
    signal.alarm(_ENDING)
    torch.distributed.destroy_process_group()
    signal.alarm(0)


def _noted(rows: Iterable[Cells], note: Note) -> list[Cells]:
    """All rows, each noted when it is there."""
    found = []
    for row in rows:
        note(", ".join(map(str, row)))
        found.append(row)
    return found


def _training(options: Namespace, note: Note) -> Iterator[str]:
    with usage_errors():
        check_names((options.model, options.full), MODELS)
        for name in ("batch", "text", "rank", "ahead", "repeats"):
            whole(f"--{name}", getattr(options, name), 1)
        check_size(options.model, options.size)
    names = ("model", "full", "size", "text", "batch", "rank", "ahead", "repeats")
    sizes, rows = bench_training.Sizes(**{name: getattr(options, name) for name in names}), []
    for row in bench_training.bench(sizes, only=options.only, seconds=options.seconds, **_where(options)):
        rows.append(row)
        note(f"{row.name}: {row.note or f'{row.milliseconds:.1f} ms'}")
    yield bench_training.table(rows)


def _memory(options: Namespace, note: Note) -> Iterator[str | int]:
    steps = whole("--steps", options.steps, 1)
    run = steps if options.run_steps is None else min(steps, whole("--run-steps", options.run_steps, 2))
    fast = {None: (False,), "only": (True,), "too": (False, True)}[options.fast]
    rows, start = [], time.monotonic()
    with usage_errors():
        check_names(options.models, MODELS)
        check_names([name for name in options.quant if name != "16"], RECIPES)
        for size in options.budgets:
            if size != bench_memory.STAGES:
                parse_bytes(size, "--budgets")
    if options.host:
        yield from _host_memory(options, run, note)
        return
    if run < steps:
        note(f"{run} of {steps} steps are run; seconds count the others as the median of those after the first one")
    for row in bench_memory.budgets(
        options.models,
        options.quant,
        options.budgets,
        bench_memory.Picture(steps, run, options.size),
        fast=fast,
        seconds=options.seconds,
        **_where(options),
    ):
        rows.append(row)
        said = row.failed or f"{row.seconds:.2f} s, peak {row.peak_gb + row.outside_gb:.2f} GB"
        note(f"{time.monotonic() - start:.0f} s: {row.name} {row.recipe} {row.budget}: {said}")
    yield bench_memory.table(rows)


def _host_memory(options: Namespace, steps: int, note: Note) -> Iterator[str]:
    found = []
    how = {"fast": options.fast is not None, "steps": steps, "size": options.size, **_where(options)}
    for stage in host_memory.stages(options.models[0], options.quant[0], options.budgets[0], **how):
        found.append(stage)
        note(f"{stage.name}: {stage.failed or f'{stage.anon:.2f} GB'}")
    yield host_memory.table(found)


BENCHES: dict[str, Callable[[Namespace, Note], Iterator[str | int]]] = {
    "steps": _steps,
    "speed": _speed,
    "errors": _errors,
    "layers": _layers,
    "ways": _ways,
    "loading": _loading,
    "picture": _picture,
    "samplers": _samplers,
    "quality": _quality,
    "lora": _lora,
    "controlnet": _controlnet,
    "maps": _maps,
    "training": _training,
    "parallel": _parallel,
    "memory": _memory,
}
