"""The config.json files of diffusers and transformers: read, compared with the tensors, and written.

A config is inferred from shapes and completed by config.json, which may not contradict them. The functions here are
entries of the rows of `mmdit.checkpoints.components.REGISTRY`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from encoders.clip import Activation, CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.models.config import MMDiTConfig

Shapes = Mapping[str, Sequence[int]]
MAX_SIDE = 2**24  # elements along one side of a tensor; the largest official side is 147,456
MAX_NUMBER = 10**9  # the largest number that is accepted in a config.json
_ACTIVATIONS = ("quick_gelu", "gelu")
_PROJECTION = "text_projection.weight"
_LARGEST = 2  # eos_token_id by which transformers means "pool at the largest id", which is how SD3 was trained


def mmdit_config(shapes: Shapes, said: Mapping[str, Any]) -> MMDiTConfig:
    """The config of an MMDiT; config.json gives its default picture size."""
    return MMDiTConfig.from_shapes(shapes, sample_size=said.get("sample_size"))


def vae_config(shapes: Shapes, said: Mapping[str, Any]) -> VAEConfig:
    """The config of a VAE; config.json gives the groups of its norms, and scale and shift of its latents."""
    return VAEConfig.from_shapes(
        shapes,
        groups=said.get("norm_num_groups", 32),
        scale=said.get("scaling_factor", 1.5305),
        shift=said.get("shift_factor", 0.0609),
    )


def clip_l_config(shapes: Shapes, said: Mapping[str, object]) -> CLIPConfig:
    """The config of CLIP-L, whose official file has no projection."""
    return _clip_config(shapes, said, "quick_gelu", 768, "CLIP-L", {1280: "CLIP-G"})


def clip_g_config(shapes: Shapes, said: Mapping[str, object]) -> CLIPConfig:
    """The config of CLIP-G, whose projected output is half of the pooled text vector.

    Raises:
        KeyError: there is no projection.
    """
    config = _clip_config(shapes, said, "gelu", 1280, "CLIP-G", {768: "CLIP-L"})
    if config.projection_dim is None:
        raise KeyError(_PROJECTION)
    return config


def _clip_config(
    shapes: Shapes, said: Mapping[str, Any], usual: Activation, width: int, name: str, others: Mapping[int, str]
) -> CLIPConfig:
    activation = said.get("hidden_act", usual)
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"the config.json of {name} says hidden_act = {activation!r}, "
            f"expected {' or '.join(map(repr, _ACTIVATIONS))}"
        )
    eos = said.get("eos_token_id", _LARGEST)
    config = CLIPConfig.from_shapes(
        shapes, activation=activation, heads=said.get("num_attention_heads"), eos_id=None if eos == _LARGEST else eos
    )
    if config.width in others:
        raise ValueError(
            f"a CLIP text tower of width {config.width} is {others[config.width]}, where {name} (width {width}) is "
            "expected; the two files may be swapped"
        )
    return config


def t5_config(shapes: Shapes, said: Mapping[str, object]) -> T5Config:
    """The config of a T5 encoder, which follows from shapes alone."""
    return T5Config.from_shapes(shapes)


def check_shapes(shapes: Shapes, dimensions: Mapping[str, int]) -> None:
    """Check that tensors have the number of dimensions that inferring the config relies on.

    Args:
        shapes: the shape of every tensor of a model, by official name.
        dimensions: the number of dimensions of the tensors whose names match a pattern.

    Raises:
        ValueError: a tensor is empty, implausibly large, or has another number of dimensions.
    """
    for key, shape in shapes.items():
        if 0 in shape:
            raise ValueError(f"{key} is empty: it has shape {list(shape)}")
        if any(side > MAX_SIDE for side in shape):
            raise ValueError(f"{key} has shape {list(shape)}; no model here has a side above {MAX_SIDE}")
    for pattern, sides in dimensions.items():
        if odd := [key for key, shape in shapes.items() if re.fullmatch(pattern, key) and len(shape) != sides]:
            raise ValueError(f"{odd[0]} has shape {list(shapes[odd[0]])}, expected {sides} dimensions")


def check_entries(title: str, said: Mapping[str, object], classes: Sequence[str]) -> None:
    """Check the entries of a config.json that are used without a check against tensors, and the class that it names.

    Raises:
        ValueError: an entry has the wrong type, or the class is that of another model.
    """
    for name, (kind, low, words) in TAKEN.items():
        value = said.get(name)
        if name not in said or (value is None and name in _MAY_BE_NULL):
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or not low < value < MAX_NUMBER:
            raise ValueError(f"the config.json of the {title} says {name} = {_shown(value)}, expected {words}")
    named = said.get("architectures", said.get("_class_name"))
    named = named if isinstance(named, list) else [] if named is None else [named]
    if named and not any(name in classes for name in named if isinstance(name, str)):
        raise ValueError(
            f"the config.json of the {title} names the class {_shown(named[0])}, expected {' or '.join(classes)}"
        )


def check_agree(title: str, said: Mapping[str, object], found: Mapping[str, object], own: Shapes | None) -> None:
    """Check that a config.json agrees with the tensors; entries that it lacks are not checked.

    Args:
        title: the model's name in messages.
        said: the entries of config.json.
        found: the entries that config.json should have for these tensors.
        own: the shapes of the tensors, where config.json lies beside their file and describes them alone.

    Raises:
        ValueError: they contradict each other.
    """
    for name, value in found.items():
        if name not in said or _plain(said[name]) == _plain(value):
            continue
        if name in CONSTANT:
            raise ValueError(
                f"the config.json of the {title} says {name} = {_shown(said[name])}, Stable Diffusion 3 has only "
                f"{value!r}; this is another model"
            )
        if name in SETTLED:
            raise ValueError(
                f"the config.json of the {title} says {name} = {_shown(said[name])}, its tensors say {value!r}; "
                "they are not of the same model: download both again"
            )
    with_projection = "CLIPTextModelWithProjection" in str(said.get("architectures"))
    if own is not None and with_projection and _PROJECTION not in own:
        raise ValueError(
            f"the config.json of the {title} names CLIPTextModelWithProjection, but {_PROJECTION} is missing; "
            "download the file again"
        )
    if own is not None and _PROJECTION in own and _projection_dim(said, own) != own[_PROJECTION][0]:
        raise ValueError(
            f"the config.json of the {title} says projection_dim = {_shown(said['projection_dim'])}, {_PROJECTION} has "
            f"{own[_PROJECTION][0]} rows; they are not of the same model: download both again"
        )


def _projection_dim(said: Mapping[str, object], own: Shapes) -> Any:
    return said.get("projection_dim", own[_PROJECTION][0])


def _plain(value: object) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def mmdit_json(config: MMDiTConfig) -> dict[str, Any]:
    """The config.json of diffusers' SD3Transformer2DModel."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": config.head_dim,
        "caption_projection_dim": config.hidden_size,
        "dual_attention_layers": list(config.dual_attention_blocks),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.pos_embed_size,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": config.sample_size,
    }


