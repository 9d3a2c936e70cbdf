"""A checkpoint in words, and whether it loads: `mmdit inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from encoders import Tokenizers
from mmdit.checkpoints.components import REGISTRY, Component
from mmdit.checkpoints.load import StoredModel, check_loads, open_model
from mmdit.checkpoints.load_pipeline import check_together, check_tokenizers
from mmdit.checkpoints.locate import TOKENIZERS, Found, locate, with_neighbours
from mmdit.checkpoints.missing import how_to_get, missing, unknown
from mmdit.checkpoints.safetensors_io import NAMES, CheckpointError
from quant.formats import FLOAT8

_ACTIVATIONS = {
    "none": "not rounded",
    "static": "float8 with the stored input scale",
    "tensor": "float8 with one scale per call",
    "token": "float8 with one scale per token",
}


@dataclass(frozen=True)
class Description:
    """A checkpoint in words, and the reasons why the loader refuses it."""

    text: str
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


def describe(path: str | Path) -> str:
    """The text of `inspect`."""
    return inspect(path).text


def inspect(path: str | Path) -> Description:
    """Describe layout, models, tensors, dtypes, bytes and scales of a checkpoint, and what a picture still needs.

    Every model is built on the meta device and compared with its tensors, as the loader does; no weight is read.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: the path holds no model of Stable Diffusion 3. A model that cannot be loaded is no error; the
            description lists it as a problem.
    """
    found = locate(path)
    if not found.weights and not found.several:
        raise unknown(found)
    if "transformer" in found.weights:  # a transformer is there to draw pictures
        found = with_neighbours(found)
    models, problems = _opened(found)
    lines = [f"{path}", f"layout: {found.layout}", *(line for model in models.values() for line in _model_lines(model))]
    lines += _several_lines(found)
    only_control = bool(models) and all(model.kind.place == "control" for model in models.values())
    lines += [] if only_control else [_tokenizer_line(found)]
    total = sum(lazy.nbytes for model in models.values() for lazy in model.tensors.values())
    lines.append(f"in all: {sum(len(model.tensors) for model in models.values())} tensors, {total / 1e9:.3f} GB")
    if only_control and not problems:
        lines += ["", "complete: mmdit.load_controlnet reads it, and pipe(controlnet=, control_image=) draws with it"]
        return Description("\n".join(lines))
    without = missing(found)
    if not without and not problems:
        problems = _problems_together(found, models)
    lines += ["", *(f"cannot be loaded: {problem}" for problem in problems), *_missing_lines(found, without, problems)]
    return Description("\n".join(lines), tuple(problems))


def _opened(found: Found) -> tuple[dict[Component, StoredModel], list[str]]:
    """The models that load, and why others do not."""
    models, problems = {}, []
    several = (each for each in found.several if each not in found.weights and not REGISTRY[each].many)
    for component in [*found.weights, *several]:
        try:
            model = open_model(found, component)
            check_loads(model)
            models[component] = model
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    return models, problems


def _problems_together(found: Found, models: dict[Component, StoredModel]) -> list[str]:
    """The reasons why models that load one by one, tokenizers and scheduler do not make a pipeline."""
    assert found.tokenizers is not None, "nothing is missing"
    try:
        check_together(models)
        check_tokenizers(models, Tokenizers.from_folder(found.tokenizers, t5="t5" in models))
        _ = found.shift
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _model_lines(stored: StoredModel) -> list[str]:
    dtypes = Counter(NAMES[lazy.dtype] for lazy in stored.tensors.values())
    size = sum(lazy.nbytes for lazy in stored.tensors.values())
    counts = ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
    lines = [
        f"{stored.kind.title}: {stored.kind.words(stored.config)}",
        f"  {stored.source}",
        f"  {len(stored.tensors)} tensors ({counts}), {size / 1e9:.3f} GB",
    ]
    return lines + _float8_lines(stored) + [f"  note: {note}" for note in stored.notes]


def _float8_lines(stored: StoredModel) -> list[str]:
    """Lines about float8: format, spelling, and how many weights have a scale and an input scale."""
    scales = stored.scales
    float8 = Counter(NAMES[lazy.dtype] for lazy in stored.tensors.values() if lazy.dtype in FLOAT8)
    if not float8:
        return []
    formats = ", ".join(f"{count} {name}" for name, count in float8.most_common())
    if not scales.weights:
        return [f"  {scales.spelling}: {formats}"]
    codes = [lazy.codes for lazy in stored.tensors.values() if lazy.codes is not None]
    rows = sum(bool(each.scale.ndim) for each in codes)
    recipes = Counter(each.recipe.activation for each in codes)
    treated = ", ".join(f"{count} {_ACTIVATIONS[name]}" for name, count in recipes.most_common())
    return [
        f"  float8 scales: {len(scales.weights)} weights, {len(scales.inputs)} inputs, spelled as {scales.spelling}",
        f"  kept in float8: {formats}"
        + (f", {rows} with a scale per row" if rows else "")
        + f"; activations: {treated}",
    ]


def _several_lines(found: Found) -> list[str]:
    """Models that lie side by side, of which none is described."""
    return [
        f"{len(files)} {REGISTRY[component].title}s, inspect each by its path: {', '.join(map(str, files))}"
        for component, files in found.several.items()
        if REGISTRY[component].many and component not in found.weights
    ]


def _tokenizer_line(found: Found) -> str:
    if found.tokenizers is None:
        return "tokenizers: none found"
    present = [name for name in TOKENIZERS if (found.tokenizers / name).is_dir()]
    return f"tokenizers: {', '.join(present)} in {found.tokenizers}"


def _missing_lines(found: Found, without: list[str], problems: list[str]) -> list[str]:
    optional = [component for component, kind in REGISTRY.items() if kind.without and component not in found.weights]
    lines = ["missing to draw a picture:", *how_to_get(without, found)] if without else []
    if not without and not problems:
        lines = ["complete: a picture can be drawn with it"]
    for component in optional:
        lines += [f"optional, without it {REGISTRY[component].without}:", *how_to_get([component], found)]
    return lines
