"""What of a pipeline's models is on the device: the plan of a drawing, turns, and errors of a full device."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from encoders import VAE, CLIPText, T5Encoder, run_encoder
from mmdit.checkpoints.components import Component, title
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.failures import ExplainedMemoryError, released
from mmdit.pipeline.footprint import ENCODERS, Setting, Sizes, default_sizes, on_device
from mmdit.pipeline.profiles import Profile
from mmdit.runtime import activations as count
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.device_memory import context_of, memory_of
from mmdit.runtime.modulation import ModulationTable
from mmdit.runtime.parallel import Parallel
from mmdit.runtime.plan import MemoryPlan, ModelBytes, TooLittleMemory, plan, size_word, smallest
from mmdit.runtime.products import stacked_bytes
from mmdit.runtime.streaming import WHOLE, Presence, Residency, arriving, capped, model_bytes
from mmdit.utils import is_out_of_memory, weight_bytes
from quant.recipe import Recipe
from quant.tensor import Float8Tensor

_GRAPHS = 4  # of a drawing where memory is not limited
_TEXTS = 32  # outputs of text encoders that are kept


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
        self._context, self._observed = count.CONTEXT, 0
        self._weight_bytes: dict[Component, ModelBytes] | None = None
        self._turns = None
        if offload is not None or budget is not None:
            self._turns = Residency(device, moves=budget is not None, tight=budget is not None)
            self._turns.graphs_at_once = _GRAPHS if budget is None else 0
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
            self._observed,
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
            self._weight_bytes = on_device(self._place, parts)
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
        self._turns.still, self._turns.graphs_at_once = found.stays, int(found.records)

    def _set_budget(self, budget: int | None) -> None:
        """Go on with another budget; None has the models take turns, as `offload="stages"` does."""
        assert self._turns is not None, "models that are on the device for good have no budget"
        self._leave()
        self._turns.moves, self._turns.tight = budget is not None or self._turns.moves, budget is not None
        self._turns.still, self._turns.graphs_at_once = False, _GRAPHS if budget is None else 0
        self._budget, self.memory_plan = budget, None
        self._fit(self._sizes, anew=True)

    def _replan(self) -> None:
        """Plan anew for the same sizes, because something else has changed."""
        if self.memory_plan is not None:
            self.memory_plan = None
            self._fit(self._sizes, anew=True)

    @contextmanager
    def _observing(self, size: int) -> Iterator[None]:
        """Inside, statistics of the transformer's inputs take so many bytes of the device, for which plans leave room.

        Raises:
            TooLittleMemory: no plan keeps the budget with them.
        """
        self._observed += size
        try:
            self._replan()
            yield
        finally:
            self._observed -= size
            self.memory_plan = None  # also where there was no plan with them
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
            self._turns.drawn()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn a failed allocation into an error that says what was needed, what there was, and what would do.

        Nothing that the failed computation has made stays in memory.
        """
        handled = sys.exception()
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error) or isinstance(error, ExplainedMemoryError | TooLittleMemory):
                raise
            explained = ExplainedMemoryError(self._explanation(error, what))
            explained.add_note(released(error, handled))
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
        models = on_device(self._place, models)
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
