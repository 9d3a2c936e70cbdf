"""Loading models from checkpoints of any layout, strictly and tensor by tensor; no model is loaded in part."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from encoders.clip import CLIPText
from encoders.t5 import T5Encoder
from encoders.vae import VAE
from mmdit.checkpoints.components import REGISTRY, Component, ModelKind
from mmdit.checkpoints.files import is_file
from mmdit.checkpoints.float8 import Float8, absorb_scales, disagreeing
from mmdit.checkpoints.hub import fetch_control, is_repo_id
from mmdit.checkpoints.keymaps import some
from mmdit.checkpoints.lazy import AsStored, LazyTensor
from mmdit.checkpoints.locate import Found, ambiguous, locate, open_weights
from mmdit.checkpoints.missing import absent
from mmdit.checkpoints.recognise import looks_like, unwrapped
from mmdit.checkpoints.safetensors_io import CheckpointError, FileTensor
from mmdit.checkpoints.staging import filled
from mmdit.models.controlnet import CONTROL_KINDS, ControlKind, ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.utils import is_out_of_memory
from quant.formats import FLOAT8
from quant.quantize import kept as is_kept
from quant.quantize import linears_of, quantize_weight
from quant.recipe import Recipe
from quant.spellings import Scales, unread_quantization
from quant.tensor import Float8Tensor
from samplers import pick

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes that layers compute in
AT_A_TIME = (2, 4)  # tensors read at a time, to a CPU and to a GPU
_IN_PIECES = ("cuda",)  # devices to which files are read in large pieces
_SMALL = 64 * 2**20  # bytes of a model that one thread reads in less time than threads take to hand tensors around
_ONE_AT_A_TIME = Lock()  # held by a thread that has a weight in 16 bits, to quantize it


@dataclass(frozen=True)
class StoredModel:
    """One model of a checkpoint, mapped to official names; its tensors are read on demand."""

    component: Component
    source: Path
    tensors: dict[str, LazyTensor]
    config: Any  # the config of the kind's class
    scales: Scales  # the spelling of its float8 scales in the file, if any
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names in the file of renamed tensors
    notes: tuple[str, ...] = ()  # tensors of the file that are not used, in words

    @property
    def kind(self) -> ModelKind:
        """Its row in the registry."""
        return REGISTRY[self.component]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The stored dtypes of its tensors."""
        return {lazy.dtype for lazy in self.tensors.values()}


def load_mmdit(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    float8: Float8 = "keep",
    ema: bool = False,
) -> MMDiT:
    """The transformer of a checkpoint of any layout, in eval mode.

    Args:
        path: A safetensors file, a shard index, or a folder.
        device: The device of the weights, which are moved tensor by tensor.
        dtype: The dtype to compute in; None keeps the stored one (of a float8 file, the dtype of its other tensors, or
            bfloat16 where there are none).
        float8: "keep" makes weights of Linears `quant.Float8Tensor`s with the codes and scales of the file. Where the
            file has an input scale, activations are rounded to float8 too, unless it asks for full precision. Norms,
            biases, embeddings and convolutions cannot compute in float8 and are upcast. "dequantize" dequantizes all
            tensors and needs a dtype.
        ema: Load the averaged weights (`model_ema.`) that a training run stored, instead of the others.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: the file is broken or holds another model, or its tensors are not exactly those of the model.
    """
    return _load(path, "transformer", device, dtype, float8, ema=ema)


