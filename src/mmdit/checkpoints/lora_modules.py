"""Group the keys of a LoRA file into modules, and make patches from the tensors of each module."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from encoders.json_files import printable
from mmdit.checkpoints.lora_kinds import (
    Change,
    Full,
    Generalized,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Orthogonal,
    Replacement,
    Scaled,
)
from mmdit.checkpoints.lora_names import PRECEDENCE, Named, Target, understood
from mmdit.checkpoints.lora_rules import HeaderScales, LoraRules
from mmdit.checkpoints.safetensors_io import CheckpointError

_ADAPTER = r"(?:\.\w+)?"  # the adapter name, which PEFT may include in the key
_ROLES: Final[tuple[tuple[str, str], ...]] = (
    (rf"(?:\.lora_up|_lora\.up|\.lora\.up|\.lora_linear_layer\.up|\.lora_B{_ADAPTER})\.weight|\.lora_B", "up"),
    (
        rf"(?:\.lora_down|_lora\.down|\.lora\.down|\.lora_linear_layer\.down|\.lora_A{_ADAPTER})\.weight|\.lora_A",
        "down",
    ),
    (r"\.lora_mid\.weight", "mid"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
    (r"\.reshape_weight", "reshape_weight"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "dora_scale"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    *((rf"\.(?:hada_)({name})", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((rf"\.(?:lokr_)({name})", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *((rf"\.{name}\.weight", name) for name in ("a1", "a2", "b1", "b2")),
    (r"\.oft_blocks", "oft_blocks"),
    (r"\.rescale", "rescale"),
    (r"\.w_norm", "w_norm"),
    (r"\.b_norm", "b_norm"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
    (r"\.set_weight", "set_weight"),
    (r"\.on_input", "on_input"),
)
_KEY = re.compile("(.+?)(?:" + "|".join(f"(?P<_{i}>{pattern})" for i, (pattern, _) in enumerate(_ROLES)) + ")")
_UNREAD: Final = (  # further tensors that trainers store, with a description
    (re.compile(r"bundle_emb\..*"), "an embedding of a word, not a LoRA"),
    (re.compile(r".*\._aux\..*"), "what a trainer keeps for itself; its own reader drops it too"),
    (re.compile(r".*\.oft_R(?:\.\w+)?\.weight"), "OFT of version 2, which is not read"),
    (re.compile(r".*\.(?:q_layer|p_layer)\.weight|.*\.lambda_layer"), "T-LoRA, which is not read"),
    (re.compile(r".*\.lora_embedding_[AB].*"), "a LoRA of an embedding table, which is not read"),
    (re.compile(r".*\.scalar"), "a factor that LyCORIS folds into the others when it saves"),
)
_KINDS: Final = {  # the tensors that identify a kind; if a module has several kinds, the last in this order is used
    "lora": ("up", "down"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"),
    "glora": ("a1", "a2", "b1", "b2"),
    "oft": ("oft_blocks",),
    "ia3": ("on_input",),
    "norm": ("w_norm",),
    "diff": ("diff",),
    "set": ("set_weight",),
}
_OF_KIND: Final = {  # all tensors that a kind reads
    "lora": ("up", "down", "mid", "reshape_weight", "alpha"),
    "loha": (*_KINDS["loha"], "hada_t1", "hada_t2", "alpha"),
    "lokr": (*(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")), "alpha"),
    "glora": (*_KINDS["glora"], "alpha"),
    "oft": ("oft_blocks", "rescale", "alpha"),
    "ia3": ("on_input", "weight"),
    "norm": ("w_norm",),
    "diff": ("diff",),
    "set": ("set_weight",),
}


@dataclass(frozen=True, eq=False)
class Patch:
    """One change of one tensor."""

    module: str  # name of the module in the file
    target: Target
    change: Change
    magnitude: Magnitude | None = None  # DoRA's norms

    @property
    def kind(self) -> str:
        """The kind of the change, with "+dora" if there are norms."""
        return self.change.name + ("" if self.magnitude is None else "+dora")


@dataclass
class Module:
    """The tensors of one module in the file, by role, and their keys."""

    name: str
    named: Named
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def kinds(self) -> list[str]:
        """The kinds of the module's tensors; the last one is used."""
        return [kind for kind, roles in _KINDS.items() if any(role in self.tensors for role in roles)]


def modules_of(tensors: Mapping[str, Tensor], unused: dict[str, str]) -> list[Module]:
    """The modules of a file; keys that belong to no module are added to `unused`, with the reason."""
    modules: dict[str, Module] = {}
    for key, tensor in tensors.items():
        found = _role(key, tensors)
        unread = next((why for pattern, why in _UNREAD if pattern.fullmatch(key)), None)
        if unread is not None or found is None:
            unused[key] = unread or "no tensor of a LoRA has such a name"
            continue
        name, role = found
        named = understood(name)
        if named is None:
            unused[key] = f"{printable(name, 80)} is no module of Stable Diffusion 3 or 3.5"
            continue
        module = modules.setdefault(name, Module(name, named))
        if role in module.tensors:
            unused[key] = f"{module.keys[role]} says the same"
            continue
        module.tensors[role], module.keys[role] = tensor, key
    return _without_twins(list(modules.values()), unused)


