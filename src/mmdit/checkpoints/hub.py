"""Checkpoints from the Hugging Face Hub: only the files that the loader reads are downloaded, to the hub's own cache.

Needs huggingface_hub (`pip install "mmdit-lab[hub]"`), which is imported only when something is fetched.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders.tokenizer_files import KNOWN_FILES
from mmdit.checkpoints.components import REGISTRY, ModelKind
from mmdit.checkpoints.files import json_object
from mmdit.checkpoints.locate import TOKENIZERS, locate
from mmdit.checkpoints.missing import TOKENIZER_FILES

Variant = Literal["fp16"]

# The Hub's own rule: at most 96 ASCII letters, digits, "_", "-" and "."; the last two not at an end, nor doubled.
# Names that end in ".safetensors" are taken for files, which is our own rule.
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.))(?!.*\.(?:git|safetensors)$){_NAME}/{_NAME}", re.ASCII)
EXPLICIT = "hf:"  # before "owner/name", where a path could be meant
_LOCAL = re.compile(  # first folders of paths
    "checkpoints?|clip|comfyui|data|diffusion_models|downloads|home|loras|mnt|models?|outputs?|text_encoders|tmp|unet|vae"
    "|weights",
    re.IGNORECASE,
)
_INDEX, _SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
_CLIP_ENOUGH = (
    {"vocab.json", "merges.txt", "tokenizer_config.json"},
    {"vocab.json", "merges.txt", "special_tokens_map.json"},
    {"tokenizer.json"},
)
_T5_ENOUGH = ({"tokenizer.json"}, {"spiece.model"})
_TRANSFORMER = "SD3Transformer2DModel"
_INSTEAD = {"stabilityai/stable-diffusion-3-medium": "stabilityai/stable-diffusion-3-medium-diffusers"}


class HubError(RuntimeError):
    """A repository on the hub cannot be used; the message says in one sentence why, and what to do."""


def is_repo_id(text: str | Path) -> bool:
    """Whether a text names a repository on the hub, "owner/name", and not a path.

    It is taken for a path if the path or its first folder exists, or if the first folder has a usual name for models.
    "hf:owner/name" is always a repository.
    """
    if not isinstance(text, str):
        return False
    if text.startswith(EXPLICIT):
        return _REPOSITORY.fullmatch(text.removeprefix(EXPLICIT)) is not None
    if _REPOSITORY.fullmatch(text) is None or Path(text).exists():
        return False
    first = text.partition("/")[0]
    return _LOCAL.fullmatch(first) is None and not Path(first).exists()


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: Variant | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download the files of a repository that a pipeline needs, and no others; returns the folder that holds them.

    Files that are in the cache already are not downloaded again, and an interrupted download continues where it
    stopped. Without a network (or with HF_HUB_OFFLINE=1) a complete cache is enough.

    Args:
        repo_id: "owner/name" or "hf:owner/name".
        revision: A branch, tag or commit; None is the main branch.
        token: An access token; None takes that of `hf auth login` or HF_TOKEN, False sends none.
        variant: "fp16" prefers the files of half precision where a repository has both.
        cache_dir: The folder of the cache; None is the Hub's own, see HF_HOME.
        endpoint: The address of the Hub; None is HF_ENDPOINT, else https://huggingface.co.

    Raises:
        ValueError: `repo_id` is not the name of a repository.
        HubError: huggingface_hub is not installed; the repository or revision does not exist or may not be read; the
            hub cannot be reached and the cache is incomplete; or the repository holds no complete pipeline.
        mmdit.CheckpointError: a downloaded file is broken, see `mmdit.checkpoints.locate.locate`.
    """
    repo_id = _checked_id(repo_id)
    api = _library(repo_id).HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"), token=token)
    with _explained(repo_id, revision, api.endpoint):
        commit = api.resolve_revision(repo_id, revision=revision, cache_dir=cache_dir).resolved
        chosen = needed(_files(api, repo_id, commit, cache_dir), variant=variant, repository=repo_id)
        small = [name for name in chosen if not name.endswith(".safetensors")]
        for names in (small, chosen):  # refuse another kind of model before its gigabytes are downloaded
            patterns = [glob.escape(name) for name in names]
            folder = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=cache_dir, allow_patterns=patterns))
            _check_kind(folder, repo_id)
    _check_read(folder, chosen)
    return folder


