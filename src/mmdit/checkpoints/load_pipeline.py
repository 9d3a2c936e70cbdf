"""All models of a pipeline, from a file, a folder, a repository, or the embedded model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from encoders import VAE, CLIPText, T5Encoder, Tokenizers
from mmdit.checkpoints.components import REGISTRY, Component, title
from mmdit.checkpoints.float8 import Float8
from mmdit.checkpoints.hub import Variant, fetch, is_repo_id
from mmdit.checkpoints.load import StoredModel, build, open_model, say_notes
from mmdit.checkpoints.locate import TOKENIZERS, Found, ambiguous, locate, with_neighbours
from mmdit.checkpoints.missing import how_to_get, missing
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from quant.recipe import Recipe
from samplers import SamplingDefaults

QUANTIZED: tuple[Component, ...] = ("transformer", "t5")  # the models to which `quant` applies
Check = Callable[[Mapping[Component, StoredModel]], None]
DEMO = "demo"  # names the embedded model where a path is expected


@dataclass
class Components:
    """The models, tokenizers and scheduler settings of a pipeline."""

    transformer: MMDiT
    vae: VAE
    clip_l: CLIPText | None
    clip_g: CLIPText | None
    t5: T5Encoder | None
    tokenizers: Tokenizers
    shift: float | None  # the timestep shift of the scheduler's config, where it is a single number
    sampling: SamplingDefaults | None = None  # the scheduler's config, where it says more than a shift


@dataclass(frozen=True)
class Source:
    """A path with its options, which together say where the models of a pipeline come from."""

    path: str | Path = DEMO
    others: Mapping[Component, str | Path | None] | None = None  # files or folders of single models
    tokenizers: str | Path | None = None  # the folder that holds tokenizer, tokenizer_2 and tokenizer_3
    revision: str | None = None  # branch, tag or commit of a repository
    token: str | bool | None = None
    variant: Variant | None = None  # "fp16" takes the half-precision files of a repository
    cache_dir: str | Path | None = None
    ema: bool = False  # whether averaged weights are loaded instead of the others

    @property
    def is_demo(self) -> bool:
        """Whether it is the embedded model."""
        return isinstance(self.path, str) and self.path == DEMO

    @property
    def is_repository(self) -> bool:
        """Whether it is a repository of the Hugging Face Hub."""
        return isinstance(self.path, str) and is_repo_id(self.path)

    @property
    def name(self) -> str:
        """Its name in the settings of a picture: "demo", owner/name, or an absolute path."""
        return str(self.path) if self.is_demo or self.is_repository else str(Path(self.path).resolve())

    def find(self) -> Found:
        """Locate all models: those at the path, those given as options, and those in files beside a single file.

        Raises:
            FileNotFoundError: there is no such path.
            ValueError: an option does not apply to this kind of path.
            mmdit.HubError: the repository cannot be downloaded.
            CheckpointError: a file is broken, or a folder holds no known model.
        """
        found = locate(self._local(), ema=self.ema)
        for component, given in (self.others or {}).items():
            if given is not None:
                _take(found, component, locate(given, clip=component))
        if self.tokenizers is not None:
            if not Path(self.tokenizers).is_dir():
                raise FileNotFoundError(
                    f"tokenizers={self.tokenizers} is no folder; expected one that holds {', '.join(TOKENIZERS)}"
                )
            found.tokenizers = Path(self.tokenizers)
        return with_neighbours(found)

    def _local(self) -> Path:
        if self.is_repository:
            return fetch(
                str(self.path),
                revision=self.revision,
                token=self.token,
                variant=self.variant,
                cache_dir=self.cache_dir,
            )
        if given := [name for name in ("revision", "variant") if getattr(self, name) is not None]:
            raise ValueError(f"{given[0]} is for a repository of the hub, which {self.path} is not")
        return EMBEDDED if self.is_demo else Path(self.path)


def load(
    source: Source | str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    float8: Float8 = "keep",
    quant: Recipe | None = None,
    *,
    check: Check | None = None,
) -> Components:
    """Load the models and tokenizers of a pipeline from any source; see `mmdit.load_mmdit` for the arguments.

    With `quant`, Linears of transformer and T5 are quantized when they are read, where the files hold no float8.

    The source may be a safetensors file, a shard index, a folder in the official, diffusers or ComfyUI layout, a folder
    of the hub's cache, "owner/name" of a repository on the Hugging Face Hub, or "demo" for the embedded model.
    `check` is called with the located models before any weight is read, and may raise.

    Raises:
        FileNotFoundError, ValueError, mmdit.HubError: see `Source.find`.
        CheckpointError: something is missing (what, from where, to where) or broken.
    """
    source = source if isinstance(source, Source) else Source(source)
    found = source.find()
    models = _opened(found)
    check_together(models)
    assert found.tokenizers is not None, "missing() looks for them"
    tokenizers = Tokenizers.from_folder(found.tokenizers, t5="t5" in models)
    check_tokenizers(models, tokenizers)
    shift, sampling = found.shift, found.sampling  # read before the weights, because it may be refused
    if sampling is not None and sampling.is_plain:
        sampling = None
    if check is not None:
        check(models)
    say_notes(models.values())
    if "t5" not in models:
        lines = (line.strip() for line in how_to_get(["t5"], found))
        warnings.warn(
            f"{found.path} has no T5 encoder; prompts are followed less well. {' '.join(lines)}", stacklevel=3
        )
    built: dict[str, Any] = {
        name: build(model, device, dtype, float8, quant if name in QUANTIZED else None)
        for name, model in models.items()
    }
    return Components(**({"t5": None} | built), tokenizers=tokenizers, shift=shift, sampling=sampling)


def _take(found: Found, component: Component, given: Found) -> None:
    """Locate a model at another path, and use it instead."""
    if component not in given.weights:
        open_model(given, component)  # says what is there instead
    found.weights[component] = given.weights[component]
    found.several.pop(component, None)
    found.configs.pop(component, None)
    found.configs |= {name: config for name, config in given.configs.items() if name == component}
    found.files.headers |= given.files.headers
    found.files.splits |= given.files.splits


def _opened(found: Found) -> dict[Component, StoredModel]:
    """All models of a located checkpoint; CheckpointError where one is missing."""
    if "transformer" not in found.weights:
        open_model(found, "transformer")  # says what there is instead
    for component in sorted(found.several.keys() - found.weights.keys()):
        if not REGISTRY[component].many:
            raise ambiguous(found, component)
    if without := missing(found):
        has = ", ".join(found.weights) or "no model of SD3"
        said = f"{found.path} is not enough for a picture: it has {has}. Missing:"
        raise CheckpointError("\n".join([said, *how_to_get(without, found), *_whole_above(found)]))
    parts = Components.__dataclass_fields__
    return {component: open_model(found, component) for component in found.weights if component in parts}


def _whole_above(found: Found) -> list[str]:
    """A line that names the folder of a whole pipeline, where a folder inside of it was given."""
    folders = (folder for folder in found.path.parents[:2] if (folder / "model_index.json").is_file())
    return [f"  {folder} is a whole pipeline: give that folder" for folder in folders]


def check_together(models: Mapping[Component, StoredModel]) -> None:
    """Raise CheckpointError where models that load one by one do not fit together."""
    config: dict[Component, Any] = {name: model.config for name, model in models.items()}
    transformer, towers = config["transformer"], (config["clip_l"], config["clip_g"])
    pooled = sum(tower.projection_dim or tower.width for tower in towers)
    pairs: list[tuple[Component, str, int, int]] = [
        ("vae", "latent channels", config["vae"].latent_channels, transformer.in_channels),
        ("clip_l", "pooled channels together with CLIP-G", pooled, transformer.pooled_dim),
    ]
    if "t5" in config:
        pairs.append(("t5", "channels", config["t5"].width, transformer.context_dim))
    for name, what, found, expected in pairs:
        if found != expected:
            raise CheckpointError(
                f"{models[name].source}: this {title(name)} has {found} {what}, but the transformer of "
                f"{models['transformer'].source} takes {expected}; they are not of the same model"
            )


def check_tokenizers(models: Mapping[Component, StoredModel], tokenizers: Tokenizers) -> None:
    """Raise CheckpointError where a tokenizer has more tokens than its encoder has embeddings."""
    pairs: list[tuple[Component, Any]] = [
        ("clip_l", tokenizers.clip_l),
        ("clip_g", tokenizers.clip_g),
        ("t5", tokenizers.t5),
    ]
    for name, tokenizer in pairs:
        config: Any = models[name].config if name in models else None
        if tokenizer is not None and config is not None and tokenizer.vocab_size > config.vocabulary:
            raise CheckpointError(
                f"the tokenizer of the {title(name)} has {tokenizer.vocab_size} tokens, but {models[name].source} has "
                f"embeddings for {config.vocabulary}; they are not of the same model"
            )
