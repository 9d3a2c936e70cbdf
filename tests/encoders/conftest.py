"""Tokenizer folders for the tests: the official one if it is present, and a tiny one that is made here."""

import json
import os
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece

from encoders import CLIPConfig, CLIPText, T5Config, T5Encoder, Tokenizers
from skips import SKIPS

OFFICIAL = Path(__file__).parents[3] / "shared" / "reference" / "tokenizers"


@pytest.fixture(scope="session")
def official_tokenizers() -> Path:
    """The folder that holds the official tokenizer/, tokenizer_2/ and tokenizer_3/."""
    if OFFICIAL.is_dir():
        return OFFICIAL
    if os.environ.get("MMDIT_REQUIRE_OFFICIAL") == "1":
        pytest.fail(SKIPS["official tokenizers"])
    pytest.skip(SKIPS["official tokenizers"])


@pytest.fixture(scope="session")
def official(official_tokenizers: Path) -> Tokenizers:
    """The official tokenizers, read once; a test that changes them puts everything back."""
    return Tokenizers.from_folder(official_tokenizers)


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable characters for bytes: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def write_clip(folder: Path, pad: str) -> None:
    """Write a CLIP tokenizer with five merges; its words are "cat", "wow" and single characters."""
    merges = ["c a", "ca t</w>", "w o", "wo w</w>", "! !</w>"]
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    ends = {str(vocab[t]): {"content": t, "special": True} for t in ("<|startoftext|>", "<|endoftext|>")}
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        for token in ends.values():
            token[flag] = False
    pads = {} if pad == "<|endoftext|>" else {str(vocab[pad]): ends[str(len(vocab) - 1)] | {"content": pad}}
    config = {
        "added_tokens_decoder": pads | ends,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
        "model_max_length": 77,
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_t5(folder: Path) -> None:
    """Write a T5 tokenizer.json with a few words and all letters, two sentinels and no character map."""
    words = [("▁", -2.0), ("▁cat", -3.0), ("▁a", -2.5), ("▁photo", -4.0), ("!", -3.0)]
    letters = [(letter, -6.0 - i / 10) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*special, *words, *letters, ("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": "extra" in text, "rstrip": "extra" in text}
        | {"normalized": False, "special": True}
        for i, (text, _) in enumerate(pieces)
        if text.startswith("<")
    ]
    model = {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}
    content = {"version": "1.0", "added_tokens": added, "normalizer": None, "model": model}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def tiny_tokenizers(tmp_path: Path) -> Path:
    """A small folder with the layout of the official one, new for each test, which may break it."""
    root = tmp_path / "tiny"
    write_clip(root / "tokenizer", pad="<|endoftext|>")
    write_clip(root / "tokenizer_2", pad="!")
    write_t5(root / "tokenizer_3")
    return root


@pytest.fixture
def tiny_encoders(tiny_tokenizers: Path) -> dict[str, CLIPText | T5Encoder]:
    """Random encoders for these tokenizers, in float64: widths 32, 48 and 96, CLIP-L with a projection."""
    tokenizers = Tokenizers.from_folder(tiny_tokenizers)
    assert tokenizers.clip_l and tokenizers.clip_g and tokenizers.t5
    sizes = [
        CLIPConfig(32, 3, 64, "quick_gelu", heads=2, vocabulary=tokenizers.clip_l.vocab_size, projection_dim=32),
        CLIPConfig(48, 3, 96, "gelu", heads=2, vocabulary=tokenizers.clip_g.vocab_size, projection_dim=48),
    ]
    t5 = T5Config(96, 2, heads=2, head_dim=16, mlp_dim=128, vocabulary=tokenizers.t5.vocab_size)
    encoders = {"clip_l": CLIPText(sizes[0]), "clip_g": CLIPText(sizes[1]), "t5": T5Encoder(t5)}
    for model in encoders.values():
        model.double().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1)
    return encoders


@pytest.fixture(scope="session")
def tiny_spiece() -> bytes:
    """A sentencepiece Unigram model with T5's settings (nmt_nfkc, pad 0, eos 1, unk 2, no bos), trained here."""
    text = "a photo of a cat and the dog in a red house with many small windows on the hill by the sea "
    lines = [text[i:] + text[:i] for i in range(len(text))]
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()
