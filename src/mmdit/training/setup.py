"""The start of a run: from a config to a model that trains, its data, and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from mmdit.checkpoints.load import load_controlnet, open_controlnet
from mmdit.checkpoints.load_pipeline import DEMO, Source
from mmdit.models.controlnet import ControlKind, ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control_inputs import HintRules, hint_rules
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.compiled import refuse_compiled
from mmdit.runtime.devices import resolve_device
from mmdit.training.adapters import Adapter, attach
from mmdit.training.batches import Samples
from mmdit.training.blocks import compile_blocks, recompute
from mmdit.training.config import ConfigError, TrainingConfig
from mmdit.training.control import Controlled, new_config, new_net
from mmdit.training.data import encoded, on_device
from mmdit.training.ema import Ema
from mmdit.training.export import write_lora, write_model
from mmdit.training.loop import Processes, Training
from mmdit.training.modulation import ModulationAhead
from quant.quantize import quantize_, refuse_quantized
from quant.recipe import as_recipe


@dataclass
class Trained:
    """The model of a run, and what is trained of it."""

    pipe: Pipeline
    model: nn.Module  # see `Training.model`
    parameters: dict[str, nn.Parameter]
    adapters: Mapping[str, Adapter]  # by name of the Linear; empty unless the method is lora
    net: ControlNet | None = None
    ahead: ModulationAhead | None = None

    def file(self, config: TrainingConfig) -> Path:
        """The file of the result in the output's folder."""
        name = {"lora": "lora", "full": "transformer", "controlnet": "controlnet"}[config.method]
        return Path(config.output) / f"{name}.safetensors"

    def write(self, config: TrainingConfig) -> Path:
        """Write the result into the output's folder, in the dtype of the base model; returns the file."""
        path, dtype = self.file(config), getattr(torch, config.dtype)
        if config.method == "lora":
            return write_lora(self.adapters, path, config)
        if self.net is not None:
            return write_model("controlnet", self.net, path, dtype)
        return write_model("transformer", self.pipe.transformer, path, dtype)


def load_base(config: TrainingConfig) -> Pipeline:
    """The base model on the CPU, in the config's dtype.

    Raises:
        FileNotFoundError, ValueError, mmdit.CheckpointError, mmdit.HubError: see `mmdit.Pipeline.load`.
    """
    return Pipeline.load(Source(DEMO if config.model == "demo" else config.model), dtype=getattr(torch, config.dtype))


def encode_data(pipe: Pipeline, config: TrainingConfig, *, progress: bool | None = None) -> Samples:
    """The encoded data of a config; the VAE and the text encoders are on the device meanwhile."""
    others = {name: model for name, model in pipe.models.items() if name not in ("transformer", "controlnet")}
    with on_device(others, device_of(config)):
        return encoded(pipe, config, hints=_hint_rules(pipe, config), progress=progress)


def _hint_rules(pipe: Pipeline, config: TrainingConfig) -> HintRules | None:
    """How drawings with the net of a config encode its hints; None where no net is trained."""
    if config.method != "controlnet":
        return None
    if config.controlnet is not None:
        return hint_rules(open_controlnet(config.controlnet).config, pipe.profile)
    return hint_rules(new_config(pipe.transformer, config.control_blocks, _kind(config)), pipe.profile)


def device_of(config: TrainingConfig) -> torch.device:
    """The device of a run."""
    return resolve_device(config.device or "auto", "device")


