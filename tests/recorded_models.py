"""The tiny models of the recorded runs with pictures and hints, whose weights are a formula of their keys' names."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders import VAE, Tokenizers, VAEConfig
from golden import DATA
from mmdit import ControlNet, ControlNetConfig, MMDiT, MMDiTConfig, Pipeline
from mmdit.checkpoints.controlnet import read_control, read_diffusers_control
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import model_in_memory
from mmdit.checkpoints.load_pipeline import Components
from mmdit.checkpoints.write import single_file
from recorded_runs import weight

_BASE = {"depth": 4, "hidden_size": 256, "context_dim": 256, "pooled_dim": 192, "pos_embed_size": 24}
TRANSFORMERS = {"sd35l4": MMDiTConfig(**_BASE), "sd3m4": MMDiTConfig(**_BASE, qk_norm=None)}
_NET = {"depth": 2, "hidden_size": 256, "pooled_dim": 192}
_JOINT = {**_NET, "context_dim": 256, "pos_embed_size": 24, "zero_pooled": True}
NETS = {
    "blur": ControlNetConfig(**_NET, kind="blur"),
    "canny": ControlNetConfig(**_NET, kind="canny"),
    "depth": ControlNetConfig(**_NET, kind="depth"),
    "instantx": ControlNetConfig(**_JOINT),
    "inpaint": ControlNetConfig(**_JOINT, hint_channels=17),
}
MODELS = {"transformer": MMDiT, "vae": VAE, "controlnet": ControlNet}


def stored(component: str, config: object) -> dict[str, Tensor]:
    """The tensors of a file of such a model, under the keys that the reference read."""
    with torch.device("meta"):
        model = MODELS[component](config)
    tensors = single_file([model_in_memory(component, model)], "comfyui")
    return {
        key: weight(key, lazy.shape) if lazy.dtype.is_floating_point else lazy.read() for key, lazy in tensors.items()
    }


@cache
def vae() -> VAE:
    model = VAE(VAEConfig(widths=(32, 64, 128, 128)))
    keys = model.state_dict()
    model.load_state_dict({key: weight(f"first_stage_model.{key}", tuple(keys[key].shape)).float() for key in keys})
    return model.eval().requires_grad_(False)


@cache
def transformer(name: str) -> MMDiT:
    model = MMDiT(TRANSFORMERS[name])
    keys = model.state_dict()
    prefix = "model.diffusion_model."
    model.load_state_dict({key: weight(prefix + key, tuple(keys[key].shape)).float() for key in keys})
    return model.eval().requires_grad_(False)


def net_file(name: str, folder: Path) -> Path:
    """The file of a recorded ControlNet."""
    path = folder / f"{name}.safetensors"
    save_file(stored("controlnet", NETS[name]), path)
    return path


@cache
def records() -> dict[str, Tensor]:
    """What the references gave with ControlNets."""
    return load_file(DATA / "images" / "control.safetensors")


@cache
def net(name: str) -> ControlNet:
    """A recorded ControlNet."""
    tensors = {key: LazyTensor.of(tensor) for key, tensor in stored("controlnet", NETS[name]).items()}
    read = read_diffusers_control if NETS[name].is_joint else read_control
    state = {key: lazy.read(torch.float32) for key, lazy in read(tensors, Path()).tensors.items()}
    model = ControlNet(NETS[name])
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@cache
def pipeline(model: str, profile: str) -> Pipeline:
    """A recorded transformer and VAE under a profile; it has no text encoders."""
    parts = Components(transformer(model), vae(), None, None, None, Tokenizers(None, None, None), None)
    return Pipeline(parts, profile=profile)
