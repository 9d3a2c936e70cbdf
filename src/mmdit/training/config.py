"""The settings of a training run: one frozen dataclass, in and out of JSON, every field documented.

JSON has no comments. In a config file, a key that begins with "//" is a comment: it is not read, and its value may be
anything. `commented` writes one before each setting.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, Self, get_args, get_origin, get_type_hints

from encoders.json_files import described, read_json
from mmdit.training.rates import Schedule
from mmdit.utils import range_words
from quant.recipe import RECIPES
from samplers.training import MODE_SCALES

Method = Literal["lora", "full", "controlnet"]
AdapterKind = Literal["lora", "dora", "lokr"]
Naming = Literal["diffusers", "comfyui", "kohya"]
Optimizer = Literal["adamw", "adamw8bit"]
Timesteps = Literal["logit_normal", "mode", "cosmap", "uniform"]
Weighting = Literal["none", "sigma_sqrt", "cosmap", "logit_normal"]
Precision = Literal["bfloat16", "float32", "float64"]

ATTENTION: Final = ("joint_blocks.*.attn.qkv", "joint_blocks.*.attn.proj")
_COMMENT: Final = "//"


class ConfigError(ValueError):
    """A training config cannot be used; the message names the key, what was found and what was expected."""


def _setting(
    default: Any,
    said: str,
    least: int | float = -math.inf,
    most: int | float = math.inf,
    *,
    above: int | float = -math.inf,
) -> Any:
    """A field with its description and its range: from `least` to `most`, and greater than `above`."""
    return field(default=default, metadata={"said": said, "least": least, "most": most, "above": above})


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a training run; the description of each is in its field's metadata, see `settings`."""

    method: Method = _setting("lora", "what is trained: lora (an adapter), full (the transformer) or controlnet")
    model: str = _setting("demo", "folder or file of the base model, owner/name on the hub, or demo")
    data: str = _setting("data", "folder of pictures with captions: NAME.txt or NAME.json each, or metadata.jsonl")
    output: str = _setting("trained", "folder of checkpoints, log, sample pictures and the result")
    seed: int = _setting(0, "seed of the adapter's start, of the order of the data, and of noise and times", 0, 2**63)

    size: int = _setting(1024, "side of a square picture in pixels; buckets of other shapes have about its area", 16)
    multiple: int = _setting(64, "sides of pictures are multiples of this number of pixels, itself one of 16", 16)
    most_ratio: float = _setting(2.0, "largest ratio of the sides of a bucket; 1 crops every picture to a square", 1)
    text_tokens: int = _setting(256, "T5 tokens of a caption", 0, 512)
    caption_dropout: float = _setting(0.1, "share of samples whose caption is replaced by the empty one", 0, 1)
    latents: Literal["sample", "mode"] = _setting(
        "mode", "mode of the VAE's distribution, or a sample (diffusers' scripts)"
    )
    cache: str | None = _setting(None, "folder of cached latents and text embeddings; null is OUTPUT/cache")

    steps: int = _setting(1000, "number of optimizer steps", 1)
    batch_size: int = _setting(1, "samples of a forward pass, on each process", 1)
    accumulation: int = _setting(1, "forward and backward passes per optimizer step, whose gradients are averaged", 1)
    optimizer: Optimizer = _setting("adamw", "adamw, or adamw8bit (states in 8 bits; needs torchao)")
    learning_rate: float = _setting(1e-4, "peak of the learning rate", above=0)
    schedule: Schedule = _setting("constant", "learning rate after the warmup: constant, linear or cosine (to 0)")
    warmup: int = _setting(0, "steps in which the learning rate rises from 0", 0)
    betas: tuple[float, float] = _setting((0.9, 0.999), "AdamW's decay of the first and second moment", 0, 1)
    epsilon: float = _setting(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = _setting(1e-2, "AdamW's weight decay", 0)
    clip: float | None = _setting(1.0, "largest norm of all gradients together; null does not clip", above=0)
    fused_backward: bool = _setting(
        False,
        "step each parameter as soon as its gradient is there, and free it unchecked; needs accumulation 1, clip null",
    )
    ema: float | None = _setting(None, "decay of the average of the trained weights, which is what is written", 0, 1)

    timesteps: Timesteps = _setting("logit_normal", "density of the times: logit_normal, mode, cosmap or uniform")
    logit_mean: float = _setting(0.0, "mean of logit_normal; above 0 favours noise")
    logit_std: float = _setting(1.0, "standard deviation of logit_normal", above=0)
    mode_scale: float = _setting(1.29, "scale of mode; above 0 favours the middle", *MODE_SCALES)
    shift: float | None = _setting(None, "shift of the times towards noise; null is the model's, usually 3", above=0)
    weighting: Weighting = _setting("none", "weight of the loss by time: none, sigma_sqrt, cosmap or logit_normal")

    adapter: AdapterKind = _setting("lora", "kind of adapter: lora, dora or lokr")
    rank: int = _setting(16, "rank of the adapter", 1)
    alpha: float | None = _setting(None, "the adapter's change is scaled by alpha / rank; null is the rank", above=0)
    targets: tuple[str, ...] = _setting(ATTENTION, "globs of the Linears that get an adapter, in official names")
    split_qkv: bool = _setting(True, "one lora or dora for each of q, k and v, as in diffusers, or one for all three")
    lokr_factor: int = _setting(8, "largest size of the small factor of lokr", 1)
    naming: Naming = _setting("diffusers", "names in the written LoRA: diffusers (PEFT), comfyui or kohya")

    trained: tuple[str, ...] = _setting(("*",), "full: globs of the parameters that are trained")
    control_kind: str | None = _setting(None, "controlnet: kind of the hint (canny, depth ...); null does not say")
    control_blocks: int = _setting(6, "controlnet: number of blocks of a new net", 1)
    controlnet: str | None = _setting(None, "controlnet: file of a net to go on from; null starts a new one")

    device: str | None = _setting(None, "cpu, cuda, cuda:1 ...; null takes a GPU where there is one")
    dtype: Precision = _setting("bfloat16", "dtype of the base model; adapters are float32 or wider")
    quant: str | None = _setting(None, "float8 recipe of the frozen base of an adapter, such as fp8; null is none")
    quant_gradient: Literal["full", "e5m2"] = _setting(
        "full",
        "with quant: gradients through the base in its dtype (full), or rounded to float8 E5M2, in float8 products",
    )
    checkpoint_blocks: bool = _setting(True, "compute each block's activations again in the backward pass")
    keep_attention: bool = _setting(True, "with checkpoint_blocks and compile: keep the outputs of attention")
    compile: bool = _setting(False, "compile the blocks by torch.compile")
    ahead: int = _setting(
        0, "adapters: steps whose modulation is computed at once, so that adaLN's weights can leave the GPU; 0: none", 0
    )

    log_every: int = _setting(10, "steps between lines of the log", 1)
    time_bins: int = _setting(10, "bins of the timestep by which the log tells the loss", 1)
    block_norms: bool = _setting(False, "log the norm of the gradients of each block")
    tensorboard: bool = _setting(False, "also write TensorBoard events; needs tensorboard")
    save_every: int = _setting(500, "steps between checkpoints", 1)
    keep: int = _setting(2, "newest checkpoints that are kept", 1)
    sample_every: int = _setting(0, "steps between sample pictures; 0 draws none", 0)
    sample_prompts: tuple[str, ...] = _setting((), "prompts of the sample pictures")
    sample_steps: int = _setting(20, "sampler steps of a sample picture", 1)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: a value has another type, is out of range, or excludes another one; the key is named.
        """
        for name, kind in _types().items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        if self.multiple % 16:
            raise ConfigError(f"multiple must be a multiple of 16 pixels, got {self.multiple}")
        if self.size < self.multiple:
            raise ConfigError(f"size {self.size} is less than multiple {self.multiple}")
        if self.quant is not None and self.quant not in RECIPES:
            raise ConfigError(_unknown("quant", self.quant, RECIPES))
        if self.quant is not None and RECIPES[self.quant].activation == "static":
            raise ConfigError(
                f"quant {self.quant!r} needs scales of the activations, which a calibration finds: give a model that "
                f"`mmdit quantize --recipe {self.quant}` has written, and no quant"
            )
        if self.quant is not None and self.method != "lora":
            raise ConfigError(f"quant {self.quant!r} is for the frozen base of method 'lora', not for {self.method!r}")
        if self.method == "lora" and self.adapter == "lokr" and self.naming == "diffusers":
            raise ConfigError("naming 'diffusers' cannot say adapter 'lokr', which PEFT's files lack; take 'comfyui'")
        if self.ahead and self.method != "lora":
            raise ConfigError(f"ahead is for method 'lora', whose modulation is not trained, not for {self.method!r}")
        if self.fused_backward and (self.accumulation > 1 or self.clip is not None):
            raise ConfigError(
                f"fused_backward needs accumulation 1 and clip null: it frees a gradient before the norm of all is "
                f"known; got accumulation {self.accumulation} and clip {self.clip}"
            )
        if self.fused_backward and self.block_norms:
            raise ConfigError("block_norms needs the gradients of all blocks, and fused_backward frees them: drop one")
        if self.sample_every and not self.sample_prompts:
            raise ConfigError(f"sample_every is {self.sample_every}, but there are no sample_prompts")

    @property
    def scale(self) -> float:
        """alpha / rank of the adapter."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def cache_folder(self) -> Path:
        """The folder of cached latents and text embeddings."""
        return Path(self.output) / "cache" if self.cache is None else Path(self.cache)

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any], *, where: str | Path | None = None) -> Self:
        """Read a config from a file, or from an object that was read.

        Args:
            source: a file, or an object.
            where: what an object is called in errors.

        Raises:
            encoders.json_files.JSONError: the file is no JSON object.
            ConfigError: a key is unknown (the nearest names are given), or see `__post_init__`.
        """
        values = read_json(source, kind=dict) if isinstance(source, str | Path) else source
        values = {key: value for key, value in values.items() if not key.startswith(_COMMENT)}
        try:
            if unknown := [key for key in values if key not in _types()]:
                raise ConfigError(_unknown("key", unknown[0], _types(), "the config has no"))
            return cls(**{key: _checked(key, value, _types()[key]) for key, value in values.items()})
        except ConfigError as error:
            name = source if isinstance(source, str | Path) else where
            raise ConfigError(str(error) if name is None else f"{name}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Every setting, as `from_json` takes it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    def commented(self) -> str:
        """The text of a config file that has each setting's description before it, under a key with "//"."""
        lines: dict[str, Any] = {"//": 'Keys that begin with "//" are comments and are not read.'}
        for key, value in self.to_json().items():
            lines |= {f"{_COMMENT} {key}": settings()[key], key: value}
        return json.dumps(lines, indent=2, ensure_ascii=False) + "\n"


def settings() -> dict[str, str]:
    """The description of every setting, by key."""
    return {one.name: one.metadata["said"] for one in dataclasses.fields(TrainingConfig)}


@cache
def _types() -> dict[str, Any]:
    hints = get_type_hints(TrainingConfig)
    return {one.name: hints[one.name] for one in dataclasses.fields(TrainingConfig)}


def _checked(key: str, value: Any, kind: Any) -> Any:
    """The value of a key in its own type: whole numbers become floats where these are expected, lists tuples."""
    options = get_args(kind) if NoneType in get_args(kind) else (kind,)
    if value is None and NoneType in options:
        return None
    (kind,) = (one for one in options if one is not NoneType)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(_unknown(key, value, get_args(kind)))
        return value
    if get_origin(kind) is tuple:
        return _checked_list(key, value, get_args(kind))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        null = " or null" if len(options) > 1 else ""
        raise ConfigError(f"{key} is {described(value)}, expected {_WORDS[kind]}{null}")
    return _in_range(key, value) if kind in (int, float) else value


def _checked_list(key: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    count = None if kinds[-1] is Ellipsis else len(kinds)
    if not isinstance(value, list | tuple) or (count is not None and len(value) != count):
        size = "" if count is None else f" of {count}"
        raise ConfigError(f"{key} is {described(value)}, expected an array{size} of {_SEVERAL[kinds[0]]}")
    return tuple(_checked(key, one, kinds[0]) for one in value)


def _in_range(key: str, value: int | float) -> int | float:
    at = next(one.metadata for one in dataclasses.fields(TrainingConfig) if one.name == key)
    least, most, above = at["least"], at["most"], at["above"]
    if not math.isfinite(value) or not least <= value <= most or value <= above:
        ranges = f" above {above:g}" if above > -math.inf else range_words(least, most)
        raise ConfigError(f"{key} is {value}, expected a finite number{ranges}")
    return value


def _unknown(key: str, value: object, known: Any, said: str = "") -> str:
    near = get_close_matches(str(value), list(known), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    what = f"{said} {key} {value!r}" if said else f"{key} is {value!r}"
    return f"{what}; {hint}Known are {', '.join(map(str, known))}"


_SEVERAL: Final = {float: "numbers", str: "strings"}
_WORDS: Final = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
