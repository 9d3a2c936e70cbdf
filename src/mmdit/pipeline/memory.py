"""A pipeline's models on a device that is too small for all of them: the plan, the turns, and what went wrong."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from encoders import VAE, CLIPText, T5Encoder, run_encoder
from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.checkpoints.components import Component, title
from mmdit.checkpoints.load import StoredModel, compute_dtype, empty
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.profiles import Profile
from mmdit.runtime import activations as count
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.devices import suited_dtype
from mmdit.runtime.modulation import ModulationTable
from mmdit.runtime.parallel import Parallel
from mmdit.runtime.plan import Activations, MemoryPlan, ModelBytes, TooLittleMemory, plan, size_word, smallest
from mmdit.runtime.products import stacked_bytes
from mmdit.runtime.streaming import WHOLE, Presence, Residency, arriving, capped, model_bytes
from mmdit.utils import is_out_of_memory, weight_bytes
from quant.emulation import HAS_TRITON
from quant.matmul import Runs, backend_of, multiplies_by_half
from quant.quantize import kept, linears_of
from quant.recipe import Recipe
from quant.tensor import Float8Tensor

_TILES = (256, 128, 64)  # pixels
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by bytes; float16 takes what bfloat16 does
_TEXTS = 32  # outputs of text encoders that are kept
ENCODERS: tuple[Component, ...] = ("clip_l", "clip_g", "t5")


@dataclass(frozen=True)
class Sizes:
    """What of a drawing decides how much memory it takes.

    Args:
        pictures: that are decoded at once.
        samples: rows of the transformer's largest batch.
        height, width: of the latents, in cells.
        tokens: text tokens of the transformer.
        rows, length: prompts that an encoder reads at once, and their tokens.
        steps: for which the modulation is computed ahead.
        encodes: whether pictures are encoded.
        tile: side of the VAE's tiles in pixels that the caller asks for; 0 is none.
    """

    pictures: int = 1
    samples: int = 2
    height: int = 128
    width: int = 128
    tokens: int = 333
    rows: int = 1
    length: int = 256
    steps: int = 28
    encodes: bool = False
    tile: int = 0

    def covers(self, other: Sizes) -> bool:
        """Whether a plan for these sizes is enough for others."""
        return self == self.merged(other)

    def merged(self, other: Sizes) -> Sizes:
        """The larger one of each number; of tiles the smaller one."""
        larger = {one.name: max(getattr(self, one.name), getattr(other, one.name)) for one in fields(self)}
        return Sizes(**(larger | {"tile": other.tile}))


@dataclass(frozen=True)
class Setting:
    """What else decides it.

    Args:
        configs: configs of the models, by component.
        itemsize: bytes of a value in each model.
        device: where models compute.
        recipe: the transformer's float8 recipe, if any.
        upcast: whether text encoders compute in float32.
        fast, graph: whether the fast forward runs, and in CUDA graphs where blocks stay in place.
        residuals: bytes of a ControlNet's residuals per sample and image token; 0 without one.
        context: what the process takes of a GPU and torch does not count.
    """

    configs: Mapping[Component, Any]
    itemsize: Mapping[Component, int]
    device: torch.device
    recipe: Recipe | None = None
    upcast: bool = False
    fast: bool = False
    graph: bool = False
    residuals: int = 0
    context: int = count.CONTEXT

    def activations(self, sizes: Sizes) -> Activations:
        """Bytes of a drawing of these sizes, beside the weights."""
        config: MMDiTConfig = self.configs["transformer"]
        size = self.itemsize["transformer"]
        image = -(-sizes.height // config.patch_size) * -(-sizes.width // config.patch_size)
        runs = self._runs(config, size)
        step = count.step_bytes(
            config,
            samples=sizes.samples,
            image=image,
            text=sizes.tokens,
            itemsize=size,
            emulated=runs == "emulated",
            dequantized=runs == "dequantized",
            half=multiplies_by_half(runs, self.device, _DTYPES[size]),
            summed=runs == "emulated" and (self.fast or not HAS_TRITON),
            fast=self.fast,
        )
        if self.device.type == "cuda":
            step = int(count.FRAGMENTS * step)
        cells = sizes.height * sizes.width
        latents = count.latent_bytes(samples=sizes.samples, channels=config.in_channels, cells=cells)
        texts = 2 * sizes.samples * sizes.tokens * config.context_dim * size
        return Activations(
            text={name: self._text(name, sizes) for name in ENCODERS if name in self.configs},
            step=step + latents + self.residuals * sizes.samples * image,
            decode=self._vae(sizes, cells, sizes.tile or None),
            tiles={tile: self._vae(sizes, cells, tile) for tile in _TILES if not sizes.tile or tile < sizes.tile},
            table=count.table_bytes(config, samples=sizes.samples, steps=sizes.steps, itemsize=size),
            graph=step if self.graph else 0,
            kept=texts + latents,
            reserve=self.context + count.WORKSPACE if self.device.type == "cuda" else 0,
        )

    def _runs(self, config: MMDiTConfig, size: int) -> Runs:
        """How products with float8 weights run; "native" without any."""
        if self.recipe is None:
            return "native"
        shape = config.hidden_size, config.hidden_size
        return backend_of(self.recipe, self.device, _DTYPES[size], shape)[0]

    def _text(self, name: Component, sizes: Sizes) -> int:
        config: T5Config | CLIPConfig = self.configs[name]
        return count.text_bytes(
            width=config.width,
            hidden=config.mlp_dim,
            heads=config.heads,
            rows=sizes.rows,
            tokens=sizes.length if name == "t5" else min(sizes.length, 77),
            itemsize=self.itemsize[name],
            upcast=self.upcast,
        )

    def _vae(self, sizes: Sizes, cells: int, tile: int | None) -> int:
        config: VAEConfig = self.configs["vae"]
        pixels, size = cells * config.downscale**2, self.itemsize["vae"]
        whole = count.vae_bytes(
            config.widths, pictures=sizes.pictures, pixels=pixels, itemsize=size, encodes=sizes.encodes
        )
        if tile is None:
            return whole
        return min(
            count.tile_bytes(config.widths, pictures=sizes.pictures, pixels=pixels, tile=tile, itemsize=size), whole
        )


def default_sizes(config: MMDiTConfig, profile: Profile) -> Sizes:
    """The sizes of a picture of the model's own size by the profile's defaults, with guidance."""
    side, text = config.sample_size or 128, profile.text
    tokens = text.clip_length + text.t5_length
    return Sizes(height=side, width=side, tokens=tokens, length=text.t5_length, steps=profile.steps)


def check_budget(
    budget: int,
    device: torch.device,
    dtype: torch.dtype | None,
    recipe: Recipe | None,
    profile: Profile,
    fast: bool,
    models: Mapping[Component, StoredModel],
) -> None:
    """Plan a picture of the model's own size from the headers of the files, before a weight is read.

    Args:
        budget: bytes.
        device, dtype, recipe, profile, fast: what the pipeline is loaded with.
        models: the located models.

    Raises:
        TooLittleMemory: no plan keeps the budget.
    """
    dtypes = {name: _dtype_of(model, dtype, device) for name, model in models.items()}
    quantized = {name: recipe if name in ("transformer", "t5") else None for name in models}
    stored = [lazy.codes for lazy in models["transformer"].tensors.values() if lazy.codes is not None]
    setting = Setting(
        {name: model.config for name, model in models.items()},
        {name: found.itemsize for name, found in dtypes.items()},
        device,
        stored[0].recipe if stored else recipe,
        profile.text.encoder_dtype == "float32",
        fast,
        fast and device.type == "cuda",
        context=context_of(device),
    )
    sizes = {name: _bytes_to_come(model, dtypes[name], quantized[name]) for name, model in models.items()}
    plan(budget, _on(device, sizes), setting.activations(default_sizes(models["transformer"].config, profile)))


def _dtype_of(model: StoredModel, dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    found = compute_dtype(model, dtype, "keep")
    return suited_dtype(found, device) if dtype is None else found


def _bytes_to_come(stored: StoredModel, dtype: torch.dtype, recipe: Recipe | None) -> ModelBytes:
    """Bytes of a model by part once it is loaded and quantized."""
    model = empty(stored)
    linears = {f"{name}.weight": name for name, _ in linears_of(model)}

    def size(name: str, tensor: Tensor) -> int:
        is_code = name in linears and name in stored.tensors and stored.tensors[name].codes is not None
        if is_code or (recipe is not None and name in linears and kept(linears[name]) is None):
            return tensor.numel() + 4 * (tensor.shape[0] + 1)  # a byte each, and the scales
        return tensor.numel() * dtype.itemsize

    return model_bytes(model, size)


def _on(device: torch.device, models: dict[Component, ModelBytes]) -> dict[Component, ModelBytes]:
    """Bytes that the models take of a device."""
    if device.type != "cuda":
        return models
    return {name: one.in_steps_of(count.SEGMENT) for name, one in models.items()}


class PipelineMemory:
    """The part of a pipeline that decides what is on the device; see `mmdit.runtime.plan` for the means."""

    transformer: MMDiT
    vae: VAE
    profile: Profile
    accelerated: Accelerated | None
    parallel: Parallel | None
    _turns: Residency | None
    _budget: int | None

    memory_plan: MemoryPlan | None = None
    """What is on the device in each stage of the current drawing, or of the last one; None without `memory`."""

    @property
    def models(self) -> dict[Component, nn.Module]:
        """The loaded models, by component."""
        raise NotImplementedError

    def _start_memory(self, device: torch.device, offload: str | None, budget: int | None) -> None:
        """Set up `offload` or a budget; weights have been loaded to the host."""
        self._budget, self._sizes = budget, default_sizes(self.transformer.config, self.profile)
        self._nets: tuple[nn.Module, ...] = ()
        self._texts: OrderedDict[Hashable, Any] = OrderedDict()
        self._context = count.CONTEXT
        self._weight_bytes: dict[Component, ModelBytes] | None = None
        self._turns = None
        if offload is not None or budget is not None:
            self._turns = Residency(device, moves=budget is not None, tight=budget is not None)
        self._table = ModulationTable(self.transformer, self._turns) if self._turns is not None else None
        self.memory_plan = None
        self._fit(self._sizes, anew=True)

    def _setting(self) -> Setting:
        """What the memory of a drawing depends on, beside its sizes."""
        models = {name: model for name, model in self.models.items() if name != "controlnet"}
        device = self._place
        itemsize = {name: _itemsize(model) for name, model in models.items()}
        nets: Sequence[Any] = self._nets
        residuals = sum(
            count.residual_bytes(
                layers=net.config.depth, width=net.config.hidden_size, itemsize=itemsize["transformer"]
            )
            for net in nets
        )
        return Setting(
            {name: model.config for name, model in models.items()},
            itemsize,
            device,
            _recipe(self.transformer),
            self.profile.text.encoder_dtype == "float32",
            self.accelerated is not None,
            self.accelerated is not None and device.type == "cuda",
            residuals,
            self._context,
        )

    def _context_now(self) -> int:
        """What the process takes of the device and torch does not count."""
        return context_of(self._place, most=None if self.parallel is not None else count.MOST_CONTEXT)

    def _bytes(self) -> dict[Component, ModelBytes]:
        """Bytes of the weights of each model, as they are now."""
        if self._weight_bytes is None:
            parts = {name: model_bytes(model) for name, model in self.models.items() if name != "controlnet"}
            if self._nets:
                parts["controlnet"] = ModelBytes(sum(weight_bytes(net) for net in self._nets))
            if self.accelerated is not None:
                whole = parts["transformer"]
                parts["transformer"] = replace(whole, rest=whole.rest + stacked_bytes(self.transformer))
            self._weight_bytes = _on(self._place, parts)
        return self._weight_bytes

    def _fit(self, sizes: Sizes, nets: Sequence[nn.Module] | None = None, *, anew: bool = False) -> None:
        """Plan for a drawing of these sizes; where it is part of a larger one, the plan for that one is kept.

        Args:
            sizes: of the drawing.
            nets: its ControlNets; None are those of before.
            anew: whether the drawing begins.

        Raises:
            TooLittleMemory: no plan keeps the budget.
        """
        nets = self._nets if nets is None else tuple(nets)
        is_planned = sizes == self._sizes or (not anew and self._sizes.covers(sizes))
        is_planned = is_planned and self.memory_plan is not None and self._weight_bytes is not None
        is_planned = is_planned and not (anew and self._context_now() > self._context)
        if is_planned and nets == self._nets:
            return
        if nets != self._nets:
            self._nets, self._weight_bytes = nets, None
        sizes = sizes if anew else self._sizes.merged(sizes)
        if self._budget is None:
            self._sizes = sizes  # for what an error says
            return
        self._context = self._context_now()
        found = plan(self._budget, self._bytes(), self._setting().activations(sizes))
        self.memory_plan, self._sizes = found, sizes
        assert self._turns is not None, "a budget comes with turns"
        self._turns.still = found.stays

    def _set_budget(self, budget: int | None) -> None:
        """Go on with another budget; None has the models take turns, as `offload="stages"` does."""
        assert self._turns is not None, "models that are on the device for good have no budget"
        self._leave()
        self._turns.moves, self._turns.tight = budget is not None or self._turns.moves, budget is not None
        self._turns.still = False
        self._budget, self.memory_plan = budget, None
        self._fit(self._sizes, anew=True)

    def _replan(self) -> None:
        """Plan anew for the same sizes, because something else has changed."""
        if self.memory_plan is not None:
            self.memory_plan = None
            self._fit(self._sizes, anew=True)

    def _sizes_now(self, **changes: Any) -> Sizes:
        """The sizes of the current plan with changes."""
        return replace(self._sizes, **changes)

    def _enter(self, *names: Component, also: Sequence[nn.Module] = ()) -> None:
        """Have these models of the pipeline, and further modules, on the device, where they are not there anyway."""
        if self._turns is not None:
            self._turns.enter(self._wanted(names, also))

    def _wanted(self, names: Sequence[Component], also: Sequence[nn.Module]) -> dict[nn.Module, Presence]:
        models, found = self.models, self.memory_plan
        if self._budget is None:
            return dict.fromkeys((*(models[name] for name in names if name in models), *also), WHOLE)
        if found is None:
            self._fit(self._sizes)
            found = self.memory_plan
            assert found is not None, "a plan was made"
        if not found.turns:
            return dict.fromkeys((*models.values(), *self._nets, *also), WHOLE)
        (name,) = names
        stage = found.stage("steps" if name == "transformer" else name)
        streams = name == "transformer"
        wanted = {
            models["transformer"]: Presence(
                stage.here, stage.streamed if streams else (), adaln=not found.visited, rest=stage.rest_here
            )
        }
        if not streams:
            wanted[models[name]] = Presence(streamed=stage.streamed)
        return wanted | dict.fromkeys((*(self._nets if streams else ()), *also), WHOLE)

    def _leave(self) -> None:
        """Have no model on the device, because weights are about to change."""
        self._weight_bytes = None
        self._texts.clear()
        if self._turns is not None:
            self._turns.leave()

    def _run_encoder(self, model: CLIPText | T5Encoder, ids: list[list[int]], dtype: torch.dtype | None) -> Any:
        """The output of a text encoder; what it gave for the same tokens before is kept where models take turns."""
        if self._turns is None:
            return run_encoder(model, ids, dtype)
        name = next(name for name in ENCODERS if self.models.get(name) is model)
        key = None if _is_watched(model) else (name, _state(model), tuple(map(tuple, ids)), dtype)
        if key is not None and key in self._texts:
            self._texts.move_to_end(key)
            return self._texts[key]
        if name == "t5":
            self._fit(self._sizes_now(rows=len(ids), length=len(ids[0])))
        with self._computing(f"{len(ids)} prompts"):
            self._enter(*(ENCODERS if self._budget is None else (name,)))
            found = run_encoder(model, ids, dtype)
        if key is not None:
            self._texts[key] = found
            while len(self._texts) > _TEXTS:
                self._texts.popitem(last=False)
        return found

    @property
    def _keeps_texts(self) -> bool:
        """Whether encoders take turns one by one, and what they give is kept."""
        takes_turns = self.memory_plan is not None and self.memory_plan.turns
        return takes_turns and not any(_is_watched(self.models[name]) for name in ENCODERS if name in self.models)

    @contextmanager
    def _computing(self, what: str) -> Iterator[None]:
        """A model computes: explain running out of memory, keep the budget, and let streamed weights rest after it."""
        limit = None if self._budget is None else self._budget - self._context
        with self._explained(what), capped(self._place, limit):
            try:
                yield
            finally:
                if self._turns is not None:
                    self._turns.rest()

    @property
    def _place(self) -> torch.device:
        """The device that models compute on."""
        device: torch.device = self.transformer.pos_embed.device if self._turns is None else self._turns.device
        return device

    @contextmanager
    def _drawing(self, what: str) -> Iterator[None]:
        """Explain running out of memory; where models take turns, leave none on the device after an error."""
        guard = nullcontext() if self.parallel is None else self.parallel.guarded()  # other ranks are told of an error
        if self._turns is None:
            with guard, self._computing(what):
                yield
            return
        with self._turns.lock:  # the models share the device in turn, so one thread draws at a time
            try:
                with guard, self._computing(what):
                    yield
            except BaseException:
                self._turns.leave()
                raise
            if self._budget is None:
                self._turns.leave()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn a failed allocation into an error that says what was needed, what there was, and what would do.

        Nothing that the failed computation has made stays in memory.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error) or isinstance(error, ExplainedMemoryError | TooLittleMemory):
                raise
            explained = ExplainedMemoryError(self._explanation(error, what))
            explained.add_note(_released(error))
            self._texts.clear()
            if self._turns is not None:
                self._turns.leave()
            if self._place.type == "cuda":
                torch.cuda.empty_cache()
            raise explained from error

    def _explanation(self, error: BaseException, what: str) -> str:
        what_failed = (str(error) or type(error).__name__).splitlines()[0]
        weights = ", ".join(f"{title(name)} {weight_bytes(model) / 1e9:.2f} GB" for name, model in self.models.items())
        models = {name: model_bytes(model) for name, model in self.models.items() if name != "controlnet"}
        models = _on(self._place, models)
        activations = self._setting().activations(self._sizes)
        needed, least = plan(None, models, activations).sum, smallest(models, activations).sum
        there = memory_of(self._place)
        helps = [
            "a smaller height and width, fewer pictures at once (num_images_per_prompt)",
            "weights in 16 bits (dtype=torch.bfloat16)",
            "decoding in tiles (vae_tile=256)",
        ]
        said = ""
        if there is not None:
            said = f" {there}"
            if self._budget is None and least <= there.available:
                helps.insert(
                    0, f"a memory budget (memory={size_word(there.available)!r}, at least {size_word(least)!r})"
                )
        return (
            f"out of memory while computing {what}. Weights: {weights}; with all of them there it takes about "
            f"{size_word(needed)} in all.{said} What failed: {what_failed}. What helps: {', '.join(helps)}"
        )


class DeviceMemory(NamedTuple):
    """Bytes of a device's memory: all of them, those that nobody uses, and those that torch has."""

    total: int
    free: int
    ours: int

    @property
    def available(self) -> int:
        """What a budget may be: what is free or torch's, rounded down to a tenth of a gigabyte."""
        return (self.free + self.ours) // 10**8 * 10**8

    def __str__(self) -> str:
        return (
            f"The device has {self.total / 1e9:.2f} GB: {self.ours / 1e9:.2f} GB are this process's, "
            f"{self.free / 1e9:.2f} GB are free."
        )


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, torch.cuda.memory_reserved(device))


