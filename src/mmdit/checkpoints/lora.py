"""Read LoRA files, interpret every key, and check the file before any weight is changed.

`load_lora` returns a `Lora`: its patches, their scales, and the unused keys with the reasons. Names are parsed by
`mmdit.checkpoints.lora_names`, and `mmdit.checkpoints.lora_kinds` contains the formulas.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from encoders.json_files import printable
from mmdit.checkpoints.components import title
from mmdit.checkpoints.keymaps import some
from mmdit.checkpoints.lora_modules import Patch, is_of_lora, modules_of, patches_of
from mmdit.checkpoints.lora_names import PARTS, Part
from mmdit.checkpoints.lora_rules import HEADER, TRAINED, HasName, HeaderScales, LoraRules, rules_of
from mmdit.checkpoints.recognise import looks_like, split
from mmdit.checkpoints.safetensors_io import CheckpointError, open_tensors, read_header
from quant.scaling import all_finite

_SHOWN: Final = 6  # unused keys in the repr
_WIDTHS: Final = {2432: "Stable Diffusion 3.5 Large", 1536: "Stable Diffusion 3.5 Medium or Stable Diffusion 3 Medium"}
_UNET: Final = r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]"
_FOREIGN: Final = (  # LoRAs for other models, by a characteristic key
    ("Flux", r"(?:double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    ("Stable Diffusion XL", rf"{_UNET}.*[._]transformer_blocks[._][1-9]|add_embedding|label_emb"),
    ("Stable Diffusion 1.x or 2", _UNET),
)


@dataclass(frozen=True, repr=False, eq=False)
class Lora:
    """The contents of a LoRA file; made by `mmdit.load_lora`.

    `patches` are the changes, one for each tensor or third of a tensor. `unused` maps every unused key of the file to
    the reason. `metadata` is the metadata of the file's header. `notes` describe differences between the programs that
    read such a file.
    """

    source: str
    patches: tuple[Patch, ...]
    unused: Mapping[str, str]
    metadata: Mapping[str, str]
    rules: LoraRules
    producer: str  # the program that probably wrote the file
    notes: tuple[str, ...] = ()
    path: str = ""  # of the file, as it was given; "" for given tensors

    @property
    def targets(self) -> dict[str, list[Patch]]:
        """The patches by the tensor that they change, `part.official key`."""
        found: dict[str, list[Patch]] = {}
        for patch in self.patches:
            found.setdefault(f"{patch.target.part}.{patch.target.key}", []).append(patch)
        return found

    @property
    def scales(self) -> dict[str, float]:
        """The scale alpha / rank of every module, by the module's name in the file."""
        return {patch.module: patch.change.scale for patch in reversed(self.patches)}

    @property
    def parts(self) -> list[Part]:
        """The models that the LoRA changes."""
        present = {patch.target.part for patch in self.patches}
        return [part for part in PARTS if part in present]

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, in ascending order."""
        return sorted({patch.change.rank for patch in self.patches if patch.change.rank is not None})

    @property
    def kinds(self) -> dict[str, int]:
        """The number of patches of each kind."""
        return dict(Counter(patch.kind for patch in self.patches).most_common())

    @property
    def width(self) -> int | None:
        """The width of the transformer that the LoRA fits; None if no patch determines it."""
        for patch in self.of("transformer"):
            rows, columns = patch.change.sizes
            if re.search(r"attn2?\.(qkv|proj)\.weight$|mlp\.fc1\.weight$|adaLN", patch.target.key) and columns:
                return columns if not patch.target.key.endswith("bias") else None
            if patch.target.key.endswith(("mlp.fc2.weight", "attn.proj.weight")) and rows:
                return rows
        return None

    @property
    def base(self) -> str:
        """The base model that the LoRA's shapes fit, as text."""
        width = self.width
        if width is None:
            return "a model that its shapes do not tell"
        if any(".attn2." in patch.target.key for patch in self.patches):
            return f"{'Stable Diffusion 3.5 Medium' if width == 1536 else 'an MMDiT-X'} (width {width})"
        return f"{_WIDTHS.get(width, 'an MMDiT')} (width {width})"

    def of(self, part: Part) -> list[Patch]:
        """The patches of one model."""
        return [patch for patch in self.patches if patch.target.part == part]

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.of(part))} of {part}" for part in self.parts)
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        ranks = f"rank {', '.join(map(str, self.ranks))}; " if self.ranks else ""
        scales = sorted(set(self.scales.values()))
        spread = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        shown, more = list(self.unused.items())[:_SHOWN], len(self.unused) - _SHOWN
        lines = [
            f"Lora({self.source})",
            f"  {self.producer}; {self.base}",
            f"  {len(self.patches)} patches ({kinds}): {counts}",
            f"  {ranks}scale {spread}; read as {self.rules.name}",
            f"  {len(self.unused)} keys are not used" + (":" if shown else ""),
            *(f"    {printable(key, 100)}: {why}" for key, why in shown),
            *([f"    and {more} more, see .unused"] if more > 0 else []),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def check_lora(lora: object) -> None:
    """Raise TypeError for what is no `Lora`, such as the name of a file."""
    if not isinstance(lora, Lora):
        raise TypeError(f"lora is {type(lora).__name__}, expected mmdit.Lora; give mmdit.load_lora(file)")


def load_lora(
    file: str | Path | Mapping[str, Tensor],
    profile: str | HasName | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Lora:
    """Read a LoRA file of any program that writes them for Stable Diffusion 3 and 3.5.

    Supported are the layouts of diffusers and peft, kohya's sd-scripts, OneTrainer, SimpleTuner, LyCORIS and ComfyUI,
    for the transformer and all text encoders, and the kinds LoRA, DoRA, LoHa, LoKr, GLoRA, OFT, BOFT, (IA)^3, full
    differences and replacements.

    Args:
        file: a safetensors file, or its tensors by name.
        profile: the interpretation where programs disagree. None, "diffusers" and "reference" use the strength and the
            formula of the trainer. "comfyui" follows ComfyUI: it ignores `lora_alpha` in the header,
            `lora_magnitude_vector` and biases of parts of a weight, and has its own DoRA formula.
        metadata: the header's metadata, if `file` is a mapping of tensors.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is broken; it is not a LoRA, or a LoRA for another model; a factor is missing, empty,
            not finite, or its shape does not match the other factors.
        ValueError: there is no such profile.
    """
    rules = rules_of(profile)
    if isinstance(file, Mapping):
        source, tensors, found = "the given tensors", dict(file), dict(metadata or {})
    else:
        lazy, found = open_tensors(file)
        _check_is_lora(str(file), lazy)
        source, tensors = str(file), {key: one.read() for key, one in lazy.items()}
    _check_is_lora(source, tensors)
    _check_finite(source, tensors)
    unused: dict[str, str] = {}
    header = HeaderScales(source, found)
    modules = modules_of(tensors, unused)
    patches = [patch for module in modules for patch in patches_of(source, module, rules, header, unused)]
    if not patches:
        raise CheckpointError(
            f"{source}: none of its {len(tensors)} tensors patches Stable Diffusion 3 or 3.5, first "
            f"{some(sorted(tensors), 3)}"
        )
    patches.sort(key=lambda patch: patch.target.third is not None)  # whole weights before their parts, as ComfyUI does
    whole = {key: unused[key] for key in tensors if key in unused}
    notes = tuple(_notes(patches, found, rules))
    path = "" if isinstance(file, Mapping) else str(file)
    return Lora(source, tuple(patches), whole, found, rules, _producer(tensors, found), notes, path)


def is_lora_file(path: str | Path) -> bool:
    """Whether a safetensors file contains LoRA tensors and no model; `load_lora` reads or explains such a file."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".sft") or not path.is_file():
        return False
    try:
        keys = read_header(path).entries
    except CheckpointError:
        return False
    return any(is_of_lora(key, keys) for key in keys) and not split(k for k in keys if not is_of_lora(k, keys)).models


def _check_is_lora(source: str, keys: Iterable[str]) -> None:
    """Raise CheckpointError for files without a LoRA and for LoRAs for other models."""
    keys = dict.fromkeys(keys)
    of_lora = [key for key in keys if is_of_lora(key, keys)]
    for name, pattern in _FOREIGN:
        if key := next((key for key in of_lora if re.search(pattern, key)), None):
            raise CheckpointError(
                f"{source} is a LoRA for {name}, by {printable(key, 120)!r}; it cannot change Stable Diffusion 3 or 3.5"
            )
    models = split(key for key in keys if not is_of_lora(key, keys)).models
    if not of_lora or models:
        what = " and ".join(map(title, models)) or looks_like(keys)
        raise CheckpointError(f"{source} is no LoRA: it is {what}; give a file of weights to add")


def _check_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_complex():
            raise CheckpointError(f"{source}: {printable(key, 200)} is {tensor.dtype}, expected real numbers")
        if tensor.is_floating_point() and not all_finite(wide := tensor.float()):
            bad = int((~wide.isfinite()).sum())
            raise CheckpointError(
                f"{source}: {bad} of {tensor.numel()} numbers of {printable(key, 200)} are not finite; the training "
                "diverged, or the file is broken: take an earlier checkpoint of it"
            )


def _notes(patches: Iterable[Patch], metadata: Mapping[str, str], rules: LoraRules) -> Iterable[str]:
    patches = list(patches)
    if HEADER in metadata:
        scales = sorted({patch.change.scale for patch in patches})
        if rules.reads_header and scales != [1.0]:
            yield f"the header's lora_alpha gives scales {scales[0]:g} to {scales[-1]:g}, where ComfyUI takes 1"
        if not rules.reads_header:
            yield "the header's lora_alpha is not read, as in ComfyUI; diffusers reads it"
    if "split_qkv" in metadata.get("ss_network_args", ""):
        yield "trained with split_qkv: every program reads q, k, v of such files at a third of the trained strength"
    if rules is TRAINED and any(patch.magnitude is not None for patch in patches):
        yield "DoRA: ComfyUI computes another weight from the same file (profile='comfyui')"


def _producer(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """The program that probably wrote the file, judged by key names and metadata."""
    for key, name in _SIGNED:
        if key in metadata:
            return f"{name} ({metadata[key][:60]})" if key == "ss_network_module" else name
    keys = list(keys)
    return next(
        (name for pattern, name in _SIGNATURES if any(re.search(pattern, key) for key in keys)), "unknown program"
    )


_SIGNED: Final = (
    ("ss_network_module", "kohya sd-scripts"),
    ("lycoris_config", "LyCORIS, SimpleTuner"),
    (HEADER, "diffusers, peft"),
)
_SIGNATURES: Final = (  # the first that matches
    (r"^lycoris_", "LyCORIS, SimpleTuner"),
    (r"^lora_transformer_|^bundle_emb\.", "OneTrainer"),
    (r"^transformer\.joint_blocks\.", "OneTrainer (OMI)"),
    (r"^diffusion_model\..*\.lora_(A|B)", "OneTrainer (ComfyUI's names)"),
    (r"^diffusion_model\..*\.alpha$", "ComfyUI, trained"),
    (r"^diffusion_model\.", "ComfyUI, extracted"),
    (r"^lora_unet_.*\.(hada|lokr|a1|oft)|^lora_unet_.*\.w_norm", "LyCORIS in kohya's names"),
    (r"^lora_(unet|te\d?)_", "kohya sd-scripts"),
    (r"^transformer\..*\.alpha$", "SimpleTuner"),
    (r"^base_model\.model\.", "peft"),
    (r"lora_A|lora_B", "diffusers, peft"),
    (r"lora", "an old diffusers"),
)
