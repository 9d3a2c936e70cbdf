"""Every variant of the transformer against diffusers' SD3Transformer2DModel, and proof that these tests can fail."""

import pytest
import torch

import tiny
from float64 import references_in_float64
from mmdit import MMDiT, load_mmdit

SIZES = [(1, 8, 8, 77), (2, 6, 10, 90), (3, 2, 18, 5)]  # batch, latent height, latent width, text tokens


def inputs(batch, height, width, tokens, dtype=torch.float64):
    latent = torch.randn(batch, 16, height, width, dtype=torch.float64)
    context = torch.randn(batch, tokens, tiny.T5_WIDTH, dtype=torch.float64)
    pooled = torch.randn(batch, tiny.CLIP_L + tiny.CLIP_G, dtype=torch.float64)
    timestep = torch.linspace(987.38, 8.93, batch)
    return latent.to(dtype), timestep, context.to(dtype), pooled.to(dtype)


def theirs(model, latent, timestep, context, pooled, **kwargs):
    with torch.no_grad():
        return model(latent, context, pooled, timestep, return_dict=False, **kwargs)[0]


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def pair(request, tiny_folders):
    """Our model, read from the diffusers folder, and theirs, in float64."""
    name = request.param
    return load_mmdit(tiny_folders[name], dtype=torch.float64), tiny.transformer(tiny.VARIANTS[name]).double()


def parity(ours, reference, **kwargs) -> float:
    """The error that the tests below bound: float64, the references' norms in float64 too."""
    torch.manual_seed(1)
    given = inputs(2, 6, 10, 20)
    with references_in_float64():
        return tiny.error(ours(*given, **kwargs), theirs(reference, *given))


@pytest.mark.parametrize("size", SIZES)
def test_same_maths_in_float64(pair, size):
    ours, reference = pair
    given = inputs(*size)
    with references_in_float64():
        assert tiny.error(ours(*given), theirs(reference, *given)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unpatched_reference(pair, dtype):
    ours, reference = (model.to(dtype) for model in pair)
    given = inputs(2, 6, 10, 333, dtype)
    found, wanted = ours(*given), theirs(reference, *given)
    ours.double(), reference.double()
    assert tiny.error(found, wanted) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_reference(tiny_folders, dtype):
    """At most twice the error that the reference itself has at this dtype against float64 on the same weights."""
    for name in tiny.VARIANTS:
        ours, reference = load_mmdit(tiny_folders[name], dtype=dtype), tiny.transformer(tiny.VARIANTS[name]).to(dtype)
        given = inputs(2, 6, 10, 40, dtype)
        low, reference_low = ours(*given), theirs(reference, *given)
        truth = ours.double()(given[0].double(), given[1], given[2].double(), given[3].double())
        assert tiny.error(low, truth) <= 2 * tiny.error(reference_low, truth), name


def test_skip_layers_equal_diffusers(pair):
    ours, reference = pair
    given = inputs(2, 6, 10, 20)
    with references_in_float64():
        wanted = theirs(reference, *given, skip_layers=[1])
    assert tiny.error(ours(*given, skip_layers=[1]), wanted) <= 1e-10
    assert tiny.error(ours(*given), wanted) > 1e-3


def test_control_equals_diffusers(pair):
    """diffusers adds control to all blocks but the last (CONVENTIONS row 16), so ours gets None there."""
    ours, reference = pair
    given = inputs(2, 6, 10, 20)
    control = [torch.randn(2, 15, tiny.HIDDEN, dtype=torch.float64) for _ in range(tiny.DEPTH)]
    with references_in_float64():
        wanted = theirs(reference, *given, block_controlnet_hidden_states=control)
    assert tiny.error(ours(*given, control=[*control[:-1], None]), wanted) <= 1e-10
    assert tiny.error(ours(*given, control=control), wanted) > 1e-3


def test_control_after_a_skipped_block_is_still_added(pair):
    ours, _ = pair
    given = inputs(1, 4, 4, 5)
    control = [None, torch.randn(1, 4, tiny.HIDDEN, dtype=torch.float64), None]
    assert tiny.error(ours(*given, control=control, skip_layers=[1]), ours(*given, skip_layers=[1])) > 1e-3


def swap_last_adaln(model: MMDiT) -> None:
    weight = model.final_layer.adaLN_modulation[1].weight
    weight.copy_(weight.roll(len(weight) // 2, 0))


def swap_shift_and_scale(model: MMDiT) -> None:
    weight = model.joint_blocks[0].x_block.adaLN_modulation[1].weight
    shift, scale, *rest = weight.chunk(model.joint_blocks[0].x_block.chunks)
    weight.copy_(torch.cat([scale, shift, *rest]))


def drop_qk_norm(model: MMDiT) -> None:
    model.joint_blocks[1].x_block.attn.ln_q = torch.nn.Identity()


def transpose_patches(model: MMDiT) -> None:
    whole = model.unpatchify
    model.unpatchify = lambda tokens, h, w: whole(tokens.unflatten(2, (2, 2, -1)).transpose(2, 3).flatten(2), h, w)


def shift_timestep(model: MMDiT) -> None:
    embed = model.t_embedder.forward
    model.t_embedder.forward = lambda timestep: embed(timestep + 1)


def erf_gelu(model: MMDiT) -> None:
    model.joint_blocks[0].x_block.mlp.act = torch.nn.GELU()


def uncentred_crop(model: MMDiT) -> None:
    model.pos_embed = model.pos_embed.roll(1, 1)


MUTATIONS = [
    swap_last_adaln,
    swap_shift_and_scale,
    drop_qk_norm,
    transpose_patches,
    shift_timestep,
    erf_gelu,
    uncentred_crop,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_parity_fails_on_a_broken_model(tiny_folders, mutate):
    """Each fault is one that a port of this model has had; the bound of the parity test must catch it."""
    ours = load_mmdit(tiny_folders["sd3.5-medium"], dtype=torch.float64)
    reference = tiny.transformer(tiny.VARIANTS["sd3.5-medium"]).double()
    assert parity(ours, reference) <= 1e-10
    with torch.no_grad():
        mutate(ours)
    assert parity(ours, reference) > 1e-5
