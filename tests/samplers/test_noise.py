"""Noise: each picture's depends on its seed alone; ComfyUI's Brownian tree."""

import sys

import pytest
import torch
import torchsde

import samplers


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.usefixtures("rounded_draws")
def test_noise_of_each_picture_is_that_of_its_seed_alone():
    batch = samplers.gaussian((3, 4, 2, 2), [generator(seed) for seed in (5, 6, 7)], torch.float32)
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(batch[row : row + 1], samplers.gaussian((1, 4, 2, 2), generator(seed), torch.float32))
    half = samplers.gaussian((1, 4, 2, 2), generator(5), torch.bfloat16)
    assert torch.equal(half, batch[:1].bfloat16())


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
