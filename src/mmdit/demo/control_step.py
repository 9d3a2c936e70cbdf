"""A training step of a ControlNet of the embedded model: the two losses, and steps recorded as CUDA graphs."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.checkpoints.load import load_controlnet
from mmdit.demo.control_data import Batch, Data
from mmdit.demo.control_recipe import ControlRecipe
from mmdit.models.controlnet import ControlKind, ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import residuals_of, spread
from mmdit.pipeline.control_inputs import hint_rules
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import Profile
from mmdit.training import control
from mmdit.training.blocks import compile_blocks
from mmdit.training.ema import Ema
from mmdit.training.rates import set_rate
from mmdit.training.recording import RecordedGradients, eager_gradients
from samplers.training import noised

__all__ = ["STAGES", "Stepper", "Trainer", "net_file", "new_net", "trainer_of"]

STAGES = ("alone", "together")  # each draws from a seed of its own


class Trainer:
    """A net in training, beside the frozen transformer.

    Args:
        net: float32.
        transformer: bfloat16.
        context_gradients: whether gradients also go through the transformer's text tokens; without, a step of training
            takes two thirds of the time.
    """

    def __init__(self, net: ControlNet, transformer: MMDiT, *, context_gradients: bool = False) -> None:
        self.net, self.transformer, self.context_gradients = net, transformer, context_gradients
        width, patch = net.config.hidden_size, net.config.patch_size
        self.reader = nn.Linear(width, 16 * patch**2).to(transformer.pos_embed.device)

    def residuals(self, batch: Batch, x: Tensor, profile: Profile) -> list[Tensor]:
        """The residuals of noised latents, as drawings in a profile compute them."""
        # A CUDA graph must not read weights that autocast kept from before.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return residuals_of(
                self.net,
                self.transformer,
                profile,
                x.bfloat16(),
                1000 * batch.t,
                batch.context,
                batch.pooled,
                batch.hint,
            )

    def alone(self, batch: Batch, profile: Profile) -> Tensor:
        """The loss of the first stage: the picture's latent, read from what the last block gives."""
        seen: list[Tensor] = []
        block = self.net.transformer_blocks[-1]
        hook = block.register_forward_hook(lambda _, args, out: seen.append(out[1]))
        try:
            self.residuals(batch, noised(batch.x0, batch.noise, batch.t), profile)
        finally:
            hook.remove()
        said = self.transformer.unpatchify(self.reader(seen[0].float()), *batch.x0.shape[2:])
        return F.mse_loss(said, batch.x0)

    def together(self, batch: Batch, profile: Profile) -> Tensor:
        """The velocity loss with the net's residuals."""
        return F.mse_loss(self.velocity(batch, profile), batch.noise - batch.x0)

    def velocity(self, batch: Batch, profile: Profile) -> Tensor:
        """The velocity, float32 [b, c, h, w]."""
        model, x = self.transformer, noised(batch.x0, batch.noise, batch.t)
        residuals = self.residuals(batch, x, profile)
        places = spread(profile, self.net, model.config.depth)
        c = model.t_embedder(1000 * batch.t) + model.y_embedder(batch.pooled.bfloat16())
        image = model.x_embedder(x.bfloat16()) + model.cropped_pos_embed(*x.shape[2:])
        context = model.context_embedder(batch.context)
        for block, place in zip(model.joint_blocks, places, strict=True):
            context, image = block(context if self.context_gradients else context.detach(), image, c)
            image = image if place is None else image + residuals[place].bfloat16()
        return model.unpatchify(model.final_layer(image, c), *x.shape[2:]).float()

    def loss(self, stage: str, profile: Profile, batch: Batch) -> Tensor:
        """The loss of a stage."""
        return self.alone(batch, profile) if stage == "alone" else self.together(batch, profile)

    def compile(self) -> None:
        """Compile all blocks."""
        compile_blocks([*self.transformer.joint_blocks, *self.net.transformer_blocks])


def new_net(kind: ControlKind, transformer: MMDiT, depth: int = 1, mlp_dim: int | None = None) -> ControlNet:
    """A net for the embedded model, whose residuals are 0."""
    return control.new_net(transformer, depth, kind, mlp_dim)


def trainer_of(pipe: Pipeline, kind: ControlKind, recipe: ControlRecipe, start_from: Path | None = None) -> Trainer:
    """A net on the pipeline's device beside a frozen copy of its transformer, as the recipe says.

    Args:
        pipe: whose transformer the net is for.
        kind: of the hints.
        recipe: its numbers about the net, and whether blocks are compiled.
        start_from: a folder of nets; the net has the weights of the one of its kind, grown where the recipe says so.
    """
    transformer = copy.deepcopy(pipe.transformer).bfloat16().requires_grad_(False)
    net = new_net(kind, transformer, recipe.depth, recipe.mlp_dim)
    if start_from is not None:
        control.grow(load_controlnet(net_file(start_from, kind), dtype=torch.float32), net)
    trainer = Trainer(net.to(pipe.device), transformer, context_gradients=recipe.context_gradients)
    if recipe.compiled:
        trainer.compile()
    return trainer


def net_file(folder: Path, kind: ControlKind) -> Path:
    """The file of a net in a folder of nets."""
    return folder / f"controlnet_{kind}.safetensors"


class Stepper:
    """Training steps of one stage; on a GPU, each profile has a CUDA graph of its own, because their rules differ.

    Args:
        trainer: the net in training.
        stage: one of `STAGES`.
        data: on the net's device.
        recipe: its numbers of a step.

    Attributes:
        left_out: how many batches had gradients that were not finite.
    """

    def __init__(self, trainer: Trainer, stage: str, data: Data, recipe: ControlRecipe) -> None:
        self.trainer, self.stage, self.data, self.recipe = trainer, stage, data, recipe
        alone = stage == "alone"
        self.size = recipe.alone_batch if alone else recipe.batch
        self.weights = [*trainer.net.parameters(), *(trainer.reader.parameters() if alone else ())]
        device = self.weights[0].device
        self.generator = torch.Generator(device).manual_seed(recipe.seed + 1 + STAGES.index(stage))
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
        self.ema = Ema(trainer.net, recipe.ema)
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)
        self._graphs: dict[str, RecordedGradients[Batch]] = {}

    def step(self, profile: Profile, rate: float) -> Tensor:
        """Train on one batch by the rules of a profile; returns the loss.

        Raises:
            RuntimeError: the step cannot be recorded.
        """
        batch = self.data.draw(hint_rules(self.trainer.net.config, profile), self.size, self.recipe, self.generator)
        loss = self._gradients(batch, profile)
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        self._leave_out(~torch.isfinite(norm))
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.ema.update()
        return loss

    def _leave_out(self, wrong: Tensor) -> None:
        """Where gradients are not finite, train on zeros in place of them; the host does not wait to know."""
        self.left_out = self.left_out + wrong
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad = torch.where(wrong, 0, weight.grad)

    def _gradients(self, batch: Batch, profile: Profile) -> Tensor:
        loss_of = partial(self.trainer.loss, self.stage, profile)
        if not self.recipe.recorded:
            return eager_gradients(loss_of, self.weights, batch)
        if profile.name not in self._graphs:
            self._graphs[profile.name] = RecordedGradients(loss_of, batch, self.weights)
        return self._graphs[profile.name](batch)
