"""Tiled decoding and encoding equal those in one piece, with a trained VAE and random ones, and takes less memory."""

import weakref
from functools import reduce

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encoders import VAE, VAEConfig, decode_tiled, encode_tiled, tiling
from encoders.tiling import Moments
from mmdit import load_vae
from mmdit.embedded import EMBEDDED
from refusals import refuses

SEAM = 40  # pixels; a side of tiles that divides neither side of the picture
CONFIGS = [
    VAEConfig((8, 12, 16), latent_channels=3, blocks_per_level=1, groups=4),
    VAEConfig((6, 4), latent_channels=5, blocks_per_level=2, groups=2, scale=0.7, shift=-0.3),
    VAEConfig((4,), latent_channels=2, blocks_per_level=1, groups=1),
]


def random_vae(config):
    """Random weights and norms, so that no two channels are equal."""
    vae = VAE(config).double()
    for name, weight in vae.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name and "weight" in name), std=0.3)
    return vae


@pytest.fixture(scope="module")
def trained():
    return load_vae(EMBEDDED, dtype=torch.float64)


@pytest.fixture(scope="module")
def latent(trained):
    """The latent of a bright disc before a slope of colours, 96 x 128 pixels."""
    y, x = torch.meshgrid(torch.linspace(-0.75, 0.75, 96), torch.linspace(-1, 1, 128), indexing="ij")
    slope = torch.stack([x, y, -x * y]).mul(0.6)
    disc = torch.tensor([0.9, 0.7, -0.5])[:, None, None]
    picture = torch.where(x.square() + y.square() < 0.45, disc, slope)
    with torch.no_grad():
        return trained.encode(picture[None].double()).mode()


@pytest.fixture(scope="module")
def truth(trained, latent):
    return whole(trained, latent)


@pytest.fixture(scope="module")
def picture(truth):
    """A part of the decoded picture, 64 x 96 pixels."""
    return truth[..., 20:84, 16:112].contiguous()


@pytest.fixture(scope="module")
@torch.no_grad()
def code(trained, picture):
    return trained.encode(picture).mode()


@torch.no_grad()
def whole(vae, latent):
    return vae.decode(latent)


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


def close_pixels(image, wanted):
    """The share of values that differ by at most 2 of 255 grey levels."""
    return ((image.float() - wanted.float()).abs() * 127.5 <= 2).float().mean().item()


def seam_ratio(image):
    """Mean difference of neighbouring pixels across seams divided by that elsewhere; the larger of both directions."""
    ratios = []
    for steps in (image.float().diff(dim=2).abs(), image.float().diff(dim=3).abs().transpose(2, 3)):
        across = torch.arange(1, steps.shape[2] + 1) % SEAM == 0
        ratios.append(steps[:, :, across].mean() / steps[:, :, ~across].mean())
    return max(ratios).item()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tile", [1, 2, 7, 1000])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 4)])
def test_equals_whole_decoding(config, tile, size):
    vae = random_vae(config)
    latent = torch.randn(2, config.latent_channels, *size).double()
    given = latent.clone()
    assert error(decode_tiled(vae, latent, tile=tile), whole(vae, latent)) <= 1e-10
    assert torch.equal(latent, given)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tile", [1, 3, 8, 1000])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
@torch.no_grad()
def test_equals_whole_encoding(config, tile, size):
    vae = random_vae(config)
    image = torch.randn(2, 3, *(side * config.downscale for side in size)).double()
    given = image.clone()
    found, wanted = encode_tiled(vae, image, tile=tile), vae.encode(image)
    for part, whole_part in ((found.mean, wanted.mean), (found.std, wanted.std)):
        assert error(part, whole_part) <= 1e-10 * max(1, whole_part.abs().max().item())
    assert torch.equal(image, given)
    samples = [one.sample(torch.Generator().manual_seed(3)) for one in (found, wanted)]
    assert error(*samples) <= 1e-10 * max(1, wanted.std.max().item())


def test_equals_whole_encoding_with_trained_weights(trained, picture, code):
    assert error(encode_tiled(trained, picture, tile=SEAM).mode(), code) <= 1e-10


def test_equals_whole_decoding_with_trained_weights(trained, latent, truth):
    assert error(decode_tiled(trained, latent, tile=SEAM), truth) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shows_no_seams_in_any_dtype(trained, latent, truth, dtype):
    vae, latent = load_vae(EMBEDDED, dtype=dtype), latent.to(dtype)
    tiled, wanted = decode_tiled(vae, latent, tile=SEAM), whole(vae, latent)
    assert tiled.dtype == dtype and tiled.shape == wanted.shape
    assert dtype != torch.float32 or error(tiled, wanted) <= 1e-4
    assert error(tiled, truth) <= 2 * error(wanted, truth)  # as good as plain PyTorch at this dtype
    assert close_pixels(tiled, wanted) >= 0.999
    assert seam_ratio(tiled) <= 1.1


def statistics_of_each_tile(monkeypatch):
    """Naive tiling: the statistics of each tile in place of those of the whole picture."""
    normed = tiling.normed
    monkeypatch.setattr(tiling, "normed", lambda norm, x, _: normed(norm, x, Moments.of(x, norm.num_groups)))