def fetch_control(repo_id: str, kind: str | None = None, *, endpoint: str | None = None) -> Path:
    """Download the ControlNet of a repository; returns its weights, beside which config.json lies if there is one.

    Args:
        repo_id: "owner/name" or "hf:owner/name".
        kind: "canny" or another kind of hint, by which one of several files is chosen.
        endpoint: see `fetch`.

    Raises:
        ValueError: `repo_id` is not the name of a repository.
        HubError: see `fetch`; or the repository holds no ControlNet as .safetensors, or several.
    """
    repo_id = _checked_id(repo_id)
    api = _library(repo_id).HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"))
    with _explained(repo_id, None, api.endpoint):
        commit = api.resolve_revision(repo_id, revision=None, cache_dir=None).resolved
        first, *others = needed_control(_files(api, repo_id, commit, None), kind, repository=repo_id)
        patterns = [glob.escape(name) for name in (first, *others)]
        return Path(api.snapshot_download(repo_id, revision=commit, allow_patterns=patterns)) / first


def needed_control(names: Iterable[str], kind: str | None = None, *, repository: str = "the repository") -> list[str]:
    """The files of a repository's ControlNet, the weights (or the index of their shards) first.

    Args:
        names: all files of the repository, as paths with "/".
        kind: of the hint; one of several files is chosen by the word in its name.
        repository: what messages call it.

    Raises:
        HubError: there is none as .safetensors, or there are several and `kind` names none of them.
    """
    names = frozenset(names)
    for folder in ("", "controlnet/"):
        for mark in ("", ".fp16"):
            if files := _files_of(names, f"{folder}diffusion_pytorch_model", mark):
                return [files[0], *sorted(files[1:]), *(names & {f"{folder}config.json"})]
    files = sorted(name for name in names if re.fullmatch(r"(controlnet/)?[^/]+\.safetensors", name))
    chosen = files if kind is None else [name for name in files if kind in name.lower()] or files
    if len(chosen) != 1:
        has = f"; it has {', '.join(files)}: say which by kind=, such as kind='canny'" if files else ""
        raise HubError(f"{repository} holds {len(files) or 'no'} ControlNets as .safetensors{has}")
    return chosen


def _checked_id(repo_id: str) -> str:
    repo_id = repo_id.removeprefix(EXPLICIT)
    if not _REPOSITORY.fullmatch(repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}")
    return repo_id


def needed(names: Iterable[str], *, variant: Variant | None = None, repository: str = "the repository") -> list[str]:
    """The files of a repository that the loader reads, of the diffusers layout if complete, else of the official one.

    One variant of each model is chosen: without `variant` the plain one, as in the loader; for T5 in the official
    layout the one in 16 bits. Pickles are never chosen.

    Args:
        names: all files of the repository, as paths with "/".
        variant: "fp16" prefers the half-precision files of each model that has them.
        repository: its name in messages.

    Raises:
        HubError: neither layout is complete (the message lists what is missing), or no model has the variant.
    """
    names = frozenset(names)
    diffusers, official = _diffusers(names, variant), _official(names)
    choice = official if diffusers.missing and not official.missing else diffusers
    if choice.missing:
        lacks = diffusers.missing if _INDEX in names else official.missing
        raise HubError(
            f"{repository} holds no complete Stable Diffusion 3 as .safetensors (pickles are never opened); "
            f"missing: {', '.join(lacks)}" + (f"; take {_INSTEAD[repository]}" if repository in _INSTEAD else "")
        )
    if variant is not None and not any(variant in name for name in choice.files):
        raise HubError(f"{repository} has no {variant} files; leave out variant={variant!r}")
    return sorted(choice.files)


