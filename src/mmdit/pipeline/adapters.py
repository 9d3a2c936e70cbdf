"""LoRAs of a pipeline: load, weight, disable, merge and remove them, with diffusers' method names.

All changes are computed from the original weights, so that removing a LoRA restores them exactly; see
`mmdit.pipeline.patched_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, get_args

from torch import Tensor

from mmdit.checkpoints.lora import Lora, load_lora
from mmdit.checkpoints.lora_merge import planned
from mmdit.checkpoints.lora_names import PARTS, Part
from mmdit.models.lora import all_beside
from mmdit.pipeline.base import PipelineModels
from mmdit.pipeline.patched_weights import Adapter, Form, PatchedWeights, Weight, refuse_trained, shapes_of
from mmdit.utils import number
from samplers import pick


@dataclass
class _State:
    """The LoRAs of a pipeline, and the weights that they have replaced."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    enabled: bool = True
    weights: PatchedWeights = field(default_factory=PatchedWeights)
    applied: _Applied = field(default_factory=lambda: _Applied({}, True))

    def keep(self) -> None:
        """Note that the weights are now those of these LoRAs."""
        values = {name: (adapter, dict(vars(adapter))) for name, adapter in self.adapters.items()}
        self.applied = _Applied(values, self.enabled)

    def revert(self) -> None:
        """Have the LoRAs of the last `keep` again, with the weights and forms that they had."""
        self.adapters, self.enabled = {}, self.applied.enabled
        for name, (adapter, values) in self.applied.adapters.items():
            vars(adapter).update(values)
            self.adapters[name] = adapter


class _Applied(NamedTuple):
    """The LoRAs that the weights have in them: by name the adapter and the values of its fields."""

    adapters: dict[str, tuple[Adapter, dict[str, object]]]
    enabled: bool


