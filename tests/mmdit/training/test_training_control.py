"""ControlNets in training: hints, residuals and velocity are those of a drawing in the same profile."""

from pathlib import Path

import pytest
import torch

import tiny
from mmdit import ControlNet, ControlNetConfig, Pipeline
from mmdit.checkpoints.load_pipeline import Components
from mmdit.pipeline.control_inputs import control_inputs, make_control
from mmdit.pipeline.image_inputs import PictureSize
from mmdit.pipeline.profiles import PROFILES
from mmdit.training import data as module
from mmdit.training.batches import Batch, InMemory, Sample, batch_at
from mmdit.training.control import Controlled, grow, new_net
from mmdit.training.setup import encode_data
from samplers.training import noised
from tiny_training import CONFIG, demo, drawn_velocity, noise, settings, tiny_model, write_pictures

NETS = {
    "canny": ControlNetConfig(1, 64, 16, kind="canny"),
    "joint": ControlNetConfig(2, 64, 16, context_dim=32, pos_embed_size=8, zero_pooled=True),
    "joint, pooled": ControlNetConfig(1, 64, 16, context_dim=32, pos_embed_size=8),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", NETS)
def test_the_velocity_is_that_of_a_drawing(kind: str, profile: str) -> None:
    net, transformer, rules = ControlNet(NETS[kind]), tiny_model(), PROFILES[profile]
    tiny.randomize(net, 5)
    x0, other, hint = (noise(i, 2, 16, 4, 6) for i in range(3))
    batch = Batch(x0, other, torch.full((2,), 0.75), noise(4, 2, 6, CONFIG.context_dim), noise(5, 2, 16), hint)
    x = noised(x0, other, batch.t)
    with torch.no_grad():
        found = Controlled(transformer, net, rules)(x, 1000 * batch.t, batch.context, batch.pooled, hint)
        wanted = drawn_velocity(transformer, net, rules, batch, x)
        plain = transformer(x, 1000 * batch.t, batch.context, batch.pooled)
    assert (wanted - plain).norm() > 0.1 * plain.norm()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("kind", "profile"), [("canny", "diffusers"), ("canny", "comfyui"), ("canny", "reference"), ("depth", "comfyui")]
)
def test_hints_are_encoded_as_in_a_drawing(kind: str, profile: str, tmp_path: Path) -> None:
    """The latents of a cached hint have the mean and the spread of those that a drawing gives the net."""
    write_pictures(tmp_path, 2)
    (tmp_path / "0.png").unlink(), (tmp_path / "0.txt").unlink()
    (tmp_path / "hints").mkdir()
    (tmp_path / "hints" / "1.png").write_bytes((tmp_path / "1.png").read_bytes())
    models = demo()
    parts = Components(
        models.transformer, models.vae, models.clip_l, models.clip_g, models.t5, models.tokenizers, models.shift
    )
    pipe = Pipeline(parts, profile=profile)
    more = {"method": "controlnet", "control_kind": kind, "size": 128, "data": str(tmp_path), "text_tokens": 77}
    samples = encode_data(pipe, settings(tmp_path / "out", **more), progress=False)
    sizes = pipe.transformer.config
    net = ControlNet(ControlNetConfig(1, sizes.hidden_size, sizes.pooled_dim, kind=kind))
    picture = module.opened(tmp_path / "1.png").permute(0, 2, 3, 1)
    (one,) = control_inputs(net, picture, config=sizes)
    torch.manual_seed(0)
    drawn = make_control(one, pipe.vae, PROFILES[profile], PictureSize(128, 128, cut=False), 64, twice=False).hint
    found = samples.read(0)
    std = torch.zeros_like(found.hint) if found.hint_std is None else found.hint_std
    torch.testing.assert_close(std.mean(), drawn.std(0).mean(), rtol=0.05, atol=1e-6)
    assert ((drawn.mean(0) - found.hint).abs() <= 5 * std / 8 + 1e-3).all()


