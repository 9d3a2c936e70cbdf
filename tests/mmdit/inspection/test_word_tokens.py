"""Words of the prompt and their tokens, by the characters that tokens came from."""

import pytest

from mmdit import Pipeline
from mmdit.inspection.words import SPECIAL, WordError, check_words, mixed, token_positions, words_of
from refusals import refuses

PROMPT = "A red circle above a blue star, on white"


@pytest.fixture(scope="module")
def demo():
    return Pipeline.demo()


@pytest.fixture(scope="module")
def read(demo):
    return demo.encode([PROMPT, "two small rings"])


def spelled(read, positions, sample=0):
    """What the tokens at these positions came from, of each encoder."""
    spans = [span for span in read.spans[sample] if span.position in positions]
    return {f"{span.encoder} {read.prompts[sample][span.start : span.stop]}" for span in spans}


def test_words_of_a_prompt():
    assert words_of("A red star, a RED ring") == ["A", "red", "star", "ring"]


@pytest.mark.parametrize(
    ("word", "encoder", "expected"),
    [
        ("circle", "all", {"clip_l circle", "clip_g circle", "t5 circle"}),
        ("circle", "t5", {"t5 circle"}),
        ("Blue Star", "clip", {"clip_l blue", "clip_g blue", "clip_l star", "clip_g star"}),
        ("star,", "t5", {"t5 star", "t5 ,"}),
    ],
)
def test_tokens_of_a_word(read, word, encoder, expected):
    assert spelled(read, token_positions(read, 0, word, encoder)) == expected


def test_occurrences(read):
    one, two, both = (token_positions(read, 0, word) for word in ("a#1", "a#2", "a"))
    assert sorted(one + two) == both
    assert len(one) == len(two) == 2
    assert one[0] < two[0]
    assert token_positions(read, 0, "a#3") == []
    assert token_positions(read, 0, "bov") == []  # a part of a word is none


def test_every_token_is_a_words_or_special(read):
    """Nothing is counted twice and nothing is left out: words, ends, padding and the comma are the whole context."""
    for sample, prompt in enumerate(read.prompts):
        for encoder, expected in (("all", range(333)), ("clip", range(77)), ("t5", range(77, 333))):
            names = [*words_of(prompt), *SPECIAL, *([","] if "," in prompt else [])]
            found = [place for name in names for place in token_positions(read, sample, name, encoder)]
            assert sorted(found) == list(expected)


def test_special_tokens(read):
    assert token_positions(read, 0, "<bos>") == [0]
    assert token_positions(read, 0, "<bos>", "t5") == []
    clip, t5 = (token_positions(read, 0, "<eos>", encoder) for encoder in ("clip", "t5"))
    assert (clip, t5) == ([11], [87])  # after nine words and a comma
    assert token_positions(read, 0, "<eos>") == clip + t5


def test_chunks_of_a_long_prompt():
    """Each chunk of CLIP has its own ends."""
    pipe = Pipeline.demo(profile="comfyui")
    read = pipe.encode(" and ".join(["a red circle"] * 30))
    assert token_positions(read, 0, "<bos>") == [0, 77]
    assert len(token_positions(read, 0, "<eos>", "clip")) == 2
    assert len(token_positions(read, 0, "circle", "clip")) == len(token_positions(read, 0, "circle", "t5")) == 30


def test_repeated_and_moved_conditionings_keep_their_words(read):
    twice = read.repeat(2).to("cpu", read.context.dtype)
    assert twice.prompts == (read.prompts[0],) * 2 + (read.prompts[1],) * 2
    assert token_positions(twice, 3, "rings") == token_positions(read, 1, "rings") != []


def test_a_word_that_is_not_there(demo, read):
    refuses(
        lambda: check_words(read, ["cirle"]), "'cirle'", "A, red, circle", "two, small", "'circle'", error=WordError
    )
    refuses(lambda: check_words(read, [" "]), "no word", error=WordError)
    check_words(read, ["rings", "circle"])  # each in one of the prompts
    with pytest.warns(UserWarning, match="was cut"):
        cut = demo.encode("a " * 80 + "ring")
    refuses(lambda: check_words(cut, ["ring"], "clip"), "cut", error=WordError)
    check_words(cut, ["ring"], "t5")


def test_embeddings_have_no_words(read):
    from encoders import Conditioning

    bare = Conditioning(read.context, read.pooled)
    refuses(lambda: token_positions(bare, 0, "red"), "embeddings", error=WordError)


def test_mix():
    import torch

    mix = mixed([[3, 5], [], [5]], torch.device("cpu"), torch.float32)
    assert mix.tokens.tolist() == [3, 5]
    assert mix.counts[[0, 2]].tolist() == [[1, 1], [0, 1]]
    assert mix.counts[1].isnan().all()
    assert mix.shares()[0].tolist() == [0.5, 0.5]
