"""Configs of the four kinds of model: inferred from shapes, completed by config.json, never contradicted by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.config import MMDiTConfig
from mmdit.recognise import Component

Shapes = Mapping[str, Sequence[int]]
ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}


def infer(component: Component, shapes: Shapes, files: Mapping[Component, Mapping[str, Any]]) -> Any:
    """The config of a component, from its shapes and, for what shapes cannot say, its config.json if there is one.

    Raises:
        ValueError: the shapes are those of another model, or config.json contradicts them.
    """
    said = files.get(component, {})
    config = _FROM[component](shapes, said)
    _compare(said, to_diffusers(component, config))
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
    heads = said.get("num_attention_heads")
    return CLIPConfig.from_shapes(shapes, activation=said.get("hidden_act", "quick_gelu"), heads=heads)


def _clip_g(shapes: Shapes, said: Mapping[str, Any]) -> CLIPConfig:
    heads = said.get("num_attention_heads")
    return CLIPConfig.from_shapes(shapes, activation=said.get("hidden_act", "gelu"), heads=heads)


def _t5(shapes: Shapes, said: Mapping[str, Any]) -> T5Config:
    return T5Config.from_shapes(shapes)


def _compare(said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """What a config.json says must be what the tensors show; keys that it does not have say nothing."""
    for name, value in found.items():
        if name in _SETTLED and name in said and _plain(said[name]) != _plain(value):
            raise ValueError(
                f"config.json says {name} = {said[name]!r}, the tensors say {value!r}; one of them is wrong"
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
# The entries of config.json files that tensors or our code settle; the rest says nothing about the computation.
_SETTLED = (
    *("attention_head_dim", "caption_projection_dim", "dual_attention_layers", "in_channels", "joint_attention_dim"),
    *("num_attention_heads", "num_layers", "out_channels", "patch_size", "pooled_projection_dim"),
    *("pos_embed_max_size", "qk_norm", "block_out_channels", "latent_channels", "layers_per_block"),
    *("use_quant_conv", "use_post_quant_conv", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("max_position_embeddings", "vocab_size", "d_ff", "d_kv", "d_model", "num_heads", "feed_forward_proj"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_eps", "layer_norm_epsilon"),
)
