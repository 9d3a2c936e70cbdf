"""Noise: each picture's depends on its seed alone; ComfyUI's Brownian tree."""

import sys

import pytest
import torch
import torchsde

import samplers
from samplers import noise


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.usefixtures("rounded_draws")
def test_noise_of_each_picture_is_that_of_its_seed_alone():
    batch = samplers.gaussian((3, 4, 2, 2), [generator(seed) for seed in (5, 6, 7)], torch.float32)
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(batch[row : row + 1], samplers.gaussian((1, 4, 2, 2), generator(seed), torch.float32))
    half = samplers.gaussian((1, 4, 2, 2), generator(5), torch.bfloat16)
    assert torch.equal(half, batch[:1].bfloat16())


@pytest.fixture
def by_threads(monkeypatch):
    """Threads draw in every dtype; gives a list of how many numbers they shared. Each test tries torch anew."""
    shared, counts = noise._shared, []
    monkeypatch.setattr(noise, "_pays", lambda dtype: True)
    monkeypatch.setattr(noise, "_shared", lambda count, *given: (counts.append(count), shared(count, *given))[1])
    noise._shareable.cache_clear()
    yield counts
    noise._shareable.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4, 128, 128), (1, 1, 257, 257)], ids=["even", "odd"])
def test_threads_draw_what_one_draws(dtype, shape, by_threads):
    """And leave the generator where one leaves it; something was drawn before, and a number is kept from that."""
    one, many = generator(3), generator(3)
    for place in range(2):
        drawn = samplers.gaussian_by_threads(shape, many, dtype)
        assert torch.equal(drawn, torch.randn(shape, generator=one, dtype=dtype))
        assert torch.equal(one.get_state(), many.get_state())
        assert len(by_threads) == 2 + place, "tried once, and drawn each time"
        assert torch.equal(torch.randn(1, generator=one), torch.randn(1, generator=many))


def test_threads_share_the_noise_of_each_picture(by_threads):
    drawn = samplers.gaussian_by_threads((2, 1, 257, 257), [generator(5), generator(6)], torch.float32)
    assert torch.equal(drawn, samplers.gaussian((2, 1, 257, 257), [generator(5), generator(6)], torch.float32))
    assert by_threads == [257**2] * 3
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        samplers.gaussian_by_threads((2, 1, 257, 257), [generator(5)], torch.float32)


def test_threads_draw_where_normal_numbers_take_long(monkeypatch):
    times = {"uniform": 1.0, "normal": 3.9}
    monkeypatch.setattr(noise, "_seconds", lambda draw: times["normal" if draw.func is torch.randn else "uniform"])
    assert not noise._pays.__wrapped__(torch.float32)
    times["normal"] = 4.1
    assert noise._pays.__wrapped__(torch.float32)


RANDN = torch.randn


def in_other_blocks(*size, **how):
    """As if torch made normal numbers from uniform ones that lie elsewhere."""
    return RANDN(*size, **how).flip(0)


def otherwise_where_large(*size, **how):
    """As if torch made other numbers in large samples; parts of threads, and what is tried quickly, are smaller."""
    found = RANDN(*size, **how)
    return -found if len(found) > 2**15 else found


def of_twice_as_many(count, **how):
    """As if torch took two numbers of the generator for each that it makes."""
    return RANDN(2 * (count[0] if isinstance(count, tuple) else count), **how)[::2]


@pytest.mark.parametrize("randn", [in_other_blocks, otherwise_where_large, of_twice_as_many])
def test_one_thread_draws_what_threads_would_draw_otherwise(by_threads, monkeypatch, randn):
    monkeypatch.setattr(torch, "randn", randn)
    one, many = generator(3), generator(3)
    wanted = torch.randn((2**16 + 1,), generator=one)
    assert torch.equal(samplers.gaussian_by_threads((2**16 + 1,), many, torch.float32), wanted)
    assert torch.equal(one.get_state(), many.get_state())
    assert by_threads == [2**16 + 1], "tried, and not drawn"


def test_fresh_noise_goes_on_with_its_generator():
    x = torch.zeros(1, 4, 2, 2)
    noise = samplers.Fresh(x, generator(3))
    drawn = torch.randn(2, 1, 4, 2, 2, generator=generator(3))
    assert torch.equal(torch.stack([noise(0.9, 0.5), noise(0.5, 0.1)]), drawn)
    torch.manual_seed(7)
    fresh = samplers.Fresh(x)(0.9, 0.5)
    torch.manual_seed(7)
    assert torch.equal(fresh, torch.randn(1, 4, 2, 2))


def tree(seeds, x=None):
    return samplers.BrownianTree(torch.zeros(1, 4, 8, 8) if x is None else x, 0.01, 1.0, seeds)


def test_the_tree_is_torchsdes_as_comfyui_asks_it():
    """(W(sigma') - W(sigma)) / |sigma' - sigma|^(1/2): the sign is negative where the level falls."""
    own = torchsde.BrownianTree(torch.tensor(0.01), torch.zeros(1, 4, 8, 8), torch.tensor(1.0), entropy=11)
    path = own(torch.tensor(0.4), torch.tensor(0.9))
    width = (torch.tensor(0.4) - torch.tensor(0.9)).abs().sqrt()
    assert torch.equal(tree(11)(0.9, 0.4), -path / width)
    assert torch.equal(tree(11)(0.4, 0.9), path / width)


def test_the_tree_is_one_path():
    """The increments of two steps add up to the increment over both, whatever was asked before."""
    noise = tree(11)
    parts = noise(0.9, 0.6) * 0.3**0.5 + noise(0.6, 0.2) * 0.4**0.5
    torch.testing.assert_close(tree(11)(0.9, 0.2) * 0.7**0.5, parts, rtol=0, atol=1e-5)
    assert not torch.equal(noise(0.9, 0.6), tree(12)(0.9, 0.6))


def test_the_tree_has_unit_variance():
    noise = tree(3, torch.zeros(1, 16, 32, 32))
    for ends in ((1.0, 0.7), (0.7, 0.69), (0.69, 0.01)):
        assert float(noise(*ends).std()) == pytest.approx(1, abs=0.02)


def test_seeds_of_a_batch_are_those_of_each_picture_alone():
    batch = tree([5, 6], torch.zeros(2, 4, 8, 8))(0.9, 0.4)
    assert torch.equal(batch[:1], tree(5)(0.9, 0.4))
    assert torch.equal(batch[1:], tree(6)(0.9, 0.4))
    with pytest.raises(ValueError, match="2 seeds for 1 samples"):
        tree([5, 6])


def test_without_torchsde_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(ImportError, match=r"torchsde, which is not installed: pip install .mmdit-lab\[comfy\]"):
        tree(5)
