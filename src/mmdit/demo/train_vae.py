"""Training of the VAE: pictures drawn as they are needed, a check that must pass, and the scale folded in."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from encoders.vae import MAX_LOGVAR, MIN_LOGVAR, VAE
from mmdit.demo.captions import training_captions
from mmdit.demo.progress import save_whole
from mmdit.demo.run import Run
from mmdit.demo.scenes import Scene, Scenes, render, sample
from mmdit.demo.score import check, parse_batch, statements, symbolic
from mmdit.demo.trainee import compile_regions, initial_parts
from mmdit.training.ema import Ema
from mmdit.training.journal import mean_of
from mmdit.training.rates import Budget, Every, learning_rate, set_rate

__all__ = ["fold_scale", "latents_of", "round_trip", "train_vae", "vae_loss"]

_HELD_OUT_SEED = 987_654_321  # scenes of this seed are in no training set
_RENDERED = 1024  # pictures drawn at once: one sync with the device for several batches
_STATE = "vae.pt"


def train_vae(run: Run, scenes: Scenes) -> VAE:
    """The averaged VAE with its scale folded in, in float32 on the run's device; resumed if the folder has it."""
    averaged = initial_parts(run.recipe.architecture, run.recipe.seed).vae.to(run.device).requires_grad_(False)
    if (run.folder / _STATE).exists():
        run.journal.say("VAE: taken from the state folder")
        averaged.load_state_dict(torch.load(run.folder / _STATE, map_location=run.device))
        return averaged
    _fit(run, scenes, averaged)
    factor = fold_scale(averaged, latents_of(run, averaged, scenes[:4096], "raw"))
    psnr, agree = round_trip(run, averaged)
    run.journal.row("vae folded", factor=factor, psnr=psnr, verdicts=agree)
    save_whole(averaged.state_dict(), run.folder / _STATE)
    return averaged


