"""What a set of tensor names is: which models of the registry, in whose names, and what else lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from encoders.json_files import printable
from mmdit.checkpoints.components import REGISTRY, ModelKind, Naming, title

# Stored beside the weights by some writers, and used by no model: index buffers and CLIP's contrastive temperature.
UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale)")
# Prefixes that say nothing of what is behind them.
_WRAPPERS = ("transformer.", "text_encoder.", "model.")
_LORA = (
    r"lora_(up|down|mid|A|B|unet|te\d?|transformer|linear_layer)|lycoris_|[._]lora\.|(hada|lokr)_w|\.dora_scale$|"
    r"\.diff(_b)?$|\.set_weight$|\.reshape_weight$"
)
# What training and other programs leave in files beside the models, by the names of the tensors.
_LEFTOVERS: tuple[tuple[str, str], ...] = (
    (r"(model_ema|ema_model|ema)\..*", "averaged weights (EMA)"),
    (r"(.*\.)?(model_sampling|denoiser|noise_scheduler)\..*", "a noise schedule"),
    (
        r"(betas|sigmas|log_sigmas|alphas_cumprod(_prev)?|sqrt_.*_cumprod|log_one_minus_.*|posterior_.*)",
        "a noise schedule",
    ),
    (r"(first_stage_model\.)?loss\..*", "a training loss"),
    (rf".*({_LORA}).*", "a LoRA"),
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
_FOREIGN_MODELS = _FOREIGN[:2]  # whose tensors carry our names too


class Model(NamedTuple):
    """The tensors of one model within a file: `{name without prefix: name in the file}`."""

    naming: Naming
    keys: dict[str, str]


@dataclass(frozen=True)
class Split:
    """What the names of a file's tensors say."""

    models: dict[str, Model]  # by component; by family ("clip") where its place has to say which member it is
    left: list[str] = field(default_factory=list)  # names that belong to no model
    dropped: dict[str, list[str]] = field(default_factory=dict)  # names that are known and not used, by what they are
    wrapped: list[str] = field(default_factory=list)  # names that a wrapper has changed

    def notes(self) -> list[str]:
        """What is left out of the file or read under another name, in words."""
        left_out = [
            f"{len(keys)} tensors of {what} are left out, first {printable(keys[0], 200)}"
            for what, keys in self.dropped.items()
        ]
        unwrapped = f"{len(self.wrapped)} names are read without `_orig_mod.` and `module.`, which wrappers add"
        return left_out + ([unwrapped] if self.wrapped else [])


def split(keys: Iterable[str], *, ema: bool = False) -> Split:
    """The models that a file holds, and what else it has.

    Names are read without what wrappers add: `_orig_mod.` of torch.compile, a leading `module.` of parallel training.

    Args:
        keys: names of tensors.
        ema: take averaged weights (`model_ema.`, `ema.`) in the place of those that they are the average of.
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
        if name in found.models:  # under two prefixes: what the file means is not clear
            found.left.extend(kept.values())
        else:
            found.models[name] = Model(naming, kept)
    found.wrapped.extend(key for key in keys if unwrapped(key) != key)
    return found


def foreign(keys: Iterable[str]) -> str | None:
    """What a file of another kind is, if it is one that people mix up with SD3 checkpoints."""
    keys = list(keys)
    if any(re.search(_LORA, key) for key in keys):
        return "a LoRA (weights to add to a model, not a model)"
    return next((name for name, pattern in _FOREIGN if any(re.search(pattern, key) for key in keys)), None)


def looks_like(keys: Iterable[str]) -> str:
    """A few words for an error message: what these keys are."""
    keys = list(keys)
    found = split(keys)
    name = foreign(found.left if found.models else keys)
    if name is not None:
        return name
    if found.models:
        return " and ".join(map(title, found.models))
    shown = ", ".join(printable(key, 80) for key in sorted(keys)[:3])
    return f"no model known here (first keys: {shown})"


def unwrapped(key: str) -> str:
    """A name without what torch.compile (`_orig_mod.`) and parallel training (a leading `module.`) add to it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _averaged(named: Mapping[str, str]) -> dict[str, str]:
    """The names of averaged weights in the place of the others; Stability's and CompVis' code writes them without dots.

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
    """The naming and the kind of a group of names; `kind` is what its prefix says."""
    names = [name for name in local if re.search(_LORA, name) is None and _EMA.match(name) is None]
    for each in [kind] if kind is not None else REGISTRY.values():
        for naming in each.namings:
            signature = re.compile(naming.signature)
            if any(signature.match(name) for name in names):
                return naming, each
    return None, None


def _is_foreign(local: Mapping[str, str]) -> bool:
    return any(re.search(pattern, name) for _, pattern in _FOREIGN_MODELS for name in local)


def _leave_out(
    found: Split, local: Mapping[str, str], beside: Mapping[str, str], *, keep: bool = False
) -> dict[str, str]:
    """Sort out what is known and not used; the rest is given back, or belongs to no model."""
    kept = {}
    patterns = [(re.compile(pattern), what) for pattern, what in (*_LEFTOVERS, *beside.items())]
    for name, key in local.items():
        what = next((what for pattern, what in patterns if pattern.fullmatch(name)), None)
        if what is not None and (keep or what != "a LoRA"):
            found.dropped.setdefault(what, []).append(key)
        elif keep:
            kept[name] = key
        elif not UNUSED.fullmatch(name):
            found.left.append(key)
    return kept