def is_of_lora(key: str, keys: Container[str]) -> bool:
    """Whether a key has the suffix of a LoRA tensor, given all keys of the file."""
    return _role(key, keys) is not None


def _role(key: str, keys: Container[str]) -> tuple[str, str] | None:
    """The module name and the role of a key; a plain `.weight` only has a role next to `.on_input`."""
    name = key.removesuffix(".weight")
    if name != key and f"{name}.on_input" in keys:
        return name, "weight"
    return _named_role(key)


@lru_cache(maxsize=2**14)  # loading a file asks five times for each of its keys
def _named_role(key: str) -> tuple[str, str] | None:
    """The module name and the role that a key's suffix says."""
    found = _KEY.fullmatch(key)
    return None if found is None else (found[1], next(role for i, (_, role) in enumerate(_ROLES) if found[f"_{i}"]))


def _without_twins(modules: list[Module], unused: dict[str, str]) -> list[Module]:
    """Keep one module per target; if several names refer to one target, the last in ComfyUI's prefix order is used."""
    winners: dict[Target, Module] = {}
    for module in sorted(modules, key=lambda each: PRECEDENCE[each.named.prefix]):
        loser = winners.pop(module.named.target, None)
        winners[module.named.target] = module
        if loser is not None:
            unused |= dict.fromkeys(loser.keys.values(), f"{module.name} names the same module and counts")
    return list(winners.values())


def patches_of(
    source: str, module: Module, rules: LoraRules, header: HeaderScales, unused: dict[str, str]
) -> list[Patch]:
    """The patches for a module's weight and bias; keys that are not used are added to `unused`.

    Raises:
        CheckpointError: a tensor is missing, or the shapes do not match.
    """
    kinds = [kind for kind in module.kinds() if kind != "ia3" or rules.reads_ia3]
    patches, used, scale, target = [], set[str](), 1.0, module.named.target
    if kinds:
        change = _change(source, module, kinds[-1], rules, header)
        magnitude = _magnitude(module, rules) if kinds[-1] in _DECOMPOSED else None
        patches.append(Patch(module.name, target, change, magnitude))
        used |= {*_OF_KIND[kinds[-1]], *({} if magnitude is None else _MAGNITUDE_OF[magnitude.rule])}
        scale = change.scale
    elif "up_bias" in module.tensors:
        _check_present(source, module, "lora")
    is_cut = target.third is not None or (bool(patches) and _is_exchanged(target, patches[0].change))
    for role in ("diff_b", "b_norm", "up_bias"):
        if role in module.tensors and module.named.bias is not None and _reads_bias(role, rules, is_cut=is_cut):
            used.add(role)
            change = Full(scale=scale if role == "up_bias" else 1.0, diff=module.tensors[role].flatten())
            patches.append(Patch(module.name, replace(target, key=module.named.bias), change))
    for role in module.keys.keys() - used:
        unused[module.keys[role]] = _why_unused(role, kinds, module)
    return patches


def _is_exchanged(target: Target, change: Change) -> bool:
    rows, columns = change.sizes
    return rows is not None and columns is not None and target.is_exchanged(rows, columns)


def _reads_bias(role: str, rules: LoraRules, *, is_cut: bool) -> bool:
    return rules.reads_peft_extras if role == "up_bias" else rules.cuts_biases or not is_cut


def _change(source: str, module: Module, kind: str, rules: LoraRules, header: HeaderScales) -> Change:
    tensors = module.tensors
    _check_present(source, module, kind)
    empty = next((role for role in _OF_KIND[kind] if role in tensors and not tensors[role].numel()), None)
    if empty is not None:
        raise CheckpointError(
            f"{source}: {module.keys[empty]} has shape {list(tensors[empty].shape)}: a rank of 0 says nothing"
        )
    try:
        change = _MAKERS[kind](tensors, rules)
        _check_product(change)
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = [f"{module.keys[role]} {list(tensors[role].shape)}" for role in _OF_KIND[kind] if role in tensors]
        raise CheckpointError(
            f"{source}: the shapes of {module.name} do not go together: {', '.join(shapes)}"
        ) from error
    return _scaled(source, module, change, rules, header)


def _check_present(source: str, module: Module, kind: str) -> None:
    """Raise CheckpointError if a factor of the module is missing."""
    present = module.tensors
    wanted = [*_KINDS[kind], *(["weight"] if kind == "ia3" else [])]
    if kind == "lokr":
        halves = [half for half in ("w1", "w2") if f"lokr_{half}" not in present]
        wanted = [f"lokr_{half}_{factor}" for half in halves for factor in "ab"]
    if missing := [role for role in wanted if role not in present]:
        have = ", ".join(key for role, key in module.keys.items() if role != "alpha")
        raise CheckpointError(
            f"{source}: {have} without {' and '.join(missing)} of the same module; the file is incomplete: download "
            "it, or save it, again"
        )


