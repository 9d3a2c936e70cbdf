"""The own tokenizers: deterministic files, one token a word, any text, and the readers of others agree."""

import hashlib
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast

from encoders.tokenize import Tokenizers
from mmdit.demo import captions, scenes
from mmdit.demo.grammar import WORDS
from mmdit.demo.vocab import SIZE, write_tokenizers

ODD = ["", "A photograph of 37 Wonderful horses!", "wow! #$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "two  spaces", "don't stop"]
FOREIGN = "naïve café 日本 😀"


@cache
def texts() -> list[str]:
    return [some[0] for some in captions.training_captions(scenes.sample(500, 31), 1, seed=3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(place)
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_are_those_of_the_official_layout_and_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    write_tokenizers(tmp_path)
    assert contents(tmp_path) == contents(folder)
    clip = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    t5 = ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"]
    parts = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}
    assert sorted(contents(folder)) == sorted(f"{part}/{name}" for part, names in parts.items() for name in names)


def test_trained_weights_belong_to_these_ids(folder: Path) -> None:
    """A change here makes every trained embedding wrong: train again, then put the new digest down."""
    files = {name: data for name, data in contents(folder).items() if "config" not in name and "special" not in name}
    digest = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    assert digest[:16] == "877a5cce2a94e479"


def test_clip_has_the_ids_that_pooling_and_padding_rely_on(folder: Path) -> None:
    for name, pad in (("tokenizer", SIZE - 1), ("tokenizer_2", 0)):
        clip = CLIPTokenizer.from_pretrained(folder / name)
        assert (len(clip), clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (SIZE, SIZE - 2, SIZE - 1, pad)
        assert clip.model_max_length == 77
        ids = clip("a star", padding="max_length").input_ids
        assert ids[0] == SIZE - 2
        assert ids[3:] == [SIZE - 1] + [pad] * 73
        assert ids.index(max(ids)) == 3


def test_t5_has_the_ids_that_padding_relies_on(folder: Path) -> None:
    t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
    assert (len(t5), t5.pad_token_id, t5.eos_token_id, t5.unk_token_id, t5.model_max_length) == (SIZE, 0, 1, 2, 512)
    assert t5("a star", padding="max_length", max_length=5).input_ids[2:] == [1, 0, 0]


def test_every_word_of_the_grammar_is_one_token(folder: Path) -> None:
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
    for word in WORDS:
        assert clip.tokenize(word) == [word + "</w>"]
        assert clip.tokenize(word.title()) == [word + "</w>"]
        assert t5.tokenize(word) == ["▁" + word]
        assert t5.tokenize(word.title()) == ["▁" + word.title()]
    assert len(clip.tokenize("rhinoceros")) > 1
    assert len(t5.tokenize("rhinoceros")) > 1


def test_captions_fit_into_77_tokens(folder: Path) -> None:
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
    assert max(len(ids) for ids in clip(texts()).input_ids) <= 77
    assert max(len(ids) for ids in t5(texts()).input_ids) <= 77


def test_clip_encodes_any_text_and_gives_it_back(folder: Path) -> None:
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for text in [*ODD, FOREIGN]:
        ids = clip(text).input_ids
        assert SIZE - 1 not in ids[1:-1]  # no unknown token, which CLIP spells as EOS
        decoded = clip.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_both_files_of_t5_say_the_same_and_encode_any_text(folder: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer_3" / "spiece.model"))
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer_3" / "tokenizer.json"))
    ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id())
    assert (pieces.vocab_size(), *ids) == (SIZE, 0, 1, 2, -1)
    for text in [*texts(), *ODD, FOREIGN]:
        expected = pieces.encode(text)
        assert 2 not in expected
        assert file.encode(text).ids == [*expected, 1]
        assert pieces.decode(expected) == " ".join(text.split())


def test_the_own_reader_agrees_with_transformers(folder: Path) -> None:
    own = Tokenizers.from_folder(folder)
    assert own.t5 is not None
    pairs = (
        (own.clip_l, CLIPTokenizer.from_pretrained(folder / "tokenizer")),
        (own.clip_g, CLIPTokenizer.from_pretrained(folder / "tokenizer_2")),
        (own.t5, T5TokenizerFast.from_pretrained(folder / "tokenizer_3")),
    )
    for reader, other in pairs:
        for text in [*texts(), *ODD, FOREIGN, "one\ntwo\tthree"]:
            assert list(reader.encode(text).ids) == other(text).input_ids, text


def test_only_foreign_characters_are_unknown_to_readers_without_byte_fallback(folder: Path) -> None:
    t5 = Tokenizers.from_folder(folder).t5
    assert t5 is not None
    assert not any(2 in t5.encode(text).ids for text in [*texts(), *ODD])
    assert 2 in t5.encode(FOREIGN).ids