class PipelineAdapters(PipelineModels):
    """The part of `mmdit.Pipeline` that adds LoRAs to its models."""

    def load_lora_weights(
        self,
        file: str | Path | Mapping[str, Tensor] | Lora,
        adapter_name: str | None = None,
        weight: Weight = 1.0,
        *,
        text_encoder_weight: Weight | None = None,
        form: Form = "attached",
    ) -> LoraReport:
        """Read a LoRA by the rules of the pipeline's profile and activate it, in addition to the active ones.

        Args:
            file: a LoRA file, its tensors by name, or the result of `mmdit.load_lora`.
            adapter_name: the name of the LoRA; None gives it the first free name of default_0, default_1 ...
            weight: the strength, which may be negative; or strengths by globs over official names
                (`{"joint_blocks.1?.*": 0.5}`), where tensors that no glob matches have strength 1.
            text_encoder_weight: the same for the text encoders; None is `weight`.
            form: "attached" keeps the weights and adds the low-rank products to the outputs of the Linears. It does not
                round float8 weights again, and is fast to switch. "merged" changes the weights. It costs nothing per
                step, but float8 weights are rounded again.

        Returns:
            The active LoRAs, their form, and the keys that are not used.

        Raises:
            mmdit.CheckpointError: see `mmdit.load_lora` and `mmdit.merge_lora`; the pipeline is then unchanged.
            ValueError: the name is taken, a weight is not finite, a glob matches nothing, or merging gives float8
                weights that are not finite; the pipeline is then unchanged.
        """
        lora = file if isinstance(file, Lora) else load_lora(file, self.profile)
        name = self._free_name() if adapter_name is None else adapter_name
        if name in self._loras.adapters:
            raise ValueError(
                f"there is an adapter {name!r} already ({self._loras.adapters[name].lora.source}); give another name, "
                "or call delete_adapters first"
            )
        pick(dict.fromkeys(get_args(Form)), form, "form")
        adapter = Adapter(lora, form, _checked("weight", weight, lora))
        if text_encoder_weight is not None:
            adapter.text_encoder_weight = _checked("text_encoder_weight", text_encoder_weight, lora)
        self._check_fits(lora)
        self._loras.adapters[name] = adapter
        self._apply_loras()
        return self.lora_report()

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Weight | Sequence[Weight | None] | None = None,
        *,
        text_encoder_weights: Weight | Sequence[Weight | None] | None = None,
    ) -> None:
        """Activate exactly these LoRAs, in this order and with these weights.

        Args:
            adapter_names: one name or several.
            adapter_weights: one weight for all, or one for each, as in `load_lora_weights`; None is 1.
            text_encoder_weights: the same for the text encoders; None takes the weights of the transformer.

        Raises:
            ValueError: a name is unknown or given twice, the number of weights differs from the number of names, a
                weight is not finite, or a glob matches nothing.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = [self._adapter(name) for name in names]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the adapter {twice[0]!r} is named twice")
        weights = _each("adapter_weights", adapter_weights, known)
        text = _each("text_encoder_weights", text_encoder_weights, known)
        for adapter in self._loras.adapters.values():
            adapter.active = False
        for adapter, weight, text_weight in zip(known, weights, text, strict=True):
            adapter.active, adapter.weight = True, 1.0 if weight is None else weight
            adapter.text_encoder_weight = text_weight
        others = {name: one for name, one in self._loras.adapters.items() if name not in names}
        self._loras.adapters = dict(zip(names, known, strict=True)) | others
        self._apply_loras()

    def get_active_adapters(self) -> list[str]:
        """The names of the active LoRAs, in the order in which they are applied."""
        if not self._loras.enabled:
            return []
        return [name for name, adapter in self._loras.adapters.items() if adapter.active]

    def get_list_adapters(self) -> dict[Part, list[str]]:
        """The names of the loaded LoRAs, by the model that they change."""
        every = self._loras.adapters.items()
        found = {part: [name for name, adapter in every if adapter.lora.of(part)] for part in PARTS}
        return {part: names for part, names in found.items() if names}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove LoRAs, active or not.

        Raises:
            ValueError: a name is unknown.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._adapter(name)
        for name in names:
            self._loras.adapters.pop(name, None)
        self._apply_loras()

    def disable_lora(self) -> None:
        """Disable all LoRAs, including merged ones, until `enable_lora`."""
        self._loras.enabled = False
        self._apply_loras()

    def enable_lora(self) -> None:
        """Enable the LoRAs again after `disable_lora`."""
        self._loras.enabled = True
        self._apply_loras()

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """Disable all LoRAs within the context: `with pipe.without_lora(): off = mmdit.capture(pipe, ...)`."""
        before = self._loras.enabled
        self.disable_lora()
        try:
            yield
        finally:
            self._loras.enabled = before
            self._apply_loras()

    def fuse_lora(self, adapter_names: str | Sequence[str] | None = None, *, lora_scale: float = 1.0) -> LoraReport:
        """Merge LoRAs into the weights; `unfuse_lora` restores the weights bit for bit.

        Args:
            adapter_names: one name or several; None merges all active LoRAs.
            lora_scale: a factor for the weights of the LoRAs while they are merged.

        Raises:
            ValueError: a name is unknown, no LoRA is active, or the scale is not finite.
        """
        scale = number("lora_scale", lora_scale)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = self.get_active_adapters() if names is None else list(names)
        if not names:
            raise ValueError("fuse_lora: no LoRA acts; call load_lora_weights or set_adapters first")
        for adapter in [self._adapter(name) for name in names]:
            adapter.form, adapter.scale = "merged", scale
        self._apply_loras()
        return self.lora_report()

    def unfuse_lora(self) -> None:
        """Restore the weights from before LoRAs were merged, and attach all active LoRAs instead."""
        for adapter in self._loras.adapters.values():
            adapter.form, adapter.scale = "attached", 1.0
        self._apply_loras()

    def unload_lora_weights(self) -> None:
        """Remove all LoRAs and restore all weights bit for bit."""
        self._loras.adapters.clear()
        self._loras.enabled = True
        self._apply_loras()

    def lora_report(self) -> LoraReport:
        """The active LoRAs with their forms and strengths, and the keys that are not used."""
        attached = sum(len(all_beside(model)) for model in self.models.values())
        replaced = len(self._loras.weights.before)
        return LoraReport(dict(self._loras.adapters), self._loras.enabled, attached, replaced, tuple(self.models))

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """Within the context, all active LoRAs are merged."""
        forms = [(adapter, adapter.form) for adapter in self._loras.adapters.values()]
        try:
            for adapter, _ in forms:
                adapter.form = "merged"
            self._apply_loras()
            yield
        finally:
            for adapter, form in forms:
                adapter.form = form
            self._apply_loras()

    @property
    def _loras(self) -> _State:
        return self.__dict__.setdefault("_lora_state", _State())

    def _adapter(self, name: str) -> Adapter:
        known = self._loras.adapters
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"there is no adapter {name!r}, known are {', '.join(map(repr, known)) or 'none'}{hint}")
        return known[name]

    def _free_name(self) -> str:
        return next(name for i in range(10**6) if (name := f"default_{i}") not in self._loras.adapters)

    def _check_fits(self, lora: Lora) -> None:
        """Raise CheckpointError, before any weight is changed, for a LoRA that does not fit or changes no model."""
        parts = [part for part in lora.parts if part in self.models]
        if not parts:
            raise ValueError(
                f"{lora.source} changes {', '.join(lora.parts)}, and this pipeline has {', '.join(self.models)}"
            )
        for part in parts:
            planned(part, shapes_of(self.models[part]), [lora], [1.0])

    def _apply_loras(self) -> None:
        """Restore the weights, then merge and attach the active LoRAs; after an error, those of before act again.

        Raises:
            ValueError: adapters in training are beside Linears, whose place the LoRAs would take.
        """
        try:
            refuse_trained(self.models.values())
        except ValueError:
            self._loras.revert()
            raise
        self._leave()  # else the new weights would be overwritten when the models move back
        try:
            self._patch()
        except BaseException:
            self._loras.revert()
            self._patch()
            raise
        self._loras.keep()
        self._replan()

    def _patch(self) -> None:
        acting = [self._loras.adapters[name] for name in self.get_active_adapters()]
        parts = {part: self.models[part] for part in PARTS if part in self.models}
        self._loras.weights.apply(parts, acting)


@dataclass(frozen=True, repr=False)
class LoraReport:
    """A report on the LoRAs of a pipeline."""

    adapters: Mapping[str, Adapter]
    enabled: bool
    attached: int  # number of Linears with attached LoRAs
    replaced: int  # number of tensors that LoRAs have replaced
    models: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [
            f"{len(self.adapters)} LoRAs{'' if self.enabled else ', all of them disabled'}: beside {self.attached} "
            f"Linears, merged into {self.replaced} tensors"
        ]
        for name, adapter in self.adapters.items():
            acts = adapter.form if adapter.active else "does not act"
            absent = [part for part in adapter.lora.parts if part not in self.models]
            lines.append(f"  {name}: {acts}, weight {adapter.weight}, {adapter.lora.source}")
            lines += [
                f"    left out: {len(adapter.lora.of(part))} patches of {part}, which is not there" for part in absent
            ]
            lines += [f"    {len(adapter.lora.unused)} keys of the file are not used"] if adapter.lora.unused else []
        return "\n".join(lines)


def _checked(name: str, weight: Weight, lora: Lora) -> Weight:
    """Check a weight, or weights by glob; each glob must match a tensor that the LoRA changes."""
    if not isinstance(weight, Mapping):
        return number(name, weight)
    keys = sorted({patch.target.key for patch in lora.patches})
    for glob in weight:
        if not any(fnmatchcase(key, glob) for key in keys):
            near = ", ".join(get_close_matches(glob, keys, n=3, cutoff=0))
            raise ValueError(
                f"{name}: {glob!r} matches none of {len(keys)} tensors that the LoRA changes, such as {near}"
            )
    return {glob: number(f"{name}[{glob!r}]", value) for glob, value in weight.items()}


def _each(
    name: str, given: Weight | Sequence[Weight | None] | None, adapters: Sequence[Adapter]
) -> list[Weight | None]:
    """One weight for each adapter, checked."""
    weights = list(given) if isinstance(given, Sequence) else [given] * len(adapters)
    if len(weights) != len(adapters):
        raise ValueError(f"{name} has {len(weights)} entries for {len(adapters)} adapters; give one, or one for each")
    return [
        None if weight is None else _checked(name, weight, adapter.lora)
        for weight, adapter in zip(weights, adapters, strict=True)
    ]
