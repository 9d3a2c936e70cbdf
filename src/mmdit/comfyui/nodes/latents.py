"""Make, encode, decode, resize and combine latents: ComfyUI's `nodes.py` and `comfy_extras/nodes_latent.py`.

Sizes and positions are in pixels; a latent cell is 8 pixels wide, and remainders are dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from encoders import VAE, decode_tiled, encode_tiled
from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import MAX_SIDE, boolean, choice, decimal, integer, node, side, wire
from mmdit.comfyui.limits import WorkflowLimits
from mmdit.comfyui.values import CHANNELS, Latent, Prompts
from mmdit.pictures import images as pictures
from mmdit.pictures.composite import repeated
from mmdit.pictures.latents import AXES, ROTATIONS, Axis, Rotation
from mmdit.pictures.resize import CROPS, LATENT_FILTERS, Crop, Filter, Size
from mmdit.pipeline.images import to_unit

_CELL = 8
_SAMPLES, _VAE, _PIXELS, _MASK = (
    wire("samples", "LATENT"),
    wire("vae", "VAE"),
    wire("pixels", "IMAGE"),
    wire("mask", "MASK"),
)
_PAIR = (wire("samples1", "LATENT"), wire("samples2", "LATENT"))
_BATCH = integer("batch_size", 1, 1, 4096)
_X, _Y = integer("x", 0, 0, MAX_SIDE), integer("y", 0, 0, MAX_SIDE)
_METHOD = choice("upscale_method", ("nearest-exact", "bilinear", "area", "bicubic", "bislerp"))
_TILES = (
    integer("tile_size", 512, 64, 4096),
    integer("overlap", 64, 0, 4096),
    integer("temporal_size", 64, 8, 4096),
    integer("temporal_overlap", 8, 4, 4096),
)
assert set(_METHOD.choices or ()) == set(LATENT_FILTERS)  # type: ignore[arg-type]


@node("EmptySD3LatentImage", [side("width", 1024), side("height", 1024), _BATCH], ["LATENT"])
def empty_sd3_latent_image(context: Context, width: int, height: int, batch_size: int) -> Latent:
    """Make an empty SD3 latent."""
    return _empty(context, batch_size, CHANNELS, height, width)


@node("EmptyLatentImage", [side("width", 512), side("height", 512), _BATCH], ["LATENT"])
def empty_latent_image(context: Context, width: int, height: int, batch_size: int) -> Latent:
    """Make an empty latent of 4 channels, which the samplers expand for SD3."""
    return _empty(context, batch_size, 4, height, width)


def _empty(context: Context, count: int, channels: int, height: int, width: int) -> Latent:
    context.limits.check_pictures(count, height, width)
    return {"samples": torch.zeros(count, channels, height // _CELL, width // _CELL)}


@node("VAEDecode", [_SAMPLES, _VAE], ["IMAGE"])
def vae_decode(samples: Latent, vae: VAE | None) -> Tensor:
    """Decode latents to pictures."""
    vae = _checked(vae)
    return _decoded(vae, samples, vae.decode)


@node("VAEDecodeTiled", [_SAMPLES, _VAE, *_TILES], ["IMAGE"])
def vae_decode_tiled(
    samples: Latent, vae: VAE | None, tile_size: int, overlap: int, temporal_size: int, temporal_overlap: int
) -> Tensor:
    """Decode in tiles, to use less memory. The tiles have no seams here, so the overlap changes nothing."""
    vae = _checked(vae)
    return _decoded(vae, samples, lambda latent: decode_tiled(vae, latent, tile=tile_size))


def _decoded(vae: VAE, samples: Latent, decode: Callable[[Tensor], Tensor]) -> Tensor:
    first = next(vae.parameters())
    latent = pictures.from_vae_scale(samples["samples"].float()).to(first.device, first.dtype)
    return to_unit(decode(latent)).float().cpu().movedim(1, -1)


@node("VAEEncode", [_PIXELS, _VAE], ["LATENT"])
def vae_encode(pixels: Tensor, vae: VAE | None) -> Latent:
    """Encode pictures as the mean of their latent distribution; their sides are cut to multiples of 8."""
    return {"samples": encoded(_checked(vae), pixels)}


@node("VAEEncodeTiled", [_PIXELS, _VAE, *_TILES], ["LATENT"])
def vae_encode_tiled(
    pixels: Tensor, vae: VAE | None, tile_size: int, overlap: int, temporal_size: int, temporal_overlap: int
) -> Latent:
    """Encode in tiles, to use less memory. The tiles have no seams here, so the overlap changes nothing."""
    return {"samples": encoded(_checked(vae), pixels, tile=tile_size)}


def encoded(vae: VAE, pixels: Tensor, *, tile: int | None = None) -> Tensor:
    """Encode pictures [b, h, w, c] to latents [b, 16, h / 8, w / 8] in VAE scale, using the first three channels.

    Args:
        vae: the VAE.
        pixels: the pictures.
        tile: the side of a tile in cells of each layer; None encodes the whole picture at once.
    """
    first = next(vae.parameters())
    picture = pictures.center_crop(pixels[..., :3]).movedim(-1, 1)
    # contiguous, because GroupNorm of a channels-last view is less exact on a CPU
    given = (2 * picture - 1).contiguous().to(first.device, first.dtype)
    latent = (vae.encode(given) if tile is None else encode_tiled(vae, given, tile=tile)).mode()
    return pictures.to_vae_scale(latent.float().cpu())


def _checked(vae: VAE | None) -> VAE:
    if vae is None:
        raise RuntimeError("the VAE input is None, because the checkpoint holds no VAE; load one with VAELoader")
    return vae


@node("VAEEncodeForInpaint", [_PIXELS, _VAE, _MASK, integer("grow_mask_by", 6, 0, 64)], ["LATENT"])
def vae_encode_for_inpaint(pixels: Tensor, vae: VAE | None, mask: Tensor, grow_mask_by: int) -> Latent:
    """Encode pictures, gray inside the mask, and attach the mask, rounded and grown."""
    gray, noise_mask = pictures.gray_inside(pixels[..., :3], mask, grow_mask_by)
    return {"samples": encoded(_checked(vae), gray), "noise_mask": noise_mask.unsqueeze(1)}


@node("SetLatentNoiseMask", [_SAMPLES, _MASK], ["LATENT"])
def set_latent_noise_mask(samples: Latent, mask: Tensor) -> Latent:
    """Attach the mask of the region to be redrawn, unchanged."""
    changed = samples.copy()
    changed["noise_mask"] = mask.reshape(-1, 1, *mask.shape[-2:])
    return changed


@node(
    "InpaintModelConditioning",
    [
        wire("positive", "CONDITIONING"),
        wire("negative", "CONDITIONING"),
        _VAE,
        _PIXELS,
        _MASK,
        boolean("noise_mask", True),
    ],
    ["CONDITIONING", "CONDITIONING", "LATENT"],
)
def inpaint_model_conditioning(
    positive: Prompts, negative: Prompts, vae: VAE | None, pixels: Tensor, mask: Tensor, noise_mask: bool
) -> tuple[Prompts, Prompts, Latent]:
    """Encode pictures and attach the mask; the prompts are unchanged.

    ComfyUI also adds the picture and the mask to the prompts; a model of 16 input channels ignores them.
    """
    latent: Latent = {"samples": encoded(_checked(vae), pixels)}
    if noise_mask:
        at_size = pictures.mask_to_size(mask, Size(*pixels.shape[1:3])).squeeze(1)
        latent["noise_mask"] = pictures.center_crop(at_size.unsqueeze(-1)).movedim(-1, 1)
    return positive, negative, latent


@node(
    "LatentUpscale",
    [_SAMPLES, _METHOD, side("width", 512, 0), side("height", 512, 0), choice("crop", CROPS)],
    ["LATENT"],
)
def latent_upscale(
    context: Context, samples: Latent, upscale_method: Filter, width: int, height: int, crop: Crop
) -> Latent:
    """Resize latents; a width or height of 0 keeps the aspect ratio, and each side is at least 64 pixels."""
    if not width and not height:
        return samples
    rows, columns = samples["samples"].shape[2:]
    size = pictures.size_or_aspect((rows, columns), height, width, least=64)
    return _resized(context.limits, samples, Size(size.height // _CELL, size.width // _CELL), upscale_method, crop)


@node("LatentUpscaleBy", [_SAMPLES, _METHOD, decimal("scale_by", 1.5, 0.01, 8.0)], ["LATENT"])
def latent_upscale_by(context: Context, samples: Latent, upscale_method: Filter, scale_by: float) -> Latent:
    """Resize latents by a factor."""
    rows, columns = samples["samples"].shape[2:]
    return _resized(context.limits, samples, pictures.size_by(rows, columns, scale_by), upscale_method, "disabled")


def _resized(limits: WorkflowLimits, samples: Latent, size: Size, method: Filter, crop: Crop) -> Latent:
    latent = samples["samples"]
    limits.check_latents((*latent.shape[:2], *size))
    return _with(
        samples, pictures.resize_latent(latent, height=size.height, width=size.width, filter=method, crop=crop)
    )


@node("LatentFromBatch", [_SAMPLES, integer("batch_index", 0, 0, 63), integer("length", 1, 1, 64)], ["LATENT"])
def latent_from_batch(samples: Latent, batch_index: int, length: int) -> Latent:
    """Take some samples of a batch; each keeps the noise that it has in the batch."""
    latent = samples["samples"]
    start = min(len(latent) - 1, batch_index)
    part = slice(start, min(start + length, len(latent)))
    found = _with(samples, latent[part])
    if "noise_mask" in samples and len(samples["noise_mask"]) > 1:
        found["noise_mask"] = repeated(samples["noise_mask"], len(latent))[part]
    found["batch_index"] = samples.get("batch_index", list(range(len(latent))))[part]
    return found


@node("RepeatLatentBatch", [_SAMPLES, integer("amount", 1, 1, 64)], ["LATENT"])
def repeat_latent_batch(context: Context, samples: Latent, amount: int) -> Latent:
    """Repeat a batch; the noise indices in `batch_index` continue from one repetition to the next."""
    latent = samples["samples"]
    context.limits.check_latents((len(latent) * amount, *latent.shape[1:]))
    found = _with(samples, latent.repeat(amount, 1, 1, 1))
    if "noise_mask" in samples and len(samples["noise_mask"]) > 1:
        found["noise_mask"] = repeated(samples["noise_mask"], len(latent)).repeat(amount, 1, 1, 1)
    if "batch_index" in samples:
        given = samples["batch_index"]
        offset = max(given) - min(given) + 1
        found["batch_index"] = [one + i * offset for i in range(amount) for one in given]
    return found


@node("LatentBatch", _PAIR, ["LATENT"])
def latent_batch(context: Context, samples1: Latent, samples2: Latent) -> Latent:
    """Concatenate two batches."""
    one, other = samples1["samples"], samples2["samples"]
    context.limits.check_latents((len(one) + len(other), *one.shape[1:]))
    found = _with(samples1, pictures.batch_latents(one, other))
    numbers = (each.get("batch_index", list(range(len(each["samples"])))) for each in (samples1, samples2))
    found["batch_index"] = [number for several in numbers for number in several]
    return found


@node(
    "LatentComposite",
    [wire("samples_to", "LATENT"), wire("samples_from", "LATENT"), _X, _Y, integer("feather", 0, 0, MAX_SIDE)],
    ["LATENT"],
)
def latent_composite(samples_to: Latent, samples_from: Latent, x: int, y: int, feather: int) -> Latent:
    """Paste latents onto others, with feathered edges."""
    to, of = samples_to["samples"], samples_from["samples"]
    return _with(samples_to, pictures.paste_latent(to, of, x=x // _CELL, y=y // _CELL, feather=feather // _CELL))


@node(
    "LatentCompositeMasked",
    [
        wire("destination", "LATENT"),
        wire("source", "LATENT"),
        _X,
        _Y,
        boolean("resize_source", False),
        wire("mask", "MASK", optional=True),
    ],
    ["LATENT"],
)
def latent_composite_masked(
    destination: Latent, source: Latent, x: int, y: int, resize_source: bool, mask: Tensor | None = None
) -> Latent:
    """Paste latents onto others, through a mask."""
    below, above = destination["samples"], source["samples"]
    found = pictures.composite_latents(below, above, x=x // _CELL, y=y // _CELL, mask=mask, resize_source=resize_source)
    return _with(destination, found)


@node("LatentBlend", [*_PAIR, decimal("blend_factor", 0.5, 0.0, 1.0)], ["LATENT"])
def latent_blend(samples1: Latent, samples2: Latent, blend_factor: float) -> Latent:
    """Compute the weighted mean of two latents."""
    return _with(samples1, pictures.blend_latents(samples1["samples"], samples2["samples"], blend_factor))


@node("LatentCrop", [_SAMPLES, side("width", 512, 64), side("height", 512, 64), _X, _Y], ["LATENT"])
def latent_crop(samples: Latent, width: int, height: int, x: int, y: int) -> Latent:
    """Crop latents."""
    sizes = {"x": x // _CELL, "y": y // _CELL, "width": width // _CELL, "height": height // _CELL}
    return _with(samples, pictures.crop_latent(samples["samples"], **sizes))


@node("LatentFlip", [_SAMPLES, choice("flip_method", AXES)], ["LATENT"])
def latent_flip(samples: Latent, flip_method: Axis) -> Latent:
    """Mirror latents."""
    return _with(samples, pictures.flip_latent(samples["samples"], flip_method))


@node("LatentRotate", [_SAMPLES, choice("rotation", ROTATIONS)], ["LATENT"])
def latent_rotate(samples: Latent, rotation: Rotation) -> Latent:
    """Rotate latents clockwise."""
    return _with(samples, pictures.rotate_latent(samples["samples"], rotation))


@node("LatentAdd", _PAIR, ["LATENT"])
def latent_add(samples1: Latent, samples2: Latent) -> Latent:
    """Add two latents."""
    return _with(samples1, pictures.add_latents(samples1["samples"], samples2["samples"]))


@node("LatentSubtract", _PAIR, ["LATENT"])
def latent_subtract(samples1: Latent, samples2: Latent) -> Latent:
    """Subtract the second latent from the first."""
    return _with(samples1, pictures.subtract_latents(samples1["samples"], samples2["samples"]))


@node("LatentMultiply", [_SAMPLES, decimal("multiplier", 1.0, -10.0, 10.0)], ["LATENT"])
def latent_multiply(samples: Latent, multiplier: float) -> Latent:
    """Multiply latents by a number."""
    return _with(samples, pictures.multiply_latent(samples["samples"], multiplier))


@node("LatentInterpolate", [*_PAIR, decimal("ratio", 1.0, 0.0, 1.0)], ["LATENT"])
def latent_interpolate(samples1: Latent, samples2: Latent, ratio: float) -> Latent:
    """Interpolate the direction and the norm of each latent cell."""
    return _with(samples1, pictures.interpolate_latents(samples1["samples"], samples2["samples"], ratio))


def _with(latent: Latent, samples: Tensor) -> Latent:
    """Copy a latent with other samples; its mask and batch_index stay."""
    changed = latent.copy()
    changed["samples"] = samples
    return changed
