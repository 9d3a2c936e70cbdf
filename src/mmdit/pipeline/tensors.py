"""Convert prompts, pictures, masks and seeds to tensors, and latents to pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from encoders import Conditioner, Conditioning, TextRules, checked_prompts, decode_tiled, encode_tiled
from mmdit.models.controlnet import ControlNet
from mmdit.pictures.read import PictureLike
from mmdit.pipeline.arguments import LEAST_TILE, check_latents, check_tensor
from mmdit.pipeline.base import PipelineModels
from mmdit.pipeline.control import Control
from mmdit.pipeline.control_inputs import (
    ControlInput,
    ControlNetLike,
    Numbers,
    check_counts,
    control_inputs,
    make_control,
    takes_shift,
)
from mmdit.pipeline.failures import AllFinite
from mmdit.pipeline.image_inputs import ImageInputs, PictureSize, image_inputs, masks_of
from mmdit.pipeline.images import to_unit
from mmdit.pipeline.masks import repeated
from mmdit.pipeline.seeds import Generators, SeedLike, checked_seeds, generators
from mmdit.pipeline.settings import MAX_T5_TOKENS
from mmdit.runtime.fast_vae import FastVAE
from mmdit.utils import ahead, whole
from samplers import gaussian
from samplers.noise import moved


class PipelineTensors(PipelineModels):
    """The conversions of a pipeline: `encode`, `noise`, `encode_image`, `encode_mask`, `control` and `decode`."""

    def encode(self, prompts: str | Sequence[str], *, max_sequence_length: int | None = None) -> Conditioning:
        """Encode prompts with the text encoders; the result is on the transformer's device and in its dtype.

        Args:
            prompts: one or more.
            max_sequence_length: number of T5 tokens; None is the profile's.

        Raises:
            ValueError, TypeError: no prompt, or one that is not a string.
        """
        prompts = checked_prompts(prompts)
        if self.parallel is None:
            return self._encode(prompts, max_sequence_length)
        self.parallel.agree("encode", prompts=prompts, max_sequence_length=max_sequence_length)
        with self.parallel.guarded():
            return self._encode(prompts, max_sequence_length)

    def _encode(self, prompts: Sequence[str], max_sequence_length: int | None) -> Conditioning:
        """What `encode` returns, of prompts on which the ranks of a parallel run agree."""
        return self._encode_each([prompts], max_sequence_length)[0]

    def _encode_each(self, batches: Sequence[Sequence[str]], max_sequence_length: int | None) -> list[Conditioning]:
        """Several batches of prompts, which several ranks share."""
        with self._explained(f"{sum(map(len, batches))} prompts"):
            found = self._conditioner(max_sequence_length).each(batches)
            return [one.to(self.device, self.dtype) for one in found]

    def _conditioner(self, max_sequence_length: int | None) -> Conditioner:
        return Conditioner(
            self.clip_l,
            self.clip_g,
            self.t5,
            self.tokenizers,
            self._rules(max_sequence_length),
            context_dim=self.transformer.config.context_dim,
            pooled_dim=self.transformer.config.pooled_dim,
            faster=None if self._beside is None else self._beside.encoders(self._text_encoders),
            run=self._run_encoder,
            run_all=None if self.parallel is None or self._turns is not None else self.parallel.texts,
        )

    def noise(
        self,
        seed: SeedLike | None = None,
        *,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
    ) -> Float[Tensor, "b c h w"]:
        """Starting noise: latents of shape [b, c, h, w], in model space, drawn on the CPU.

        Args:
            seed: a whole number, or a list with one for each picture. Each seed of a list draws the same noise as it
                would alone. With one seed for several pictures, the profile decides: all noise comes from a single
                draw, or each picture has the same noise.
            count: number of pictures, b.
            height, width: size of the pictures in pixels, multiples of 16; None is the model's own size.
            generator: one, or a list with one for each picture, instead of seeds; noise is drawn on its device.

        Raises:
            ValueError: a size is not possible, or the numbers of seeds and pictures differ.
        """
        shape = self._latent_shape(whole("count", count, 1), height, width)
        alone = self.profile.one_seed == "each_alone"
        return self._noise(shape, generators(checked_seeds(seed), generator, shape[0], alone=alone))

    def encode_image(
        self,
        image: PictureLike,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: SeedLike | None = None,
        generator: Generators = None,
        tile: int | None = None,
        mean: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """The latents of pictures, [b, c, h, w], in model space; see `sample(image=)`.

        Args:
            image: a path, a PIL picture, an array [h, w, 3] or a tensor [3, h, w] in [0, 1], a batch or a list of
                these. Latents are returned as they are.
            height, width: the size of the drawing in pixels. None leaves it to the profile: the picture's own size,
                cropped to multiples, or the model's.
            seed, generator: the source of randomness, if the profile samples the latent distribution; see `noise`.
            tile: encode in tiles of this many pixels a side, which takes less memory; see `encoders.encode_tiled`.
            mean: take the mean of the latent's distribution, whatever the profile does.

        Raises:
            ValueError, TypeError: the picture, its size or the numbers of seeds are not possible.
            FloatingPointError: the encoded latents are not finite.
        """
        inputs = image_inputs(image, None, channels=self.vae.config.latent_channels)
        assert inputs is not None
        alone = self.profile.one_seed == "each_alone"
        drawn_by = generators(checked_seeds(seed), generator, inputs.count, alone=alone)
        size = self._picture_size(inputs, height, width)
        tile = None if tile is None else whole("tile", tile, LEAST_TILE)
        return self._encoded_images(inputs, size, inputs.count, drawn_by, tile, mean=mean)

    def encode_mask(self, mask_image: PictureLike, latents: Tensor) -> Float[Tensor, "b 1 h w"]:
        """A mask at the size of latents, as the profile reads it; see `sample(mask=)`.

        Args:
            mask_image: the region to draw anew, of any size, see `Pipeline.__call__`.
            latents: the latents [b, c, h, w] whose size the mask gets.

        Raises:
            ValueError, TypeError: the value is not a mask, or the mask is 0 everywhere.
        """
        cell = self.vae.config.downscale
        rows, columns = latents.shape[2:]
        masks = ImageInputs(masks=tuple(masks_of(mask_image)))
        found = masks.latent_masks(PictureSize(rows * cell, columns * cell, cut=False), cell, self.profile)
        assert found is not None
        return found.to(latents.device)

    @torch.no_grad()
    def control(
        self,
        controlnet: ControlNetLike,
        control_image: PictureLike,
        control_mask: PictureLike | None = None,
        *,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        scale: Numbers = 1.0,
        start: Numbers = 0.0,
        stop: Numbers = 1.0,
        guided: bool = True,
    ) -> tuple[Control, ...]:
        """Encode the hints of ControlNets; the result is the `control` of a `mmdit.Ranged`, for `sample`.

            control = pipe.control(net, edges)
            cond, uncond = (Ranged(pipe.encode(text), control=control) for text in ("a red circle", ""))
            for step in pipe.sample([cond], [uncond], pipe.noise(seed=1)): ...

        Args:
            controlnet, control_image, control_mask: see `mmdit.Pipeline.__call__`.
            count: the number of pictures that are drawn.
            height, width: the size of the drawing in pixels; None is the model's own size.
            scale, start, stop: `controlnet_conditioning_scale`, `control_guidance_start` and `control_guidance_end`.
            guided: whether an unconditional branch runs; in the profile "diffusers", its hint has separate noise.

        Raises:
            TypeError, ValueError: see `mmdit.pipeline.control_inputs.control_inputs`.
        """
        inputs = control_inputs(
            controlnet,
            control_image,
            control_mask,
            scale=scale,
            start=start,
            stop=stop,
            config=self.transformer.config,
        )
        count, cell = whole("count", count, 1), self.vae.config.downscale
        rows, columns = self._latent_shape(count, height, width)[2:]
        return self._controls(inputs, PictureSize(rows * cell, columns * cell, cut=False), count, guided=guided)

    def decode(
        self, latent: Float[Tensor, "b c h w"], *, tile: int | None = None, finite: bool = True
    ) -> Float[Tensor, "b 3 h8 w8"]:
        """The pictures of latents, [b, 3, 8 h, 8 w], in [0, 1].

        Args:
            latent: latents of shape [b, c, h, w], in model space, of any size.
            tile: decode in tiles of this many pixels a side, which takes less memory; see `encoders.decode_tiled`.
            finite: refuse latents and pictures that are not finite; False passes them on, to look at.

        Raises:
            ValueError: the latents have another number of channels than the VAE.
            FloatingPointError: the latents, or the pictures that the VAE makes of them, are not finite.
        """
        check_tensor("latent", latent)
        channels = self.vae.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(f"latent has shape {list(latent.shape)}, expected [b, {channels}, h, w] in model space")
        tile = None if tile is None else whole("tile", tile, LEAST_TILE)
        tile = self._fit_vae(latent, tile)
        with self._computing(f"the pictures of latents {list(latent.shape)}"):
            self._enter("vae")
            first = next(self.vae.parameters())
            latent = latent.to(first.device, first.dtype)
            checks = [AllFinite(latent, "the latent to decode")] if finite else []
            decoded = self._decoded_latent(latent, tile)
            if finite:
                word = str(first.dtype).removeprefix("torch.")
                checks.append(AllFinite(decoded, f"the picture that the VAE decoded in {word}"))
            found = to_unit(decoded)
            if self._here.pending is not None:
                self._here.pending()
            for check in checks:  # no check is waited for before all is launched, so that a GPU has no pause
                check.read()
            return found

    def _decoded_latent(self, latent: Tensor, tile: int | None) -> Tensor:
        """The VAE's pictures, about in [-1, 1]: in tiles, on several ranks, or by the fast forward."""
        if self.parallel is not None and self._budget is not None:
            tile = self.parallel.smallest(tile)
        if tile is not None:
            return decode_tiled(self.vae, latent, tile=tile)
        if self.parallel is None:
            return self._fast_vae.decode(latent)
        with self.parallel.guarded():
            fast, graph = self._fast_vae, self.accelerated is not None and self.accelerated.graph
            return self.parallel.decoded(self.vae, latent, fast if isinstance(fast, FastVAE) else None, graph=graph)

    def _fit_vae(self, latent: Tensor, tile: int | None, *, encodes: bool = False) -> int | None:
        """The side of the VAE's tiles for latents of this shape: what the caller asks for, or what a budget takes."""
        pictures, _, height, width = latent.shape
        sizes = self._sizes_now(pictures=pictures, height=height, width=width, tile=tile or 0)
        self._fit(replace(sizes, encodes=encodes or sizes.encodes))
        return self.memory_plan.tile if tile is None and self.memory_plan is not None else tile

    def _controls(
        self, inputs: Sequence[ControlInput], size: PictureSize, count: int, *, guided: bool
    ) -> tuple[Control, ...]:
        """Encode the hints of the nets of a call."""
        if not inputs:
            return ()
        check_counts(inputs, count)
        self._check_nets([one.net for one in inputs])
        for net in {one.net for one in inputs}:
            self._fit(self._sizes, nets=[*(one for one in self._nets if one is not net), net])
        self._enter("vae")
        first = takes_shift(inputs[0].net.config, self.profile) if self.profile.control_shift_of == "first" else None
        return tuple(
            make_control(one, self.vae, self.profile, size, count, twice=guided, shifted=first) for one in inputs
        )

    def _check_nets(self, nets: Sequence[ControlNet]) -> None:
        """Raise ValueError for a net on another device than the transformer; with `offload`, nets are moved to it."""
        device = self.transformer.pos_embed.device
        for net in nets if self._turns is None else ():
            if net.pos_embed_input.proj.weight.device != device:
                raise ValueError(
                    f"the ControlNet is on {net.pos_embed_input.proj.weight.device}, the transformer on {device}: "
                    f"net.to({str(device)!r})"
                )

    def _picture_size(self, inputs: ImageInputs, height: int | None, width: int | None) -> PictureSize:
        """The size at which pictures are drawn."""
        cell = self.vae.config.downscale
        own = None
        if inputs.latents is not None:
            rows, columns = inputs.latents.shape[2:]
            check_latents(inputs.latents, len(inputs.latents), self.transformer.config, cell, self._unit, height, width)
            return PictureSize(rows * cell, columns * cell, cut=False)
        if height is None and width is None:
            own = inputs.size(self.profile, cell * self._unit)
        rows, columns = self._cells(own[0] if own else height, "height"), self._cells(own[1] if own else width, "width")
        return PictureSize(rows * cell, columns * cell, cut=own is not None)

    def _encoded_images(
        self,
        inputs: ImageInputs,
        size: PictureSize,
        count: int,
        drawn_by: Generators,
        tile: int | None = None,
        *,
        mean: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """The latents of `count` drawings; pictures are repeated, with copies of one picture adjacent.

        A picture for several drawings is sampled once for all of them, or once with each of several generators.
        """
        if inputs.latents is not None:
            return repeated(inputs.latents, count).to(self.device, self._latent_dtype)
        return self._encoded_pixels(inputs.drawn(size, self.profile), count, drawn_by, tile, mean=mean)

    def _encoded_pixels(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        count: int,
        drawn_by: Generators,
        tile: int | None = None,
        *,
        mean: bool = False,
    ) -> Float[Tensor, "b2 c h8 w8"]:
        """Encode pictures in [0, 1] to the latents of `count` drawings, in tiles of `tile` pixels per side."""
        cell = self.vae.config.downscale
        cells = pixels.new_empty((len(pixels), 1, pixels.shape[2] // cell, pixels.shape[3] // cell), device="meta")
        tile = self._fit_vae(cells, tile, encodes=True)
        with self._computing(f"the latents of {len(pixels)} pictures"):
            self._enter("vae")
            first = next(self.vae.parameters())
            given = (2 * pixels - 1).to(first.device, first.dtype)
            found = self._fast_vae.encode(given) if tile is None else encode_tiled(self.vae, given, tile=tile)
            latents, std = found.mean, found.std
        if isinstance(drawn_by, Sequence):
            latents, std = repeated(latents, count), repeated(std, count)
        if self.profile.image_latent != "mean" and not mean:
            sampled_by = drawn_by if self.profile.image_latent == "sampled" else None
            latents = latents + std * gaussian(latents.shape, sampled_by, latents.dtype).to(latents.device)
        AllFinite(latents, f"the VAE's latent of the picture in {str(first.dtype).removeprefix('torch.')}").read()
        return repeated(latents, count).to(self.device, self._latent_dtype)

    @property
    def _latent_dtype(self) -> torch.dtype:
        """The dtype that latents have between the parts of a drawing."""
        return self.dtype if self.profile.state_dtype == "model" else torch.float32

    def _check_noise(self, shape: Sequence[int]) -> None:
        """Raise an error of too little memory where the host cannot even hold the noise; nothing is written to it."""
        torch.empty(shape, dtype=self._noise_dtype, device="cpu")

    def _noise(self, shape: Sequence[int], drawn_by: Generators) -> Tensor:
        return self._on_device(gaussian(shape, drawn_by, self._noise_dtype))

    def _on_device(self, noise: Tensor) -> Tensor:
        """Noise from the CPU as a drawing starts from it."""
        noise = moved(noise, self.device)
        return noise.half() if self.profile.noise_dtype == "float16" else noise

    @contextmanager
    def _noise_ahead(self, shape: Sequence[int], drawn_by: Generators) -> Iterator[Callable[[], Tensor]]:
        """Draw noise for a GPU by a thread within the context; what it gives waits for the noise and returns it.

        Args:
            shape: of the noise.
            drawn_by: generators on the CPU that nobody else draws from.
        """
        if self.device.type != "cuda":
            yield partial(self._noise, shape, drawn_by)
            return
        with ahead(partial(gaussian, shape, drawn_by, self._noise_dtype)) as drawn:
            yield lambda: self._on_device(drawn())

    @property
    def _noise_dtype(self) -> torch.dtype:
        """The dtype in which noise is drawn."""
        return self.dtype if self.profile.noise_dtype == "model" else torch.float32

    def _rules(self, max_sequence_length: int | None) -> TextRules:
        rules = self.profile.text
        if max_sequence_length is None:
            return rules
        return replace(rules, t5_length=whole("max_sequence_length", max_sequence_length, 2, MAX_T5_TOKENS))

    def _latent_shape(self, count: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """The shape [b, c, h, w] of the latents of pictures of this size in pixels; None is the model's own size."""
        return (
            count,
            self.transformer.config.in_channels,
            self._cells(height, "height"),
            self._cells(width, "width"),
        )