def vae_json(config: VAEConfig) -> dict[str, Any]:
    """The config.json of diffusers' AutoencoderKL."""
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks_per_level,
        "mid_block_add_attention": True,
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def clip_json(config: CLIPConfig) -> dict[str, Any]:
    """The config.json of transformers' CLIPTextModelWithProjection."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "bos_token_id": 0,
        "eos_token_id": _LARGEST if config.eos_id is None else config.eos_id,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 1,
        "projection_dim": config.projection_dim or config.width,
        "vocab_size": config.vocabulary,
    }


def t5_json(config: T5Config) -> dict[str, Any]:
    """The config.json of transformers' T5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.mlp_dim,
        "d_kv": config.head_dim,
        "d_model": config.width,
        "dense_act_fn": "gelu_new",
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.buckets,
        "tie_word_embeddings": False,
        "vocab_size": config.vocabulary,
    }


def vae_words(config: VAEConfig) -> str:
    """A VAE in words."""
    return f"widths {'-'.join(map(str, config.widths))}, {config.latent_channels} latent channels"


def clip_words(config: CLIPConfig) -> str:
    """A CLIP text tower in words."""
    projection = "no projection" if config.projection_dim is None else "with projection"
    return f"{config.layers} layers x {config.width}, {config.activation}, {projection}"


def t5_words(config: T5Config) -> str:
    """A T5 encoder in words."""
    return f"{config.layers} layers x {config.width}, vocabulary {config.vocabulary}"


# The number of dimensions of the tensors that configs are inferred from; all others are checked against the model.
CLIP_DIMENSIONS = {
    r"text_model\.(embeddings\..*|encoder\.layers\.0\.mlp\.fc1\.weight)|text_projection\.weight": 2,
}
MMDIT_DIMENSIONS = {
    r"(context_embedder|y_embedder\.mlp\.0|final_layer\.linear|joint_blocks\.0\.x_block\.mlp\.fc1)\.weight": 2,
    r"joint_blocks\.\d+\.(x|context)_block\.attn2?\.ln_[qk]\.weight": 1,
    r"pos_embed": 3,
    r"x_embedder\.proj\.weight": 4,
}
VAE_DIMENSIONS = {r".*\.conv_in\.weight|.*\.conv1\.weight": 4}
T5_DIMENSIONS = {
    r"shared\.weight|.*\.relative_attention_bias\.weight|.*\.(SelfAttention\.q|DenseReluDense\.wo)\.weight": 2,
}
# Entries that are read from config.json because no shape implies them: type, lower bound (exclusive), description.
TAKEN: Mapping[str, tuple[Any, float, str]] = {
    "sample_size": (int, 0, "a whole number above 0"),
    "norm_num_groups": (int, 0, "a whole number above 0"),
    "num_attention_heads": (int, 0, "a whole number above 0"),
    "eos_token_id": (int, -1, "a token id"),
    "scaling_factor": ((int, float), 0, "a number above 0"),
    "shift_factor": ((int, float), -inf, "a number"),
}
_MAY_BE_NULL = ("sample_size", "num_attention_heads")  # the entry then has its usual value
# Entries that follow from the tensors.
SETTLED = (
    *("attention_head_dim", "caption_projection_dim", "dual_attention_layers", "in_channels", "joint_attention_dim"),
    *("num_attention_heads", "num_layers", "out_channels", "patch_size", "pooled_projection_dim"),
    *("pos_embed_max_size", "qk_norm", "block_out_channels", "latent_channels", "layers_per_block"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "vocab_size"),
    *("d_ff", "d_kv", "d_model", "num_heads"),
    "relative_attention_num_buckets",
)
# Entries that would change what is computed, and for which the code supports one value only.
CONSTANT = (
    *("act_fn", "down_block_types", "up_block_types", "mid_block_add_attention", "use_quant_conv"),
    *("use_post_quant_conv", "feed_forward_proj", "dense_act_fn", "is_gated_act", "layer_norm_eps"),
    *("layer_norm_epsilon", "relative_attention_max_distance"),
)
