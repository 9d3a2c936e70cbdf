"""Recognising models by tensor names: which models a file holds, in which naming, and which tensors belong to none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from encoders.json_files import printable
from mmdit.checkpoints.components import REGISTRY, ModelKind, Naming, title

# Tensors that some writers store and no model uses: index buffers and CLIP's contrastive temperature.
UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale)")
# Prefixes that do not tell which model follows.
_WRAPPERS = ("transformer.", "text_encoder.", "model.")
_LORA = re.compile(
    r"lora_(up|down|mid|A|B|unet|te\d?|transformer|linear_layer)|lycoris_|[._]lora\.|(hada|lokr)_w|\.dora_scale$|"
    r"\.diff(_b)?$|\.set_weight$|\.reshape_weight$"
)
# Tensors that training and other programs leave in files beside the models: pattern -> description.
_LEFTOVERS: tuple[tuple[str, str], ...] = (
    (r"(model_ema|ema_model|ema)\..*", "averaged weights (EMA)"),
    (r"(.*\.)?(model_sampling|denoiser|noise_scheduler)\..*", "a noise schedule"),
    (
        r"(betas|sigmas|log_sigmas|alphas_cumprod(_prev)?|sqrt_.*_cumprod|log_one_minus_.*|posterior_.*)",
        "a noise schedule",
    ),
    (r"(first_stage_model\.)?loss\..*", "a training loss"),
    (rf".*({_LORA.pattern}).*", "a LoRA"),
)
_EMA = re.compile(r"(model_ema|ema_model|ema)\.(.+)")
_FOREIGN: tuple[tuple[str, str], ...] = (
    ("a ControlNet of another model", r"^controlnet_(?!blocks\.)|^control_model\."),
    ("a Flux checkpoint", r"(^|\.)double_blocks\.\d+\.|(^|\.)single_transformer_blocks\.\d+\."),
    ("a Stable Diffusion XL checkpoint", r"^conditioner\.embedders\.|(^|\.)label_emb\.|^add_embedding\."),
    ("a Stable Diffusion 2 checkpoint", r"^cond_stage_model\.model\."),
    ("a Stable Diffusion 1.x checkpoint", r"^cond_stage_model\.transformer\."),
    ("a UNet of Stable Diffusion 1.x or 2", r"(^|\.)input_blocks\.\d+\.|^down_blocks\.\d\.(attentions|resnets)\."),
)
_FOREIGN_MODELS = re.compile("|".join(pattern for _, pattern in _FOREIGN[:2]))  # its tensors have our names too


class Model(NamedTuple):
    """The tensors of one model within a file: `{name without prefix: name in the file}`."""

    naming: Naming
    keys: dict[str, str]


@dataclass(frozen=True)
class Split:
    """The tensors of a file, sorted by model."""

    models: dict[str, Model]  # by component, or by family ("clip") where only the file's place tells which member it is
    left: list[str] = field(default_factory=list)  # names that belong to no model
    dropped: dict[str, list[str]] = field(default_factory=dict)  # known names that are not used: description -> names
    wrapped: list[str] = field(default_factory=list)  # names that a wrapper has prefixed

    def notes(self) -> list[str]:
        """Sentences about tensors that are not used or are read under another name."""
        left_out = [
            f"{len(keys)} tensors of {what} are left out, first {printable(keys[0], 200)}"
            for what, keys in self.dropped.items()
        ]
        unwrapped = f"{len(self.wrapped)} names are read without `_orig_mod.` and `module.`, which wrappers add"
        return left_out + ([unwrapped] if self.wrapped else [])


def split(keys: Iterable[str], *, ema: bool = False) -> Split:
    """The models that a file holds, and its other tensors.

    Prefixes of wrappers are removed first: `_orig_mod.` of torch.compile, and a leading `module.` of parallel training.

    Args:
        keys: names of tensors.
        ema: take averaged weights (`model_ema.`, `ema.`) instead of the weights that they average.
    """
    keys = list(keys)
    named = {key: unwrapped(key) for key in keys}
    if ema:
        named = _averaged(named)
    found = Split({})
    for prefix, local in _groups(named).items():
        kind = next((kind for kind in REGISTRY.values() if prefix in kind.prefixes), None)
        naming, kind = _recognise(local, kind)
        if naming is None or kind is None or _is_foreign(local):
            _leave_out(found, local, {})
            continue
        name = kind.component if prefix in kind.prefixes else kind.family
        kept = _leave_out(found, local, {**kind.beside, **naming.beside}, keep=True)
        if name in found.models:  # present under two prefixes, so that it is unclear which one is meant
            found.left.extend(kept.values())
        else:
            found.models[name] = Model(naming, kept)
    found.wrapped.extend(key for key in keys if unwrapped(key) != key)
    return found


def foreign(keys: Iterable[str]) -> str | None:
    """A description of a file of another kind, if it is one that is often mistaken for an SD3 checkpoint."""
    keys = list(keys)
    if any(map(_LORA.search, keys)):
        return "a LoRA (weights to add to a model, not a model)"
    return next((name for name, pattern in _FOREIGN if any(re.search(pattern, key) for key in keys)), None)


def looks_like(keys: Iterable[str]) -> str:
    """A short description of these keys, for an error message."""
    keys = list(keys)
    if not keys:
        return "a file without tensors"
    found = split(keys)
    name = foreign(found.left if found.models else keys)
    if name is not None:
        return name
    if found.models:
        return " and ".join(map(title, found.models))
    shown = ", ".join(printable(key, 80) for key in sorted(keys)[:3])
    return f"no model known here (first keys: {shown})"


def unwrapped(key: str) -> str:
    """A name without the prefixes of torch.compile (`_orig_mod.`) and parallel training (a leading `module.`)."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _averaged(named: Mapping[str, str]) -> dict[str, str]:
    """The names with averaged weights instead of the others; Stability's and CompVis' code removes the dots of names.

    Source: `ldm/modules/ema.py` (LitEma) of CompVis/latent-diffusion.
    """
    plain = {name: key for key, name in named.items() if _EMA.match(name) is None}
    by_flat = {name.removeprefix("model.").replace(".", ""): name for name in plain}
    taken = {
        by_flat.get(found[2].replace(".", ""), found[2]): key
        for key, name in named.items()
        if (found := _EMA.match(name)) is not None
    }
    return {key: name for name, key in (plain | taken).items()}


