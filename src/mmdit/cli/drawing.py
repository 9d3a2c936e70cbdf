"""What `mmdit generate` does: fill in what was not given, check all of it, load the model, draw, write."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any

import torch

from encoders.chunks import Rows, read
from mmdit._version import __version__
from mmdit.checkpoints.hub import is_repo_id
from mmdit.cli.console import Note
from mmdit.cli.controls import check_controls, control_arguments, control_settings, note_other_control
from mmdit.cli.devices import DEMO, choose_threads, computing_on, device_of, dtype_of, is_file, load
from mmdit.cli.inputs import Inputs, read_inputs
from mmdit.cli.long_runs import note_long_run
from mmdit.cli.loras import add_loras, check_loras, note_other_loras
from mmdit.cli.outputs import Output, outputs
from mmdit.cli.ranks import Ranks
from mmdit.cli.usage import DTYPES, UsageError, exists, usage_errors
from mmdit.pipeline.arguments import checked_quant, profile_of, shift_for
from mmdit.pipeline.guidance import Guidance
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.seeds import generators
from mmdit.pipeline.settings import (
    FORMAT_VERSION,
    KEYWORD,
    WORKFLOW_KEYWORD,
    Settings,
    SettingsError,
    grid,
    read_settings,
    text_chunks,
)
from mmdit.utils import whole
from samplers import SCHEDULES, SOLVERS, pick
from samplers.checks import MAX_STEPS

Picture = tuple[str, int]  # prompt and seed
OTHERS = ("clip_l", "clip_g", "t5", "vae", "tokenizers")
OF_THE_HUB = ("revision", "variant")
# Settings that a picture holds, by the option that sets them on the command line.
TAKEN = {
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "guidance": "guidance",
    "sampler": "sampler",
    "schedule": "schedule",
    "shift": "shift",
    "profile": "profile",
    "max_sequence_length": "max_sequence_length",
    "model": "model",
    "dtype": "dtype",
    "quant": "quant",
    "strength": "strength",
    "padding_mask_crop": "padding_mask_crop",
    "keep_outside": "keep_outside",
    "differential": "differential",
    "fit": "fit",
    "outpaint": "outpaint",
    "hires": "hires",
}
LEAST = {"height": 1, "width": 1, "steps": 1, "max_sequence_length": 2, "vae_tile": 64, "batch": 1, "threads": 1}


def draw(options: Namespace, note: Note) -> Iterator[str]:
    """Draw all pictures; yields a line for each one that is written.

    Args:
        options: The options of the command line; None is what was not given.
        note: Tells the user something that is not an error.

    Raises:
        UsageError: an option is wrong, or options do not go together.
        ValueError, OSError, MemoryError, mmdit.HubError: one sentence that says what is wrong and what to do.
    """
    ranks = Ranks.of(options)
    note = ranks.note(note)
    before = None if options.settings is None else _settings(options.settings)
    ask = _filled(options, before, note)
    ask.quiet = ask.quiet or ranks.rank > 0
    profile = _checked(ask, before, note)
    inputs = read_inputs(ask, before, profile, note)
    check_controls(ask, before)
    check_loras(ask, before)
    pictures = list(product(ask.prompts, ask.seed))
    read = [("--image", ask.image), ("--mask", ask.mask), *(("--control", hint.path) for hint in ask.control or ())]
    with usage_errors():
        output, sheet = outputs(ask.output, ask.grid, len(pictures), read=read)
    device = ranks.device(_device(ask, before, note))
    with ranks.together(device):
        yield from _draw(ask, before, profile, inputs, pictures, (output, sheet), device, ranks, note)


def _draw(
    ask: Namespace,
    before: Settings | None,
    profile: Profile,
    inputs: Inputs,
    pictures: Sequence[Picture],
    targets: tuple[Output, Output | None],
    device: torch.device,
    ranks: Ranks,
    note: Note,
) -> Iterator[str]:
    """Load the model, draw the pictures of this rank, and write them."""
    (output, sheet), pipe = targets, _pipeline(ask, profile, device, note)
    add_loras(ask, before, pipe, note)
    if ask.fast:
        pipe.accelerate()
    if pipe.memory_plan is not None:
        note(str(pipe.memory_plan))
    arguments = inputs.arguments | control_arguments(ask, pipe)
    inputs = replace(inputs, arguments=arguments, settings=inputs.settings | control_settings(ask))
    if before is not None and before.model_digest not in ("", pipe.digest) and _is_alike(pipe, before):
        note(f"{ask.settings} was drawn with other weights than those of {ask.model}, so its picture will differ")
    ranks.share(pipe, profile.reads_negative(_scale(ask, profile)))
    own, names = ranks.own(pictures), ranks.names(output.names(), len(pictures))
    note_long_run(pipe, ask, inputs.arguments, len(own), note)
    drawn, numbers = [], ranks.own(range(1, len(pictures) + 1))
    for number, (image, settings) in zip(numbers, _drawn(pipe, ask, own, inputs), strict=True):
        ranks.check()
        if number == 1 and before is not None:
            note_other_control(ask.settings, before.control, settings.control, note)
            if ask.lora:
                note_other_loras(ask.settings, before.loras, settings.loras, note)
        if not ranks.writes:
            continue
        path = output.write(names, image, settings.to_json(), _workflow(settings))
        place = f"; picture {number} of {len(pictures)}" if len(pictures) > 1 else ""
        yield f"wrote {path} ({image.width} x {image.height}, seed {settings.seed}{place})"
        drawn += [(image, settings)] if sheet else []
    if sheet:
        yield _write_grid(sheet, drawn, len(ask.seed))


def _workflow(settings: Settings) -> Mapping[str, Any] | None:
    """The graph that lets ComfyUI draw a picture of profile "comfyui" again."""
    if settings.profile != "comfyui":
        return None
    from mmdit.comfyui.export import workflow_of

    return workflow_of(settings)


def _is_alike(pipe: Pipeline, before: Settings) -> bool:
    """Whether the pipeline has the dtype and quantization of a picture, so that digests can be compared."""
    return (str(pipe.dtype).removeprefix("torch."), pipe.quant) == (before.dtype, before.quant)


def _settings(path: str) -> Settings:
    """The settings of a picture that this command, `mmdit.save_png`, or ComfyUI has written."""
    texts = text_chunks(Path(path))
    if KEYWORD not in texts and WORKFLOW_KEYWORD in texts:
        from mmdit.comfyui.export import from_workflow

        return from_workflow(path)
    found = read_settings(path)
    if isinstance(of := found.get("pictures"), list):
        raise SettingsError(f"{path} is a grid of {len(of)} pictures; give one of these to --settings")
    return Settings.from_json(found, path)


def _filled(options: Namespace, before: Settings | None, note: Note) -> Namespace:
    """The options, filled in from a picture's settings, then from defaults; None is left to profile and model."""
    ask = Namespace(**vars(options))
    said = {} if before is None else {option: getattr(before, setting) for option, setting in TAKEN.items()}
    if before is not None and not before.dtype:  # a picture of ComfyUI does not record the dtype
        del said["dtype"]
    said |= {"seed": [0 if before is None else before.seed]}
    for option, value in ({"negative_prompt": "", "profile": "diffusers"} | said).items():
        if getattr(ask, option) is None:
            setattr(ask, option, value)
    if before is not None and options.model is None and is_repo_id(before.model):
        raise ValueError(
            f"{ask.settings} was drawn with {before.model}, a repository of the Hugging Face Hub, and nothing is "
            f"downloaded because of a picture; if you trust it: --model {before.model}"
        )
    ask.prompts = _prompts(options, before, note)
    if ask.seed == [None]:
        raise ValueError(
            f"{ask.settings} has no seed of its own (it is one of several drawn from one, or from given noise), so it "
            "cannot be drawn again; with --seed N its other settings can be used"
        )
    return ask


