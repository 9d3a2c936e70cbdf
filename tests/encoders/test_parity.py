"""CLIP, T5 and VAE against transformers and diffusers, read from real files."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import tiny
from encoders.clip import CLIPConfig, CLIPText
from encoders.t5 import T5Encoder
from encoders.vae import VAE
from float64 import references_in_float64
from mmdit import load_clip, load_t5, load_vae


@pytest.fixture(scope="module")
def folder(tiny_folders):
    return tiny_folders["sd3.5-large"]


@pytest.fixture(scope="module")
def reference(folder):
    return tiny.load(folder)


def ids(model, length: int, batch: int = 2) -> torch.Tensor:
    """Random ids with the end-of-text token (the largest id) at another place in each row, twice in the first."""
    vocabulary = model.config.vocabulary
    found = torch.randint(2, vocabulary - 2, (batch, length))
    found[0, length // 2], found[0, -1], found[1, length // 3] = (vocabulary - 1,) * 3
    return found


@pytest.mark.parametrize("which", ["l", "g"])
def test_clip(folder, reference, which):
    ours = load_clip(folder, which, dtype=torch.float64)
    theirs = (reference.text_encoder if which == "l" else reference.text_encoder_2).double()
    tokens = ids(ours, 77)
    out = ours(tokens)
    with torch.no_grad():
        wanted = theirs(tokens, output_hidden_states=True)
    assert tiny.error(out.penultimate, wanted.hidden_states[-2]) <= 1e-10
    assert tiny.error(out.last, wanted.last_hidden_state) <= 1e-10
    assert tiny.error(out.projected, wanted.text_embeds) <= 1e-10
    single = load_clip(folder, which)
    assert (
        tiny.error(single(tokens).penultimate, theirs.float()(tokens, output_hidden_states=True).hidden_states[-2])
        < 1e-5
    )


@pytest.mark.parametrize("eos", [2, 60, 63])
def test_clip_pools_where_eos_token_id_says(eos):
    """60 is not the largest id, as the end-of-text token is not where tokens were added after it."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPTextConfig(**sizes, num_attention_heads=2, projection_dim=16, eos_token_id=eos)
    theirs = tiny.randomize(CLIPTextModelWithProjection(config), 3).double()
    shapes = {key: list(tensor.shape) for key, tensor in theirs.state_dict().items()}
    ours = CLIPText(CLIPConfig.from_shapes(shapes, activation="quick_gelu", heads=2, eos_id=None if eos == 2 else eos))
    ours.double().load_state_dict({key: theirs.state_dict()[key] for key in ours.state_dict()})
    tokens = torch.randint(3, 60, (3, 20))
    tokens[:, 4], tokens[:, 9], tokens[:, 12], tokens[1, 6] = 63, 60, 60, 60
    with torch.no_grad():
        wanted, found = theirs(tokens), ours(tokens)
    assert tiny.error(found.projected, wanted.text_embeds) <= 1e-10
    assert tiny.error(found.last, wanted.last_hidden_state) <= 1e-10


def test_an_eos_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"eos_token_id is 64.* 64 tokens"):
        CLIPConfig(32, 1, 64, "gelu", heads=2, vocabulary=64, eos_id=64)


