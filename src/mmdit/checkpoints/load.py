"""Reading models from checkpoints of any layout: strict, tensor by tensor, nothing half loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from encoders.clip import CLIPConfig, CLIPText
from encoders.t5 import T5Config, T5Encoder
from encoders.vae import VAE, VAEConfig
from mmdit.checkpoints import config_json
from mmdit.checkpoints.components import KIND_OF, TITLES, Component, Model, foreign, looks_like, split
from mmdit.checkpoints.float8 import Float8, absorb_scales, disagreeing
from mmdit.checkpoints.keymaps import count, mmdit_rules, partners, to_ours, vae_rules
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.locate import Found, locate, open_weights
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.utils import is_out_of_memory
from quant.formats import FLOAT8
from quant.quantize import linears_of
from quant.spellings import Scales

Config = MMDiTConfig | VAEConfig | CLIPConfig | T5Config
MODULES: dict[Component, type[nn.Module]] = {
    "transformer": MMDiT,
    "vae": VAE,
    "clip_l": CLIPText,
    "clip_g": CLIPText,
    "t5": T5Encoder,
}
COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what layers compute in
_NUMBER = re.compile(r"(?<=\.)\d{4,}(?=\.)")
READERS = 2  # tensors read at a time
_T5_EMBEDDING, _T5_EMBEDDING_TWIN = "shared.weight", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class StoredModel:
    """One model of a checkpoint, under official names and not read yet."""

    component: Component
    source: Path
    tensors: dict[str, LazyTensor]
    config: Config
    scales: Scales  # how the file spelled its float8, if any
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names in the file, where they are others

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that its tensors are stored in."""
        return {lazy.dtype for lazy in self.tensors.values()}


def load_mmdit(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    float8: Float8 = "keep",
) -> MMDiT:
    """The transformer of a checkpoint of any layout, in eval mode.

    Args:
        path: a safetensors file, a shard index, or a folder.
        device: where the weights go, tensor by tensor.
        dtype: to compute in; None keeps what is stored (beside float8: that of the rest, bfloat16 if there is no rest).
        float8: "keep", because that is what such files are for, makes weights of Linears `quant.Float8Tensor`s with the
            codes and scales of the file. With an input scale activations are rounded to float8 too, unless the file
            asks for full precision. Norms, biases, embeddings and convolutions cannot compute in float8 and are
            widened. "dequantize" widens everything, and needs a dtype.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: the file is broken, holds something else, or its tensors are not exactly those of the model.
    """
    return _load(path, "transformer", device, dtype, float8)


