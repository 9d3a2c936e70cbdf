"""Configs of the four kinds of model: inferred from shapes, completed by config.json, never contradicted by it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from encoders.clip import Activation, CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.checkpoints.components import CLIP_WIDTHS, TITLES, Component
from mmdit.models.config import MMDiTConfig

Shapes = Mapping[str, Sequence[int]]
ACTIVATIONS: dict[Component, Activation] = {"clip_l": "quick_gelu", "clip_g": "gelu"}


def infer(component: Component, shapes: Shapes, files: Mapping[Component, Mapping[str, Any]]) -> Any:
    """The config of a component, from its shapes and, for what shapes cannot say, its config.json if there is one.

    Raises:
        ValueError: the shapes are those of another model, or config.json contradicts them.
    """
    said = files.get(component, {})
    _check_shapes(component, shapes)
    _check_numbers(component, said)
    config = _FROM[component](shapes, said)
    _compare(component, said, to_diffusers(component, config))
    return config


def to_diffusers(component: Component, config: Any) -> dict[str, Any]:
    """The config.json of a component as diffusers and transformers write it."""
    return _TO[component](config)


def _transformer(shapes: Shapes, said: Mapping[str, Any]) -> MMDiTConfig:
    return MMDiTConfig.from_shapes(shapes, sample_size=said.get("sample_size"))


def _vae(shapes: Shapes, said: Mapping[str, Any]) -> VAEConfig:
    return VAEConfig.from_shapes(
        shapes,
        groups=said.get("norm_num_groups", 32),
        scale=said.get("scaling_factor", 1.5305),
        shift=said.get("shift_factor", 0.0609),
    )


def _clip_l(shapes: Shapes, said: Mapping[str, Any]) -> CLIPConfig:
    return _tower("clip_l", shapes, said)


def _clip_g(shapes: Shapes, said: Mapping[str, Any]) -> CLIPConfig:
    return _tower("clip_g", shapes, said)


def _tower(component: Component, shapes: Shapes, said: Mapping[str, Any]) -> CLIPConfig:
    activation = said.get("hidden_act", ACTIVATIONS[component])
    if activation not in ACTIVATIONS.values():
        raise ValueError(
            f"the config.json of the {TITLES[component]} says hidden_act = {activation!r}, "
            f"expected {' or '.join(map(repr, ACTIVATIONS.values()))}"
        )
    config = CLIPConfig.from_shapes(shapes, activation=activation, heads=said.get("num_attention_heads"))
    if CLIP_WIDTHS.get(config.width, component) != component:
        raise ValueError(
            f"a CLIP text tower of width {config.width} is the {TITLES[CLIP_WIDTHS[config.width]]}, "
            f"where the {TITLES[component]} is expected; were they swapped?"
        )
    return config


def _t5(shapes: Shapes, said: Mapping[str, Any]) -> T5Config:
    return T5Config.from_shapes(shapes)


def _check_shapes(component: Component, shapes: Shapes) -> None:
    """The inference may index what it reads."""
    if hollow := [key for key, shape in shapes.items() if 0 in shape]:
        raise ValueError(f"{hollow[0]} is empty: {list(shapes[hollow[0]])}")
    for pattern, sides in _SIDES[component].items():
        if odd := [key for key, shape in shapes.items() if re.fullmatch(pattern, key) and len(shape) != sides]:
            raise ValueError(f"{odd[0]} has shape {list(shapes[odd[0]])}, expected {sides} dimensions")


def _check_numbers(component: Component, said: Mapping[str, Any]) -> None:
    """What is taken from config.json must be of the right kind."""
    for name, (kind, low, words) in _TAKEN.items():
        value = said.get(name)
        if name not in said or (value is None and kind is int):
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or not low < value < inf:
            raise ValueError(f"the config.json of the {TITLES[component]} says {name} = {value!r}, expected {words}")


def _compare(component: Component, said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """What a config.json says must be what the tensors show; keys that it does not have say nothing."""
    for name, value in found.items():
        if name in _SETTLED and name in said and _plain(said[name]) != _plain(value):
            raise ValueError(
                f"the config.json of the {TITLES[component]} says {name} = {said[name]!r}, its tensors say {value!r}; "
                "they are not of the same model: download both again"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _transformer_json(config: MMDiTConfig) -> dict[str, Any]:
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


def _vae_json(config: VAEConfig) -> dict[str, Any]:
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
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _clip_json(config: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "bos_token_id": 0,
        "eos_token_id": 2,  # transformers' sign for "pool at the largest id", which is how SD3 was trained
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


def _t5_json(config: T5Config) -> dict[str, Any]:
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


_FROM = {"transformer": _transformer, "vae": _vae, "clip_l": _clip_l, "clip_g": _clip_g, "t5": _t5}
_TO: Mapping[str, Any] = {
    "transformer": _transformer_json,
    "vae": _vae_json,
    "clip_l": _clip_json,
    "clip_g": _clip_json,
    "t5": _t5_json,
}
# Dimensions of the tensors that configs are inferred from; the others are checked against the model.
_CLIP_SIDES = {
    r"text_model\.(embeddings\..*|encoder\.layers\.0\.mlp\.fc1\.weight)|text_projection\.weight": 2,
}
_SIDES: Mapping[Component, Mapping[str, int]] = {
    "transformer": {
        r"(context_embedder|y_embedder\.mlp\.0|final_layer\.linear|joint_blocks\.0\.x_block\.mlp\.fc1)\.weight": 2,
        r"joint_blocks\.0\.x_block\.attn\.ln_q\.weight": 1,
        r"pos_embed": 3,
        r"x_embedder\.proj\.weight": 4,
    },
    "vae": {r".*\.conv_in\.weight|.*\.conv1\.weight": 4},
    "clip_l": _CLIP_SIDES,
    "clip_g": _CLIP_SIDES,
    "t5": {r"shared\.weight|.*\.relative_attention_bias\.weight|.*\.(SelfAttention\.q|DenseReluDense\.wo)\.weight": 2},
}
# What is taken from config.json because no shape tells it.
_TAKEN: Mapping[str, tuple[Any, float, str]] = {
    "sample_size": (int, 0, "a whole number above 0"),
    "norm_num_groups": (int, 0, "a whole number above 0"),
    "num_attention_heads": (int, 0, "a whole number above 0"),
    "scaling_factor": ((int, float), 0, "a number above 0"),
    "shift_factor": ((int, float), -inf, "a number"),
}
# The entries of config.json files that tensors or our code settle; the rest says nothing about the computation.
_SETTLED = (
    *("attention_head_dim", "caption_projection_dim", "dual_attention_layers", "in_channels", "joint_attention_dim"),
    *("num_attention_heads", "num_layers", "out_channels", "patch_size", "pooled_projection_dim"),
    *("pos_embed_max_size", "qk_norm", "block_out_channels", "latent_channels", "layers_per_block"),
    *("use_quant_conv", "use_post_quant_conv", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("max_position_embeddings", "vocab_size", "d_ff", "d_kv", "d_model", "num_heads", "feed_forward_proj"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_eps", "layer_norm_epsilon"),
)