def trained_of(pipe: Pipeline, config: TrainingConfig) -> Trained:
    """Move the transformer to the device, quantize it where asked for, and add what is trained.

    Raises:
        ValueError: the pipeline is accelerated or compiled, a glob matches nothing, or the base is float8 and is to be
            trained in full.
    """
    transformer, device = pipe.transformer, device_of(config)
    refuse_compiled(transformer, "the transformer")
    place(transformer, device, config.quant, config.quant_gradient)
    if config.method == "lora":
        adapters = attach(transformer, config)
        named = [
            (f"{name}.{key}", one) for name, adapter in adapters.items() for key, one in adapter.named_parameters()
        ]
        found = Trained(pipe, transformer, dict(named), adapters)
    elif config.method == "full":
        refuse_quantized(transformer, "the transformer", "train a LoRA on it, or take a 16-bit file")
        found = Trained(pipe, transformer, dict(chosen_of(transformer, config.trained)), {})
    else:
        net = _net(pipe, config).to(device)
        found = Trained(pipe, Controlled(transformer, net, pipe.profile), dict(net.named_parameters()), {}, net)
    blocks = [*transformer.joint_blocks, *(() if found.net is None else found.net.transformer_blocks)]
    if config.checkpoint_blocks:
        recompute(blocks, keep_attention=config.keep_attention)
    if config.compile:
        compile_blocks(blocks)
    return found


def place(
    transformer: nn.Module, device: torch.device, quant: str | None, gradient: Literal["full", "e5m2"] = "full"
) -> None:
    """Move a transformer to a device; with a float8 recipe, block by block, so that it is never there in 16 bits."""
    if quant is not None:
        refuse_quantized(transformer, "the transformer", f"leave out quant {quant!r}, or take a 16-bit file")
        for block in transformer.get_submodule("joint_blocks").children():
            block.to(device)
            quantize_(block, replace(as_recipe(quant), gradient=gradient))
    transformer.to(device)


def start(
    config: TrainingConfig,
    *,
    pipe: Pipeline | None = None,
    samples: Samples | None = None,
    processes: Processes | None = None,
) -> tuple[Training, Trained]:
    """A run that has done no step.

    Args:
        config: all settings.
        pipe: the base model, instead of the config's; its transformer is changed.
        samples: encoded data, instead of the config's folder.
        processes: the place of this process among others.
    """
    processes = processes or Processes()
    check_processes(config, processes)
    pipe = load_base(config) if pipe is None else pipe
    if samples is None:
        with processes.in_turn():
            samples = encode_data(pipe, config)
    found = trained_of(pipe, config)
    owners = _owners(found)
    model = processes.prepare(found.model)
    found.parameters = {name: part.get_parameter(key) for name, (part, key) in owners.items()}
    run = Training(
        config,
        model,
        found.parameters,
        samples,
        make_optimizer(found.parameters.values(), config),
        pipe.shift if config.shift is None else config.shift,
        device_of(config),
        getattr(torch, config.dtype),
        None if config.ema is None else Ema(found.parameters.values(), config.ema),
        processes,
    )
    if config.ahead:
        found.ahead = ahead_of(run, pipe.transformer)
    return run, found


def ahead_of(run: Training, transformer: MMDiT) -> ModulationAhead:
    """Compute the modulation of a run's passes ahead from now on.

    Raises:
        ValueError: an adapter is beside adaLN or an embedder, whose modulation would change with it.
    """
    trained = {name for name, one in transformer.named_parameters() if one.requires_grad}
    if bad := sorted(name for name in trained if "adaLN" in name or name.startswith(("t_embedder", "y_embedder"))):
        raise ValueError(f"ahead: {bad[0]} is trained, and the modulation depends on it; set ahead to 0")
    config = run.config

    def conditions(place: int) -> tuple[Tensor, Tensor]:
        batch = run.batch_of(place)
        return batch.t, batch.pooled

    last = config.steps * config.accumulation
    made = ModulationAhead(transformer, config.batch_size, config.ahead, conditions, last)
    run.before_pass = made.enter
    return made


def check_processes(config: TrainingConfig, processes: Processes) -> None:
    """Raise ConfigError where a setting does not go together with several processes."""
    if processes.world > 1 and config.fused_backward:
        raise ConfigError(
            f"fused_backward steps a parameter before the gradients of all {processes.world} processes are there: set "
            "it to false"
        )
    if processes.sharded and config.ahead:
        raise ConfigError(f"ahead {config.ahead} moves weights that fsdp has sharded: set it to 0, or take ddp")
    if processes.sharded and config.sample_every:
        raise ConfigError(
            f"sample_every {config.sample_every} draws with whole weights, and fsdp has sharded them: set it to 0, or "
            "take ddp"
        )


