"""ComfyUI's recorded workflows: their graphs and numbers, the tiny models that they ran on, and the token ids.

The models' weights are a formula of their keys' names, and the token ids of the texts are recorded, so that neither
weights nor tokenizers of others are needed.
"""

import json
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoders import VAE, CLIPConfig, CLIPText, CLIPTokenizer, T5Config, T5Encoder, T5Tokenizer, Tokenizers, VAEConfig
from encoders.tokenize import Tokens
from encoders.tokenizer_files import TokenizerFiles
from golden import DATA
from mmdit import MMDiT, MMDiTConfig
from mmdit.comfyui.values import Model
from recorded_models import NETS, stored

FOLDER = DATA / "workflows"
INPUT = DATA / "images"
_BASE = {"context_dim": 256, "pooled_dim": 192}
TRANSFORMERS = {
    "sd35l_tiny": MMDiTConfig(depth=3, hidden_size=192, pos_embed_size=24, **_BASE),
    "sd35m_tiny": MMDiTConfig(depth=4, hidden_size=256, pos_embed_size=48, dual_attention_blocks=(0, 1), **_BASE),
    "sd35l4_tiny": MMDiTConfig(depth=4, hidden_size=256, pos_embed_size=24, **_BASE),
    "sd3m4_tiny": MMDiTConfig(depth=4, hidden_size=256, pos_embed_size=24, qk_norm=None, **_BASE),
    "sd3m_tiny": MMDiTConfig(depth=2, hidden_size=128, pos_embed_size=24, qk_norm=None, **_BASE),
}
_TOWER = {"mlp_dim": 256, "vocabulary": 49408}
FULL = os.environ.get("MMDIT_FULL") == "1"  # all recorded workflows, not only those that show something of their own
_STD = 0.06
_NAMES = {one: f"sd35l4_controlnet_{one}_tiny" for one in ("blur", "canny", "depth")}  # of the files of ControlNets
_NAMES |= {"instantx": "sd3m4_instantx_tiny", "inpaint": "sd3m4_instantx_inpaint_tiny"}


@cache
def cases() -> dict[str, dict]:
    """The recorded workflows by their ids: graph, records (name of a tensor: wire), pictures (node: name)."""
    return {case["id"]: case for case in json.loads((FOLDER / "cases.json").read_text())}


@cache
def errors() -> dict[str, dict]:
    """ComfyUI's answers to wrong graphs, by their ids."""
    return {case["id"]: case for case in json.loads((FOLDER / "errors.json").read_text())}


@cache
def golden() -> dict[str, Tensor]:
    """Everything that was recorded, by name."""
    return load_file(INPUT / "control.safetensors") | load_file(FOLDER / "golden.safetensors")


@cache
def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """What a tensor of a recorded model holds."""
    drawn = np.random.RandomState(zlib.crc32(key.encode())).randn(*shape).astype(np.float32) * np.float32(_STD)
    if len(shape) == 1 and key.endswith("weight") and any(word in key for word in ("ln_", "norm")):
        drawn = drawn + 1
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32)).half()


def _stored(make: type[nn.Module], config: object, prefix: str = "") -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = make(config).state_dict()
    return {prefix + key: weight(prefix + key, tuple(tensor.shape)) for key, tensor in shapes.items()}


def write_models(root: Path) -> Path:
    """ComfyUI's folder of models, as the reference had it."""
    vae = _stored(VAE, VAEConfig(widths=(32, 64, 128, 128)), "first_stage_model.")
    encoders = _encoders()
    for name, config in TRANSFORMERS.items():
        tensors = _stored(MMDiT, config, "model.diffusion_model.")
        _save(root / "checkpoints" / name, tensors | vae)
        if name == "sd35l_tiny":
            inside = {
                f"text_encoders.{n}.transformer.{key}": t.clone()
                for n, one in encoders.items()
                for key, t in one.items()
            }
            _save(root / "checkpoints" / "sd35l_aio_tiny", tensors | vae | inside)
            _save(root / "diffusion_models" / "sd35l_tiny_unet", _without("model.diffusion_model.", tensors))
    for name in sorted(NETS) if FULL else ("canny", "inpaint"):
        _save(root / "controlnet" / _NAMES[name], stored("controlnet", NETS[name]))
    _save(root / "vae" / "sd3_vae_tiny", _without("first_stage_model.", vae))
    for name, shapes in json.loads((FOLDER / "loras.json").read_text()).items():
        _save(root / "loras" / name, {key: _of_lora(key, tuple(shape)) for key, shape in shapes.items()})
    for name, tensors in encoders.items():
        _save(root / "text_encoders" / f"{name}_tiny", tensors)
    weight.cache_clear()  # several models have equal tensors
    return root


def _of_lora(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(2.0).half() if key.endswith(".alpha") else weight(key, shape)


def _encoders() -> dict[str, dict[str, Tensor]]:
    clip_l = _stored(CLIPText, CLIPConfig(width=128, layers=3, heads=2, activation="quick_gelu", **_TOWER))
    clip_g = _stored(CLIPText, CLIPConfig(width=64, layers=4, heads=1, activation="gelu", projection_dim=64, **_TOWER))
    config = T5Config(width=256, layers=3, heads=4, head_dim=64, mlp_dim=320, vocabulary=32128)
    t5 = _stored(T5Encoder, config)
    embedding = weight("encoder.embed_tokens.weight", (32128, 256))
    both = {"shared.weight": embedding, "encoder.embed_tokens.weight": embedding.clone()}
    return {"clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5 | both}


def _without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{path}.safetensors")


class _Recorded:
    """A tokenizer that knows the recorded texts alone."""

    ids: dict[str, list[int]]

    def encode(self, text: str) -> Tokens:
        found = self.ids[text]
        return Tokens(text, tuple(found), ((0, len(text)),) * len(found))


class _CLIPTokens(_Recorded, CLIPTokenizer):
    pass


class _T5Tokens(_Recorded, T5Tokenizer):
    pass


@cache
def tokenizers() -> Tokenizers:
    """Tokenizers of the recorded texts."""
    known = json.loads((FOLDER / "tokens.json").read_text())
    found = [
        made(**known["special"][name], backend=None, files=TokenizerFiles(FOLDER, {}))
        for made, name in ((_CLIPTokens, "clip_l"), (_T5Tokens, "t5"))
    ]
    for one, name in zip(found, ("clip_l", "t5"), strict=True):
        object.__setattr__(one, "ids", known[name])
    return Tokenizers(found[0], found[0], found[1])


def bare_model(depth: int = 1) -> Model:
    """A MODEL whose transformer has no sensible weights."""
    return Model(MMDiT(MMDiTConfig(depth=depth, hidden_size=64, context_dim=4, pooled_dim=2, pos_embed_size=4)))