@dataclass
class _Choice:
    """The chosen files of one layout, and what the repository lacks for it."""

    files: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def take(self, files: Collection[str], what: str) -> None:
        """Add files; where there are none, note what is missing."""
        self.files += files
        self.missing += () if files else (what,)


def _diffusers(names: frozenset[str], variant: Variant | None) -> _Choice:
    choice = _Choice()
    choice.take(names & {_INDEX}, _INDEX)
    for kind in REGISTRY.values():
        if kind.needed or (not kind.many and any(name.startswith(f"{kind.folder}/") for name in names)):
            choice.take(_weights(names, kind, variant), f"{kind.folder}/ (a complete set of .safetensors)")
    _add_small_files(choice, names, t5=any(name.startswith(f"{REGISTRY['t5'].folder}/") for name in names))
    return choice


def _official(names: frozenset[str]) -> _Choice:
    choice = _Choice()
    root = sorted(name for name in names if re.fullmatch(r"[^/]+\.safetensors", name))
    main = [name for name in root if name.startswith("sd3") and "incl_clips" not in name] or root
    among = f" where it has {', '.join(main)}" if main else ""
    choice.take(main if len(main) == 1 else [], f"one transformer (sd3*.safetensors){among}")
    texts = [name for name in names if re.fullmatch(r"(text_encoders|clip)/[^/]+\.safetensors", name)]
    for component, kind in REGISTRY.items():  # the names of the official files hold these
        if kind.place == "text":
            files = _widest(name for name in texts if component in name)
            choice.take(files, kind.source) if files or kind.needed else None
    # The name of the transformer's file does not tell whether it also holds the VAE.
    choice.files += _widest(name for name in names if re.fullmatch(r"vae/[^/]+\.safetensors", name))
    _add_small_files(choice, names, t5=any("t5" in name for name in texts))
    return choice


def _add_small_files(choice: _Choice, names: frozenset[str], *, t5: bool) -> None:
    """Add the tokenizers, and the configs that exist."""
    configs = {_SCHEDULER, *(f"{kind.folder}/config.json" for kind in REGISTRY.values() if not kind.many)}
    choice.files += names & configs
    for folder in TOKENIZERS if t5 else TOKENIZERS[:2]:
        here = {file for file in KNOWN_FILES if f"{folder}/{file}" in names}
        enough = any(files <= here for files in (_T5_ENOUGH if folder == TOKENIZERS[2] else _CLIP_ENOUGH))
        choice.take([f"{folder}/{file}" for file in here] if enough else [], TOKENIZER_FILES[folder])


def _weights(names: frozenset[str], kind: ModelKind, variant: Variant | None) -> list[str]:
    """The weight files of a component, chosen in the same order as `locate.weights_in`; [] if incomplete."""
    folder = kind.folder
    for stem in dict.fromkeys((kind.stem, *(other.stem for other in REGISTRY.values()))):
        for mark in ("", ".fp16") if variant is None else (f".{variant}", ""):
            if found := _files_of(names, f"{folder}/{stem}", mark):
                return found
        marks = {match[1] for name in names if (match := re.fullmatch(rf"{folder}/{stem}(\.\w+)\.safetensors", name))}
        if len(marks) == 1:  # the only variant, such as bf16
            return _files_of(names, f"{folder}/{stem}", marks.pop())
    return []


def _files_of(names: frozenset[str], stem: str, mark: str) -> list[str]:
    """The index and shards of a variant, or its single file; [] if it is missing or incomplete."""
    index, single = f"{stem}.safetensors.index{mark}.json", f"{stem}{mark}.safetensors"
    if index in names and (shards := _shards(names, f"{stem}{mark}")):
        return [index, *shards]
    return [single] if single in names else []


