"""Map module names in LoRA files to official tensors and to rows of these tensors.

Programs spell module names differently: with dots or underscores, official or diffusers names, and various prefixes.
This module removes the prefix, replaces dots with underscores, and looks the name up in a table that is built from
`keymaps.mmdit_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, NamedTuple

from mmdit.checkpoints.keymaps import Concat, SwapHalves, mmdit_rules

Part = Literal["transformer", "clip_l", "clip_g", "t5"]
PARTS: Final[tuple[Part, ...]] = ("transformer", "clip_l", "clip_g", "t5")
Exchange = Literal["never", "always", "if last"]
"""Whether a file has the two halves of the rows (shift | scale) in the other order; "if last" is for the last block."""


@dataclass(frozen=True)
class Target:
    """The tensor that a patch changes: all of its rows, or one third of them (q, k or v of a fused weight)."""

    part: Part
    key: str  # official name of the tensor
    third: int | None = None
    exchange: Exchange = "never"

    def __str__(self) -> str:
        return f"{self.part}.{self.key}" + ("" if self.third is None else f"[{'qkv'[self.third]}]")

    def rows(self, count: int) -> slice:
        """The slice of the target's rows in a tensor with `count` rows."""
        if self.third is None:
            return slice(0, count)
        return slice(self.third * count // 3, (self.third + 1) * count // 3)

    def is_exchanged(self, rows: int, columns: int) -> bool:
        """Whether a weight with this many rows and inputs has its halves in the opposite order in the file.

        In the context stream, the modulation of the last block has 2 chunks of rows; all other blocks have 6.
        """
        return self.exchange == "always" or (self.exchange == "if last" and rows == 2 * columns)


class Named(NamedTuple):
    """The official tensors that a module name refers to."""

    target: Target  # the weight; a bias has the same rows
    bias: str | None  # official name of the bias
    prefix: str


class _Module(NamedTuple):
    """One module of a model as a template; `{i}` stands for the number of a block or layer."""

    weight: str
    bias: str | None
    third: int | None = None
    exchange: Exchange = "never"


# If two names refer to one module, the later prefix is used (ComfyUI's order, after the prefixes it does not read).
_PREFIXES: Final[tuple[tuple[str, Part], ...]] = (
    ("", "transformer"),
    ("model.diffusion_model.", "transformer"),
    ("lora_unet_", "transformer"),
    ("diffusion_model.", "transformer"),
    ("transformer.", "transformer"),
    ("base_model.model.", "transformer"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "transformer"),
    ("lora_te_", "clip_l"),
    ("lora_te1_", "clip_l"),
    ("text_encoder.", "clip_l"),
    ("text_encoders.clip_l.transformer.", "clip_l"),
    ("clip_l.", "clip_l"),
    ("lora_te2_", "clip_g"),
    ("text_encoder_2.", "clip_g"),
    ("text_encoders.clip_g.transformer.", "clip_g"),
    ("clip_g.", "clip_g"),
    ("lora_te3_", "t5"),
    ("text_encoder_3.", "t5"),
    ("text_encoders.t5xxl.transformer.", "t5"),
    ("t5.", "t5"),
)
PRECEDENCE: Final = {prefix: place for place, (prefix, _) in enumerate(_PREFIXES)}
_LONGEST_FIRST = sorted(_PREFIXES, key=lambda pair: -len(pair[0]))
_NUMBERED = re.compile(r"(joint_blocks|transformer_blocks|text_model_encoder_layers|encoder_block)_(\d{1,4})_(.+)")


def understood(name: str) -> Named | None:
    """Look up a module name from a LoRA file; None if SD3 / 3.5 has no such module.

    Args:
        name: the part of a key before its suffix, such as `lora_unet_joint_blocks_7_x_block_attn_qkv`; or the official
            name of a parameter, such as `diffusion_model.joint_blocks.7.x_block.attn.qkv.bias`.
    """
    prefix, part = next((prefix, part) for prefix, part in _LONGEST_FIRST if name.startswith(prefix))
    flat = name.removeprefix(prefix).replace(".processor.", ".").replace(".", "_")
    if part in ("clip_l", "clip_g") and flat.startswith("encoder_layers_"):  # the names of transformers 5
        flat = f"text_model_{flat}"
    found = _NUMBERED.fullmatch(flat)
    template = flat if found is None else f"{found[1]}_{{i}}_{found[3]}"
    if part == "t5" and found is not None and found[2] == "0" and template.endswith("relative_attention_bias"):
        template = flat
    module = _modules(part).get(template)
    if module is None:
        return None
    number = "" if found is None else str(int(found[2]))
    bias = None if module.bias is None else module.bias.replace("{i}", number)
    target = Target(part, module.weight.replace("{i}", number), module.third, module.exchange)
    return Named(target, bias, prefix)


@cache
def _modules(part: Part) -> Mapping[str, _Module]:
    """The modules of a model by flat name; modules of text encoders have one name each."""
    if part == "transformer":
        return dict(_transformer())
    return dict(_plain(_CLIP if part.startswith("clip") else _T5))


def _transformer() -> Iterator[tuple[str, _Module]]:
    """Official and diffusers names of the modules; for the last block, only those that differ from other blocks."""
    for rule in mmdit_rules(2):
        ours, _, kind = rule.ours.rpartition(".")
        if kind == "bias" or ours.startswith("joint_blocks.1."):
            continue
        ours = (ours if ours else rule.ours).replace("joint_blocks.0.", "joint_blocks.{i}.")
        weight, bias = (ours, None) if kind == rule.ours else (f"{ours}.weight", f"{ours}.bias")
        exchange: Exchange = "always" if isinstance(rule, SwapHalves) else "never"
        if ours.endswith("context_block.adaLN_modulation.1"):
            exchange = "if last"
        yield from _both(_flat(ours), _Module(weight, None if ".ln_" in ours else bias))
        for index, key in enumerate(rule.theirs):
            theirs = _flat(key.removesuffix(".weight").replace("transformer_blocks.0.", "transformer_blocks.{i}."))
            if theirs != _flat(ours):
                third = index if isinstance(rule, Concat) else None
                yield from _both(theirs, _Module(weight, None if ".ln_" in ours else bias, third, exchange))
        if isinstance(rule, Concat):  # OneTrainer's layout "OMI" numbers the parts
            for index in range(3):
                yield f"{_flat(ours)}_{index}", _Module(weight, bias, index)


def _plain(names: Mapping[str, bool]) -> Iterator[tuple[str, _Module]]:
    for name, biased in names.items():
        yield from _both(_flat(name), _Module(f"{name}.weight", f"{name}.bias" if biased else None))


def _both(flat: str, module: _Module) -> Iterator[tuple[str, _Module]]:
    """A module, and its weight and bias under their own names."""
    yield flat, module
    if module.weight.endswith(".weight"):
        yield f"{flat}_weight", module
    if module.bias is not None:
        yield f"{flat}_bias", _Module(module.bias, None, module.third, module.exchange)


def _flat(name: str) -> str:
    return name.replace(".", "_")


_LAYER = "text_model.encoder.layers.{i}"
_CLIP = {  # module: whether it has a bias
    **{f"{_LAYER}.self_attn.{name}_proj": True for name in ("q", "k", "v", "out")},
    **{f"{_LAYER}.{name}": True for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")},
    "text_model.embeddings.token_embedding": False,
    "text_model.embeddings.position_embedding": False,
    "text_model.final_layer_norm": True,
    "text_projection": False,
}
_T5 = {
    **{f"encoder.block.{{i}}.layer.0.SelfAttention.{name}": False for name in ("q", "k", "v", "o")},
    **{f"encoder.block.{{i}}.layer.1.DenseReluDense.{name}": False for name in ("wi_0", "wi_1", "wo")},
    "encoder.block.{i}.layer.0.layer_norm": False,
    "encoder.block.{i}.layer.1.layer_norm": False,
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": False,
    "encoder.final_layer_norm": False,
    "shared": False,
}
