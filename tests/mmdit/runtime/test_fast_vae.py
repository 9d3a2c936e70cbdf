"""The fast VAE computes what the VAE computes, and its errors are no larger; its norm is interpreted without a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from encoders import VAE
from encoders.vae import VAEConfig
from mmdit.runtime import fast_vae
from mmdit.runtime.fast_vae import FastVAE, attention, plain_norm
from skips import SKIPS
from triton_device import DEVICE, HAS_TRITON, quiet

GPU = DEVICE == "cuda"
CONFIG = VAEConfig((32, 64), latent_channels=4, blocks_per_level=1, groups=8)


def vae_of(config=CONFIG, dtype=torch.float64):
    found = VAE(config)
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(std=fan**-0.5 if parameter.ndim > 1 else 0.2)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
    return found.to(DEVICE, dtype).eval().requires_grad_(False)


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("sides", [(6, 4), (1, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_it_is_the_vae(samples, sides):
    vae = vae_of()
    fast = FastVAE(vae, plain_norm)
    latent = drawn(samples, 4, *sides)
    kept = latent.clone()
    found = fast.decode(latent)
    assert error(found, vae.decode(latent)) < 1e-12
    assert found.is_contiguous()
    assert torch.equal(latent, kept)
    image = drawn(samples, 3, 2 * sides[0], 2 * sides[1])
    kept = image.clone()
    for one, other in zip(vars(fast.encode(image)).values(), vars(vae.encode(image)).values(), strict=True):
        assert error(one, other) < 1e-12
    assert torch.equal(image, kept)


def test_many_and_large_pictures_come_in_parts(monkeypatch):
    vae = vae_of()
    fast = FastVAE(vae, plain_norm)
    latent, image, sizes = drawn(3, 4, 4, 4), drawn(3, 3, 8, 8), []
    for name, run in (("_decoded", fast._decoded), ("_encoded", fast._encoded)):
        monkeypatch.setattr(fast, name, lambda x, run=run: sizes.append(len(x)) or run(x))
    for whole, parts in ((3 * 64, [3, 3]), (2 * 64, [2, 1, 2, 1]), (63, [])):
        monkeypatch.setattr(fast_vae, "WHOLE", whole)
        sizes.clear()
        assert error(fast.decode(latent), vae.decode(latent)) < 1e-12
        assert error(fast.encode(image).mean, vae.encode(image).mean) < 1e-12
        assert sizes == parts


def test_what_it_would_not_run_is_refused():
    vae = vae_of()
    fast = FastVAE(vae, plain_norm)
    handle = vae.decoder.mid.attn_1.register_forward_hook(lambda *_: None)
    for run in (lambda: fast.decode(drawn(1, 4, 2, 2)), lambda: FastVAE(vae, plain_norm)):
        with pytest.raises(ValueError, match=r"decoder\.mid\.attn_1"):
            run()
    handle.remove()
    with pytest.raises(ValueError, match="5 x 4"):
        fast.encode(drawn(1, 3, 5, 4))


def test_attention_in_parts(monkeypatch):
    q, k, v = (drawn(2, 12, 8) for _ in range(3))
    wanted = F.scaled_dot_product_attention(q, k, v)
    for size in (2**28, 5 * 2 * 12 * 8, 1):
        monkeypatch.setattr(fast_vae, "_SCORES", size)
        assert error(attention(q, k, v), wanted) < 1e-12


def normed(x, groups, silu):
    """The exact result, by definition."""
    wide = x.double().unflatten(1, (groups.num_groups, -1))
    wide = wide - wide.mean((2, 3, 4), keepdim=True)
    wide = wide / (wide.square().mean((2, 3, 4), keepdim=True) + groups.eps).sqrt()
    found = wide.flatten(1, 2) * groups.weight.double()[:, None, None] + groups.bias.double()[:, None, None]
    return F.silu(found) if silu else found


# (samples, channels, groups, sides); the last of each list has several parts and a mean far above its deviation
CASES = [(2, 12, 3, (3, 5)), (2, 8, 8, (1, 1)), (1, 32, 4, (7, 9))]
CASES += [(2, 128, 32, (128, 130)), (1, 512, 32, (63, 64)), (1, 96, 32, (200, 300))] if GPU else []


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.bfloat16])
@pytest.mark.skipif(not HAS_TRITON, reason=SKIPS["triton"])
def test_the_norm_by_triton(monkeypatch, case, silu, dtype):
    from mmdit.runtime import vae_kernels

    monkeypatch.setattr(vae_kernels, "_TILE", vae_kernels._TILE if GPU else 128)
    monkeypatch.setattr(vae_kernels, "_PARTS", vae_kernels._PARTS if GPU else 4)
    samples, channels, groups, sides = case
    layer = nn.GroupNorm(groups, channels, eps=1e-6).to(DEVICE, dtype).requires_grad_(False)
    layer.weight.normal_()
    layer.bias.normal_()
    x = (drawn(samples, channels, *sides) + 30 * (case == CASES[-1])).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = normed(x, layer, silu)
    with quiet():
        found = vae_kernels.norm(x, layer, silu=silu)
        kept = x.clone()
        into = vae_kernels.norm(kept, layer, silu=silu, in_place=True)
    assert into.data_ptr() == kept.data_ptr()
    assert torch.equal(into, found)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Rounded once from float32; the plain layers round twice.
    eps = torch.finfo(dtype).eps
    assert float((found.double() - exact).abs().max()) <= 0.51 * eps * float(exact.abs().max()) + 2e-5
    assert error(found, exact) <= 1.02 * error(plain_norm(x, layer, silu=silu), exact) + 3e-6


@pytest.mark.skipif(not HAS_TRITON, reason=SKIPS["triton"])
def test_equal_values_become_the_bias():
    from mmdit.runtime import vae_kernels

    layer = nn.GroupNorm(2, 8).to(DEVICE).requires_grad_(False)
    layer.bias.normal_()
    x = torch.full((2, 8, 3, 3), 33.3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with quiet():
        found = vae_kernels.norm(x, layer, silu=False)
    assert torch.equal(found, layer.bias[:, None, None].expand_as(x))


@pytest.mark.skipif(not HAS_TRITON, reason=SKIPS["triton"])
def test_nan_and_infinity_are_not_hidden():
    from mmdit.runtime import vae_kernels

    layer = nn.GroupNorm(2, 8).to(DEVICE, torch.bfloat16).requires_grad_(False)
    for bad in (float("nan"), float("inf")):
        x = drawn(2, 8, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        x[0, 1, 2, 2] = bad
        with quiet():
            found = vae_kernels.norm(x, layer, silu=True)
        assert found[0, :4].isnan().all()
        assert found[0, 4:].isfinite().all()
        assert found[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if GPU else [torch.bfloat16])
@pytest.mark.skipif(not HAS_TRITON, reason=SKIPS["triton"])
def test_its_error_is_that_of_the_vae(dtype):
    """On a GPU at full width, elsewhere at toy size."""
    from mmdit.runtime import vae_kernels

    config = VAEConfig() if GPU else CONFIG
    exact = vae_of(config)
    vae = VAE(config).to(DEVICE, dtype)
    vae.load_state_dict(exact.state_dict())
    vae.requires_grad_(False)
    exact.load_state_dict(vae.state_dict())  # the weights are rounded, the arithmetic is not
    side = 64 if GPU else 4  # smaller, the two errors are draws of too few roundings
    latent = drawn(1, config.latent_channels, side, side, dtype=dtype)
    image = drawn(1, 3, *(side * config.downscale,) * 2, dtype=dtype).clamp(-1, 1)
    fast = FastVAE(vae, vae_kernels.norm)
    with quiet():
        pairs = [
            (fast.decode(latent), vae.decode(latent), exact.decode(latent.double())),
            (fast.encode(image).mean, vae.encode(image).mean, exact.encode(image.double()).mean),
        ]
    for found, plain, wanted in pairs:
        assert error(found, wanted) <= 1.1 * error(plain, wanted)