def _shards(names: frozenset[str], stem: str) -> list[str]:
    """All shards of a file, [] if some are missing."""
    numbered = re.compile(re.escape(stem) + r"-\d+-of-(\d+)\.safetensors")
    sets: dict[str, list[str]] = {}
    for name in names:
        if match := numbered.fullmatch(name):
            sets.setdefault(match[1], []).append(name)
    return [name for total, shards in sets.items() if len(shards) == int(total) for name in shards]


def _widest(files: Iterable[str]) -> list[str]:
    """The preferred one of several variants: not float8 where there is another, and a plain name before "fp16"."""
    return sorted(files, key=lambda name: ("fp8" in name, len(name), name))[:1]


def _library(repo_id: str) -> Any:
    """huggingface_hub, imported when it is needed."""
    try:
        import huggingface_hub.errors  # noqa: PLC0415
    except ImportError as error:
        raise HubError(f'{repo_id} can be fetched with huggingface_hub only: pip install "mmdit-lab[hub]"') from error
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        version = huggingface_hub.__version__
        raise HubError(f'huggingface_hub {version} is too old to fetch {repo_id}: pip install -U "mmdit-lab[hub]"')
    return huggingface_hub


def _files(api: Any, repo_id: str, commit: str, cache_dir: str | Path | None) -> list[str]:
    """All files of a commit, from the cache's notes, or else from the hub."""
    hub = _library(repo_id)
    try:
        return [file.path for file in hub.get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)]
    except hub.errors.CachedRepoTreeNotFoundError:
        return api.list_repo_files(repo_id, revision=commit)


def _check_kind(folder: Path, repo_id: str) -> None:
    """Raise HubError where model_index.json names another model than Stable Diffusion 3."""
    if (folder / _INDEX).is_file():
        kind = json_object(folder / _INDEX).get("transformer")
        if not isinstance(kind, list) or _TRANSFORMER not in kind:
            raise HubError(
                f"{repo_id} is no Stable Diffusion 3: its {_INDEX} says transformer = {kind}, expected {_TRANSFORMER}"
            )


def _check_read(folder: Path, chosen: Collection[str]) -> None:
    """Raise HubError where the cache holds files of earlier downloads that would be read instead of the chosen ones."""
    read = {file.relative_to(folder).as_posix() for file in locate(folder).weights.values()}
    if others := sorted(read - set(chosen)):
        raise HubError(
            f"{folder} holds {', '.join(others)} of another download, which would be read instead of what was chosen; "
            "delete it there, or give another cache_dir"
        )


@contextmanager
def _explained(repo_id: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one sentence each."""
    errors = _library(repo_id).errors
    neither = "" if Path(repo_id).exists() else ", and there is no local folder of that name"
    log_in = "log in with `hf auth login` or give token="
    broken = (OSError, RuntimeError, errors.RevisionResolutionError, errors.HTTPError)  # hf_xet raises RuntimeError
    gated = f"{repo_id} may not be read: accept its licence on {endpoint}/{repo_id}, then {log_in}"
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(gated) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{endpoint} has no revision {revision!r} of {repo_id}{neither}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{endpoint} has no repository {repo_id} that you may see{neither}; if it is private or gated, {log_in}"
        ) from error
    except broken as error:
        causes = _causes(error)
        if any(getattr(getattr(cause, "response", None), "status_code", None) in (401, 403) for cause in causes):
            raise HubError(gated) from error
        first = f"{type(causes[-1]).__name__}: {causes[-1]}".partition("\n")[0]
        raise HubError(
            f"{repo_id} could not be downloaded from {endpoint}, and what is in the cache is incomplete ({first})"
        ) from error


def _causes(error: BaseException) -> list[BaseException]:
    """An error and its causes, the original cause last."""
    return [error] if error.__cause__ is None else [error, *_causes(error.__cause__)]