def test_hints_are_drawn_anew_in_every_pass(tmp_path: Path) -> None:
    mean, std, text = noise(0, 16, 4, 4), torch.full((16, 4, 4), 0.5), (noise(1, 6, 32), noise(2, 16))
    config = settings(tmp_path, method="controlnet", control_blocks=1)

    def hints(*hint: torch.Tensor | None) -> list[torch.Tensor]:
        data = InMemory([Sample(noise(3, 16, 4, 4), None, *text, *hint)], text)
        found = [batch_at(data, config, 3.0, place).hint for place in (0, 1, 0)]
        return [one for one in found if one is not None]

    first, second, again = hints(mean, std)
    assert torch.equal(first, again)
    assert float((first - mean).std()) == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(first, second)
    assert torch.equal(hints(mean, None)[0], torch.stack([mean, mean]))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_grown_net_begins_as_the_given_one(profile: str) -> None:
    """More blocks and wider MLPs change nothing until they are trained; all that is new gets gradients."""
    transformer, rules = tiny_model(), PROFILES[profile]
    given, grown = new_net(transformer, 1, "canny", 96), new_net(transformer, 2, "canny", 160)
    tiny.randomize(given, 5)
    grow(given, grown)
    inputs = [noise(0, 2, 16, 4, 6), torch.full((2,), 750.0), noise(4, 2, 6, CONFIG.context_dim), noise(5, 2, 16)]
    hint = noise(1, 2, 16, 4, 6)
    found, wanted = (Controlled(transformer, net, rules)(*inputs, hint) for net in (grown, given))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.detach().abs().max()))
    found.square().sum().backward()
    assert grown.transformer_blocks[0].mlp.fc2.weight.grad[:, 96:].any()
    if rules.control_after_last:  # otherwise, the second of two blocks has no residual
        gates = grown.transformer_blocks[1].adaLN_modulation[1].bias.grad.view(6, -1)[[2, 5]]
        assert gates.any(1).all()


def test_a_narrower_mlp_keeps_its_largest_units() -> None:
    transformer = tiny_model()
    given, smaller = new_net(transformer, 1, "canny", 8), new_net(transformer, 1, "canny", 3)
    tiny.randomize(given, 5)
    mlp = given.transformer_blocks[0].mlp
    with torch.no_grad():
        mlp.fc2.weight[:, [0, 2, 3, 6, 7]] *= 1e-3
    grow(given, smaller)
    kept = sorted(smaller.transformer_blocks[0].mlp.fc1.bias.tolist())
    assert kept == sorted(mlp.fc1.bias[[1, 4, 5]].tolist())


def test_a_net_does_not_grow_into_one_of_fewer_blocks_or_another_width() -> None:
    transformer = tiny_model()
    with pytest.raises(ValueError, match="2 blocks"):
        grow(new_net(transformer, 2, "canny"), new_net(transformer, 1, "canny"))
    with pytest.raises(ValueError, match=r"pos_embed_input\.proj\.weight"):
        grow(ControlNet(ControlNetConfig(1, 128, 16)), new_net(transformer, 1, None))


def test_a_net_that_cannot_grow_leaves_the_new_one_unchanged() -> None:
    transformer = tiny_model()
    joint, sizes = ControlNet(NETS["joint"]), transformer.config
    masked = ControlNet(ControlNetConfig(1, sizes.hidden_size, sizes.pooled_dim, hint_channels=17))
    other_text = ControlNet(ControlNetConfig(1, sizes.hidden_size, sizes.pooled_dim + 8))
    normed = ControlNet(ControlNetConfig(1, sizes.hidden_size, sizes.pooled_dim, qk_norm="rms"))
    heads = ControlNet(ControlNetConfig(1, sizes.hidden_size, sizes.pooled_dim, head_dim=32))
    for given, told in (
        (heads, "head_dim .*32.*64"),
        (joint, r"given net has joint blocks \(context_dim=32\)"),
        (masked, r"pos_embed_input\.proj\.weight .*17.*16"),
        (other_text, r"time_text_embed\.text_embedder\.\S+ .*24.*16"),
        (normed, r"given net has transformer_blocks\.0\.\S*ln_\S*, which the new net has not"),
    ):
        into = new_net(transformer, 2, None)
        before = {key: value.clone() for key, value in into.state_dict().items()}
        with pytest.raises(ValueError, match=told):
            grow(given, into)
        assert all(torch.equal(value, before[key]) for key, value in into.state_dict().items())
    with pytest.raises(ValueError, match="new net has joint blocks"):
        grow(new_net(transformer, 1, None), joint)
    with pytest.raises(ValueError, match=r"new net has transformer_blocks\.0\.\S*ln_"):
        grow(new_net(transformer, 1, None), normed)