def load_vae(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VAE:
    """The VAE of a checkpoint of any layout, with float8 upcast; see `load_mmdit` for arguments and errors."""
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


def load_controlnet(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kind: str | None = None,
    float8: Float8 = "keep",
) -> ControlNet:
    """A ControlNet of Stability's or InstantX's kind, in eval mode; see `load_mmdit` for the other arguments.

    Args:
        path: a safetensors file, a folder (of diffusers, ComfyUI or others), or "owner/name" of a repository on the
            Hugging Face Hub. `kind` says which is meant where there are several nets.
        device, dtype, float8: see `load_mmdit`.
        kind: what the hint is: "blur", "canny", "depth", "tile", "pose" or "inpaint". Stability's files say it; files
            of diffusers do not. It decides the range of the hint's values in some profiles, see `mmdit.Profile`.

    Raises:
        FileNotFoundError: there is no such path.
        mmdit.HubError: the repository cannot be had.
        ValueError: the kind is unknown.
        CheckpointError: as `load_mmdit`; or the file says another kind.
    """
    stored = open_controlnet(path, kind)
    say_notes([stored])
    return build(stored, device, dtype, float8)


def open_controlnet(path: str | Path, kind: str | None = None) -> StoredModel:
    """A ControlNet with its config inferred, but no weight read; see `load_controlnet` for arguments and errors."""
    known: dict[str, ControlKind] = {one: one for one in CONTROL_KINDS}
    asked = None if kind is None else pick(known, kind, "kind")
    place = fetch_control(str(path), asked) if isinstance(path, str) and is_repo_id(path) else path
    return _of_kind(locate(place), asked)


def _of_kind(found: Found, kind: ControlKind | None) -> StoredModel:
    """The ControlNet of this kind, or the only one."""
    if kind is not None and "controlnet" not in found.weights:
        nets = {file: open_model(_only(found, file), "controlnet") for file in found.several.get("controlnet", ())}
        fitting = [file for file, net in nets.items() if kind in (net.config.kind or file.stem)]
        found = _only(found, fitting[0]) if len(fitting) == 1 else found
    stored = open_model(found, "controlnet")
    said = stored.config.kind
    if kind is None or kind == said:
        return stored
    if said is not None:
        raise CheckpointError(f"{stored.source} is a ControlNet for {said} hints, but kind={kind!r} is asked for")
    try:
        return replace(stored, config=replace(stored.config, kind=kind))
    except ValueError as error:
        raise CheckpointError(f"{stored.source}: {error}") from error


def _only(found: Found, file: Path) -> Found:
    """The same with one of several ControlNets."""
    return replace(found, weights={"controlnet": file})


def open_model(found: Found, component: Component) -> StoredModel:
    """One model of a located checkpoint, with names mapped, float8 scales read and config inferred, but no weight read.

    Raises:
        CheckpointError: the checkpoint holds no such model, only a part of it, several, or tensors of no known model.
    """
    if component in found.several and component not in found.weights:
        raise ambiguous(found, component)
    if component not in found.weights:
        raise absent(found, component)
    source, kind, said = found.weights[component], REGISTRY[component], found.configs.get(component, {})
    stored, metadata = open_weights(source, found.files)
    if unread := unread_quantization({key: lazy.dtype for key, lazy in stored.items()}, metadata, said):
        raise CheckpointError(f"{source}: {unread}")
    names = found.files.split(source, stored, ema=found.ema)
    model = names.models.get(component) or names.models.get(kind.family)
    if model is None:
        raise absent(Found(source, found.layout, files=found.files), component)
    if names.left:
        raise CheckpointError(
            f"{source}: {len(names.left)} unexpected tensors beside the {kind.title}: {some(names.left)}; "
            f"they look like {looks_like(names.left)}"
        )
    absorbed, scales = absorb_scales(source, model.keys, stored, metadata)
    with _explained(source, kind):
        said = _together(said, kind.says(absorbed))
        tensors, stored_as = model.naming.read(absorbed, source)
        shapes = {key: lazy.shape for key, lazy in tensors.items()}
        config = kind.config_of(shapes, said, own=is_file(source.parent / "config.json"))
    notes = [*names.notes(), *_merge_notes(disagreeing(absorbed, stored_as.values()))]
    return StoredModel(component, source, tensors, config, scales, stored_as, tuple(notes))


def _together(said: Mapping[str, object], more: Mapping[str, object]) -> dict[str, Any]:
    """The entries of config.json and those that tensors hold, which may not contradict each other."""
    for name, value in more.items():
        if said.get(name, value) not in (None, value):
            raise ValueError(f"config.json says {name} = {said[name]!r:.80}, a tensor says {value!r}")
    return {**said, **more}


@contextmanager
def _explained(source: Path, kind: ModelKind) -> Iterator[None]:
    """Turn errors of key maps and configs into CheckpointErrors that name the file."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"{source} is incomplete: the tensor {error} of the {kind.title} is missing; download it again"
        ) from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def say_notes(models: Iterable[StoredModel]) -> None:
    """Warn of tensors that are not used, once for each file."""
    for note in dict.fromkeys(f"{model.source}: {note}" for model in models for note in model.notes):
        warnings.warn(note, stacklevel=2)


def model_in_memory(component: Component, model: nn.Module) -> StoredModel:
    """A model in memory in the form that can be written; wrappers of torch.compile are removed."""
    tensors = {unwrapped(key): LazyTensor.of(tensor) for key, tensor in model.state_dict().items()}
    config: Any = model.config
    return StoredModel(component, Path("memory"), tensors, config, Scales("no float8"))


def empty(stored: StoredModel) -> nn.Module:
    """The model on the meta device, which has shapes and no values."""
    make: Any = stored.kind.module
    with torch.device("meta"), NoInitialValues():
        return make(stored.config)


class NoInitialValues(TorchFunctionMode):
    """Leaves out `torch.nn.init`: on the meta device it has nothing to fill, and loads 900 modules of torch for it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(
    stored: StoredModel,
    device: torch.device | str,
    dtype: torch.dtype | None,
    float8: Float8 = "keep",
    recipe: Recipe | None = None,
) -> Any:
    """Load a stored model tensor by tensor to `device`, in eval mode.

    Args:
        stored: The model, mapped and not read.
        device, dtype, float8: see `load_mmdit`.
        recipe: Quantize the Linears of a model that has no float8 weights, each when it is read, as `quant.quantize_`
            would do it afterwards: one weight at a time is on the device in 16 bits. None quantizes nothing.

    Raises:
        CheckpointError: tensors are missing, unexpected or mis-shaped, or their dtypes give no dtype to compute in; or
            a weight that is quantized is not finite.
    """
    if dtype is not None and dtype not in COMPUTED:
        raise ValueError(f"dtype must be one of {', '.join(map(str, COMPUTED))}, got {dtype}")
    if float8 not in get_args(Float8):
        raise ValueError(f"float8 must be one of {', '.join(map(repr, get_args(Float8)))}, got {float8!r}")
    model = empty(stored)
    check_tensors(stored, model)
    dtype, device = compute_dtype(stored, dtype, float8), torch.device(device)
    if device == torch.device("cuda"):  # the current device belongs to a thread, and other threads read
        device = torch.device("cuda", torch.cuda.current_device())
    linears = {f"{name}.weight": name for name, _ in linears_of(model)}
    codes = {key for key in linears if stored.tensors[key].codes is not None and float8 == "keep"}
    rounded = () if recipe is None or codes else [key for key, name in linears.items() if not is_kept(name)]
    how = _How(device, dtype, codes, recipe, frozenset(rounded))
    with _said(stored, how), filled(_as_they_are(stored, how), device) as there:
        state = {key: _around(stored.tensors[key], values, how, key) for key, values in there.items()}
        others = [key for key in stored.tensors if key not in there]
        state |= zip(others, _read_all(stored, others, how), strict=True)
        model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def compute_dtype(stored: StoredModel, dtype: torch.dtype | None, float8: Float8) -> torch.dtype:
    """The dtype that was given, or else the stored dtype of the tensors that are not float8."""
    if dtype is not None:
        return dtype
    if float8 == "dequantize" and stored.dtypes & set(FLOAT8):
        raise CheckpointError(
            f"{stored.source} stores the {stored.kind.title} in float8, which layers do not compute in: "
            "give a dtype, e.g. dtype=torch.bfloat16"
        )
    wide = {lazy.dtype for lazy in stored.tensors.values() if lazy.dtype.is_floating_point and not lazy.widened}
    wide -= set(FLOAT8)
    if len(wide) > 1:
        raise CheckpointError(
            f"{stored.source} stores the {stored.kind.title} in {', '.join(sorted(map(str, wide)))}, which "
            "layers do not mix: give one dtype, e.g. dtype=torch.bfloat16"
        )
    return wide.pop() if wide else torch.bfloat16


def _merge_notes(merges: list[tuple[str, ...]]) -> list[str]:
    if not merges:
        return []
    return [
        f"{len(merges)} layers that are one here have parts with different input scales, first "
        f"{' + '.join(merges[0])}; their weights are kept, and activations are not rounded to float8"
    ]


def check_tensors(stored: StoredModel, model: nn.Module) -> None:
    """Raise one CheckpointError that lists all missing, unexpected, mis-shaped and integer tensors."""
    wanted = model.state_dict()
    shapes = [key for key in wanted if key in stored.tensors and wanted[key].shape != stored.tensors[key].shape]
    integers = [key for key in wanted if key in stored.tensors and not stored.tensors[key].dtype.is_floating_point]
    problems = [
        _problem("missing", [_in_file(stored, key) for key in wanted if key not in stored.tensors]),
        _problem("unexpected", [_in_file(stored, key) for key in stored.tensors if key not in wanted]),
        _problem("of another shape", [_against(stored, key, wanted[key]) for key in shapes]),
        _problem("not floating point", [f"{_in_file(stored, key)} {stored.tensors[key].dtype}" for key in integers]),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{stored.source} does not fit the {stored.kind.title} that its shapes say: {found}")


def check_loads(stored: StoredModel) -> None:
    """Run all checks of `build` on the meta device.

    Raises:
        CheckpointError: see `build`; mixed stored dtypes, for which `build` needs a dtype, are no error here.
    """
    check_tensors(stored, empty(stored))


def _load(
    path: str | Path,
    component: Component,
    device: torch.device | str,
    dtype: torch.dtype | None,
    float8: Float8,
    *,
    ema: bool = False,
) -> Any:
    stored = open_model(locate(path, clip=component, ema=ema), component)
    say_notes([stored])
    return build(stored, device, dtype, float8)


class _How(NamedTuple):
    """How the tensors of a model are read."""

    device: torch.device
    dtype: torch.dtype
    codes: Collection[str]  # weights that stay float8
    recipe: Recipe | None
    rounded: Collection[str]  # weights that are quantized to the recipe


def _as_they_are(stored: StoredModel, how: _How) -> dict[str, FileTensor]:
    """The tensors that are on a GPU what they are in the file."""
    found = {}
    for key, lazy in stored.tensors.items() if how.device.type in _IN_PIECES else ():
        load, dtype = lazy.load, how.dtype
        if key in how.codes and lazy.codes is not None:
            if not isinstance(lazy.codes.load, AsStored):
                continue
            load, dtype = lazy.codes.load.lazy.load, lazy.codes.dtype
        if not isinstance(load, FileTensor) or key in how.rounded:
            continue
        if (load.entry.dtype, load.entry.shape) == (dtype, lazy.shape):
            found[key] = load
    return found


def _around(lazy: LazyTensor, values: Tensor, how: _How, key: str) -> Tensor:
    """The weight of these values, which may come later."""
    if key not in how.codes or lazy.codes is None:
        return values
    return lazy.codes.around(values, how.dtype).as_parameter()


@contextmanager
def _said(stored: StoredModel, how: _How) -> Iterator[None]:
    """Say what a model takes where the device has too little memory for it."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory on {how.device} while loading the {stored.kind.title} of {stored.source}: it takes "
            f"{_size(stored, how)} in all. Use a smaller dtype (dtype=torch.bfloat16), quant= or another device"
        ) from error


def _read_all(stored: StoredModel, keys: Sequence[str], how: _How) -> list[Tensor]:
    """Tensors by several threads: one waits for the disk, others cast or copy. A small model is read by this one."""
    if how.device.type == "cpu" and sum(stored.tensors[key].nbytes for key in keys) < _SMALL:
        return [_read(stored, key, how) for key in keys]
    with ThreadPoolExecutor(AT_A_TIME[how.device.type == "cuda"]) as pool:
        return [*pool.map(lambda key: _read(stored, key, how), keys)]


def _read(stored: StoredModel, key: str, how: _How) -> Tensor:
    lazy, device, dtype = stored.tensors[key], how.device, how.dtype
    if lazy.codes is not None and key in how.codes:
        return lazy.codes.read(dtype, device).as_parameter()
    if how.recipe is not None and key in how.rounded:
        with _ONE_AT_A_TIME:
            return _quantized(stored, key, lazy.read(dtype, device), how.recipe).as_parameter()
    return lazy.read(dtype, device)


def _quantized(stored: StoredModel, key: str, values: Tensor, recipe: Recipe) -> Float8Tensor:
    try:
        return quantize_weight(values, recipe)
    except ValueError as error:
        raise CheckpointError(f"{stored.source}: {_in_file(stored, key)}: {error}") from error


def _size(stored: StoredModel, how: _How) -> str:
    small = {*how.codes, *how.rounded}
    size = sum(prod(lazy.shape) * (1 if key in small else how.dtype.itemsize) for key, lazy in stored.tensors.items())
    return f"{size} bytes ({size / 1e9:.2f} GB)"


def _problem(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what}: {some(keys)}" if keys else ""


def _against(stored: StoredModel, key: str, wanted: Tensor) -> str:
    return f"{_in_file(stored, key)} {list(stored.tensors[key].shape)} where {list(wanted.shape)} is expected"


def _in_file(stored: StoredModel, key: str) -> str:
    """The names of a tensor in the file; a fused tensor has one for each of its parts."""
    return " + ".join(stored.stored_as.get(key, (key,)))
