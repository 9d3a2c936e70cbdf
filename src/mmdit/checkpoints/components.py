"""What a set of tensor names is: which of our models, in whose names, or what else it looks like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Component = Literal["transformer", "vae", "clip_l", "clip_g", "t5"]
Kind = Literal["transformer", "vae", "clip", "t5"]
Names = Literal["official", "diffusers"]

KIND_OF: dict[Component, Kind] = {
    "transformer": "transformer",
    "vae": "vae",
    "clip_l": "clip",
    "clip_g": "clip",
    "t5": "t5",
}
TITLES: dict[Component | Kind, str] = {
    "transformer": "transformer (MMDiT)",
    "vae": "VAE",
    "clip": "CLIP text tower",
    "clip_l": "CLIP-L text encoder",
    "clip_g": "CLIP-G text encoder",
    "t5": "T5 encoder",
}
PREFIXES: dict[str, Component] = {  # of single files; the first four are the official ones
    "model.diffusion_model.": "transformer",
    "first_stage_model.": "vae",
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "t5",
    "diffusion_model.": "transformer",
}
CLIP_WIDTHS: dict[int, Component] = {768: "clip_l", 1280: "clip_g"}
# Stored beside the weights by some writers, and used by no model: index buffers and CLIP's contrastive temperature.
UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale)")

_SIGNATURES: list[tuple[Kind, Names, str]] = [  # any one key is enough, so that a missing one can be named
    ("transformer", "official", r"joint_blocks\.\d+\.(x|context)_block\."),
    ("transformer", "diffusers", r"transformer_blocks\.\d+\.(attn\.add_[qkv]_proj|ff_context|norm1_context)\."),
    ("vae", "official", r"(encoder\.down|decoder\.up)\.\d+\.block\."),
    ("vae", "diffusers", r"(encoder\.down|decoder\.up)_blocks\.\d+\.resnets\."),
    ("clip", "official", r"text_model\.(embeddings|encoder\.layers)\."),
    ("t5", "official", r"encoder\.block\.\d+\.layer\.[01]\."),
]
_LORA = (
    r"lora_(up|down|mid|A|B|unet|te\d?|transformer|linear_layer)|lycoris_|[._]lora\.|(hada|lokr)_w|\.dora_scale$|"
    r"\.diff(_b)?$|\.set_weight$|\.reshape_weight$"
)
_FOREIGN: list[tuple[str, str]] = [
    ("a LoRA (weights to add to a model, not a model)", _LORA),
    ("a ControlNet", r"^controlnet_|^control_model\."),
    ("a Flux checkpoint", r"(^|\.)double_blocks\.\d+\.|(^|\.)single_transformer_blocks\.\d+\."),
    ("a Stable Diffusion XL checkpoint", r"^conditioner\.embedders\.|(^|\.)label_emb\.|^add_embedding\."),
    ("a Stable Diffusion 2 checkpoint", r"^cond_stage_model\.model\."),
    ("a Stable Diffusion 1.x checkpoint", r"^cond_stage_model\.transformer\."),
    ("a UNet of Stable Diffusion 1.x or 2", r"(^|\.)input_blocks\.\d+\.|^down_blocks\.\d\.(attentions|resnets)\."),
]


class Model(NamedTuple):
    """The tensors of one model within a file: `{name without prefix: name in the file}`."""

    names: Names
    keys: dict[str, str]


def split(keys: Iterable[str]) -> tuple[dict[Component | Kind, Model], list[str]]:
    """The models that a file holds, and the keys that belong to none of them.

    A text tower without prefix is "clip": whether it is L or G, its place has to say.
    """
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(next((prefix for prefix in PREFIXES if key.startswith(prefix)), ""), []).append(key)
    models: dict[Component | Kind, Model] = {}
    left: list[str] = []
    for prefix, members in groups.items():
        local = {key.removeprefix(prefix): key for key in members}
        recognised = _recognise(local)
        if recognised is None or foreign(members) is not None:
            left += members
            continue
        kind, names = recognised
        models[PREFIXES.get(prefix, kind)] = Model(names, local)
    return models, [key for key in left if not UNUSED.fullmatch(key)]


def foreign(keys: Iterable[str]) -> str | None:
    """What a file of another kind is, if it is one that people mix up with SD3 checkpoints."""
    keys = list(keys)
    return next((name for name, pattern in _FOREIGN if any(re.search(pattern, key) for key in keys)), None)


def looks_like(keys: Iterable[str]) -> str:
    """A few words for an error message: what these keys are."""
    keys = list(keys)
    if name := foreign(keys):
        return name
    models, _ = split(keys)
    if models:
        return " and ".join(TITLES[kind] for kind in models)
    return f"no model known here (first keys: {', '.join(sorted(keys)[:3])})"


def _recognise(local: Mapping[str, str]) -> tuple[Kind, Names] | None:
    fits = ((kind, names) for kind, names, pattern in _SIGNATURES if any(re.match(pattern, key) for key in local))
    return next(fits, None)
