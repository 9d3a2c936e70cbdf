"""The embedded model: it draws what its prompt says, and diffusers draws the same with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from full import FULL
from mmdit import Pipeline, load_vae
from mmdit.checkpoints.write import convert
from mmdit.cli.app import main
from mmdit.demo.captions import training_captions
from mmdit.demo.evaluate import FEW, GUIDES, Setting, draw, evaluate, few_steps
from mmdit.demo.export import MAX_BYTES
from mmdit.demo.scenes import render, sample
from mmdit.demo.score import check, parse_batch, statements, symbolic
from mmdit.embedded import EMBEDDED

PROMPT = "a large red circle above a blue star, on a white background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.demo()


def test_the_folder_is_small_enough_to_commit():
    assert sum(file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()) <= MAX_BYTES


def test_held_out_prompts(pipe):
    """At least 90 % of what they state, as a mean over the kinds of statements."""
    prompts = 64 if FULL else 8
    result = evaluate(pipe, Setting("fixed prompts", steps=12 if FULL else 8, t5="77"), prompts, 1, batch=16)
    assert sum(count for _, count in result.by_kind.values()) > 7 * prompts
    assert result.macro >= 0.90, result.by_kind


def test_rows_of_guidance_and_of_few_steps_draw(pipe, small_pictures):
    """Each kind of guidance gives a picture of its own at three steps, but that layers are skipped at later ones."""
    pictures = [next(iter(draw(pipe, [PROMPT], [1], replace(row, steps=3, t5="77"), 1))) for row in GUIDES]
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(GUIDES) - 2
    rows = few_steps(["euler", "dpmpp_2m"])
    assert [row.steps for row in rows if row.guidance == 1 and row.sampler == "dpmpp_2m"] == list(FEW)
    with pytest.raises(ValueError, match="did you mean 'euler'"):
        few_steps(["eular"])


def test_other_words_other_picture(pipe):
    """The scorer refuses the picture of another prompt: what it counts is in the picture and not in the prompt."""
    picture = pipe(PROMPT, seed=1, num_inference_steps=12, max_sequence_length=77, output_type="pt").images
    parsed = parse_batch(picture)[0]
    assert all(check(claim, parsed) for claim in statements(PROMPT))
    assert not any(check(claim, parsed) for claim in statements("a small green ring left of a pink square on navy"))


def test_diffusers_draws_the_same_picture(pipe, tmp_path):
    folder = convert(EMBEDDED, tmp_path / "diffusers", "diffusers")
    theirs = tiny.load(folder)
    settings = {"num_inference_steps": 20 if FULL else 6, "guidance_scale": 4.5, "max_sequence_length": 77}
    a = pipe(PROMPT, "a green ring", seed=5, **settings).images[0]
    generator = torch.Generator().manual_seed(5)
    b = theirs(PROMPT, negative_prompt="a green ring", generator=generator, height=128, width=128, **settings).images[0]
    assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


def test_generate_without_a_model_says_that_it_is_the_embedded_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--steps", "2"]) == 0
    assert "embedded model" in capsys.readouterr().err
    assert (tmp_path / "picture.png").exists()


def test_a_missing_folder_is_never_replaced_by_the_embedded_model(tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        Pipeline.from_pretrained(tmp_path / "nothing")
    assert main(["generate", PROMPT, "--model", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


def test_the_vae_keeps_what_a_picture_says():
    """Scenes that no training saw: at least 32 dB, and the scorer says of the decoded what is true of the scene."""
    scenes = sample(24 if FULL else 8, 987_654_321)
    pictures, vae = render(scenes), load_vae(EMBEDDED, dtype=torch.float32)
    latent = vae.encode(2 * pictures - 1).mode()
    decoded = (vae.decode(latent) / 2 + 0.5).clamp(0, 1)
    assert float(-10 * (decoded - pictures).square().mean().log10()) >= 32
    assert 0.9 < float(latent.std()) < 1.1
    verdicts = []
    captions = [texts[0] for texts in training_captions(scenes, 1, 1)]
    for index, (parsed, scene) in enumerate(zip(parse_batch(decoded), scenes.words(), strict=True)):
        claims = [*statements(captions[index]), *statements(captions[index - 1])]
        verdicts += [check(claim, parsed) == check(claim, symbolic(scene)) for claim in claims]
    assert sum(verdicts) / len(verdicts) >= 0.99