def context_of(device: torch.device, most: int | None = count.MOST_CONTEXT) -> int:
    """Bytes that this process takes of a GPU and torch does not count: its context, and the code of libraries.

    It is at least `CONTEXT`, because code is loaded when it first runs, and more where the device holds more beside
    torch's memory now. What other processes hold cannot be told apart, so that it is `most` at most; None is no limit,
    for a GPU that nobody else uses.
    """
    there = memory_of(device)
    outside = 0 if there is None else there.total - there.free - there.ours
    found = max(outside, count.CONTEXT)
    return found if most is None else min(found, most)


class ExplainedMemoryError(MemoryError):
    """An allocation failed; the message says what was needed, what there was, and what would do."""


def _released(error: BaseException) -> str:
    """Let everything go that an error holds, and return where it was raised, in words.

    The frames that it has passed hold tensors, also after they were cleared: in the closures of their functions. Who
    handles the error holds its traceback, so that this is cut into pieces.
    """
    where = "".join(traceback.format_tb(error.__traceback__)[-8:])
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        piece = found.__traceback__
        while piece is not None:
            following, piece.tb_next = piece.tb_next, None
            piece = following
        found = found.with_traceback(None).__context__
    return f"It was raised here:\n{where}"


def _itemsize(model: nn.Module) -> int:
    """Bytes of a value that a model computes with."""
    return next(one for one in model.parameters() if not isinstance(one, Float8Tensor)).dtype.itemsize


def _recipe(model: nn.Module) -> Recipe | None:
    return next((one.recipe for one in model.parameters() if isinstance(one, Float8Tensor)), None)


def _is_watched(model: nn.Module) -> bool:
    """Whether somebody's hooks want to see the model run."""
    hooks = (hook for part in model.modules() for hook in (*part._forward_hooks.values(), *_before(part)))
    return any(hook is not arriving for hook in hooks)


def _before(part: nn.Module) -> list[Any]:
    return list(part._forward_pre_hooks.values())


def _state(model: nn.Module) -> Hashable:
    """Equal as long as no weight was replaced or written to."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return tuple((id(one), 0 if one.is_inference() else one._version) for one in tensors)