def _prompts(options: Namespace, before: Settings | None, note: Note) -> list[str]:
    prompts: list[str] = options.prompt
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, note)
    elif not prompts and before is not None:
        prompts = [before.prompt]
    for text in (*prompts, options.negative_prompt or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"the prompt {text!r} is no Unicode text; check the encoding of the terminal")
    for text in options.prompt:
        if exists(text):
            note(f"{text!r} is drawn as words; the lines of the file of that name are drawn with --prompts {text}")
    return prompts


def read_prompts(path: str, note: Note) -> list[str]:
    """The prompts of a file, or of standard input for "-": its lines that are not blank and do not begin with "#".

    Raises:
        ValueError: the file cannot be read as UTF-8 text, or holds no prompt.
    """
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except FileNotFoundError as error:
        raise ValueError(f"--prompts {path}: there is no such file (a prompt itself goes without --prompts)") from error
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is no UTF-8 text ({error}); save it as UTF-8") from error
    if comments := [line for line in lines if line.startswith("#")]:
        note(f"--prompts {path}: lines that begin with # are left out as comments: {len(comments)}")
    if prompts := [line for line in lines if line and not line.startswith("#")]:
        return prompts
    raise ValueError(f"--prompts {path} holds no prompt; write one on each line")


def _checked(ask: Namespace, before: Settings | None, note: Note) -> Profile:
    """Check all that can be checked without a model; returns the profile to draw with."""
    try:
        profile = _check_values(ask)
    except ValueError as error:
        if before is None:
            raise UsageError(str(error)) from error
        raise ValueError(f"{error}. What the command line does not say is taken from {ask.settings}") from error
    _check_model(ask, before)
    scale = _scale(ask, profile)
    reads = profile.reads_negative(scale) or pick(SOLVERS, ask.sampler or profile.sampler, "sampler").guided
    if ask.negative_prompt and not reads:
        note(f"with profile {profile.name} the negative prompt is not read at guidance scale {scale:g}")
    return profile


