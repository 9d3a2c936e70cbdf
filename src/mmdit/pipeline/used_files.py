"""The LoRAs and ControlNets of a picture, as its settings record them: strict JSON with files and digests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, get_args

import torch

from mmdit.checkpoints.lora import Lora
from mmdit.pipeline.patched_weights import Adapter, Form, Weight
from mmdit.pipeline.settings import SettingsError
from mmdit.utils import number


@dataclass(frozen=True, kw_only=True)
class UsedLora:
    """A LoRA that a picture was drawn with."""

    file: str  # the path as it was given; "" where tensors were given
    digest: str  # see `digest_of_lora`
    weight: Weight = 1.0
    text_encoder_weight: Weight | None = None
    form: Form = "attached"
    scale: float = 1.0  # the factor of `fuse_lora`

    @property
    def effect(self) -> tuple[object, ...]:
        """What decides the picture, wherever the file is."""
        text = self.weight if self.text_encoder_weight is None else self.text_encoder_weight
        return self.digest, self.weight, text, self.scale

    def __str__(self) -> str:
        text = "" if self.text_encoder_weight is None else f", {self.text_encoder_weight} on the text encoders"
        return f"{self.file or 'given tensors'} (weight {self.weight}{text}, digest {self.digest})"


@dataclass(frozen=True, kw_only=True)
class UsedNet:
    """The files of a ControlNet and its hint that a picture was drawn with, as they were given."""

    net: str
    hint: str


def digest_of_lora(lora: Lora) -> str:
    """A digest of 16 hexadecimal digits, over the targets, scales and up to 16 values of each tensor of the patches."""
    found = sha256()
    for patch in lora.patches:
        target = patch.target
        found.update(f"{target.part}.{target.key}.{target.third}:{patch.kind}:{patch.change.scale:.9g}".encode())
        norms = () if patch.magnitude is None else (patch.magnitude.values,)
        for tensor in (*patch.change.tensors(), *norms):
            flat = tensor.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // 16)][:16].to(torch.float64)
            found.update(f"{tuple(tensor.shape)}".encode() + values.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def used_loras(adapters: Iterable[Adapter]) -> list[UsedLora]:
    """The record of active LoRAs, in their order."""
    return [
        UsedLora(
            file=one.lora.path,
            digest=digest_of_lora(one.lora),
            weight=one.weight,
            text_encoder_weight=one.text_encoder_weight,
            form=one.form,
            scale=one.scale,
        )
        for one in adapters
    ]


def to_text(used: Iterable[UsedLora | UsedNet]) -> str:
    """A text of strict JSON; empty where nothing was used."""
    found = [asdict(one) for one in used]
    return json.dumps(found, allow_nan=False) if found else ""


def loras_of(text: str, where: str = "settings") -> list[UsedLora]:
    """The LoRAs that `to_text` recorded.

    Raises:
        SettingsError: the text is something else; the error names `where`.
    """
    found = []
    for one in _entries(text, where, "loras", {"file", "digest"}):
        try:
            one["weight"] = _weight("weight", one.get("weight", 1.0))
            if one.get("text_encoder_weight") is not None:
                one["text_encoder_weight"] = _weight("text_encoder_weight", one["text_encoder_weight"])
            one["scale"] = number("scale", one.get("scale", 1.0))
            made = UsedLora(**one)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{where}: loras: {error}") from error
        if made.form not in get_args(Form):
            raise SettingsError(f"{where}: loras: form is {made.form!r}, expected {' or '.join(get_args(Form))}")
        found.append(made)
    return found


def nets_of(text: str, where: str = "settings") -> list[UsedNet]:
    """The files of ControlNets and hints that `to_text` recorded.

    Raises:
        SettingsError: the text is something else; the error names `where`.
    """
    try:
        return [UsedNet(**one) for one in _entries(text, where, "control_files", {"net", "hint"})]
    except TypeError as error:
        raise SettingsError(f"{where}: control_files: {error}") from error


def _weight(name: str, value: Any) -> Weight:
    if isinstance(value, Mapping):
        return {str(glob): number(name, one) for glob, one in value.items()}
    return number(name, value)


def _entries(text: str, where: str, name: str, texts: set[str]) -> list[dict[str, Any]]:
    """The objects of a list in which these keys hold texts."""
    try:
        found = json.loads(text) if text else []
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: {name} is not strict JSON ({error})") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise SettingsError(f"{where}: {name} is {text[:100]!r}, expected a list of objects")
    for one in found:
        for key in sorted(texts):
            if not isinstance(one.get(key), str):
                raise SettingsError(f"{where}: {name}: {key} is {one.get(key)!r:.100}, expected a text")
    return found
