"""Conditioning under each reference's rules, against slow code that encodes one chunk of one prompt at a time."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from encoders import COMFYUI, DIFFUSERS, REFERENCE, Conditioner, TextRules, Tokenizers

NAMES = ("clip_l", "clip_g", "t5")
SIZES = {"context_dim": 96, "pooled_dim": 80}
WIDTHS = {"clip_l": slice(0, 32), "clip_g": slice(32, 80)}


@pytest.fixture
def tiny(tiny_tokenizers: Path) -> Tokenizers:
    return Tokenizers.from_folder(tiny_tokenizers)


@pytest.fixture
def conditioner(tiny: Tokenizers, tiny_encoders: dict):
    """Build a Conditioner under some rules, without the encoders that are named."""

    def make(rules: TextRules, *without: str, tokenizers: Tokenizers = tiny, **sizes: int) -> Conditioner:
        models = [None if name in without else tiny_encoders[name] for name in NAMES]
        return Conditioner(*models, tokenizers, rules, **(SIZES | sizes))

    return make


@contextmanager
def watched(models: dict):
    """Record the ids that each encoder is called with."""
    seen: dict[str, list] = {}
    hooks = [
        model.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].tolist()}))
        for name, model in models.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def slowly(model, chunks: list[list[tuple[int, float]]], ends: tuple[list[int], int, int], length: int):
    """Hidden states and pooled output, with each chunk encoded alone and each token weighted by itself."""
    head, eos, pad = ends

    def run(ids: list[int]):
        return model(torch.tensor([ids + [pad] * (length - len(ids))]))

    def hidden(out):
        return out[0] if isinstance(out, torch.Tensor) else out.penultimate[0]

    empty, states, pooled = hidden(run([*head, eos])), [], []
    for chunk in chunks:
        out = run([*head, *(index for index, _ in chunk), eos])
        z = hidden(out).clone()
        for place, (_, weight) in enumerate(chunk, len(head)):
            z[place] = (z[place] - empty[place]) * weight + empty[place]
        states.append(z)
        pooled.append(None if isinstance(out, torch.Tensor) else out)
    return torch.cat(states), pooled[0]


# diffusers


def test_the_defaults_are_diffusers():
    assert TextRules() == DIFFUSERS
    assert (DIFFUSERS.clip_length, DIFFUSERS.t5_length, DIFFUSERS.missing_t5) == (77, 256, "zeros")


def test_diffusers_by_hand(conditioner, tiny: Tokenizers, tiny_encoders: dict):
    found = conditioner(DIFFUSERS)(["a wow!", "cat"])
    assert found.context.shape == (2, 77 + 256, 96)
    for i, prompt in enumerate(("a wow!", "cat")):
        ids = [list(getattr(tiny, name)(prompt).ids) for name in NAMES]
        padded = [
            one + [pad] * (length - len(one)) for one, pad, length in zip(ids, (518, 0, 0), (77, 77, 256), strict=True)
        ]
        out_l, out_g, out_t5 = (
            tiny_encoders[name](torch.tensor([one])) for name, one in zip(NAMES, padded, strict=True)
        )
        torch.testing.assert_close(found.context[i, :77, :32], out_l.penultimate[0])
        torch.testing.assert_close(found.context[i, :77, 32:80], out_g.penultimate[0])
        assert not found.context[i, :77, 80:].any()
        torch.testing.assert_close(found.context[i, 77:], out_t5[0])
        torch.testing.assert_close(found.pooled[i], torch.cat([out_l.projected[0], out_g.projected[0]]))


@pytest.mark.parametrize("rules", [DIFFUSERS, COMFYUI, REFERENCE])
def test_pooled_clip_l_is_projected_by_diffusers_only(conditioner, tiny: Tokenizers, tiny_encoders: dict, rules):
    ids = [*tiny.clip_l("a cat").ids, *[518] * 73]
    out = tiny_encoders["clip_l"](torch.tensor([ids]))
    wanted = out.projected if rules is DIFFUSERS else out.pooled
    torch.testing.assert_close(conditioner(rules)(["a cat"]).pooled[:, :32], wanted)


# Ids


def test_clip_g_reads_with_its_own_or_with_the_tokenizer_of_clip_l(conditioner, tiny_encoders: dict):
    wow, word, mark = 515, 256, 0  # "!" at a word's end, and as CLIP-G's padding
    for rules, wanted in ((DIFFUSERS, mark), (COMFYUI, word), (REFERENCE, word)):
        with watched(tiny_encoders) as seen:
            conditioner(rules)(["wow!"])
        assert seen["clip_l"] == [[517, wow, word, *[518] * 74]]
        assert seen["clip_g"] == [[517, wow, wanted, 518, *[0] * 73]]
        assert seen["t5"][0][-1] == 0
        assert len(seen["t5"][0]) == (256 if rules is DIFFUSERS else 77)


def test_brackets_are_ids_under_diffusers_only(conditioner, tiny_encoders: dict):
    for rules, same in ((DIFFUSERS, False), (REFERENCE, True), (COMFYUI, True)):
        with watched(tiny_encoders) as seen:
            conditioner(rules)(["(a:1.5) cat"])
        given = {name: ids[0] for name, ids in seen.items()}
        with watched(tiny_encoders) as seen:
            conditioner(rules)(["a cat"])
        assert (given == {name: ids[0] for name, ids in seen.items()}) is same


# ComfyUI


def ends_of(tokenizers: Tokenizers, name: str) -> tuple[list[int], int, int]:
    if name == "t5":
        return [], tokenizers.t5.eos, tokenizers.t5.pad
    return [tokenizers.clip_l.bos], tokenizers.clip_l.eos, tokenizers.clip_l.pad if name == "clip_l" else 0


CASES = {
    "weights": [[("cat ", 1.5), ("a ", 1.0), ("wow", -0.25)]],
    "chunks": [[("a " * 74, 1.0)], [("dog", 1.0), (" cat" * 5, 1.0)]],
    "weights and chunks": [[("a " * 74, 1.0)], [("dog", 1.3), (" cat" * 60, 0.7)]],
}


@pytest.mark.parametrize("case", CASES)
def test_comfyui_by_hand(conditioner, tiny: Tokenizers, tiny_encoders: dict, case: str):
    parts = [part for chunk in CASES[case] for part in chunk]
    found = conditioner(COMFYUI)(["".join(f"({text}:{weight})" for text, weight in parts)])
    for name in NAMES:
        tokenizer = tiny.t5 if name == "t5" else tiny.clip_l
        inner = slice(0 if name == "t5" else 1, -1)
        chunks = [[(i, w) for text, w in chunk for i in tokenizer(text).ids[inner]] for chunk in CASES[case]]
        if name == "t5":
            chunks = [[token for chunk in chunks for token in chunk]]
        length = max(77, len(chunks[0]) + 1) if name == "t5" else 77
        wanted, first = slowly(tiny_encoders[name], chunks, ends_of(tiny, name), length)
        if name == "t5":
            torch.testing.assert_close(found.context[0, len(CASES[case]) * 77 :], wanted)
            continue
        torch.testing.assert_close(found.context[0, : len(wanted), WIDTHS[name]], wanted)
        pooled = first.pooled if name == "clip_l" else first.projected
        torch.testing.assert_close(found.pooled[:, WIDTHS[name]], pooled)  # of the first chunk, without weights


def test_weights_are_ignored_by_the_reference(conditioner):
    plain, weighted = conditioner(REFERENCE)(["a cat"]), conditioner(REFERENCE)(["a (cat:1.5)"])
    assert torch.equal(plain.context, weighted.context)
    plain, weighted = conditioner(COMFYUI)(["a cat"]), conditioner(COMFYUI)(["a (cat:1.5)"])
    moved = ((plain.context - weighted.context).abs() > 1e-9).any(-1)[0].nonzero().flatten()
    assert moved.tolist() == [2, 77 + 1]
    torch.testing.assert_close(plain.pooled, weighted.pooled)


def test_weights_of_one_prompt_leave_the_others_of_the_batch_alone(conditioner):
    alone, batch = conditioner(COMFYUI)(["a cat"]), conditioner(COMFYUI)(["a (cat:1.5)", "a cat", "((cat))"])
    torch.testing.assert_close(batch.context[1], alone.context[0])
    torch.testing.assert_close(batch.pooled[1], alone.pooled[0])
    torch.testing.assert_close(batch.context[2], conditioner(COMFYUI)(["(cat:1.21)"]).context[0])


def test_a_weight_of_one_runs_no_empty_prompt(conditioner, tiny_encoders: dict):
    with watched(tiny_encoders) as seen:
        conditioner(COMFYUI)(["a (cat:1.0)"])
    assert [len(ids) for ids in seen.values()] == [1, 1, 1]


def test_shorter_prompts_of_a_batch_are_filled_up_with_empty_chunks_and_padding(conditioner, tiny_encoders: dict):
    long = "a " * 100
    batch = conditioner(COMFYUI)(["cat", long])
    assert batch.context.shape == (2, 2 * 77 + 101, 96)
    torch.testing.assert_close(batch.context[1], conditioner(COMFYUI)([long]).context[0])
    alone, empty = conditioner(COMFYUI)(["cat"]), conditioner(COMFYUI)([""])
    torch.testing.assert_close(batch.context[0, :77], alone.context[0, :77])
    torch.testing.assert_close(batch.context[0, 77:154], empty.context[0, :77])
    torch.testing.assert_close(batch.pooled[0], alone.pooled[0])
    torch.testing.assert_close(batch.context[0, 154:], tiny_encoders["t5"](torch.tensor([[4, 1] + [0] * 99]))[0])


def test_towers_are_cut_to_the_shorter(conditioner):
    rules = replace(COMFYUI, clip_g_tokenizer="own")  # "!!" is one token of CLIP-L and two of CLIP-G
    with pytest.warns(UserWarning, match=r"CLIP-G reads 77 tokens, as the other tower does; .*was cut: '!( !!)+'"):
        found = conditioner(rules)([" ".join(["!!"] * 50)])
    assert len(found.context[0]) == 77 + 151


# Cuts


def test_the_reference_cuts_the_text_of_t5_only(conditioner):
    prompt = "a " * 70 + " " * 100 + "cat"
    with pytest.warns(UserWarning, match="T5 reads 226 characters; this part of the prompt was cut: ' +cat'") as said:
        found = conditioner(REFERENCE)([prompt])
    assert len(said) == 1
    assert max(span.stop for span in found.spans[0] if span.encoder == "clip_l") == len(prompt)
    assert max(span.stop for span in found.spans[0] if span.encoder == "t5") <= 226


@pytest.mark.parametrize(
    ("rules", "cut"),
    [(DIFFUSERS, {"CLIP-L": "g", "CLIP-G": "g"}), (REFERENCE, {"CLIP-L": "dog", "CLIP-G": "dog"}), (COMFYUI, {})],
)
def test_what_is_cut_is_said_once_for_each_encoder(conditioner, recwarn, rules: TextRules, cut: dict[str, str]):
    prompt = "a " * 73 + "dog"
    conditioner(rules)([prompt, prompt])
    said = {f"{name} reads 77 tokens; this part of the prompt was cut: {text!r}" for name, text in cut.items()}
    assert {str(warning.message) for warning in recwarn} == said
    assert len(recwarn) == len(said)


def test_a_prompt_of_a_million_characters_is_one_short_warning_for_each_encoder(conditioner):
    for rules in (DIFFUSERS, COMFYUI, REFERENCE):
        with pytest.warns(UserWarning, match="was cut") as said:
            found = conditioner(rules)(["b" * 10**6])
        assert found.context.shape[1] <= 16 * 77 + 1024
        assert sorted(str(warning.message).split(" ")[0] for warning in said) == ["CLIP-G", "CLIP-L", "T5"]
        assert max(len(str(warning.message)) for warning in said) < 400


def test_a_weight_that_overflows_the_context_is_refused(conditioner, tiny_encoders: dict):
    for model in tiny_encoders.values():
        model.half()
    tiny_encoders["t5"].encoder.final_layer_norm.weight.fill_(500)
    with pytest.raises(ValueError, match=r"999.*float16"):
        conditioner(replace(COMFYUI, encoder_dtype="stored"))(["(cat:999)"])
    assert conditioner(COMFYUI)(["(cat:999)"]).context.isfinite().all()


# Places


@pytest.mark.parametrize("rules", [DIFFUSERS, COMFYUI, REFERENCE])
def test_spans_are_characters_of_the_prompt_as_it_was_given(conditioner, tiny_encoders: dict, tiny: Tokenizers, rules):
    prompts = ["\\(cat\\) (wow:1.5)\na " + "a " * 75 + "((dog))", "cat"]
    if rules is not COMFYUI:
        prompts[0] = prompts[0].replace("a " * 75, "a " * 20)
    with watched(tiny_encoders) as seen:
        found = conditioner(rules)(prompts)
    clip_tokens = found.context.shape[1] - len(seen["t5"][0])
    assert clip_tokens == (2 if rules is COMFYUI else 1) * 77
    for i, prompt in enumerate(prompts):
        for name in NAMES:
            spans = [span for span in found.spans[i] if span.encoder == name]
            first, rows = (clip_tokens, 1) if name == "t5" else (0, clip_tokens // 77)
            ids = [index for row in seen[name][i * rows : (i + 1) * rows] for index in row]
            backend = (tiny.t5 if name == "t5" else tiny.clip_l).backend
            for place, _, start, stop in spans:
                text = backend.id_to_token(ids[place - first]).replace("</w>", "").replace("▁", "")
                source = prompt[start:stop].strip()
                assert source in (text, "\\" + text) or text in (
                    "",
                    "<unk>",
                    "<|startoftext|>",
                    "<|endoftext|>",
                    "</s>",
                )
            wow = [span for span in spans if prompt[span.start : span.stop].strip() == "wow"]
            assert len(wow) == (1 if i == 0 and name != "t5" else 0)
            last = max(spans, key=lambda span: span.stop)
            assert prompt[last.start : last.stop][-1] == ("t" if i else ")" if rules is DIFFUSERS else "g")


# Missing encoders


def test_missing_encoders_are_errors_or_not(conditioner):
    refused = {
        (DIFFUSERS, "clip_l"): "no CLIP-L encoder, and missing_clip is 'error'.* with missing_clip 'zeros'",
        (DIFFUSERS, "clip_g"): "no CLIP-G encoder, and missing_clip is 'error'",
        (REFERENCE, "clip_l"): "no CLIP-L encoder, and missing_clip is 'error'",
        (REFERENCE, "clip_g"): "no CLIP-G encoder, and missing_clip is 'error'",
        (REFERENCE, "t5"): "no T5 encoder, and missing_t5 is 'error'.* with missing_t5 'zeros' or 'omit'",
    }
    for rules in (DIFFUSERS, REFERENCE, COMFYUI):
        for name in NAMES:
            if (rules, name) in refused:
                with pytest.raises(ValueError, match=refused[rules, name]):
                    conditioner(rules, name)
            else:
                conditioner(rules, name)


def test_a_missing_tower_is_zeros_in_its_place(conditioner):
    whole = conditioner(COMFYUI)(["a (cat:1.2)"])
    for name, other in (("clip_l", "clip_g"), ("clip_g", "clip_l")):
        found = conditioner(COMFYUI, name)(["a (cat:1.2)"])
        assert found.context.shape == whole.context.shape
        assert not found.context[:, :77, WIDTHS[name]].any()
        assert not found.pooled[:, WIDTHS[name]].any()
        torch.testing.assert_close(found.context[:, :77, WIDTHS[other]], whole.context[:, :77, WIDTHS[other]])
        torch.testing.assert_close(found.pooled[:, WIDTHS[other]], whole.pooled[:, WIDTHS[other]])
        torch.testing.assert_close(found.context[:, 77:], whole.context[:, 77:])
        assert found.spans[0] == tuple(span for span in whole.spans[0] if span.encoder != name)


def test_without_towers_there_are_t5_tokens_only(conditioner):
    found = conditioner(COMFYUI, "clip_l", "clip_g")(["a cat", "cat"])
    torch.testing.assert_close(found.context, conditioner(COMFYUI)(["a cat", "cat"]).context[:, 77:])
    assert torch.equal(found.pooled, torch.zeros(2, 80, dtype=torch.float64))
    assert [(span.position, span.start, span.stop) for span in found.spans[0]] == [(0, 0, 1), (1, 2, 5), (2, 0, 0)]


def test_without_encoders_all_is_zero(conditioner):
    nothing = Tokenizers(None, None, None)
    found = conditioner(COMFYUI, *NAMES, tokenizers=nothing)(["a cat", "cat"])
    assert torch.equal(found.context, torch.zeros(2, 77, 96))
    assert torch.equal(found.pooled, torch.zeros(2, 80))
    assert found.spans == ((), ())


@pytest.mark.parametrize(("rules", "length"), [(DIFFUSERS, 256), (COMFYUI, 0)])
def test_a_missing_t5_is_zeros_or_nothing(conditioner, rules: TextRules, length: int):
    found = conditioner(rules, "t5")(["a cat"])
    assert found.context.shape == (1, 77 + length, 96)
    assert not found.context[:, 77:].any()
    torch.testing.assert_close(found.context[:, :77], conditioner(rules)(["a cat"]).context[:, :77])


def test_tokenizers_are_needed_where_they_are_read_with(conditioner, tiny: Tokenizers):
    borrowed = Tokenizers(tiny.clip_l, None, tiny.t5)
    torch.testing.assert_close(
        conditioner(COMFYUI, tokenizers=borrowed)(["wow!"]).context, conditioner(COMFYUI)(["wow!"]).context
    )
    for rules, tokenizers, said in (
        (DIFFUSERS, borrowed, "there is a CLIP-G encoder but no CLIP-G tokenizer for it.*tokenizer_2"),
        (COMFYUI, Tokenizers(None, tiny.clip_g, tiny.t5), "no CLIP-L tokenizer for it.*holds tokenizer$"),
        (COMFYUI, Tokenizers(tiny.clip_l, tiny.clip_g, None), "there is a T5 encoder but no T5 .*tokenizer_3"),
    ):
        with pytest.raises(ValueError, match=said):
            conditioner(rules, tokenizers=tokenizers)


def test_tokenizers_of_a_folder_that_lacks_some(tiny_tokenizers: Path, tiny: Tokenizers):
    for name in ("tokenizer_2", "tokenizer_3"):
        (tiny_tokenizers / name).rename(tiny_tokenizers / f"no_{name}")
    found = Tokenizers.from_folder(tiny_tokenizers, clip_g=False, t5=False)
    assert (found.clip_g, found.t5) == (None, None)
    assert found.clip_l("a cat") == tiny.clip_l("a cat")


def test_widths_that_do_not_fit_are_said(conditioner):
    with pytest.raises(ValueError, match="give 80 channels, context_dim is 64"):
        conditioner(DIFFUSERS, context_dim=64)(["a"])
    with pytest.raises(ValueError, match="gives 48 pooled channels, pooled_dim is 40"):
        conditioner(COMFYUI, "clip_l", pooled_dim=40)(["a"])
