"""Pictures and captions encoded once, and kept in files: latents and text embeddings, as safetensors.

The name of a file is a digest of everything that its contents depend on: the picture's bytes and size, or the caption
and the number of tokens, and the weights of the encoders. So a changed picture is encoded again, and a run on the same
data reads what is there. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import VAE
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import open_tensors, read_header, write_tensors
from mmdit.pictures.read import load_image
from mmdit.pipeline.control_inputs import HintRules
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.settings import digest_of
from mmdit.training.batches import Sample
from mmdit.training.config import TrainingConfig
from mmdit.training.records import DataError, Record, Size, bucket_of, bucket_sizes, read_records
from mmdit.utils import bar

_FULL = (errno.ENOSPC, errno.EDQUOT)
Encode = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Cached:
    """The files of one sample, and the shape of its latent."""

    record: Record
    latent: Path
    text: Path
    hint: Path | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CachedSamples:
    """Samples whose encoded form is in files; each is read when it is asked for."""

    samples: Sequence[Cached]
    empty_text: Path
    sampled_hints: bool = False  # whether a pass draws hints from their distribution, or takes the mean

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each latent."""
        return [one.shape for one in self.samples]

    @cached_property
    def empty(self) -> tuple[Tensor, Tensor]:
        """Context and pooled vector of the empty caption."""
        return read_text(self.empty_text)

    def read(self, index: int) -> Sample:
        """One sample."""
        one = self.samples[index]
        tensors, _ = open_tensors(one.latent)
        context, pooled = read_text(one.text)
        found = Sample(tensors["mean"].read(), tensors["std"].read(), context, pooled)
        if one.hint is None:
            return found
        hint, _ = open_tensors(one.hint)
        return found._replace(hint=hint["mean"].read(), hint_std=hint["std"].read() if self.sampled_hints else None)


def read_text(path: Path) -> tuple[Tensor, Tensor]:
    """Context and pooled vector of a cached text."""
    tensors, _ = open_tensors(path)
    return tensors["context"].read(), tensors["pooled"].read()


def encoded(
    pipe: Pipeline,
    config: TrainingConfig,
    *,
    hints: HintRules | None = None,
    progress: bool | None = None,
    folder: Path | None = None,
) -> CachedSamples:
    """Read the folder of a config, encode what is not in the cache, and return the samples.

    Args:
        pipe: its VAE and text encoders encode, on the device where they are.
        config: data, sizes, tokens and the cache's folder.
        hints: how the hints of a ControlNet are encoded, which is how drawings encode them; None reads no hints.
        progress: whether to show a bar; None shows it in terminals and notebooks.
        folder: of the cache, instead of the config's.

    Raises:
        DataError: see `read_records`; or a picture does not open.
        OSError: the cache cannot be written; for a full disk, the message says how much more it takes.
    """
    records = read_records(config.data, hints=hints is not None)
    cache = Cache(config.cache_folder if folder is None else folder, pipe, config)
    longest = pipe.transformer.config.max_pixels
    sizes = bucket_sizes(config.size, config.multiple, config.most_ratio, longest)
    empty = cache.text("")
    samples = []
    for number, record in enumerate(bar(records, len(records), progress)):
        with _explained(cache, number, len(records)):
            picture = opened(record.picture)
            size = bucket_of(Size(*picture.shape[2:]), sizes)
            latent = cache.latent(record.picture, picture, size)
            hint = None if record.hint is None else cache.latent(record.hint, opened(record.hint), size, hints)
            shape = read_header(latent).entries["mean"].shape
            samples.append(Cached(record, latent, cache.text(record.caption), hint, shape))
    return CachedSamples(samples, empty, hints is not None and hints.sampled)


