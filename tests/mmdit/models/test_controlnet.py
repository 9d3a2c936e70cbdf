"""The ControlNets against recorded numbers of Stability's code and live against diffusers, and what they refuse."""

import pytest
import torch
from diffusers import SD3ControlNetModel

import recorded_models as recorded
import tiny
from mmdit import ControlNet, ControlNetConfig, MMDiTConfig
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import load_controlnet
from mmdit.models.controlnet import made_pos_embed
from mmdit.models.layers import sincos_pos_embed
from recorded_runs import embeddings


def inputs(net, rows=4, columns=6, batch=2):
    """latent, timestep, context, pooled, hint and tokens for a net, in its dtype."""
    config, dtype = net.config, next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = drawn(batch, rows * columns // 4, config.hidden_size)
    return (
        drawn(batch, config.in_channels, rows, columns),
        torch.tensor([700.0, 31.25][:batch]),
        drawn(batch, 5, config.context_dim or 8),
        drawn(batch, config.pooled_dim),
        drawn(batch, config.hint_channels, rows, columns),
        tokens,
    )


def test_recorded_residuals(tmp_path):
    """Two samples at sigma 0.7 under the prompt and the negative prompt, by Stability's own code."""
    numbers = recorded.records()
    net = load_controlnet(recorded.net_file("blur", tmp_path), dtype=torch.float32)
    model = recorded.transformer("sd35l4")
    x, sigma = numbers["r.forward.x"], numbers["r.forward.sigma"]
    context, pooled = (
        torch.cat([embeddings()[name], embeddings()[f"negative_{name}"]]).float()
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    tokens = model.x_embedder(x) + model.cropped_pos_embed(*x.shape[2:])
    hint = numbers["r.controlnet.blur.hint"].repeat(2, 1, 1, 1)
    found = net(x, 1000 * sigma, context, pooled, hint, tokens)
    for residual, name in zip(found, ("residual0", "residual1"), strict=True):
        torch.testing.assert_close(residual[:1], numbers[f"r.forward.{name}"], rtol=1e-5, atol=1e-5)
    control = [found[0], found[0], found[1], found[1]]
    denoised = x - sigma.view(-1, 1, 1, 1) * model(x, 1000 * sigma, context, pooled, control=control)
    torch.testing.assert_close(denoised, numbers["r.forward.denoised"], rtol=1e-5, atol=1e-5)


def theirs(*, joint, extra=0):
    """A random net of diffusers."""
    net = SD3ControlNetModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=96 if joint else None,
        caption_projection_dim=128,
        pooled_projection_dim=80,
        pos_embed_max_size=8,
        extra_conditioning_channels=extra,
        use_pos_embed=joint,
        pos_embed_type="sincos" if joint else None,
        force_zeros_for_pooled_projection=joint,
    )
    return tiny.randomize(net, 7).double()


@pytest.mark.parametrize(("joint", "extra"), [(False, 0), (True, 0), (True, 1)], ids=["8B", "joint", "inpaint"])
def test_diffusers(joint, extra, tmp_path):
    """The same residuals in float64, from a folder that diffusers wrote."""
    net = theirs(joint=joint, extra=extra)
    net.save_pretrained(tmp_path)
    ours = load_controlnet(tmp_path, dtype=torch.float64)
    assert (ours.config.is_joint, ours.config.zero_pooled, ours.config.inpaints) == (joint, joint, bool(extra))
    latent, timestep, context, pooled, hint, tokens = inputs(ours)
    wanted = net(
        hidden_states=latent if joint else tokens,
        controlnet_cond=hint,
        timestep=timestep,
        encoder_hidden_states=context if joint else None,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    for one, other in zip(ours(latent, timestep, context, pooled, hint, tokens), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_net_whose_text_is_as_wide_as_its_tokens_has_sequential_blocks():
    """ComfyUI takes a square text embedder for the sign of parallel blocks; here each block reads the one before."""
    shapes = {key: tuple(value.shape) for key, value in ControlNet(ControlNetConfig(2, 64, 64)).state_dict().items()}
    assert shapes["time_text_embed.text_embedder.linear_1.weight"] == (64, 64)
    config = ControlNetConfig.from_shapes(shapes)
    assert (config.is_joint, config.pooled_dim) == (False, 64)
    net = tiny.randomize(ControlNet(config), 1)
    given = inputs(net)
    before = net(*given)
    net.transformer_blocks[0].mlp.fc2.bias.data += 1
    after = net(*given)
    assert not torch.allclose(before[1], after[1])


def test_made_positions():
    """A square has coordinates 0 to 15 a side, whatever its size; the longer side of others goes beyond them."""
    torch.testing.assert_close(made_pos_embed(32, 16, 16), sincos_pos_embed(32, 16), rtol=0, atol=2e-6)
    wide = made_pos_embed(32, 2, 4).unflatten(1, (2, 4))
    omega = 10000.0 ** -(torch.arange(8) / 8)
    for column, place in enumerate((-7.5, 2.5, 12.5, 22.5)):
        torch.testing.assert_close(wide[0, 0, column, :8], (place * omega).sin(), rtol=0, atol=2e-6)
        torch.testing.assert_close(wide[0, 1, column, 24:], (15 * omega).cos(), rtol=0, atol=2e-6)


BAD = {
    "latent channels": (0, lambda x: x[:, :3]),
    "hint channels": (4, lambda x: x[:, :5]),
    "the hint's rows and columns": (4, lambda x: x[..., :4]),
    "pooled width": (3, lambda x: x[:, :7]),
    "width of the transformer's tokens": (5, lambda x: x[..., :32]),
    "tokens are missing": (5, lambda x: None),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_do_not_fit(name):
    net = tiny.randomize(ControlNet(ControlNetConfig(1, 64, 48)), 1)
    given, (place, change) = list(inputs(net)), BAD[name]
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=name):
        net(*given)


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"hint_channels": 3}, "3"),
        ({"context_dim": 32}, "32"),
        ({"kind": "inpaint"}, "16"),
        ({"depth": 0}, "0"),
        ({"hidden_size": 96}, "96"),
    ],
)
def test_configs_that_no_net_has(change, numbers):
    with pytest.raises(ValueError, match=numbers):
        ControlNetConfig(**{"depth": 1, "hidden_size": 64, "pooled_dim": 48, **change})


def test_joint_blocks_all_pass_the_text_on():
    config = ControlNetConfig(2, 64, 48, context_dim=32, pos_embed_size=4)
    assert config.joint_blocks() == MMDiTConfig(
        depth=3, hidden_size=64, context_dim=32, pooled_dim=48, pos_embed_size=4, qk_norm=None
    )
    assert not any(block.ends_context for block in ControlNet(config).transformer_blocks)
    assert LazyTensor.of(ControlNet(config).pos_embed.pos_embed).shape == (1, 16, 64)