def _scale(ask: Namespace, profile: Profile) -> float:
    """The guidance scale of the drawing."""
    return profile.guidance_scale if ask.guidance_scale is None else ask.guidance_scale


def _check_values(ask: Namespace) -> Profile:
    for option, least in LEAST.items():
        if (value := getattr(ask, option)) is not None:
            whole(f"--{option.replace('_', '-')}", value, least)
    if ask.steps is not None and ask.steps > MAX_STEPS:
        raise ValueError(f"--steps must be at most {MAX_STEPS}, got {ask.steps}")
    if ask.guidance_scale is not None and not math.isfinite(ask.guidance_scale):
        raise ValueError(f"--guidance-scale must be a finite number, got {ask.guidance_scale}")
    Guidance.from_text(ask.guidance or "")
    generators(ask.seed, None, len(ask.seed))
    tables: dict[str, Iterable[str]] = {"sampler": SOLVERS, "schedule": SCHEDULES, "dtype": DTYPES}
    for option, table in tables.items():
        if (name := getattr(ask, option)) is not None:
            pick(dict.fromkeys(table), name, option)
    shift_for(ask.shift, 1.0, (1, 1), 1)
    checked_quant(ask.quant)
    return profile_of(ask.profile, ask.preset)


def _check_model(ask: Namespace, before: Settings | None) -> None:
    """Raise ValueError where options and the kind of model do not go together."""
    if before is not None and not ask.model:
        raise ValueError(f"{ask.settings} does not say with which model it was drawn; give --model")
    got = "no --model is given" if ask.model is None else f"got {ask.model}"
    one_file, is_repository = (ask.model and check(ask.model) for check in (is_file, is_repo_id))
    kinds = {"a single file": (one_file, OTHERS), "a repository of the Hugging Face Hub": (is_repository, OF_THE_HUB)}
    for kind, (fits, options) in kinds.items():
        given = [option.replace("_", "-") for option in options if getattr(ask, option) is not None]
        if given and not fits:
            raise UsageError(f"--{given[0]} goes with {kind} as --model, {got}")


def _device(ask: Namespace, before: Settings | None, note: Note) -> torch.device:
    """Where to draw: the same kind of device draws the same picture again."""
    if before is None or ask.device is not None or not before.device:
        return device_of(ask.device)
    try:
        return device_of(before.device)
    except ValueError:
        device = device_of(None)
        note(f"{ask.settings} was drawn on {before.device}, which is not here; on {device.type} pixels differ a little")
        return device