class Cache:
    """A folder of encoded pictures and texts.

    Args:
        folder: the folder; subfolders `latents` and `texts` are made.
        pipe: encodes.
        config: the number of text tokens.
    """

    def __init__(self, folder: Path, pipe: Pipeline, config: TrainingConfig) -> None:
        self.folder, self.pipe, self.config, self.written = folder, pipe, config, list[int]()

    @cached_property
    def _vae(self) -> str:
        return f"{digest_of(self.pipe.vae)} {self.pipe.vae.config}"

    @cached_property
    def _encoders(self) -> str:
        parts = (self.pipe.clip_l, self.pipe.clip_g, self.pipe.t5)
        return " ".join("none" if one is None else digest_of(one) for one in parts)

    def latent(self, path: Path, picture: Tensor, size: Size, hints: HintRules | None = None) -> Path:
        """The file of a picture's latent distribution: mean and std, float32 [c, h, w] in model space.

        Args:
            path: the file of the picture, whose bytes are part of the key.
            picture: [1, 3, h, w] in [0, 1].
            size: to which it is resized, so that it covers it, and cropped at the centre.
            hints: the rules of hints, which have files of their own; None for a picture.
        """
        rules = "picture" if hints is None else f"hint {hints.values} {hints.shifted}"
        key = _digest(path.read_bytes(), f"{size} {self._vae} {self.pipe.dtype} {rules}".encode())
        return self._file("latents", key, lambda: _moments(self.pipe.vae, fitted(picture, size), hints))

    def text(self, caption: str) -> Path:
        """The file of a caption's context [n, context_dim] and pooled vector [pooled_dim]."""
        tokens, profile = self.config.text_tokens, self.pipe.profile.name
        key = _digest(caption.encode(), f"{tokens} {profile} {self._encoders} {self.pipe.dtype}".encode())
        return self._file("texts", key, lambda: _text(self.pipe, caption, tokens))

    def _file(self, kind: str, key: str, encode: Encode) -> Path:
        path = self.folder / kind / f"{key}.safetensors"
        if not path.exists():
            tensors = encode()
            self.written.append(sum(tensor.nbytes for tensor in tensors.values()))
            write_tensors(path, {name: LazyTensor.of(tensor.cpu()) for name, tensor in tensors.items()})
        return path


def opened(path: Path) -> Tensor:
    """A picture as a tensor [1, 3, h, w] in [0, 1].

    Raises:
        DataError: it does not open.
    """
    try:
        picture = load_image(path, "data").picture
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path} does not open as a picture: {error}; repair it, or remove it and its caption"
        ) from error
    return picture.permute(0, 3, 1, 2)


def fitted(picture: Tensor, size: Size) -> Tensor:
    """A picture [1, 3, h, w] resized so that it covers the size, and cropped at its centre; still in [0, 1]."""
    height, width = picture.shape[2:]
    scale = max(size.height / height, size.width / width)
    covering = max(size.height, round(height * scale)), max(size.width, round(width * scale))
    if covering != (height, width):
        picture = F.interpolate(picture, covering, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (covering[0] - size.height) // 2, (covering[1] - size.width) // 2
    return picture[:, :, top : top + size.height, left : left + size.width]


@torch.no_grad()
def _moments(vae: VAE, picture: Tensor, hints: HintRules | None) -> dict[str, Tensor]:
    weight = next(vae.parameters())
    if hints is not None:
        found = hints.distribution(vae, picture)
    else:
        found = vae.encode((2 * picture - 1).to(weight.device, weight.dtype))
    return {"mean": found.mean[0].float(), "std": found.std[0].float()}


@torch.no_grad()
def _text(pipe: Pipeline, caption: str, tokens: int) -> dict[str, Tensor]:
    found = pipe.encode([caption], max_sequence_length=tokens)
    return {"context": found.context[0].contiguous(), "pooled": found.pooled[0].contiguous()}


@contextmanager
def on_device(models: Mapping[str, nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, these models are on a device; afterwards each is where it was."""
    before = {name: next(model.parameters()).device for name, model in models.items()}
    try:
        for model in models.values():
            model.to(device)
        yield
    finally:
        for name, model in models.items():
            model.to(before[name])


@contextmanager
def _explained(cache: Cache, number: int, total: int) -> Iterator[None]:
    """Say of a full disk how much is there, and how much more it takes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        each = sum(cache.written) / max(number, 1)
        more = f"about {each * (total - number) / 1e6:,.0f} MB more" if number else "more space"
        raise OSError(
            error.errno,
            f"the disk is full: {number} of {total} samples are cached and stay; {more} is needed. Free some space, or "
            "set cache to another folder, and start again",
            str(cache.folder),
        ) from error


def _digest(*parts: bytes) -> str:
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()[:40]
