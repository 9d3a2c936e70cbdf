"""Bytes that each stage of a drawing takes beside the weights, from shapes alone.

The formulas count the tensors that are alive at the peak; tests hold them against counted runs of the models. What the
VAE's convolutions take is measured, because cuDNN's workspaces are part of it.
"""

from __future__ import annotations

from mmdit.models.config import MMDiTConfig

TABLE_BYTES = 2**28  # of modulation that is computed ahead
# Bytes of decoding per pixel, channel of the finest level and byte of the dtype: 2.55 GB at 1024 x 1024 and 5.74 GB at
# 1536 x 1536 in bfloat16 with 128 channels, measured on an H200; encoding takes 1.88 GB at 1024 x 1024.
DECODE, ENCODE = 9.5, 7.0
# The CUDA context and the code of libraries, which torch does not count: 0.74 to 0.87 GB, measured on an H200. Other
# drivers may take more; what is measured then counts up to the second number.
CONTEXT, MOST_CONTEXT = 900_000_000, 1_200_000_000
WORKSPACE = 300_000_000  # of cuBLAS, and what torch's allocator rounds blocks up to
SEGMENT = 2**21  # bytes; torch's allocator takes a GPU's memory in multiples of it, for each part of a model alone
# What torch's allocator reserves for the activations of a step, against what is alive of them at the peak: their sizes
# differ, and leave gaps. On an H200 at 1024 x 1024, plans whose step left 0.25 GB beside what was counted ran out of
# memory, and plans that left 0.40 GB did not; this factor and `WORKSPACE` leave 0.56 GB.
FRAGMENTS = 1.5


def step_bytes(
    config: MMDiTConfig,
    *,
    samples: int,
    image: int,
    text: int,
    itemsize: int,
    emulated: bool = False,
    dequantized: bool = False,
    half: bool = False,
    summed: bool = False,
    fast: bool = False,
) -> int:
    """Bytes of the activations at the peak of a step of the transformer.

    Counted in tensors of a stream's tokens. In the MLP: the stream before and after attention, what the MLP reads, its
    two hidden activations and the output of the joint attention, of which the text's part is still needed. In the
    joint attention: the stream, what this and a second attention read, q, k, v, normed queries and keys, and q, k, v
    and the output of both streams. In a second attention: both streams, what it reads, q, k, v, the normed queries, and
    three float32 copies and their statistics where torch's RMS norm is not fused. Seven tensors of text tokens wait
    meanwhile, and both streams' modulation.

    Args:
        config: the transformer's.
        samples: of a batch; two are the branches of guidance.
        image, text: tokens of a sample.
        itemsize: bytes of a value.
        emulated: whether products of float8 codes are computed on widened copies.
        dequantized: whether a float8 weight is dequantized for its product.
        half: whether these copies are of 16 bits, see `quant.emulation`; else they are float32.
        summed: whether a product of so many tokens may be written in float32 first, which the fast forward does to
            find out which way is quickest.
        fast: the fast forward, which keeps both streams in one matrix.
    """
    width, hidden = config.hidden_size, config.mlp_dim or 4 * config.hidden_size
    ratio, wide = hidden / width, 4 / itemsize
    of_image, of_text = (samples * tokens * width * itemsize for tokens in (image, text))
    joint = of_image + of_text
    mlp = of_image * (2 * ratio + 3) + joint
    dual = bool(config.dual_attention_blocks)
    attention = of_image * (7.1 + 3 * wide) + joint if dual else of_image * (6.1 + 3 * wide)
    peaks = [mlp, attention, of_image * (8 if dual else 7) + joint * 4]
    if fast:
        peaks = [joint * (2 * ratio + 4), joint * 10]
    largest = hidden * width
    weight = 0
    if half and (emulated or dequantized):  # of the MLP's first and second product: values of codes, output, and sums
        value, sums = 2 / itemsize if emulated else 0, wide if summed else 0
        peaks.append(of_image * (3 + value + ratio * (1 + sums)) + joint * (2 if fast else 1))
        peaks.append(of_image * (4 + ratio * (1 + value) + sums) + joint * (2 if fast else 1))
        weight = largest * 2
    elif emulated:  # codes, their widened copy, and the sums before and after scaling, in float32
        peaks.append(of_image * (3 + ratio * (1 + 1 / itemsize + wide) + 3 * wide) + joint)
    if (emulated or dequantized) and not half:
        weight = largest * (4 + itemsize)
    vectors = samples * 24 * width * itemsize
    return int(max(peaks) + 7 * of_text + vectors + weight)


def residual_bytes(*, layers: int, width: int, itemsize: int) -> int:
    """Bytes of the residuals that a ControlNet of so many layers gives, per sample and image token."""
    return layers * width * itemsize


def observing_bytes(config: MMDiTConfig, *, samples: int, tokens: int, piece: int, each: int) -> int:
    """Bytes that statistics of the inputs of Linears take while they are made, at most.

    Args:
        config: the transformer's, whose widest input is that of the MLP's second Linear.
        samples: of a batch.
        tokens: of a sample, of the longer stream.
        piece: values that are counted at a time.
        each: bytes for each of them.
    """
    hidden = config.mlp_dim or 4 * config.hidden_size
    return each * min(piece, samples * tokens * hidden)


def table_bytes(config: MMDiTConfig, *, samples: int, steps: int, itemsize: int) -> int:
    """Bytes of the modulation vectors of all blocks and steps; longer tables are computed in several parts."""
    vectors = 12 * config.depth + 3 * len(config.dual_attention_blocks) - 4 + 2
    return min(max(steps, 1) * samples * vectors * config.hidden_size * itemsize, TABLE_BYTES)


def latent_bytes(*, samples: int, channels: int, cells: int) -> int:
    """Bytes of latents that a solver keeps: at most sixteen in float32."""
    return 16 * samples * channels * cells * 4


def text_bytes(*, width: int, hidden: int, heads: int, rows: int, tokens: int, itemsize: int, upcast: bool) -> int:
    """Bytes of the activations of a text encoder.

    Per token: the stream in float32 and its norm, queries, keys, values and output, and three hidden activations of the
    MLP. Where attention is not fused: four more in float32, and the scores of every head twice beside the bias. A
    layer that upcasts its weight holds the largest one in float32.
    """
    size = 4 if upcast else itemsize
    tokens_bytes = rows * tokens * (width * (24 + 6 * size) + 3 * hidden * size)
    scores = heads * tokens * tokens * 4 * (1 + 2 * rows)
    return tokens_bytes + scores + (width * hidden * 4 if upcast else 0)


def vae_bytes(widths: tuple[int, ...], *, pictures: int, pixels: int, itemsize: int, encodes: bool = False) -> int:
    """Bytes that the VAE takes to decode whole pictures, or to decode and encode them."""
    return int(max(DECODE, ENCODE if encodes else 0.0) * widths[0] * itemsize * pictures * pixels)


def tile_bytes(widths: tuple[int, ...], *, pictures: int, pixels: int, tile: int, itemsize: int) -> int:
    """Bytes that the VAE takes on the device in tiles.

    A tile of the widest level is read in the dtype and in float32 for its statistics, normed, and convolved; the
    attention of the middle sees all cells of the latent at once.
    """
    side = tile + 2
    cells = pixels / 4 ** (len(widths) - 1)
    of_tile = side * side * max(widths) * (5 * itemsize + 8)
    middle = cells * widths[-1] * (8 * itemsize + 4)
    return int(pictures * (of_tile + middle + pixels * 3 * itemsize))