def _groups(named: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """`{prefix: {name without it: name in the file}}`."""
    known = sorted((prefix for kind in REGISTRY.values() for prefix in kind.prefixes), key=len, reverse=True)
    groups: dict[str, dict[str, str]] = {}
    for key, name in named.items():
        prefix = next((prefix for prefix in known if name.startswith(prefix)), "")
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = key
    bare = groups.pop("", {})
    if bare and _recognise(bare, None)[0] is None:
        for wrapper in _WRAPPERS:
            inner = {name.removeprefix(wrapper): key for name, key in bare.items() if name.startswith(wrapper)}
            if inner and _recognise(inner, None)[0] is not None:
                groups[wrapper] = inner
                bare = {name: key for name, key in bare.items() if not name.startswith(wrapper)}
    return groups | ({"": bare} if bare else {})


def _recognise(local: Mapping[str, str], kind: ModelKind | None) -> tuple[Naming | None, ModelKind | None]:
    """The naming and the kind of a group of names; `kind` is the kind that its prefix implies, if any."""
    names = [name for name in local if _LORA.search(name) is None and _EMA.match(name) is None]
    for each in [kind] if kind is not None else REGISTRY.values():
        for naming in each.namings:
            if any(map(re.compile(naming.signature).match, names)):
                return naming, each
    return None, None


def _is_foreign(local: Mapping[str, str]) -> bool:
    return any(map(_FOREIGN_MODELS.search, local))


def _leave_out(
    found: Split, local: Mapping[str, str], beside: Mapping[str, str], *, keep: bool = False
) -> dict[str, str]:
    """Remove known names that are not used; the rest is returned, or recorded as belonging to no model."""
    kept = {}
    patterns = [(re.compile(pattern), what) for pattern, what in (*_LEFTOVERS, *beside.items())]
    known = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, _ in patterns))
    for name, key in local.items():
        found_by = (what for pattern, what in patterns if pattern.fullmatch(name))
        what = next(found_by, None) if known.fullmatch(name) else None  # few names are known: one look for most
        if what is not None and (keep or what != "a LoRA"):
            found.dropped.setdefault(what, []).append(key)
        elif keep:
            kept[name] = key
        elif not UNUSED.fullmatch(name):
            found.left.append(key)
    return kept
