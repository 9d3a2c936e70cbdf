"""The registry of model kinds: one frozen row for each kind, with all that reading, writing and describing needs.

To add a kind of model, add a row here and a file with its key maps and its config; nothing else in this room names a
kind. Rooms that look into models keep a table of their own by component, and a test holds it against this registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from encoders.clip import CLIPConfig, CLIPText
from encoders.t5 import T5Config, T5Encoder
from encoders.vae import VAE, VAEConfig
from mmdit.checkpoints import config_json, controlnet, keymaps, official
from mmdit.checkpoints.keymaps import Reader, Tensors
from mmdit.models.config import MMDiTConfig
from mmdit.models.controlnet import ControlNet, ControlNetConfig
from mmdit.models.mmdit import MMDiT

Component: TypeAlias = str
"""The name of a row of the registry: "transformer", "vae", "clip_l", "clip_g", "t5" or "controlnet"."""


class Naming(NamedTuple):
    """One way in which files name the tensors of a model."""

    name: str  # "official", "diffusers" ...
    signature: str  # a pattern; a single key that begins with it suffices, so that missing tensors can be named
    read: Reader  # maps the tensors of a file to official names
    beside: Mapping[str, str] = {}  # unused tensors in such files: pattern -> description


@dataclass(frozen=True)
class ModelKind:
    """Everything that this package must know about one kind of model."""

    component: Component
    title: str  # its name in messages
    config: type
    module: type[nn.Module]  # the class, which is built from a config alone

    namings: tuple[Naming, ...]
    prefixes: tuple[str, ...]  # prefixes of its keys in single files; the first one is written
    write_official: Callable[
        [Tensors, Any], Tensors
    ]  # (tensors, config) -> the tensors as the official files hold them
    write_diffusers: Callable[[Tensors, Any], Tensors]  # (tensors, config) -> tensors under diffusers' names

    infer: Callable[[config_json.Shapes, Mapping[str, Any]], Any]  # (shapes, entries of config.json) -> config
    to_json: Callable[[Any], dict[str, Any]]  # config -> config.json as diffusers and transformers write it
    dimensions: Mapping[str, int]  # number of dimensions of the tensors that `infer` reads, by pattern
    classes: tuple[str, ...]  # classes that its config.json may name
    blocks: str  # a pattern of official keys whose group is the number of a block
    block_tensors: int  # the smallest number of tensors in a block

    folder: str  # its folder in the diffusers layout
    stem: str  # the stem of its files there
    library: str  # the library that has its class, the first of `classes`
    # In the transformer's file, in a file of its own among the text encoders, or in a file of a ControlNet.
    place: Literal["main", "text", "control"]
    file_name: Callable[[Any, str], str]  # (config, name of the dtype) -> official stem of its file
    source: str  # its file in the official repository
    words: Callable[[Any], str]  # a description of a config in words

    needed: bool = True  # whether no picture can be drawn without it
    many: bool = False  # whether a folder may hold several, none of which a pipeline loads by itself
    without: str = ""  # the effect of its absence, where it is not needed
    family: str = ""  # kinds of one family have the same tensors; `width` or the place of the file tells them apart
    width: int | None = None  # width of the official models of this kind, where it differs within the family
    beside: Mapping[str, str] = field(default_factory=dict)  # unused tensors beside it: pattern -> description
    says: Callable[[Tensors], Mapping[str, Any]] = lambda tensors: {}  # entries of config.json that tensors imply

    def __post_init__(self) -> None:
        """Make the kind a family of its own where none is given."""
        object.__setattr__(self, "family", self.family or self.component)

    def config_of(self, shapes: config_json.Shapes, said: Mapping[str, object], *, own: bool = False) -> Any:
        """The config of a model, from its shapes and, for what shapes cannot say, from its config.json.

        Args:
            shapes: the shape of every tensor, by official name.
            said: the entries of config.json; empty where there is none.
            own: whether config.json lies beside the file, so that it describes exactly these tensors.

        Raises:
            KeyError: a tensor that the config is inferred from is missing.
            ValueError: the shapes are those of another model, or config.json contradicts them.
        """
        config_json.check_shapes(shapes, self.dimensions)
        keymaps.check_blocks(shapes, self.blocks, self.block_tensors)
        config_json.check_entries(self.title, said, self.classes)
        config = self.infer(shapes, said)
        config_json.check_agree(self.title, said, self.to_json(config), shapes if own else None)
        return config


_CLIP_BESIDE = {r"vision_model\..*|visual_projection\..*|visual\..*": "a vision tower"}
_CLIP: Mapping[str, Any] = {
    "config": CLIPConfig,
    "module": CLIPText,
    "family": "clip",
    "namings": (
        Naming("official", r"text_model\.(embeddings|encoder\.layers)\.", keymaps.read_clip),
        Naming("transformers 5", r"embeddings\.token_embedding\.|encoder\.layers\.\d+\.", keymaps.read_bare_clip),
        Naming("OpenCLIP", r"transformer\.resblocks\.\d+\.", keymaps.read_openclip),
    ),
    "write_diffusers": keymaps.write_transformers_clip,
    "to_json": config_json.clip_json,
    "dimensions": config_json.CLIP_DIMENSIONS,
    "classes": ("CLIPTextModelWithProjection", "CLIPTextModel", "CLIPModel"),
    "blocks": r"text_model\.encoder\.layers\.(\d+)\.",
    "block_tensors": 16,
    "stem": "model",
    "library": "transformers",
    "place": "text",
    "words": config_json.clip_words,
    "beside": _CLIP_BESIDE,
}
_ROWS = (
    ModelKind(  # before the transformer, whose names in diffusers it has too
        component="controlnet",
        title="ControlNet",
        config=ControlNetConfig,
        module=ControlNet,
        namings=(
            Naming(
                "official",
                r"transformer_blocks\.\d+\.adaLN_modulation\.",
                controlnet.read_control,
                {r"context_embedder\..*": "a text embedder that no block reads"},
            ),
            Naming("diffusers", r"pos_embed_input\.|controlnet_blocks\.\d+\.", controlnet.read_diffusers_control),
        ),
        prefixes=("controlnet.",),
        write_official=controlnet.write_official_control,
        write_diffusers=controlnet.write_diffusers_control,
        infer=controlnet.control_config,
        to_json=controlnet.control_json,
        dimensions=controlnet.CONTROL_DIMENSIONS,
        classes=("SD3ControlNetModel",),
        blocks=r"transformer_blocks\.(\d+)\.",
        block_tensors=10,
        folder="controlnet",
        stem="diffusion_pytorch_model",
        library="diffusers",
        place="control",
        file_name=lambda config, dtype: controlnet.control_stem(config),
        source="controlnet/diffusion_pytorch_model.safetensors",
        words=controlnet.control_words,
        needed=False,
        many=True,
        says=controlnet.control_said,
    ),
    ModelKind(
        component="transformer",
        title="transformer (MMDiT)",
        config=MMDiTConfig,
        module=MMDiT,
        namings=(
            Naming("official", r"joint_blocks\.\d+\.(x|context)_block\.", keymaps.unchanged),
            Naming(
                "diffusers",
                r"transformer_blocks\.\d+\.(attn\.add_[qkv]_proj|ff_context|norm1_context)\.",
                keymaps.read_diffusers_mmdit,
            ),
        ),
        prefixes=("model.diffusion_model.", "diffusion_model."),
        write_official=keymaps.write_unchanged,
        write_diffusers=keymaps.write_diffusers_mmdit,
        infer=config_json.mmdit_config,
        to_json=config_json.mmdit_json,
        dimensions=config_json.MMDIT_DIMENSIONS,
        classes=("SD3Transformer2DModel",),
        blocks=r"joint_blocks\.(\d+)\.",
        block_tensors=10,
        folder="transformer",
        stem="diffusion_pytorch_model",
        library="diffusers",
        place="main",
        file_name=lambda config, dtype: official.file_stem(config),
        source="sd3.5_large.safetensors",
        words=official.mmdit_words,
    ),
    ModelKind(
        component="vae",
        title="VAE",
        config=VAEConfig,
        module=VAE,
        namings=(
            Naming("official", r"(encoder\.down|decoder\.up)\.\d+\.block\.", keymaps.unchanged),
            Naming("diffusers", r"(encoder\.down|decoder\.up)_blocks\.\d+\.resnets\.", keymaps.read_diffusers_vae),
        ),
        prefixes=("first_stage_model.", "vae."),
        write_official=keymaps.write_unchanged,
        write_diffusers=keymaps.write_diffusers_vae,
        infer=config_json.vae_config,
        to_json=config_json.vae_json,
        dimensions=config_json.VAE_DIMENSIONS,
        classes=("AutoencoderKL",),
        blocks=r"(?:encoder\.down|decoder\.up)\.(\d+)\.",
        block_tensors=8,
        folder="vae",
        stem="diffusion_pytorch_model",
        library="diffusers",
        place="main",
        file_name=lambda config, dtype: "vae",
        source="vae/diffusion_pytorch_model.safetensors",
        words=config_json.vae_words,
    ),
    ModelKind(
        component="clip_l",
        title="CLIP-L text encoder",
        prefixes=("text_encoders.clip_l.transformer.", "clip_l.transformer."),
        infer=config_json.clip_l_config,
        write_official=keymaps.write_official_clip_l,
        folder="text_encoder",
        file_name=lambda config, dtype: "clip_l",
        source="text_encoders/clip_l.safetensors",
        width=768,
        **_CLIP,
    ),
    ModelKind(
        component="clip_g",
        title="CLIP-G text encoder",
        prefixes=("text_encoders.clip_g.transformer.", "clip_g.transformer."),
        infer=config_json.clip_g_config,
        write_official=keymaps.write_unchanged,
        folder="text_encoder_2",
        file_name=lambda config, dtype: "clip_g",
        source="text_encoders/clip_g.safetensors",
        width=1280,
        **_CLIP,
    ),
    ModelKind(
        component="t5",
        title="T5 encoder",
        config=T5Config,
        module=T5Encoder,
        namings=(Naming("official", r"encoder\.block\.\d+\.layer\.[01]\.", keymaps.read_t5),),
        prefixes=("text_encoders.t5xxl.transformer.", "t5xxl.transformer."),
        write_official=keymaps.write_official_t5,
        write_diffusers=lambda tensors, config: dict(tensors),
        infer=config_json.t5_config,
        to_json=config_json.t5_json,
        dimensions=config_json.T5_DIMENSIONS,
        classes=("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
        blocks=r"encoder\.block\.(\d+)\.",
        block_tensors=8,
        folder="text_encoder_3",
        stem="model",
        library="transformers",
        place="text",
        file_name=lambda config, dtype: f"t5xxl_{dtype}",
        source="text_encoders/t5xxl_fp16.safetensors",
        words=config_json.t5_words,
        needed=False,
        without="prompts are followed less well",
        beside={r"decoder\..*|lm_head\..*": "a T5 decoder"},
    ),
)
REGISTRY: dict[Component, ModelKind] = {row.component: row for row in _ROWS}


def to_diffusers(component: Component, config: object) -> dict[str, Any]:
    """The config.json of a component as diffusers and transformers write it."""
    return REGISTRY[component].to_json(config)


def title(name: str) -> str:
    """The name in messages of a component, or of a family whose member is not known."""
    if name in REGISTRY:
        return REGISTRY[name].title
    return " or ".join(kind.title for kind in REGISTRY.values() if kind.family == name)


def needed() -> list[Component]:
    """The components without which no picture can be drawn."""
    return [component for component, kind in REGISTRY.items() if kind.needed]