def vae_loss(vae: VAE, pictures: Tensor, noise: Tensor, kl_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total, L1, KL) of pictures in [-1, 1]: L1 + 0.5 L1 of image gradients + kl_weight KL, summed per picture."""
    mean, logvar = vae.encoder(pictures).float().chunk(2, dim=1)
    logvar = logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)
    error = vae.decoder(mean + torch.exp(0.5 * logvar) * noise).float() - pictures
    # Absolute differences of the error are the L1 of image gradients; they keep edges sharp.
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    level = error.abs().mean()
    return level + 0.5 * edges + kl_weight * kl, level.detach(), kl.detach()


def fold_scale(vae: VAE, raw: Tensor) -> float:
    """Scale the raw latent to std 1 / scale inside encoder.conv_out and decoder.conv_in; returns the factor.

    decode(encode(x)) stays as it is. Only a factor can be folded: conv_in pads with zeros, so a shift would show at
    the borders. The mean stays where it is.
    """
    factor = 1 / (vae.config.scale * float(raw.float().std()))
    channels = vae.config.latent_channels
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    assert out.bias is not None
    with torch.no_grad():
        out.weight[:channels] *= factor
        out.bias[:channels] *= factor
        out.bias[channels:] += 2 * math.log(factor)
        into.weight /= factor
    return factor


@torch.no_grad()
def latents_of(run: Run, vae: VAE, scenes: Scenes, space: str = "model") -> Tensor:
    """The most likely latents of scenes, bfloat16 [n, 16, 16, 16], in the model's space or "raw".

    The mode is used because the decoder ignores the posterior's noise, so the transformer need not learn it.
    """
    into = []
    dtype = torch.float16 if run.device.type == "cuda" else torch.float32  # the dtype in which a pipeline decodes
    vae = copy.deepcopy(vae).to(dtype)
    for first in range(0, len(scenes), _RENDERED):
        latent = vae.encode(2 * render(scenes[first : first + _RENDERED]).to(dtype) - 1).mode()
        into.append((vae.from_model(latent) if space == "raw" else latent).bfloat16())
    return torch.cat(into)


@torch.no_grad()
def round_trip(run: Run, vae: VAE) -> tuple[float, float]:
    """PSNR in dB on held-out scenes, and the share of verdicts on decoded pictures that are the truth."""
    scenes = sample(run.recipe.held_out_scenes, _HELD_OUT_SEED)
    words = scenes.words()
    captions = [texts[0] for texts in training_captions(scenes, 1, _HELD_OUT_SEED)]
    errors, verdicts, size = [], [], 32
    for first in range(0, len(scenes), size):
        pictures = render(scenes[first : first + size].to(run.device))
        with run.autocast():
            decoded = (vae.decode(vae.encode(2 * pictures - 1).mode()).float() + 1) / 2
        decoded = decoded.clamp(0, 1)
        errors.append((decoded - pictures).square().mean())
        chosen = slice(first, first + size)
        # A neighbour's caption is mostly false here, so a scorer that always answers "true" fails the check.
        said = [captions[i : i + 1] + captions[i - 1 : i] for i in range(len(scenes))][chosen]
        verdicts.append(run.pool.submit(_agreement, decoded.cpu().numpy(), words[chosen], said))
    shares = [future.result() for future in verdicts]
    return -10 * math.log10(mean_of(errors)), float(np.mean([share for chunk in shares for share in chunk]))


def _agreement(pictures: np.ndarray, scenes: list[Scene], captions: list[list[str]]) -> list[bool]:
    agree = []
    for parsed, scene, texts in zip(parse_batch(torch.from_numpy(pictures)), scenes, captions, strict=True):
        claims = [claim for text in texts for claim in statements(text)]
        agree += [check(claim, parsed) == check(claim, symbolic(scene)) for claim in claims]
    return agree


def _fit(run: Run, scenes: Scenes, averaged: VAE) -> None:
    """Train until the time is up, and once half as long again if the check fails."""
    recipe = run.recipe
    vae = initial_parts(recipe.architecture, recipe.seed).vae.to(run.device)
    if "vae" in run.compiled:  # eager group norm works on contiguous tensors and would copy back and forth
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compile_regions(vae, ["vae"])
    ema = Ema(vae, recipe.vae_ema)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    seconds = recipe.vae_share * run.seconds
    for attempt, share in enumerate((1.0, 0.5)):
        _train(run, vae, ema, optimizer, scenes, seconds * share)
        ema.write_to(averaged)
        psnr, agree = round_trip(run, averaged)
        passed = psnr >= recipe.min_psnr and agree >= recipe.min_verdicts
        run.journal.row("vae check", psnr=psnr, verdicts=agree, passed=passed)
        if passed or recipe.vae_steps is not None:
            return
        if attempt:
            run.journal.say(
                f"!!! VAE BELOW {recipe.min_psnr} dB OR {recipe.min_verdicts:.0%} OF VERDICTS: going on !!!"
            )


def _train(run: Run, vae: VAE, ema: Ema, optimizer: torch.optim.Optimizer, scenes: Scenes, seconds: float) -> None:
    recipe, generator, pictures = run.recipe, run.generator(1), _pictures(run, scenes)
    budget, log = Budget(seconds, recipe.vae_steps), Every(recipe.log_seconds)
    levels: list[Tensor] = []
    kls: list[Tensor] = []
    since = time.monotonic()
    for step, fraction in budget.rounds():
        rate = learning_rate(fraction, step, peak=recipe.vae_rate, warmup=recipe.vae_warmup, decay=recipe.decay)
        set_rate(optimizer, rate)
        x = next(pictures)
        noise = torch.randn(
            (len(x), vae.config.latent_channels, *(side // vae.config.downscale for side in x.shape[2:])),
            generator=generator,
            device=run.device,
        )
        with run.autocast():
            loss, level, kl = vae_loss(vae, x, noise, recipe.vae_kl)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), recipe.clip)
        optimizer.step()
        ema.update()
        levels.append(level)
        kls.append(kl)
        if step == 0 or log.due():
            run.synchronize()
            ms = 1000 * (time.monotonic() - since) / len(levels)
            run.journal.row("vae", step=step, done=fraction, ms=ms, l1=mean_of(levels), kl=mean_of(kls), rate=rate)
            levels, kls, since = [], [], time.monotonic()


def _pictures(run: Run, scenes: Scenes) -> Iterator[Tensor]:
    """Batches of pictures in [-1, 1] of random scenes, without end."""
    batch, generator = run.recipe.vae_batch, run.generator(2)
    draw = max(_RENDERED if run.recipe.vae_steps is None else batch, batch) // batch * batch
    while True:
        index = torch.randint(len(scenes), (draw,), generator=generator, device=run.device)
        yield from (2 * render(scenes[index]) - 1).split(batch)
