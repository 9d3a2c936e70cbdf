"""TextRules refuse what means nothing; encoders compute in the dtype that they say."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from encoders import COMFYUI, DIFFUSERS, REFERENCE, Conditioner, TextRules, Tokenizers
from encoders.precision import in_float32


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clip_length": 2}, "clip_length >= 3, t5_length >= 2; got 2, 256"),
        ({"t5_length": 1}, "got 77, 1"),
        ({"t5_characters": -1}, "t5_characters >= 0 or None, got -1"),
        ({"weights": "apply"}, "TextRules.weights must be one of 'literal', 'ignored', 'applied'; got 'apply'"),
        ({"long_clip": "chunk"}, "TextRules.long_clip must be one of .*; got 'chunk'"),
        ({"clip_g_tokenizer": "clip_g"}, "TextRules.clip_g_tokenizer must be"),
        ({"long_t5": "drop"}, "TextRules.long_t5 must be"),
        ({"missing_clip": "omit"}, "TextRules.missing_clip must be"),
        ({"missing_t5": "none"}, "TextRules.missing_t5 must be"),
        ({"encoder_dtype": "float16"}, "TextRules.encoder_dtype must be"),
    ],
)
def test_rules_that_mean_nothing(wrong: dict, said: str):
    rules = TextRules()
    for name, value in wrong.items():
        object.__setattr__(rules, name, value)  # past the suite's check of types
    with pytest.raises(ValueError, match=said):
        rules.__post_init__()


def test_the_references_differ_in_every_rule_but_the_length_of_a_chunk():
    names = set(TextRules.__dataclass_fields__) - {"clip_length"}
    assert {name for name in names if len({getattr(r, name) for r in (DIFFUSERS, COMFYUI, REFERENCE)}) > 1} == names


@pytest.mark.parametrize("rules", [DIFFUSERS, COMFYUI, REFERENCE])
def test_lengths_are_those_of_the_rules(tiny_tokenizers: Path, tiny_encoders: dict, rules: TextRules):
    rules = replace(rules, clip_length=20, t5_length=30)
    conditioner = Conditioner(*tiny_encoders.values(), Tokenizers.from_folder(tiny_tokenizers), rules, context_dim=96)
    assert conditioner(["a cat"]).context.shape[1] == 20 + 30
    assert conditioner(["a " * 18]).context.shape[1] == 20 + 30
    if rules.missing_clip == "zeros":
        without = Conditioner(None, None, None, Tokenizers(None, None, None), rules, context_dim=96)
        assert without(["a cat"]).context.shape == (1, 20, 96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computing_in_float32_is_that_of_a_float32_copy(tiny_tokenizers: Path, tiny_encoders: dict, dtype: torch.dtype):
    tokenizers, models = Tokenizers.from_folder(tiny_tokenizers), [model.to(dtype) for model in tiny_encoders.values()]
    prompts = ["a (cat:1.3) wow", "dog"]

    def run(encoders, rules: TextRules):
        return Conditioner(*encoders, tokenizers, rules, context_dim=96)(prompts)

    for rules in (COMFYUI, REFERENCE):
        found, wanted = run(models, rules), run([deepcopy(model).float() for model in models], rules)
        assert found.context.dtype == found.pooled.dtype == torch.float32
        assert torch.equal(found.context, wanted.context)
        assert torch.equal(found.pooled, wanted.pooled)
        stored = run(models, replace(rules, encoder_dtype="stored"))
        assert stored.context.dtype == stored.pooled.dtype == dtype
        assert not torch.equal(stored.context.float(), found.context)
    assert run(models, DIFFUSERS).context.dtype == dtype


def test_float64_stays(tiny_encoders: dict):
    ids = torch.tensor([[1, 2, 3]])
    with in_float32(tiny_encoders["t5"]):
        found = tiny_encoders["t5"](ids)
    assert torch.equal(found, tiny_encoders["t5"](ids))
    assert found.dtype == torch.float64


def test_a_model_is_as_it_was_after_computing_in_float32(tiny_encoders: dict):
    model = tiny_encoders["t5"].half()
    before = {name: (id(parameter), parameter.dtype) for name, parameter in model.named_parameters()}
    keys, seen = list(model.state_dict()), []
    with pytest.raises(RuntimeError, match="stop"), in_float32(model):
        seen.append(model.shared.weight.dtype)
        raise RuntimeError("stop")
    assert seen == [torch.float32]
    assert {name: (id(parameter), parameter.dtype) for name, parameter in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert model.shared.weight.dtype == torch.float16
    assert model.encoder._parameters.__class__ is dict


def test_gradients_reach_the_stored_weights(tiny_encoders: dict):
    model = tiny_encoders["clip_l"].bfloat16().requires_grad_(True)
    with in_float32(model):
        model(torch.tensor([[517, 3, 518]])).pooled.sum().backward()
    gradient = model.text_model.encoder.layers[0].mlp.fc1.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert gradient.abs().sum() > 0
