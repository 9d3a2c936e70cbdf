"""Every point is the value that it names: what is put there is what the model goes on with."""

from collections import Counter

import pytest
import torch

import mmdit
from encoders import VAE, CLIPText, T5Encoder
from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from full import FULL
from inspected import inputs, model
from mmdit.inspection.hooks import points_of
from mmdit.inspection.points import DERIVED

LAYERS = 3


def random(made, seed=0):
    torch.manual_seed(seed)
    made = made.double().eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5 + (parameter.ndim == 1))
    return made


def clip():
    return random(CLIPText(CLIPConfig(32, LAYERS, 64, "gelu", 2, vocabulary=50, positions=9, projection_dim=24)))


def t5():
    return random(T5Encoder(T5Config(32, LAYERS, 2, 16, 48, vocabulary=50)))


def vae():
    return random(VAE(VAEConfig(latent_channels=4, widths=(32, 32), blocks_per_level=1)))


def ids(seed):
    return (torch.randint(0, 49, (2, 9), generator=torch.Generator().manual_seed(seed)),)


def latents(seed):
    return (torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)).double(),)


def pictures(seed):
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double(),)


def tokens(seed):
    """Runs that differ in latent and text alone: the conditioning vector is no part of the residual streams."""
    latent, _, context, _ = inputs(seed)
    _, timestep, _, pooled = inputs(1)
    return latent, timestep, context, pooled


# name -> (model, its call, inputs by seed)
MODELS = {
    "mmdit": (model, lambda made, given: made(*given), tokens),
    "clip": (clip, lambda made, given: made(*given), ids),
    "t5": (t5, lambda made, given: made(*given), ids),
    "encoder": (vae, lambda made, given: made.encoder(*given), pictures),
    "decoder": (vae, lambda made, given: made.decoder(*given), latents),
}


def leaves(found):
    """Outputs as one tuple of tensors."""
    return tuple(found) if isinstance(found, tuple) else (found,)


def own_points(name):
    """The points of a model, of the VAE those of one half."""
    made = MODELS[name][0]()
    return [one for one in points_of(made).values() if name not in ("encoder", "decoder") or one.name.startswith(name)]


def some_points(name):
    """All points; of the MMDiT, outside of `make test-all`, each block's third, so that every kind is of some block."""
    points = own_points(name)
    if FULL or name != "mmdit":
        return points
    found, numbers = [], Counter()
    for point in points:
        block = point.name.split(".")[1] if point.name.startswith("joint_blocks.") else ""
        if not block or numbers[block] % LAYERS == int(block):
            found.append(point)
        numbers[block] += 1
    return found


def cuts(name):
    """Sets of points that all that depends on the run's inputs passes through, and outputs that come before them."""
    blocks = range(LAYERS)
    if name == "mmdit":
        streams = ("context_block", "x_block")
        for i in blocks:
            for part in ("pre", "mid", "post"):
                ends = i == LAYERS - 1 and part != "pre"
                yield [f"joint_blocks.{i}.{one}.resid_{part}" for one in (streams[1:] if ends else streams)], 0
        yield ["x_embedder", "context_embedder"], 0
        yield ["final_layer"], 0
    elif name == "clip":
        yield ["text_model.embeddings"], 0
        for i in blocks:
            for part in ("pre", "mid", "post"):
                before = int(i == LAYERS - 1 and part != "pre")  # the penultimate output
                yield [f"text_model.encoder.layers.{i}.resid_{part}"], before
        yield ["text_model.final_layer_norm"], 1
    elif name == "t5":
        yield ["shared"], 0
        yield from (([f"encoder.block.{i}.resid_{part}"], 0) for i in blocks for part in ("pre", "mid", "post"))
        yield ["encoder.final_layer_norm"], 0
    else:
        ends = ("resid_pre", "resid_post", "conv_in", "conv_out", "norm_out", "upsample", "downsample")
        yield from (([one.name], 0) for one in own_points(name) if one.name.endswith(ends))


@pytest.mark.parametrize("name", MODELS)
def test_values_of_another_run_give_its_outputs(name):
    """Known wrong before: resid_mid of both MMDiT streams and of CLIP reached the MLP alone."""
    make, call, given = MODELS[name]
    made = make()
    ours, theirs = given(1), given(2)
    if name == "clip":  # where the pooled token stands is told by the ids, which are no point
        theirs = (torch.cat([theirs[0][:, :-1], torch.full((2, 1), 49)], 1),)
        ours = (torch.cat([ours[0][:, :-1], torch.full((2, 1), 49)], 1),)
    for points, before in cuts(name):
        with mmdit.capture(made, points, budget=None) as other:  # a forecast for each takes most of the time
            wanted = leaves(call(made, theirs))
        plain = leaves(call(made, ours))
        with mmdit.patch(made, points, replace=other):
            found = leaves(call(made, ours))
        for mine, of_theirs in zip(found[before:], wanted[before:], strict=True):
            assert torch.allclose(mine, of_theirs, rtol=1e-9, atol=1e-9), points
        assert (plain[-1] - wanted[-1]).abs().max() > 1e-6
        assert all(torch.equal(*pair) for pair in zip(found[:before], plain[:before], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_edits_in_place_and_out_of_place_agree(name):
    make, call, given = MODELS[name]
    made = make()
    plain = leaves(call(made, given(1)))

    def in_place(value):
        value.mul_(1.5).add_(0.1)

    moved = 0
    for point in some_points(name):
        if point.layout == "by_head":
            continue
        with mmdit.patch(made, point.name, apply=lambda value: value * 1.5 + 0.1):
            wanted = leaves(call(made, given(1)))
        with mmdit.patch(made, point.name, apply=in_place):
            found = leaves(call(made, given(1)))
        for mine, other in zip(found, wanted, strict=True):
            assert torch.allclose(mine, other, rtol=0, atol=1e-12), point.name
        moved += any(not torch.equal(*pair) for pair in zip(found, plain, strict=True))
        assert all(torch.equal(*pair) for pair in zip(leaves(call(made, given(1))), plain, strict=True))
    assert moved > 10


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_what_small_changes_make(name):
    """d output / d value, from a capture with grad, against the difference that adding a direction makes."""
    make, call, given = MODELS[name]
    made, step = make(), 1e-6
    names, count = [one.name for one in own_points(name) if one.layout not in DERIVED], 25 if FULL else 9
    weights = [torch.randn_like(one) for one in leaves(call(made, given(1)))]

    def metric():
        return sum((one * weight).sum() for one, weight in zip(leaves(call(made, given(1))), weights, strict=True))

    for one in names[:: max(1, len(names) // count)]:
        with mmdit.capture(made, one, grad=True, budget=None) as seen:
            value = metric()
        slope = seen.gradients(value)[one][0]
        direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(7)).double()
        ends = []
        for sign in (1, -1):
            with mmdit.patch(made, one, add=sign * step * direction):
                ends.append(metric())
        found = (ends[0] - ends[1]) / (2 * step)
        assert torch.allclose(found, (slope * direction).sum(), rtol=1e-4, atol=1e-5), one
