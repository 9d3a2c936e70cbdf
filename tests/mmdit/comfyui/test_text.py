"""The layer whose output counts: CLIP's without its final norm, T5's with it; hooks are gone afterwards."""

import pytest
import torch

import recorded_workflows as recorded
from encoders import CLIPConfig, CLIPText, T5Config, T5Encoder
from mmdit.comfyui.text import encode
from mmdit.comfyui.values import Clip

PROMPT = "two cats on a blue sofa"


@pytest.fixture(scope="module")
def encoders() -> tuple[CLIPText, CLIPText, T5Encoder]:
    torch.manual_seed(3)
    towers = [
        CLIPText(CLIPConfig(64, layers, 64, "gelu", heads=1, projection_dim=64)).requires_grad_(False)
        for layers in (3, 4)
    ]
    t5 = T5Encoder(T5Config(192, 2, heads=1, head_dim=64, mlp_dim=64, vocabulary=32128)).requires_grad_(False)
    return towers[0], towers[1], t5


def context(encoders: tuple, layer: int | None) -> torch.Tensor:
    return encode(Clip(*encoders, recorded.tokenizers(), layer), PROMPT).context


def wanted(encoders: tuple, layer: int) -> torch.Tensor:
    """The same, layer by layer."""
    ids = recorded.tokenizers().clip_l.encode(PROMPT).ids
    rows = torch.tensor([[*ids, *[0] * (77 - len(ids))], [*ids, *[49407] * (77 - len(ids))]])
    parts = []
    for tower, row in zip(encoders[:2], (rows[1:], rows[:1]), strict=True):
        text = tower.text_model
        x = text.embeddings(row)
        for one in text.encoder.layers[: max(len(text.encoder.layers) + layer + 1, 0)]:
            x = one(x)
        parts.append(text.final_layer_norm(_last(text, row)) if -layer > len(text.encoder.layers) else x)
    both = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(both, (0, 192 - both.shape[-1]))


def _last(text, row):
    x = text.embeddings(row)
    for one in text.encoder.layers:
        x = one(x)
    return x


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, -5])
def test_clip_gives_the_output_of_the_layer(encoders, layer):
    found = context(encoders, layer)[:, :77]
    assert torch.allclose(found, wanted(encoders, layer), atol=1e-5)


def test_the_usual_layers_are_minus_2_of_clip_and_the_last_of_t5(encoders):
    usual = context(encoders, None)
    assert torch.equal(usual[:, :77], context(encoders, -2)[:, :77])
    assert torch.equal(usual[:, 77:], context(encoders, -1)[:, 77:])
    assert torch.equal(usual[:, 77:], context(encoders, -3)[:, 77:])  # more than T5 has
    before_last = context(encoders, -2)[:, 77:]
    assert not torch.allclose(usual[:, 77:], before_last, atol=1e-2)
    assert torch.allclose(before_last.square().mean(-1), torch.tensor(1.0), atol=1e-3)  # normed
    hooks = [one for encoder in encoders for one in encoder.modules() if one._forward_hooks]
    assert hooks == []