def load_vae(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VAE:
    """The VAE of a checkpoint of any layout; see `load_mmdit` for arguments and errors. It has no Linears to keep."""
    return _load(path, "vae", device, dtype, "keep")


def load_clip(
    path: str | Path,
    which: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    float8: Float8 = "keep",
) -> CLIPText:
    """A CLIP text tower, "l" or "g", of a checkpoint of any layout; see `load_mmdit` for arguments and errors."""
    if which not in ("l", "g"):
        raise ValueError(f"which must be 'l' or 'g', got {which!r}")
    return _load(path, "clip_l" if which == "l" else "clip_g", device, dtype, float8)


def load_t5(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    float8: Float8 = "keep",
) -> T5Encoder:
    """The T5 encoder of a checkpoint of any layout; see `load_mmdit` for arguments and errors."""
    return _load(path, "t5", device, dtype, float8)


def open_model(found: Found, component: Component) -> StoredModel:
    """One model of a located checkpoint: names mapped, float8 scales read, config inferred, and no weight read.

    Raises:
        CheckpointError: the checkpoint does not hold this model, or not all of it, or more than it.
    """
    if component not in found.weights:
        raise CheckpointError(_absent(found, component))
    source = found.weights[component]
    stored, metadata = open_weights(source)
    models, left = split(stored)
    model = models.get(component) or models.get(KIND_OF[component])
    if model is None:
        raise CheckpointError(_absent(Found(source, found.layout), component))
    if left:
        raise CheckpointError(
            f"{source}: {len(left)} unexpected tensors beside the {TITLES[component]}: {_some(left)}; "
            f"they look like {looks_like(left)}"
        )
    absorbed, scales = absorb_scales(source, model, stored, metadata)
    tensors, stored_as = _official(source, component, model, absorbed)
    _warn_of_scales(source, disagreeing(absorbed, stored_as.values()))
    try:
        config = config_json.infer(component, {key: lazy.shape for key, lazy in tensors.items()}, found.configs)
    except KeyError as error:
        raise CheckpointError(
            f"{source} is incomplete: the tensor {error} of the {TITLES[component]} is missing; download it again"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return StoredModel(component, source, tensors, config, scales, stored_as)


def model_in_memory(component: Component, model: nn.Module) -> StoredModel:
    """A model in memory as a part that can be written."""
    tensors = {key: LazyTensor.of(tensor) for key, tensor in model.state_dict().items()}
    config: Any = model.config
    return StoredModel(component, Path("memory"), tensors, config, Scales("no float8"))


def empty(part: StoredModel) -> nn.Module:
    """The model of a part on the meta device: shapes and no weights."""
    make: Any = MODULES[part.component]
    with torch.device("meta"):
        return make(part.config)


def build(part: StoredModel, device: torch.device | str, dtype: torch.dtype | None, float8: Float8 = "keep") -> Any:
    """The model of a part, filled tensor by tensor on `device`, in eval mode; see `load_mmdit` for the arguments.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors, or no one dtype to compute in.
    """
    if dtype is not None and dtype not in COMPUTED:
        raise ValueError(f"dtype must be one of {', '.join(map(str, COMPUTED))}, got {dtype}")
    if float8 not in get_args(Float8):
        raise ValueError(f"float8 must be one of {', '.join(map(repr, get_args(Float8)))}, got {float8!r}")
    model = empty(part)
    check_tensors(part, model)
    dtype = _compute_dtype(part, dtype, float8)
    linears = {f"{name}.weight" for name, _ in linears_of(model)} if float8 == "keep" else set()
    kept = {key for key in linears if part.tensors[key].codes is not None}
    device = torch.device(device)
    if device == torch.device("cuda"):  # the current device is a thread's own, and other threads read
        device = torch.device("cuda", torch.cuda.current_device())
    with ThreadPoolExecutor(READERS) as pool:  # one waits for the disk while another fills or casts memory
        read = pool.map(lambda key: _read(part, key, device, dtype, kept), part.tensors)
        state = dict(zip(part.tensors, read, strict=True))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _compute_dtype(part: StoredModel, dtype: torch.dtype | None, float8: Float8) -> torch.dtype:
    """The dtype that was asked for, else the one of what is not float8."""
    if dtype is not None:
        return dtype
    if float8 == "dequantize" and part.dtypes & set(FLOAT8):
        raise CheckpointError(
            f"{part.source} stores the {TITLES[part.component]} in float8, which layers do not compute in: "
            "give a dtype, e.g. dtype=torch.bfloat16"
        )
    wide = {lazy.dtype for lazy in part.tensors.values() if lazy.dtype.is_floating_point and not lazy.widened}
    wide -= set(FLOAT8)
    if len(wide) > 1:
        raise CheckpointError(
            f"{part.source} stores the {TITLES[part.component]} in {', '.join(sorted(map(str, wide)))}, which "
            "layers do not mix: give one dtype, e.g. dtype=torch.bfloat16"
        )
    return wide.pop() if wide else torch.bfloat16


def _warn_of_scales(source: Path, merges: list[tuple[str, ...]]) -> None:
    if merges:
        warnings.warn(
            f"{source}: {len(merges)} layers that are one here have parts with different input scales, first "
            f"{' + '.join(merges[0])}; their weights are kept, and activations are not rounded to float8",
            stacklevel=4,
        )


def check_tensors(part: StoredModel, model: nn.Module) -> None:
    """Raise one CheckpointError that lists every tensor that is missing, unexpected, mis-shaped or not a number."""
    wanted = model.state_dict()
    shapes = [key for key in wanted if key in part.tensors and wanted[key].shape != part.tensors[key].shape]
    integers = [key for key in wanted if key in part.tensors and not part.tensors[key].dtype.is_floating_point]
    problems = [
        _problem("missing", [_in_file(part, key) for key in wanted if key not in part.tensors]),
        _problem("unexpected", [_in_file(part, key) for key in part.tensors if key not in wanted]),
        _problem("of another shape", [_against(part, key, wanted[key]) for key in shapes]),
        _problem("not floating point", [f"{_in_file(part, key)} {part.tensors[key].dtype}" for key in integers]),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{part.source} does not fit the {TITLES[part.component]} that its shapes say: {found}")


def _load(
    path: str | Path, component: Component, device: torch.device | str, dtype: torch.dtype | None, float8: Float8
) -> Any:
    clip = component if component in ("clip_l", "clip_g") else None
    return build(open_model(locate(path, clip=clip), component), device, dtype, float8)


def _read(part: StoredModel, key: str, device: torch.device, dtype: torch.dtype, kept: Collection[str]) -> Tensor:
    lazy = part.tensors[key]
    try:
        if lazy.codes is not None and key in kept:
            return nn.Parameter(lazy.codes.read(dtype, device), requires_grad=False)
        return lazy.read(dtype, device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory on {device} while loading the {TITLES[part.component]} of {part.source}: it takes "
            f"{_size(part, dtype, kept)} in all. Use a smaller dtype (dtype=torch.bfloat16) or another device"
        ) from error


def _size(part: StoredModel, dtype: torch.dtype, kept: Collection[str]) -> str:
    size = sum(prod(lazy.shape) * (1 if key in kept else dtype.itemsize) for key, lazy in part.tensors.items())
    return f"{size} bytes ({size / 1e9:.2f} GB)"


def _official(
    source: Path, component: Component, model: Model, tensors: dict[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, tuple[str, ...]]]:
    """The tensors under official names, and what the file calls them where it has others."""
    _check_numbers(source, tensors)
    if component == "t5":
        return _without_twin(source, tensors), {}
    if model.names == "official":
        return tensors, {}
    rules = (
        mmdit_rules(count(tensors, "transformer_blocks.{i}."))
        if component == "transformer"
        else vae_rules(count(tensors, "encoder.down_blocks.{i}."), count(tensors, "encoder.down_blocks.0.resnets.{i}."))
    )
    try:
        found, left = to_ours(tensors, rules)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if left:
        without = partners(left, rules)
        why = f"missing are {_some(without)}" if without else f"no {TITLES[component]} has them"
        raise CheckpointError(f"{source}: {len(left)} unexpected tensors: {_some(left)}; {why}")
    return found, {rule.ours: rule.theirs for rule in rules}


def _check_numbers(source: Path, names: Iterable[str]) -> None:
    """Blocks are numbered without gaps, so no number is as large as the count of tensors."""
    names = list(names)
    if far := [name for name in names if any(int(number) >= len(names) for number in _NUMBER.findall(name))]:
        raise CheckpointError(f"{source}: {len(far)} unexpected tensors: {_some(far)}; there are no blocks before them")


def _without_twin(source: Path, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """T5 files store the token embedding once or twice; two different ones cannot both be right."""
    twin = tensors.pop(_T5_EMBEDDING_TWIN, None)
    if twin is None:
        return tensors
    kept = tensors.setdefault(_T5_EMBEDDING, twin)
    if kept is twin:
        return tensors

    def load(dtype: torch.dtype, device: torch.device) -> Tensor:
        one, other = (lazy.read(device="cpu").view(torch.uint8) for lazy in (kept, twin))
        if not torch.equal(one, other):
            raise CheckpointError(
                f"{source}: {_T5_EMBEDDING} and {_T5_EMBEDDING_TWIN} differ; they must be one table, "
                "so the file was written wrongly"
            )
        del one, other
        return kept.load(dtype, device)

    tensors[_T5_EMBEDDING] = LazyTensor(kept.shape, kept.dtype, load)
    return tensors


def _absent(found: Found, component: Component) -> str:
    holds = " and ".join(TITLES[part] for part in found.weights)
    if found.path.is_file():
        keys = open_weights(found.path)[0]
        holds = foreign(keys) or holds or looks_like(keys)
    return (
        f"{found.path} holds no {TITLES[component]} of SD3; it looks like {holds or 'nothing known here'}. "
        f"Give a file or folder that holds the {TITLES[component]}"
    )


def _problem(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what}: {_some(keys)}" if keys else ""


def _against(part: StoredModel, key: str, wanted: Tensor) -> str:
    return f"{_in_file(part, key)} {list(part.tensors[key].shape)} where {list(wanted.shape)} is expected"


def _in_file(part: StoredModel, key: str) -> str:
    """What the file calls a tensor; for a fused one, all that it is made of."""
    return " + ".join(part.stored_as.get(key, (key,)))


def _some(keys: Iterable[str], most: int = 5) -> str:
    keys = list(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
