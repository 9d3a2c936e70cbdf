"""Pictures with their settings: PNG files with the settings of the drawing in a text chunk, and grids of pictures.

The chunk has the keyword "mmdit" and holds strict JSON. It is ASCII (other characters are escaped) in a tEXt chunk, so
programs that copy text chunks keep it intact. It is parsed before it is written, so whatever is written can be read.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NoReturn, Self, get_args, get_type_hints

import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor, nn

from mmdit._version import __version__
from mmdit.models.lora import all_beside
from mmdit.pipeline.images import png_path
from mmdit.pipeline.prompts import Prompts
from mmdit.utils import replacing
from quant.tensor import Float8Tensor

KEYWORD = "mmdit"
WORKFLOW_KEYWORD = "prompt"  # ComfyUI's keyword for a graph in API form
FORMAT_VERSION = (
    5  # of the settings; a new field needs a new version, and `Settings.from_json` fills it in for old versions
)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ORIGINAL = "Give the PNG as mmdit-lab wrote it, or what Settings.to_json() gave; other programs may drop settings"
_EXACT = 2**53  # up to here, every whole number has an exact float
_JSON = "give Unicode strings, finite numbers, bools, None, and lists and dicts of these"
MAX_T5_TOKENS = 2**16  # that `max_sequence_length` may ask for
# The smallest and the largest value of each number, so that a picture from elsewhere cannot demand a huge drawing.
_BOUNDS = {
    "seed": (-(2**63), 2**64 - 1),
    "height": (1, 2**16),
    "width": (1, 2**16),
    "num_inference_steps": (1, 10**5),
    "guidance_scale": (-1e9, 1e9),
    "shift": (0, 1e9),
    "max_sequence_length": (2, MAX_T5_TOKENS),
    "strength": (0, 1),
    "padding_mask_crop": (0, 2**16),
    "differential": (0, 1),
}
# The version in which a setting was added; before, its default was meant.
_ADDED = {
    "guidance": 2,
    "model_digest": 3,
    **dict.fromkeys(("image", "image_digest", "mask_image", "mask_digest", "strength", "padding_mask_crop"), 4),
    **dict.fromkeys(("keep_outside", "differential", "hires", "fit", "outpaint", "control"), 4),
    **dict.fromkeys(("loras", "control_files"), 5),
}
# Exceptions of Pillow for broken files; truncated chunks raise IndexError, struct.error and others.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# Fields with a default that the last line of a repr does not list.
_SHOWN = ("guidance", "model_digest", "library_version", "format_version")


class SettingsError(ValueError):
    """Settings cannot be written or read; the message tells where, what was found, what was expected, what to do."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """The settings of one picture, complete, with every default filled in.

    Raises:
        SettingsError: a value has the wrong type, is not finite or not Unicode text; all of them are listed.
    """

    prompt: str
    negative_prompt: str
    seed: (
        int | None
    )  # None where the picture has no seed of its own: with a generator, latents, or one seed for a batch
    height: int  # pixels
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    shift: float
    profile: str  # its name
    max_sequence_length: int | None  # T5 tokens; None is the profile's number
    model: str  # the absolute path, a repository of the hub, or "demo"
    dtype: str  # float32, bfloat16 ...
    quant: str | None  # recipe of float8; None is none
    device: str  # cpu, cuda ...: the kind, without a number
    guidance: str = ""  # beside guidance_scale, as `mmdit.Guidance.from_text` reads it; since version 2
    model_digest: str = ""  # of the transformer's weights, see `digest_of`; "" where it is not known; since version 3
    # Of a drawing that starts from a picture, see `mmdit.Pipeline.__call__`; since version 4.
    image: str = ""  # the name of the file; "" where it is not known
    image_digest: str = ""  # of its pixels, see `mmdit.pipeline.image_inputs.Picture`; "" without a picture
    mask_image: str = ""
    mask_digest: str = ""
    strength: float | None = None  # None without a picture
    padding_mask_crop: int | None = None
    keep_outside: bool = False
    differential: float = 0.0
    fit: str = ""  # how the command line brought the picture to this size: crop, pad or stretch
    outpaint: str = ""  # the borders that the command line added, in pixels: LEFT,TOP,RIGHT,BOTTOM,FEATHER
    hires: str = ""  # a second pass, as `mmdit.Hires.from_text` reads it
    # ControlNets, joined by ";": kind:scale:start:end:net=digest:hint=digest of each.
    control: str = ""
    # Since version 5, see `mmdit.pipeline.used_files`: LoRAs with files and digests; files of ControlNets and hints.
    loras: str = ""
    control_files: str = ""  # "" where they were not given as files on the command line
    library_version: str = __version__
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if mistakes := _mistakes(vars(self)):
            raise SettingsError(f"settings: {'; '.join(mistakes)}")
        _check_version("settings", vars(self))

    def __repr__(self) -> str:
        """What to read at a glance; `to_json` has every value as it is."""
        against = f", against {_excerpt(self.negative_prompt)}" if self.negative_prompt else ""
        more = f" ({_excerpt(self.guidance)})" if self.guidance else ""
        steps = f"{self.num_inference_steps} steps of {self.sampler} on {self.schedule}"
        digest = f" (digest {self.model_digest})" if self.model_digest else ""
        quant = f", quantized to {self.quant}" if self.quant else ""
        length = "" if self.max_sequence_length is None else f", {self.max_sequence_length} T5 tokens"
        lines = [
            f"Settings of {_excerpt(self.prompt)}{against}",
            f"seed {self.seed}, {self.width} x {self.height} pixels, {steps}, shift {self.shift:g}, guidance "
            f"{self.guidance_scale:g}{more}",
            f"{self.model}{digest}, {self.dtype} on {self.device}{quant}, profile {self.profile}{length}",
        ]
        others = [one for one in fields(self) if one.default is not MISSING and one.name not in _SHOWN]
        given = {one.name: getattr(self, one.name) for one in others if getattr(self, one.name) != one.default}
        lines += [", ".join(f"{name} {_excerpt(str(value))}" for name, value in given.items())] if given else []
        return "\n  ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `save_png` writes: strings, finite numbers and None, by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str | Path = "settings") -> Self:
        """Settings from an object of `to_json` or `read_settings`; errors name the file `where`. 7 is accepted for 7.0.

        Raises:
            SettingsError: the format is newer; or keys are unknown, missing or of a wrong type; all of them are listed.
        """
        _check_version(where, found)
        defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        older = {name: defaults[name] for name, version in _ADDED.items() if found["format_version"] < version}
        found = older | dict(found) | {"format_version": FORMAT_VERSION}
        names = _types()
        known = {name: value for name, value in found.items() if name in names}
        odd = [f"{name!r} is unknown" for name in found if name not in names]
        odd += [f"{name} is missing" for name in names if name not in found]
        expected = [f"expected are {', '.join(names)}"] if odd else []
        if mistakes := [*odd, *_mistakes(known), *expected]:
            raise SettingsError(f"{where}: {'; '.join(mistakes)}. {_ORIGINAL}")
        known |= {name: float(value) for name, value in known.items() if float in names[name] and value is not None}
        return cls(**known)


def _excerpt(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}... ({len(text)} characters)"


def settings_of(
    pair: tuple[Prompts, Prompts | None],
    per_prompt: int,
    seeds: Sequence[int | None],
    common: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Settings, ...]:
    """The settings of each picture of a call; () where a conditioning was given instead of a prompt.

    Args:
        pair: the prompts and the negative prompts, which are None where no unconditional branch runs.
        per_prompt: number of pictures of each prompt.
        seeds: the seed of each picture.
        common: the other settings, which all pictures share.
        own: further settings of each picture.
    """
    prompts, negatives = pair
    if prompts.texts is None or (negatives is not None and negatives.texts is None):
        return ()
    against = repeat("") if negatives is None or negatives.texts is None else negatives.texts
    texts = [both for both in zip(prompts.texts, against, strict=False) for _ in range(per_prompt)]
    return tuple(
        Settings(prompt=prompt, negative_prompt=negative, seed=seed, **common, **more)
        for (prompt, negative), seed, more in zip(texts, seeds, own or [{}] * len(seeds), strict=True)
    )


def digest_of(model: nn.Module) -> str:
    """A digest of 16 hexadecimal digits, over up to 16 values of each weight, wherever each weight is.

    It tells whether a model is the one that drew a picture, in the same dtype and with the same quantization.
    """
    parts: list[Tensor] = []
    attached = [tensor for part in all_beside(model).values() for tensor in part.buffers(recurse=False)]
    for weight in (*model.parameters(), *attached):
        values = weight.qdata.view(torch.uint8) if isinstance(weight, Float8Tensor) else weight.detach()
        flat = values.reshape(-1)
        parts.append(flat[:: max(1, flat.numel() // 16)][:16].double())
    if len({part.device for part in parts}) > 1:  # where models take turns, some weights wait on the host
        parts = [part.cpu() for part in parts]
    return sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()[:16]


def save_png(
    image: Image.Image,
    path: str | Path,
    settings: Settings | Mapping[str, Any],
    *,
    workflow: Mapping[str, object] | None = None,
) -> Path:
    """Write a picture with its settings; it appears under its name only when it is complete.

    Args:
        image: of a mode that PNG has (RGB, RGBA, L ...); its pixels are kept as they are.
        path: ends in .png.
        settings: `output.settings[0]`, or JSON values by name; `format_version` must be among them.
        workflow: a graph in API form for ComfyUI, which then opens the file, such as `mmdit.to_workflow(settings)`.

    Raises:
        ValueError: another ending.
        SettingsError: a value that JSON does not keep (NaN, a tuple, a lone surrogate ...), or no known version.
    """
    path = png_path(path)
    if not isinstance(settings, Settings | Mapping):
        hint = "; give the settings of this picture, such as output.settings[0]" if isinstance(settings, tuple) else ""
        raise TypeError(f"settings is {type(settings).__name__}, expected mmdit.Settings or a dict{hint}")
    settings = settings.to_json() if isinstance(settings, Settings) else settings
    _check_version(path, settings)
    info = PngInfo()
    info.add_text(KEYWORD, _written(path, settings))
    if workflow is not None:
        info.add_text(WORKFLOW_KEYWORD, _written(path, workflow))
    with replacing(path) as part:
        image.save(part, format="png", pnginfo=info)
    return path


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` put into a picture.

    Raises:
        OSError: the file cannot be opened.
        SettingsError: the file is not a PNG or is broken; it has no settings of mmdit (the message names the program
            whose settings it has instead); or the settings are not a strict JSON object or have a newer format.
    """
    path = Path(path)
    texts = text_chunks(path)
    if KEYWORD not in texts:
        raise SettingsError(f"{path} has no {KEYWORD!r} chunk with settings; {_instead(texts)}")
    try:
        found = _parsed(texts[KEYWORD])
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: the {KEYWORD!r} chunk is not strict JSON ({error}). {_ORIGINAL}") from error
    if not isinstance(found, dict):
        raise SettingsError(
            f"{path}: the {KEYWORD!r} chunk is a JSON {type(found).__name__}, expected an object. {_ORIGINAL}"
        )
    _check_version(path, found)
    return found


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in a grid, row by row, in RGB; unused cells are black.

    Args:
        images: at least one picture.
        columns: number of columns; None is that of the smallest square grid.

    Raises:
        ValueError: there is no picture, the pictures have several sizes, or `columns` is below 1.
    """
    if not images:
        raise ValueError("no pictures for a grid; give at least one")
    if other := [i for i, image in enumerate(images) if image.size != images[0].size]:
        sizes = [f"{width} x {height}" for width, height in (images[0].size, images[other[0]].size)]
        raise ValueError(f"picture 0 is {sizes[0]}, picture {other[0]} is {sizes[1]}; a grid takes one size")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    across = min(columns or math.isqrt(len(images) - 1) + 1, len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (across * width, -(-len(images) // across) * height))
    for i, image in enumerate(images):
        sheet.paste(image.convert("RGB"), (i % across * width, i // across * height))
    return sheet


@cache
def _types() -> dict[str, tuple[type, ...]]:
    """The types that each setting accepts; a whole number is accepted for a float."""
    hints = get_type_hints(Settings)
    kinds = {name: get_args(hint) or (hint,) for name, hint in hints.items()}
    return {name: (*kind, int) if float in kind else kind for name, kind in kinds.items()}


def _mistakes(values: Mapping[str, object]) -> list[str]:
    return [said for name, value in values.items() if (said := _mistake(name, value, _types()[name]))]


def _mistake(name: str, value: Any, types: tuple[Any, ...]) -> str | None:
    found = f"{name} is {_shown(value)}"
    if (isinstance(value, bool) and bool not in types) or not isinstance(value, types):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
        return f"{found} ({type(value).__name__}), expected {wanted}"
    if isinstance(value, str) and (lone := [letter for letter in value if "\ud800" <= letter <= "\udfff"]):
        return f"{found}, which holds the lone surrogate U+{ord(lone[0]):X} and is no Unicode text; leave it out"
    if float in types and value is not None and not _is_finite(value):
        return f"{found}, expected a finite float"
    if name in _BOUNDS and value is not None and not _BOUNDS[name][0] <= value <= _BOUNDS[name][1]:
        return f"{found}, expected a number from {_BOUNDS[name][0]:g} to {_BOUNDS[name][1]:g}"
    return None


def _is_finite(number: float | int) -> bool:
    return math.isfinite(number) if isinstance(number, float) else abs(number) <= _EXACT


def _shown(value: object) -> str:
    """The value as text of at most one line."""
    try:
        return shortened(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a long {type(value).__name__}"


def _check_version(where: str | Path, settings: Mapping[str, object]) -> None:
    version = settings.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SettingsError(f"{where}: format_version is {_shown(version)}, expected {FORMAT_VERSION}. {_ORIGINAL}")
    if version > FORMAT_VERSION:
        raise SettingsError(
            f"{where}: format_version is {_shown(version)} (library_version "
            f"{_shown(settings.get('library_version'))}), mmdit-lab {__version__} reads up to {FORMAT_VERSION}; "
            "update it"
        )


def _written(path: Path, settings: Mapping[str, object]) -> str:
    for name, value in settings.items():
        try:
            back = _parsed(json.dumps({name: value}, allow_nan=False, sort_keys=True))
        except (TypeError, ValueError, RecursionError) as error:
            raise SettingsError(f"{path}: setting {_odd(name, value)} ({error}); {_JSON}") from error
        if back != {name: value}:
            raise SettingsError(f"{path}: setting {_odd(name, value)} (it comes back as {_shown(back)}); {_JSON}")
    return json.dumps(dict(settings), allow_nan=False, sort_keys=True)


def _odd(name: object, value: object) -> str:
    return f"{_shown(name)} is {_shown(value)}, which JSON does not keep"


def _parsed(text: str) -> Any:
    """Parse strict JSON (each key once, finite numbers, Unicode text), or raise ValueError or RecursionError."""
    found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    json.dumps(found, ensure_ascii=False).encode()  # an escape can encode a lone surrogate, which UTF-8 cannot
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits} is beyond every float")
    return number


def text_chunks(path: Path) -> dict[str, str]:
    """All text chunks of a PNG, by keyword.

    Raises:
        OSError: the file cannot be opened.
        SettingsError: it is no PNG, or a broken one.
    """
    with path.open("rb") as file:
        if (start := file.read(len(_SIGNATURE))) != _SIGNATURE:
            raise SettingsError(
                f"{path} is not a PNG: it begins with {start!r}, a PNG with {_SIGNATURE!r}. {_ORIGINAL}"
            )
        file.seek(0)
        try:
            with Image.open(file, formats=["PNG"]) as picture:
                assert isinstance(picture, PngImageFile)
                return dict(picture.text)  # reads the whole file, because some programs put text after the pixels
        except _BROKEN as error:
            raise SettingsError(f"{path} is a broken PNG ({error}); copy or download it again") from error


def _instead(texts: Mapping[str, str]) -> str:
    """A hint about text chunks of other programs: whose they are, and what to do."""
    if comfy := [repr(name) for name in ("prompt", "workflow") if name in texts]:
        return f"it looks like one of ComfyUI, with {' and '.join(comfy)}: run it with mmdit run, or open it there"
    if "parameters" in texts:
        return "it looks like one of AUTOMATIC1111's web UI, with 'parameters': open it there under PNG Info"
    found = ", ".join(map(repr, texts)) or "none"
    return f"text chunks that it has: {found}. {_ORIGINAL}"
