"""TextRules refuse words and lengths that mean nothing, and decide the length of the context."""

from dataclasses import replace
from pathlib import Path

import pytest

from encoders import COMFYUI, DIFFUSERS, REFERENCE, Conditioner, TextRules, Tokenizers


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clip_length": 2}, "clip_length >= 3, t5_length >= 2; got 2, 256"),
        ({"t5_length": 1}, "got 77, 1"),
        ({"max_characters": 0}, "max_characters >= 1, got 0"),
        ({"max_chunks": 0}, "max_chunks >= 1, got 0"),
        ({"max_t5": 1}, "max_t5 >= 2, got 1"),
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


def test_the_references_differ_in_every_rule_but_the_length_of_a_chunk_and_the_bounds():
    names = set(TextRules.__dataclass_fields__) - {"clip_length", "max_characters", "max_chunks", "max_t5"}
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