@pytest.mark.parametrize("length", [1, 77, 256, 300])
def test_t5(folder, reference, length):
    ours, theirs = load_t5(folder, dtype=torch.float64), reference.text_encoder_3.double()
    tokens = torch.randint(0, 900, (2, length))
    with torch.no_grad(), references_in_float64():
        assert tiny.error(ours(tokens), theirs(tokens)[0]) <= 1e-10
    with torch.no_grad():
        assert tiny.error(ours(tokens), theirs(tokens)[0]) <= 1e-5
        assert tiny.error(ours.float()(tokens), theirs.float()(tokens)[0]) <= 1e-5


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_vae(folder, reference, size):
    ours, theirs = load_vae(folder, dtype=torch.float64), reference.vae.double()
    image, latent = torch.randn(2, 3, *size).double(), torch.randn(2, 16, size[0] // 8, size[1] // 8).double()
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        assert tiny.error(ours.encode(image).mode(), (posterior.mean - 0.0609) * 1.5305) <= 1e-10
        assert tiny.error(ours.encode(image).std, posterior.std * 1.5305) <= 1e-10
        seeded = [torch.Generator().manual_seed(7) for _ in range(2)]
        drawn = (posterior.sample(seeded[0]) - 0.0609) * 1.5305
        assert tiny.error(ours.encode(image).sample(seeded[1]), drawn) <= 1e-10
        assert tiny.error(ours.decode(latent), theirs.decode(latent / 1.5305 + 0.0609)[0]) <= 1e-10
        assert (
            tiny.error(
                ours.float().decode(latent.float()), theirs.float().decode((latent / 1.5305 + 0.0609).float())[0]
            )
            < 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_reference(folder, dtype):
    """The error is at most twice the error of the reference in this dtype; both are measured against float64."""
    reference = tiny.load(folder)
    tokens = torch.randint(0, 900, (2, 77))
    cases = [
        (load_t5(folder, dtype=dtype), reference.text_encoder_3.to(dtype), lambda out: out, lambda out: out[0]),
        (
            load_clip(folder, "l", dtype=dtype),
            reference.text_encoder.to(dtype),
            lambda out: out.penultimate,
            lambda out: out.hidden_states[-2],
        ),
        (
            load_clip(folder, "g", dtype=dtype),
            reference.text_encoder_2.to(dtype),
            lambda out: out.projected,
            lambda out: out.text_embeds,
        ),
    ]
    for ours, theirs, pick_ours, pick_theirs in cases:
        with torch.no_grad():
            low, low_reference = pick_ours(ours(tokens)), pick_theirs(theirs(tokens, output_hidden_states=True))
            truth = pick_ours(ours.double()(tokens))
        assert tiny.error(low, truth) <= 2 * tiny.error(low_reference, truth), type(ours).__name__


def test_t5_in_float16_stays_finite_where_wo_overflows(folder):
    """T5-XXL's MLP output exceeds float16. Here weights are scaled until a plain float16 `wo` gives infinity."""
    wide = load_t5(folder, dtype=torch.float64)
    for block in wide.encoder.block:
        block.layer[1].DenseReluDense.wo.weight *= 2e4
    tokens = torch.randint(0, 900, (1, 40))
    truth = wide(tokens)
    half = wide.half()
    naive = []
    for block in half.encoder.block:
        wo = block.layer[1].DenseReluDense.wo
        norm_out = torch.randn(1, 8, wo.in_features).half() * 8
        naive.append(torch.nn.functional.linear(norm_out, wo.weight))
    assert not all(bool(torch.isfinite(out).all()) for out in naive)
    found = half(tokens)
    assert found.dtype == torch.float16
    assert bool(torch.isfinite(found).all())
    assert tiny.error(found, truth) < 5e-3


def quick_gelu_for_gelu(model: CLIPText) -> None:
    model.text_model.encoder.layers[0].mlp.act = torch.nn.GELU()


def last_layer_for_penultimate(model: CLIPText) -> None:
    extra = torch.nn.Identity()
    extra.resid_pre = torch.nn.Identity()
    model.text_model.encoder.layers.append(extra)


def no_causal_mask(model: CLIPText) -> None:
    attention = model.text_model.encoder.layers[1].self_attn
    attention.forward = lambda x: type(attention).forward(attention, x.flip(1)).flip(1)


@pytest.mark.parametrize("mutate", [quick_gelu_for_gelu, last_layer_for_penultimate, no_causal_mask])
def test_clip_parity_fails_on_a_broken_tower(folder, reference, mutate):
    ours, theirs = load_clip(folder, "l", dtype=torch.float64), reference.text_encoder.double()
    tokens = ids(ours, 77)
    with torch.no_grad():
        wanted = theirs(tokens, output_hidden_states=True).hidden_states[-2]
        assert tiny.error(ours(tokens).penultimate, wanted) <= 1e-10
        mutate(ours)
        assert tiny.error(ours(tokens).penultimate, wanted) > 1e-5


def scaled_scores(model: T5Encoder) -> None:
    model.encoder.block[1].layer[0].SelfAttention.q.weight /= 8


def bias_of_the_other_sign(model: T5Encoder) -> None:
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    table.copy_(table.roll(len(table) // 2, 0))


@pytest.mark.parametrize("mutate", [scaled_scores, bias_of_the_other_sign])
def test_t5_parity_fails_on_a_broken_encoder(folder, reference, mutate):
    ours, theirs = load_t5(folder, dtype=torch.float64), reference.text_encoder_3.double()
    tokens = torch.randint(0, 900, (1, 30))
    with torch.no_grad(), references_in_float64():
        wanted = theirs(tokens)[0]
        assert tiny.error(ours(tokens), wanted) <= 1e-10
        mutate(ours)
        assert tiny.error(ours(tokens), wanted) > 1e-5


def test_vae_attention_suits_fused_kernels(folder, monkeypatch):
    """Fused kernels refuse operands whose last stride is not 1, and the fallback holds all scores in memory."""
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watch(q, k, v, **kwargs):
        seen.extend(part.stride(-1) for part in (q, k, v))
        return fused(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    load_vae(folder).decode(torch.randn(1, 16, 2, 2))
    assert seen == [1, 1, 1]


def no_attention(model: VAE) -> None:
    model.decoder.mid.attn_1 = torch.nn.Identity()


def reversed_levels(model: VAE) -> None:
    model.decoder.up[2].block, model.decoder.up[3].block = model.decoder.up[3].block, model.decoder.up[2].block


def scale_before_shift(model: VAE) -> None:
    model.from_model = lambda latent: (latent + model.config.shift) / model.config.scale


@pytest.mark.parametrize("mutate", [no_attention, reversed_levels, scale_before_shift])
def test_vae_parity_fails_on_a_broken_decoder(folder, reference, mutate):
    ours, theirs = load_vae(folder, dtype=torch.float64), reference.vae.double()
    latent = torch.randn(1, 16, 2, 3).double()
    with torch.no_grad():
        wanted = theirs.decode(latent / 1.5305 + 0.0609)[0]
        assert tiny.error(ours.decode(latent), wanted) <= 1e-10
        mutate(ours)
        assert tiny.error(ours.decode(latent), wanted) > 1e-5
