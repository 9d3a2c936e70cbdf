"""Reading models from checkpoints of any layout: strict, tensor by tensor, nothing half loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.clip import CLIPConfig, CLIPText
from encoders.t5 import T5Config, T5Encoder
from encoders.vae import VAE, VAEConfig
from mmdit import configs
from mmdit.config import MMDiTConfig
from mmdit.keymaps import count, mmdit_rules, partners, to_ours, vae_rules
from mmdit.lazy import LazyTensor
from mmdit.locate import Found, locate, open_weights
from mmdit.memory import is_out_of_memory
from mmdit.model import MMDiT
from mmdit.recognise import KIND_OF, TITLES, UNUSED, Component, Model, looks_like, split
from mmdit.safetensors_file import CheckpointError
from quant import FLOAT8, Scales, dequantize, find_scales

Config = MMDiTConfig | VAEConfig | CLIPConfig | T5Config
MODULES: dict[Component, type[nn.Module]] = {
    "transformer": MMDiT,
    "vae": VAE,
    "clip_l": CLIPText,
    "clip_g": CLIPText,
    "t5": T5Encoder,
}
_T5_EMBEDDING, _T5_EMBEDDING_TWIN = "shared.weight", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint, under official names and not read yet."""

    component: Component
    source: Path
    tensors: dict[str, LazyTensor]
    config: Config
    scales: Scales  # how the file spelled its float8, if any

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that its tensors are stored in."""
        return {lazy.dtype for lazy in self.tensors.values()}


def load_mmdit(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> MMDiT:
    """The transformer of a checkpoint of any layout, in eval mode.

    Args:
        path: a safetensors file, a shard index, or a folder.
        device: where the weights go, tensor by tensor.
        dtype: None keeps what is stored; float8 is stored only, so such a file needs a dtype to compute in.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: the file is broken, holds something else, or its tensors are not exactly those of the model.
    """
    return _load(path, "transformer", device, dtype)


def load_vae(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VAE:
    """The VAE of a checkpoint of any layout; see `load_mmdit` for arguments and errors."""
    return _load(path, "vae", device, dtype)


def load_clip(
    path: str | Path, which: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> CLIPText:
    """A CLIP text tower, "l" or "g", of a checkpoint of any layout; see `load_mmdit` for arguments and errors."""
    if which not in ("l", "g"):
        raise ValueError(f"which must be 'l' or 'g', got {which!r}")
    return _load(path, "clip_l" if which == "l" else "clip_g", device, dtype)


def load_t5(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> T5Encoder:
    """The T5 encoder of a checkpoint of any layout; see `load_mmdit` for arguments and errors."""
    return _load(path, "t5", device, dtype)


def open_part(found: Found, component: Component) -> Part:
    """One model of a located checkpoint: names mapped, float8 scales absorbed, config inferred, nothing read.

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
        raise CheckpointError(f"{source} holds no {TITLES[component]}: it looks like {looks_like(stored)}")
    if left:
        raise CheckpointError(f"{source}: {len(left)} unexpected tensors, first {_some(left)}; {looks_like(left)}")
    tensors, scales = _absorb_scales(source, {name: stored[key] for name, key in model.keys.items()}, metadata)
    tensors = _official(source, component, model, tensors)
    try:
        config = configs.infer(component, {key: lazy.shape for key, lazy in tensors.items()}, found.configs)
    except KeyError as error:
        raise CheckpointError(f"{source} is incomplete: the tensor {error} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return Part(component, source, tensors, config, scales)


def part_of(component: Component, model: nn.Module) -> Part:
    """A model in memory as a part that can be written."""
    tensors = {key: LazyTensor.of(tensor) for key, tensor in model.state_dict().items()}
    config: Any = model.config
    return Part(component, Path("memory"), tensors, config, Scales("no float8"))


def empty(part: Part) -> nn.Module:
    """The model of a part on the meta device: shapes and no weights."""
    make: Any = MODULES[part.component]
    with torch.device("meta"):
        return make(part.config)


def build(part: Part, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """The model of a part, filled tensor by tensor on `device`, in eval mode.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors, or float8 without a dtype to compute in.
    """
    model = empty(part)
    check_tensors(part, model)
    if dtype is None and part.dtypes & set(FLOAT8):
        raise CheckpointError(
            f"{part.source} stores the {TITLES[part.component]} in float8, which layers do not compute in: "
            "give a dtype, e.g. dtype=torch.bfloat16"
        )
    state = {key: _read(part, key, device, dtype) for key in part.tensors}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def check_tensors(part: Part, model: nn.Module) -> None:
    """Raise one CheckpointError that lists every tensor that is missing, unexpected, mis-shaped or not a number."""
    wanted = model.state_dict()
    shapes = [key for key in wanted if key in part.tensors and wanted[key].shape != part.tensors[key].shape]
    integers = [key for key in wanted if key in part.tensors and not part.tensors[key].dtype.is_floating_point]
    problems = [
        _problem("missing", [key for key in wanted if key not in part.tensors]),
        _problem("unexpected", [key for key in part.tensors if key not in wanted]),
        _problem("of another shape", [_against(key, part.tensors[key], wanted[key]) for key in shapes]),
        _problem("not floating point", integers),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{part.source} does not fit the {TITLES[part.component]} that its shapes say: {found}")


def _load(path: str | Path, component: Component, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    clip = component if component in ("clip_l", "clip_g") else None
    return build(open_part(locate(path, clip=clip), component), device, dtype)


def _read(part: Part, key: str, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    try:
        return part.tensors[key].read(dtype, device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory on {device} while loading the {TITLES[part.component]} of {part.source}: it takes "
            f"{_gigabytes(part, dtype)} in all. Use a smaller dtype (dtype=torch.bfloat16) or another device"
        ) from error


def _gigabytes(part: Part, dtype: torch.dtype | None) -> str:
    sizes = (lazy.nbytes // lazy.dtype.itemsize * (dtype or lazy.dtype).itemsize for lazy in part.tensors.values())
    return f"{sum(sizes) / 1e9:.2f} GB"


def _absorb_scales(
    source: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> tuple[dict[str, LazyTensor], Scales]:
    try:
        scales = find_scales({key: lazy.dtype for key, lazy in tensors.items()}, metadata)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    absorbed = {key: lazy for key, lazy in tensors.items() if key not in scales.keys and not UNUSED.fullmatch(key)}
    for weight, scale in scales.weights.items():
        absorbed[weight] = _scaled(source, weight, tensors[weight], tensors[scale])
    return absorbed, scales


def _scaled(source: Path, name: str, stored: LazyTensor, scale: LazyTensor) -> LazyTensor:
    def load(dtype: torch.dtype, device: torch.device) -> Tensor:
        try:
            return dequantize(stored.read(device=device), scale.read(device=device), name, dtype)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error

    return LazyTensor(stored.shape, stored.dtype, load)


def _official(
    source: Path, component: Component, model: Model, tensors: dict[str, LazyTensor]
) -> dict[str, LazyTensor]:
    if component == "t5":
        return _without_twin(source, tensors)
    if model.names == "official":
        return tensors
    rules = (
        mmdit_rules(count(tensors, "transformer_blocks.{i}."))
        if component == "transformer"
        else vae_rules(count(tensors, "encoder.down_blocks.{i}."), count(tensors, "encoder.down_blocks.0.resnets.{i}."))
    )
    found, left = to_ours(tensors, rules)
    if left:
        without = partners(left, rules)
        why = f"missing are {_some(without)}" if without else f"no {TITLES[component]} has them"
        raise CheckpointError(f"{source}: {len(left)} unexpected tensors, first {_some(left)}; {why}")
    return found


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
            raise CheckpointError(f"{source}: {_T5_EMBEDDING} and {_T5_EMBEDDING_TWIN} differ; they must be one table")
        del one, other
        return kept.load(dtype, device)

    tensors[_T5_EMBEDDING] = LazyTensor(kept.shape, kept.dtype, load)
    return tensors


def _absent(found: Found, component: Component) -> str:
    holds = ", ".join(TITLES[part] for part in found.weights)
    if not holds and found.path.is_file():
        holds = looks_like(open_weights(found.path)[0])
    return f"{found.path} holds no {TITLES[component]}; it looks like {holds or 'nothing known here'}"


def _problem(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what}: {_some(keys)}" if keys else ""


def _against(key: str, found: LazyTensor, wanted: Tensor) -> str:
    return f"{key} {list(found.shape)} where {list(wanted.shape)} is expected"


def _some(keys: Iterable[str], most: int = 5) -> str:
    keys = list(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