def _check_product(change: Change) -> None:
    """Find factors whose shapes do not match: but for plain LoRAs, by computing the change on the meta device.

    The first multiplication on that device makes torch import its compiler, which takes seconds.
    """
    rows, columns = change.sizes
    if isinstance(change, LowRank) and change.mid is None:
        if change.up.flatten(1).shape[1] != change.down.flatten(1).shape[0]:
            raise ValueError("ranks that differ")
    elif rows is not None and columns is not None:
        change.of(torch.empty(rows, columns, device="meta"), 1.0)
    elif isinstance(change, Orthogonal) and change.blocks.shape[-1] != change.blocks.shape[-2]:
        raise ValueError("blocks that are not square")


def _scaled(source: str, module: Module, change: Change, rules: LoraRules, header: HeaderScales) -> Change:
    """Set the scale (alpha / rank) of the change."""
    rank, alpha = change.rank, module.tensors.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise CheckpointError(f"{source}: {module.keys['alpha']} has shape {list(alpha.shape)}; an alpha is one number")
    if rank is None or isinstance(change, Orthogonal):
        return change
    if alpha is not None:
        is_rank = float(alpha) == 0 and rules.zero_alpha_is_rank
        return replace(change, scale=1.0 if is_rank else float(alpha) / rank)
    if rules.reads_header:
        name = module.name.removeprefix(module.named.prefix)
        scale = header.scale(module.named.target.part, name, rank)
        return change if scale is None else replace(change, scale=scale)
    return change


def _magnitude(module: Module, rules: LoraRules) -> Magnitude | None:
    if "magnitude" in module.tensors and rules.reads_peft_extras:
        return Magnitude(module.tensors["magnitude"].flatten(), "peft")
    if "dora_scale" in module.tensors:
        return Magnitude(module.tensors["dora_scale"], rules.dora)
    return None


def _why_unused(role: str, kinds: list[str], module: Module) -> str:
    if role in ("diff_b", "b_norm", "up_bias") and module.named.bias is None:
        return "the module has no bias"
    if role in ("diff_b", "b_norm"):
        return "ComfyUI loses a bias of a part of the rows"
    if role in ("up_bias", "magnitude", "on_input", "weight"):
        return "ComfyUI does not read it"
    return f"{kinds[-1]} of the same module counts" if kinds else "nothing goes with it"


def _number(tensors: Mapping[str, Tensor], role: str) -> float:
    return float(tensors[role]) if role in tensors and tensors[role].numel() == 1 else 0.0


def _low_rank(tensors: Mapping[str, Tensor], rules: LoraRules) -> Change:
    shape = tensors.get("reshape_weight")
    padded = None if shape is None else tuple(int(side) for side in shape.flatten().tolist())
    return LowRank(up=tensors["up"], down=tensors["down"], mid=tensors.get("mid"), padded=padded)


def _hadamard(tensors: Mapping[str, Tensor], rules: LoraRules) -> Change:
    named: dict[str, Any] = {
        name.removeprefix("hada_"): tensors[name] for name in _OF_KIND["loha"][:-1] if name in tensors
    }
    if ("t1" in named) != ("t2" in named):
        raise ValueError("one Tucker core of two")
    return Hadamard(**named)


def _kronecker(tensors: Mapping[str, Tensor], rules: LoraRules) -> Change:
    named: dict[str, Any] = {
        name.removeprefix("lokr_"): tensors[name] for name in _OF_KIND["lokr"][:-1] if name in tensors
    }
    return Kronecker(**named)


def _orthogonal(tensors: Mapping[str, Tensor], rules: LoraRules) -> Change:
    blocks = tensors["oft_blocks"]
    if blocks.ndim not in (3, 4):
        raise ValueError("blocks have 3 dimensions (OFT) or 4 (BOFT)")
    limit, rescale = _number(tensors, "alpha"), tensors.get("rescale")
    return Orthogonal(blocks=blocks, limit=limit, rescale=rescale, twice=rules.orthogonal_twice)


_MAKERS: Final[dict[str, Callable[[Mapping[str, Tensor], LoraRules], Change]]] = {
    "lora": _low_rank,
    "loha": _hadamard,
    "lokr": _kronecker,
    "glora": lambda tensors, rules: Generalized(a1=tensors["a1"], a2=tensors["a2"], b1=tensors["b1"], b2=tensors["b2"]),
    "oft": _orthogonal,
    "ia3": lambda tensors, rules: Scaled(factor=tensors["weight"], on_input=bool(_number(tensors, "on_input"))),
    "norm": lambda tensors, rules: Full(diff=tensors["w_norm"]),
    "diff": lambda tensors, rules: Full(diff=tensors["diff"]),
    "set": lambda tensors, rules: Replacement(value=tensors["set_weight"]),
}
_DECOMPOSED: Final = ("lora", "loha", "lokr", "glora", "oft")  # kinds that DoRA's norms go with
_MAGNITUDE_OF: Final = {"peft": ("magnitude",), "trained": ("dora_scale",), "comfyui": ("dora_scale",)}
