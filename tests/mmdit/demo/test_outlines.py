"""The embedded LoRA: what it draws, its two namings, its training, and how outlines are scored."""

import pytest
import torch

from mmdit import OUTLINES, Pipeline, load_lora, merge_lora
from mmdit.cli import main
from mmdit.demo.captions import training_captions
from mmdit.demo.outlines import OUTLINED, filled, hollowness, outlined, sample_outlined
from mmdit.demo.scenes import render
from mmdit.demo.score import accuracies, macro_average, score_batch
from mmdit.demo.train_lora import train, write

PROMPTS = ["a large red circle on a white background", "two large blue squares on a beige background"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.demo()


def test_outlines_are_hollow_and_filled_they_are_what_captions_say() -> None:
    scenes = sample_outlined(6, 3)
    assert {one.shape for scene in scenes.words() for one in scene.objects} <= set(OUTLINED)
    captions = [texts[0] for texts in training_captions(scenes, 1, 3)]
    pictures, whole = outlined(scenes), render(scenes)
    assert hollowness(whole).max() == 0
    assert hollowness(pictures).min() > 0.2
    assert macro_average(accuracies(score_batch(filled(pictures), captions))) == 1
    assert torch.equal(filled(whole), whole)


def test_the_lora_draws_outlines(pipe: Pipeline) -> None:
    how = {"seed": [1, 2], "num_inference_steps": 8, "max_sequence_length": 77, "output_type": "pt"}
    before = hollowness(pipe(PROMPTS, **how).images)
    pipe.load_lora_weights(OUTLINES)
    after = hollowness(pipe(PROMPTS, **how).images)
    pipe.unload_lora_weights()
    assert before.max() < 0.05
    assert after.mean() > 0.2


def test_both_namings_are_the_same_lora(pipe: Pipeline) -> None:
    files = (OUTLINES, OUTLINES.with_name("outlines_diffusers.safetensors"))
    assert sum(file.stat().st_size for file in files) < 500_000
    one, other = (merge_lora(pipe.transformer.state_dict(), load_lora(file)) for file in files)
    changed = [key for key, tensor in one.items() if tensor is not pipe.transformer.state_dict(keep_vars=True)[key]]
    assert len(changed) >= 16
    for key in changed:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


def test_training_writes_a_lora_that_loads(tmp_path) -> None:
    adapters = train(0.5, scenes=4)
    write(adapters, tmp_path / "new.safetensors")
    lora = load_lora(tmp_path / "new.safetensors")
    assert set(lora.scales.values()) == {1.0}
    assert len(lora.patches) == len(adapters) == 16
    assert all(bool(one.up.any()) for one in adapters.values())


def test_the_command_line_draws_with_it(tmp_path, capsys) -> None:
    how = ["--steps", "1", "--max-sequence-length", "77", "--cfg", "1", "--seed", "1"]
    pictures = []
    for name, lora in (("plain", []), ("with", ["--lora", f"{OUTLINES}:0.9"])):
        assert main(["generate", PROMPTS[0], *how, *lora, "-o", str(tmp_path / f"{name}.png")]) == 0
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] != pictures[1]
    assert main(["generate", PROMPTS[0], *how, "--lora", str(tmp_path / "none.safetensors"), "-o", "x.png"]) == 1