def no_neighbours(monkeypatch):
    """Zeros in place of the neighbouring cells at each convolution."""
    monkeypatch.setattr(tiling, "RIM", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_encodes_as_well_in_any_dtype(picture, code, dtype):
    vae, image = load_vae(EMBEDDED, dtype=dtype), picture.to(dtype)
    tiled = encode_tiled(vae, image, tile=SEAM).mode()
    assert tiled.dtype == dtype
    assert error(tiled, code) <= 2 * error(vae.encode(image).mode(), code)


@pytest.mark.parametrize("naive", [statistics_of_each_tile, no_neighbours])
def test_naive_tiling_misses_the_bar_of_encoding(trained, picture, code, naive, monkeypatch):
    naive(monkeypatch)
    assert error(encode_tiled(trained, picture, tile=SEAM).mode(), code) > 1e-4


@pytest.mark.parametrize("naive", [statistics_of_each_tile, no_neighbours])
def test_naive_tiling_misses_the_bars(trained, latent, truth, naive, monkeypatch):
    naive(monkeypatch)
    image = decode_tiled(trained, latent, tile=SEAM)
    assert error(image, truth) > 1e-4
    assert close_pixels(image, truth) < 0.999
    assert seam_ratio(image) > 1.1


def test_merged_moments_do_not_cancel():
    """In float32, with a mean of 1000 times the deviation, from parts of different sizes and means."""
    x = torch.randn(2, 6, 10, 9) + 1000 + torch.arange(10.0)[:, None]
    parts = [Moments.of(part, 3) for part in x.split([1, 7, 2], dim=2)]
    merged, wanted = reduce(Moments.merge, parts), x.double().unflatten(1, (3, 2)).flatten(2)
    assert merged.total == wanted.shape[2]
    torch.testing.assert_close(merged.mean.double(), wanted.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.squares.double() / merged.total, wanted.var(2, correction=0), rtol=1e-4, atol=0)


def test_float16_is_as_good_as_plain_pytorch():
    vae, latent = random_vae(CONFIGS[0]), torch.randn(2, 3, 8, 9)
    truth = whole(vae, latent.double())
    vae, latent = vae.half(), latent.half()
    assert error(decode_tiled(vae, latent, tile=7), truth) <= 2 * error(whole(vae, latent), truth)


class AliveAtOnce(TorchDispatchMode):
    """The most elements that tensors hold at one time on the computing device, which is every one but `meta`."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for part in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and not leaf.is_meta):
            storage, key = part.untyped_storage(), part.untyped_storage()._cdata
            if key not in self.alive:
                self.alive[key] = storage.nbytes() // part.itemsize
                weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def peak(decode):
    with AliveAtOnce() as seen:
        decode()
    return seen.peak


def test_the_computing_device_holds_a_few_tiles():
    """At the official widths; tensors are fake, so nothing is computed. Whole activations rest on `meta`.

    The attention holds eight tensors of the latent's size, less than four tiles here.
    """
    with FakeTensorMode(), torch.no_grad():
        vae, tile = VAE(VAEConfig(blocks_per_level=1)), 128
        bound = 4 * max(vae.config.widths) * (tile + 4) ** 2  # a tile and its rim, two cells wide after an upsampling
        for side in (32, 64):
            latent = torch.empty(1, 16, side, side)
            assert peak(lambda latent=latent: decode_tiled(vae, latent, tile=tile, park="meta")) <= bound
        assert peak(lambda: vae.decode(latent)) > 5 * bound


def test_the_computing_device_holds_a_few_tiles_of_a_picture():
    """At the official widths; a layer that halves the sides holds twice the side of its tile, also padded."""
    with FakeTensorMode(), torch.no_grad():
        vae, tile, image = VAE(VAEConfig(blocks_per_level=1)), 128, torch.empty(1, 3, 512, 512)
        bound = 2.5 * vae.config.widths[1] * (2 * tile + 1) ** 2  # the widest level of which a whole tile is halved
        assert peak(lambda: encode_tiled(vae, image, tile=tile, park="meta")) <= bound
        assert peak(lambda: vae.encode(image)) > 2 * bound


@pytest.mark.parametrize(
    ("shape", "tile", "said"),
    [
        ((1, 3, 8, 8), 0, ("tile is 0", "at least 1")),
        ((1, 4, 8, 8), 8, ("[1, 4, 8, 8]", "[b, 3, h, w]")),
        ((3, 8, 8), 8, ("[3, 8, 8]", "[b, 3, h, w]")),
        ((1, 3, 8, 6), 8, ("8 x 6 pixels", "multiples of 4")),
    ],
)
def test_refuses_pictures_of_another_shape(shape, tile, said):
    vae = random_vae(CONFIGS[0])
    refuses(lambda: encode_tiled(vae, torch.zeros(shape).double(), tile=tile), *said, error=ValueError)


@pytest.mark.parametrize("tile", [0, -8])
def test_refuses_a_tile_without_cells(tile):
    vae, latent = random_vae(CONFIGS[0]), torch.zeros(1, 3, 4, 4).double()
    refuses(lambda: decode_tiled(vae, latent, tile=tile), f"tile is {tile}", "at least 1", error=ValueError)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4), (1, 3, 0, 4)])
def test_refuses_latents_of_another_shape(shape):
    vae = random_vae(CONFIGS[0])
    said = (f"latent has shape {list(shape)}", "[b, 3, h, w]")
    refuses(lambda: decode_tiled(vae, torch.zeros(shape).double()), *said, error=ValueError)
