"""The models against numbers recorded from Stability's own code, with weights and inputs given by formulas."""

import pytest
import torch

import golden
from encoders.clip import CLIPConfig, CLIPText
from encoders.t5 import T5Config, T5Encoder, relative_buckets
from encoders.vae import VAE, VAEConfig
from mmdit import MMDiT, MMDiTConfig
from mmdit.models.layers import timestep_sinusoid

TINY = golden.recorded("tiny_models")
CASES = TINY["mmdit"]["cases"]
BASE = {"depth": 2, "hidden_size": 128, "context_dim": 48, "pooled_dim": 32, "pos_embed_size": 12}
VARIANTS = {
    "sd3": MMDiTConfig(**BASE, qk_norm=None),
    "sd3.5_large": MMDiTConfig(**BASE),
    "sd3.5_medium_mmditx": MMDiTConfig(**BASE, dual_attention_blocks=(0,)),
}
X = golden.formula_input((1, 16, 8, 12), 0.11, 0.3)
POOLED = golden.formula_input((1, 32), 0.7, 0.1)
CONTEXT = golden.formula_input((1, 5, 48), 0.23, 0.5)
TIMESTEP = torch.tensor([500.25])


@pytest.mark.parametrize("name", VARIANTS)
def test_transformer(name):
    model = golden.fill(MMDiT(VARIANTS[name]))
    assert len(model.state_dict()) == CASES[name]["n_keys"]
    golden.agrees(model(X, TIMESTEP, CONTEXT, POOLED), CASES[name]["out"])


def test_skipped_layer():
    model = golden.fill(MMDiT(VARIANTS["sd3.5_medium_mmditx"]))
    found = model(X, TIMESTEP, CONTEXT, POOLED, skip_layers=[0])
    golden.agrees(found, CASES["sd3.5_medium_mmditx|skip_layers=[0]"]["out"])


def test_batch_of_two():
    """The second sample was recorded with half the context and no pooled vector, which the record does not say."""
    model = golden.fill(MMDiT(VARIANTS["sd3.5_large"]))
    context, pooled = torch.cat([CONTEXT, 0.5 * CONTEXT]), torch.cat([POOLED, 0 * POOLED])
    found = model(torch.cat([X, -X]), torch.tensor([500.25, 20.5]), context, pooled)
    golden.agrees(found, CASES["sd3.5_large|batch2 x and -x, t=(500.25,20.5)"]["out"])


def test_record_catches_a_swapped_half():
    model = golden.fill(MMDiT(VARIANTS["sd3"]))
    bias = model.final_layer.adaLN_modulation[1].bias
    with torch.no_grad():
        bias.copy_(bias.roll(len(bias) // 2))
    with pytest.raises(AssertionError):
        golden.agrees(model(X, TIMESTEP, CONTEXT, POOLED), CASES["sd3"]["out"])


def test_timestep_sinusoid():
    record = TINY["timestep_embedding_256"]
    found = timestep_sinusoid(torch.tensor([500.25], dtype=torch.float64))[0, record["indices"]]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(record["t=500.25"]), rtol=0, atol=1e-7)


def test_vae():
    vae, record = VAE(VAEConfig(widths=(32, 64, 128, 128))), TINY["vae"]
    assert [len(golden.fill(part).state_dict()) for part in (vae.encoder, vae.decoder)] == record["n_keys"]
    golden.agrees(vae.encoder(golden.formula_input((1, 3, 16, 24), 0.031, 0.2)), record["encoder_out_mean_logvar"])
    golden.agrees(vae.decoder(golden.formula_input((1, 16, 2, 3), 0.4, 0.6)), record["decoder_out"])


@pytest.mark.parametrize(("activation", "pad"), [("quick_gelu", 49407), ("gelu", 0)])
def test_clip(activation, pad):
    record = TINY[f"clip_{activation}"]
    model = golden.fill(CLIPText(CLIPConfig(64, 3, 128, activation, heads=4, projection_dim=64)))
    assert len(model.state_dict()) == record["n_keys"]
    out = model(torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70]))
    golden.agrees(out.penultimate, record["hidden_-2_no_final_ln"])
    golden.agrees(out.last, record["last_hidden_final_ln"])
    golden.agrees(out.pooled, record["pooled_unprojected"])
    golden.agrees(out.projected, record["pooled_projected"])


def test_t5():
    model, record = T5Encoder(T5Config(64, 2, 4, 16, 96, vocabulary=128)).double().eval(), TINY["t5"]
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    # Stability's module calls the embedding encoder.embed_tokens, and the formula counts keys in sorted order.
    theirs = {key.replace("shared", "encoder.embed_tokens"): shape for key, shape in shapes.items()}
    weights = golden.formula_weights(theirs)
    model.load_state_dict({key.replace("encoder.embed_tokens", "shared"): value for key, value in weights.items()})
    assert len(weights) == record["n_keys"]
    out = model(torch.tensor([[(7 * i) % 127 + 1 for i in range(40)] + [1] + [0] * 160]))
    golden.agrees(out, record["out"])
    wanted = torch.tensor(record["out_row_200"], dtype=torch.float64)
    torch.testing.assert_close(out[0, 200, :8], wanted, rtol=0, atol=1e-8)


def test_t5_relative_buckets():
    wanted = next(iter(TINY["t5_relative_buckets"].values()))
    assert relative_buckets(torch.arange(-130, 131)[None])[0].tolist() == wanted
