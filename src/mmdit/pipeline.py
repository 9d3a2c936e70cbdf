"""From a prompt to a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoders import Conditioner, Conditioning, TextRules, checked_prompts
from mmdit.arguments import Generators, cells, check_latents, check_names, generators, matching, profile_of, whole
from mmdit.assemble import Parts, from_file, from_folder
from mmdit.checkpoint import part_of
from mmdit.convert import write_checkpoint
from mmdit.demo import EMBEDDED
from mmdit.memory import explained
from mmdit.pictures import OutputType, convert_output, to_unit
from mmdit.profiles import Profile
from mmdit.recognise import Component
from samplers import SOLVERS, Step, cfg, gaussian, only_x0, pick, sigmas


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: a list of PIL pictures, an array [b, h, w, 3], a tensor [b, 3, h, w] in [0, 1], or latents."""

    images: Any


class Pipeline:
    """Stable Diffusion 3 / 3.5: text encoders, transformer, solver and VAE.

    `pipe("a cat").images[0]` draws; `encode`, `noise`, `predict`, `sample` and `decode` are the same in steps.
    The parts are plain attributes: `transformer`, `vae`, `clip_l`, `clip_g`, `t5`, `tokenizers`, `profile`.
    """

    def __init__(self, parts: Parts, *, profile: str | Profile = "diffusers") -> None:
        self.transformer, self.vae, self.tokenizers = parts.transformer, parts.vae, parts.tokenizers
        self.clip_l, self.clip_g, self.t5 = parts.clip_l, parts.clip_g, parts.t5
        self.profile = profile_of(profile)
        self.shift = self.profile.shift if parts.shift is None else parts.shift

    @classmethod
    def demo(
        cls,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        profile: str | Profile = "diffusers",
    ) -> Self:
        """Load the embedded model: 128 x 128 pictures of 1 to 4 shapes, as prompts of a small grammar say.

        "a large red circle above a blue star, on a white background": 7 shapes, 8 colours, 2 sizes, 6 backgrounds,
        counts and relations; `mmdit.demo.captions` makes more.

        Args:
            device, dtype, profile: see `from_pretrained`; stored is float16.
        """
        return cls.from_pretrained(EMBEDDED, device=device, dtype=dtype, profile=profile)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        profile: str | Profile = "diffusers",
    ) -> Self:
        """Load a folder in the official, diffusers or ComfyUI layout.

        Args:
            folder: of the checkpoint.
            device: where all models go.
            dtype: None keeps what is stored.
            profile: whose behaviour to follow, see `mmdit.PROFILES`.

        Raises:
            FileNotFoundError: there is no such folder.
            mmdit.CheckpointError: something is missing (what, from where, to where) or broken.
        """
        profile = profile_of(profile)  # a wrong name is said before gigabytes are read
        return cls(from_folder(folder, device, dtype), profile=profile)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        clip_l: str | Path | None = None,
        clip_g: str | Path | None = None,
        t5: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizers: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        profile: str | Profile = "diffusers",
    ) -> Self:
        """Load a single file, with text encoders inside, given here, or lying beside it in `text_encoders/`.

        Args:
            path: of a safetensors file that holds the transformer.
            clip_l, clip_g, t5, vae: files or folders to take these from.
            tokenizers: the folder that holds tokenizer, tokenizer_2 and tokenizer_3; looked for beside the file.
            device, dtype, profile: see `from_pretrained`.

        Raises:
            FileNotFoundError, mmdit.CheckpointError: see `from_pretrained`.
        """
        others: Mapping[Component, Any] = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5, "vae": vae}
        profile = profile_of(profile)
        return cls(from_file(path, others, tokenizers, device, dtype), profile=profile)

    @property
    def models(self) -> dict[Component, nn.Module]:
        """The models that are there, by component."""
        every: dict[Component, nn.Module | None] = {
            "transformer": self.transformer,
            "vae": self.vae,
            "clip_l": self.clip_l,
            "clip_g": self.clip_g,
            "t5": self.t5,
        }
        return {name: model for name, model in every.items() if model is not None}

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.transformer.pos_embed.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast all models."""
        for model in self.models.values():
            model.to(device=device, dtype=dtype)
        return self

    def save_pretrained(self, folder: str | Path, layout: str = "official") -> Path:
        """Write all models and tokenizers; the folder must not exist yet.

        Raises:
            FileExistsError: it exists.
        """
        parts = [part_of(name, model) for name, model in self.models.items()]
        return write_checkpoint(parts, folder, layout, shift=self.shift, tokenizers=self.tokenizers.save)

    def encode(self, prompts: str | Sequence[str], *, max_sequence_length: int | None = None) -> Conditioning:
        """What the transformer reads of the prompts, on its device and in its dtype.

        Args:
            prompts: one or more.
            max_sequence_length: T5 tokens; None is the profile's number.

        Raises:
            ValueError, TypeError: no prompt, or one that is not a string.
        """
        rules = self._rules(max_sequence_length)
        conditioner = Conditioner(
            self.clip_l,
            self.clip_g,
            self.t5,
            self.tokenizers,
            rules,
            context_dim=self.transformer.config.context_dim,
        )
        return conditioner(checked_prompts(prompts)).to(self.device, self.dtype)

    def noise(
        self,
        seed: int | Sequence[int] | None = None,
        *,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
    ) -> Float[Tensor, "b c h w"]:
        """The latents to start from, in model space, drawn on the CPU (or on the generator's device).

        Args:
            seed: one for all pictures together, or one per picture, whose noise is then that of the seed alone.
            count: pictures.
            height, width: of the picture in pixels, multiples of 16.
            generator: instead of a seed; one, or one per picture.

        Raises:
            ValueError: a size does not fit, or seeds and pictures differ in number.
        """
        rows, columns = self._cells(height, "height"), self._cells(width, "width")
        shape = (count, self.transformer.config.in_channels, rows, columns)
        dtype = self.dtype if self.profile.noise_dtype == "model" else torch.float32
        return gaussian(shape, generators(seed, generator, count), dtype).to(self.device)

    def predict(self, x: Tensor, sigma: float, conditionings: Sequence[Conditioning]) -> list[Tensor]:
        """The predicted picture (x0, a latent) at noise level `sigma` under each conditioning, in one batch.

        Conditionings of different lengths go through the transformer one after the other.
        """
        if len({conditioning.context.shape for conditioning in conditionings}) > 1:
            return [self.predict(x, sigma, [conditioning])[0] for conditioning in conditionings]
        times = len(conditionings)
        level = torch.tensor(sigma, dtype=torch.float32, device=x.device)
        velocity = self.transformer(
            torch.cat([x] * times).to(self.dtype),
            (level * 1000).expand(times * len(x)),
            torch.cat([conditioning.context for conditioning in conditionings]),
            torch.cat([conditioning.pooled for conditioning in conditionings]),
        )
        return [x - sigma * part for part in velocity.to(x.dtype).chunk(times)]

    def predictor(self, conditionings: Sequence[Conditioning]) -> Callable[[Tensor, float], list[Tensor]]:
        """`predict` with the conditionings filled in: `(x, sigma) -> [x0, ...]`."""
        return lambda x, sigma: self.predict(x, sigma, conditionings)

    def sample(
        self,
        cond: Conditioning,
        uncond: Conditioning | None,
        noise: Tensor,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str = "euler",
        schedule: str | None = None,
    ) -> Iterator[Step]:
        """The steps from noise to latent; change `step.x` and the solver goes on from there.

        Args:
            cond, uncond: of the prompts and the negative prompts, one per picture; no uncond without guidance.
            noise: [b, c, h, w], see `noise`.
            num_inference_steps, guidance_scale, schedule: None is the profile's.
            sampler: one of `samplers.SOLVERS`.

        Raises:
            ValueError: an unknown name, or no step.
        """
        solver, levels = pick(SOLVERS, sampler, "sampler"), self.levels(num_inference_steps, schedule)
        scale = self.profile.guidance_scale if guidance_scale is None else guidance_scale
        if scale > 1 and uncond is None:
            raise ValueError(f"guidance_scale {scale} needs a conditioning to guide away from: give uncond")
        denoise = only_x0(cfg(self.predict, cond, uncond, scale))
        return self._rounded(solver(denoise, noise.to(torch.promote_types(noise.dtype, torch.float32)), levels))

    def decode(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h8 w8"]:
        """The pictures of latents in model space, in [0, 1]."""
        first = next(self.vae.parameters())
        return to_unit(self.vae.decode(latent.to(first.device, first.dtype)))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str = "euler",
        schedule: str | None = None,
        seed: int | Sequence[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Draw. Names and defaults are diffusers' own; everything that is None is the profile's.

        Args:
            prompt, negative_prompt: one or more; the negative prompt counts where guidance_scale is above 1.
            height, width: in pixels, multiples of 16.
            num_inference_steps, guidance_scale, sampler, schedule: see `sample`.
            seed, generator: see `noise`.
            latents: instead of noise, [b, c, h/8, w/8].
            num_images_per_prompt: pictures of each prompt, in a row.
            max_sequence_length: T5 tokens.
            output_type: "pil", "pt" ([b, 3, h, w] in [0, 1]), "np" ([b, h, w, 3]) or "latent".

        Raises:
            ValueError, TypeError: an argument is wrong; the message says what was found and expected.
            MemoryError: the device has too little memory; the message says what helps.
        """
        prompts = checked_prompts(prompt)
        count = len(prompts) * whole("num_images_per_prompt", num_images_per_prompt, 1)
        scale = self.profile.guidance_scale if guidance_scale is None else guidance_scale
        negatives = matching(negative_prompt, len(prompts)) if scale > 1 else None
        check_names(output_type, sampler)
        self.levels(num_inference_steps, schedule)  # wrong names and numbers are said before anything is drawn
        self._rules(max_sequence_length)
        with explained(self.models, f"{count} pictures at once"):
            noise = self._start(latents, seed, generator, count, height, width)
            cond, uncond = (
                None
                if texts is None
                else self.encode(texts, max_sequence_length=max_sequence_length).repeat(num_images_per_prompt)
                for texts in (prompts, negatives)
            )
            assert cond is not None
            *_, last = self.sample(
                cond,
                uncond,
                noise,
                num_inference_steps=num_inference_steps,
                guidance_scale=scale,
                sampler=sampler,
                schedule=schedule,
            )
            latent = last.x.to(self.dtype)
            pictures = latent if output_type == "latent" else self.decode(latent)
        return PipelineOutput(convert_output(pictures, output_type, self.profile.to_uint8))

    def levels(self, num_inference_steps: int | None = None, schedule: str | None = None) -> Tensor:
        """The noise levels of the steps, float64 [steps + 1]; None is the profile's."""
        steps = self.profile.steps if num_inference_steps is None else num_inference_steps
        whole("num_inference_steps", steps, 1)
        return sigmas(schedule or self.profile.schedule, steps, shift=self.shift)

    def _rules(self, max_sequence_length: int | None) -> TextRules:
        rules = self.profile.text
        if max_sequence_length is None:
            return rules
        return replace(rules, t5_length=whole("max_sequence_length", max_sequence_length, 2))

    def _rounded(self, steps: Iterator[Step]) -> Iterator[Step]:
        """diffusers rounds the latent to the model's dtype after every step."""
        for step in steps:
            if self.profile.state_dtype == "model":
                step.x = step.x.to(self.dtype).to(step.x.dtype)
            yield step

    def _start(
        self,
        latents: Tensor | None,
        seed: int | Sequence[int] | None,
        generator: Generators,
        count: int,
        height: int | None,
        width: int | None,
    ) -> Tensor:
        if latents is None:
            return self.noise(seed, count=count, height=height, width=width, generator=generator)
        if given := [name for name, value in (("seed", seed), ("generator", generator)) if value is not None]:
            raise ValueError(f"latents and {given[0]} are given; latents leave nothing to draw: give one of them")
        check_latents(latents, count, self.transformer.config, self.vae.config.downscale, height, width)
        return latents.to(self.device)

    def _cells(self, pixels: int | None, name: str) -> int:
        """The latent cells along a side of so many pixels."""
        config = self.transformer.config
        return (config.sample_size or 128) if pixels is None else cells(pixels, name, config, self.vae.config.downscale)