def _pipeline(ask: Namespace, profile: Profile, device: torch.device, note: Note) -> Pipeline:
    if ask.settings is None and ask.model in (None, DEMO):
        said = "no --model given: " if ask.model is None else ""
        note(f"{said}drawing with the embedded model, which knows a few shapes and colours")
    choose_threads(ask.threads, ask.model, device)
    dtype = dtype_of(ask.dtype, device)
    pipe = load(
        ask.model,
        device=device,
        dtype=dtype,
        beside={name: getattr(ask, name) for name in OTHERS},
        hub={name: getattr(ask, name) for name in OF_THE_HUB},
        profile=profile,
        preset=ask.preset,
        offload=ask.offload,
        memory=ask.memory,
        quant=ask.quant,
    )
    if ask.device in (None, "auto") or ask.dtype is None:
        note(computing_on(device, dtype))
    return pipe


def _drawn(
    pipe: Pipeline, ask: Namespace, pictures: Sequence[Picture], inputs: Inputs
) -> Iterator[tuple[Any, Settings]]:
    """All pictures in their order, each with its settings."""
    for batch in _batches(pipe, ask, pictures):
        try:
            with _hint_noise(pipe, batch[0][1]):
                drawn = pipe(
                    [prompt for prompt, _ in batch],
                    ask.negative_prompt,
                    height=ask.height,
                    width=ask.width,
                    num_inference_steps=ask.steps,
                    guidance_scale=ask.guidance_scale,
                    guidance=Guidance.from_text(ask.guidance) if ask.guidance else None,
                    sampler=ask.sampler,
                    schedule=ask.schedule,
                    shift=ask.shift,
                    seed=[seed for _, seed in batch],
                    max_sequence_length=ask.max_sequence_length,
                    vae_tile=ask.vae_tile,
                    progress=False if ask.quiet else None,
                    **inputs.arguments,
                )
        except MemoryError as error:
            options = "--memory 8GB, --vae-tile 256, a smaller --batch, --height and --width, --dtype bfloat16"
            raise MemoryError(f"{error}. On the command line: {options}") from error
        for image, settings in zip(drawn.images, drawn.settings, strict=True):
            yield image, replace(settings, **inputs.settings)


@contextmanager
def _hint_noise(pipe: Pipeline, seed: int) -> Iterator[None]:
    """Seed torch's global generator, from which some profiles draw the noise of hints, as long as a batch is drawn."""
    with torch.random.fork_rng([pipe.device] if pipe.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _batches(pipe: Pipeline, ask: Namespace, pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """The batches of pictures, in order: at most --batch pictures, whose prompts have equal lengths for the encoders.

    Shorter prompts would be padded to the longest prompt of a batch, which changes their pictures.
    """
    for _, alike in groupby(pictures, key=lambda picture: ask.batch > 1 and _lengths(pipe, ask, picture[0])):
        while batch := list(islice(alike, ask.batch)):
            yield batch


def _lengths(pipe: Pipeline, ask: Namespace, prompt: str) -> tuple[tuple[int, int], ...]:
    """Chunks and their length, as each encoder reads a prompt."""
    rules, tokenizers = pipe.profile.text, pipe.tokenizers
    if ask.max_sequence_length is not None:
        rules = replace(rules, t5_length=ask.max_sequence_length)
    lengths = (rules.clip_length, rules.clip_length, rules.t5_length)
    pairs = zip((tokenizers.clip_l, tokenizers.clip_g, tokenizers.t5), lengths, strict=True)
    rows = [Rows.of([read(prompt, one, rules)], one, one.pad, length) for one, length in pairs if one is not None]
    return tuple((own.chunks, own.length) for own in rows)


def _write_grid(sheet: Output, drawn: Sequence[tuple[Any, Settings]], columns: int) -> str:
    """Write all pictures side by side, a row for each prompt; the settings of all go with them."""
    image = grid([image for image, _ in drawn], columns)
    settings = [settings.to_json() for _, settings in drawn]
    about = {"pictures": settings, "format_version": FORMAT_VERSION, "library_version": __version__}
    path = sheet.write(sheet.names(), image, about)
    return f"wrote {path} ({image.width} x {image.height}, grid of {len(drawn) // columns} x {columns})"