def _owners(found: Trained) -> dict[str, tuple[nn.Module, str]]:
    """The module and the key of each trained parameter: `fully_shard` puts other parameters in their place."""
    places = {
        id(one): (part, key) for part in found.model.modules() for key, one in part.named_parameters(recurse=False)
    }
    return {name: places[id(one)] for name, one in found.parameters.items()}


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW as the config says.

    Raises:
        ImportError: adamw8bit without torchao.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    made = [*parameters]
    if config.fused_backward:
        return FusedBackward(made, config.optimizer, settings)
    return _optimizer(made, config.optimizer, settings)


def _optimizer(parameters: list[nn.Parameter], kind: str, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    try:
        from torchao.optim import AdamW8bit  # noqa: PLC0415 # optional
    except ImportError as error:
        raise ImportError("optimizer adamw8bit needs torchao: pip install torchao; or take adamw") from error
    return AdamW8bit(parameters, **settings)


class FusedBackward(torch.optim.Optimizer):
    """Steps each parameter as soon as its gradient is complete, and frees the gradient: none are there together.

    `step` and `zero_grad` have nothing left to do.

    Args:
        parameters: what is trained.
        kind: of the optimizer of each, see `TrainingConfig.optimizer`.
        settings: its arguments.
    """

    def __init__(self, parameters: list[nn.Parameter], kind: str, settings: Mapping[str, Any]) -> None:
        self.each = {one: _optimizer([one], kind, settings) for one in parameters}
        super().__init__(parameters, dict(settings))
        self.param_groups = [group for one in self.each.values() for group in one.param_groups]
        self.state = _States(self.each)  # type: ignore[assignment]
        mine = ref(self)  # what a hook holds is never freed together with its parameter
        for one in parameters:
            one.register_post_accumulate_grad_hook(partial(_step, mine))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the parameters that still have a gradient: one that was set by hand."""
        for parameter, optimizer in self.each.items():
            if parameter.grad is not None:
                optimizer.step()
                parameter.grad = None

    def step_one(self, parameter: nn.Parameter) -> None:
        """Step one parameter, and free its gradient."""
        self.each[parameter].step()
        parameter.grad = None


def _step(optimizer: ref[FusedBackward], parameter: Tensor) -> None:
    found = optimizer()
    if found is not None and isinstance(parameter, nn.Parameter):
        found.step_one(parameter)


class _States(dict[Any, Any]):
    """The states of several optimizers as one."""

    def __init__(self, each: Mapping[nn.Parameter, torch.optim.Optimizer]) -> None:
        super().__init__()
        self.each = each

    def get(self, key: Any, default: Any = None) -> Any:
        return self.each[key].state.get(key, default)


def chosen_of(model: nn.Module, globs: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that globs name; all others are frozen."""
    known, globs = dict(model.named_parameters(remove_duplicate=False)), list(globs)
    if not globs:
        raise ValueError("trained names no parameter; give globs such as '*' or 'joint_blocks.*.attn.*'")
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise ValueError(f"trained: {glob!r} matches none of {len(known)} parameters, such as {next(iter(known))}")
    chosen = {id(one) for name, one in known.items() if any(fnmatchcase(name, glob) for glob in globs)}
    for name, one in model.named_parameters():
        one.requires_grad_(id(one) in chosen)
        if one.requires_grad:
            yield name, one


def _net(pipe: Pipeline, config: TrainingConfig) -> ControlNet:
    if config.controlnet is not None:
        return load_controlnet(config.controlnet, dtype=torch.float32).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return new_net(pipe.transformer, config.control_blocks, _kind(config))


def _kind(config: TrainingConfig) -> ControlKind | None:
    return config.control_kind  # type: ignore[return-value] # ControlNetConfig checks it
