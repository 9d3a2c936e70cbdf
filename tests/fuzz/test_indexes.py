"""Shard indexes, config.json, scheduler and model index: every folder is described or refused by our own error."""

import json
import shutil
import warnings

import pytest

from fuzzing import cases, mutated, survives
from mmdit import CheckpointError
from mmdit.checkpoints.describe import inspect
from mmdit.checkpoints.write import convert
from refusals import refuses

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
NAMES = (INDEX, "transformer/config.json", "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json")
NAMES += ("text_encoder_3/config.json", "scheduler/scheduler_config.json", "model_index.json")


@pytest.fixture(scope="module")
def folder(tiny_folders, tmp_path_factory):
    """A diffusers folder with a sharded transformer, whose JSON files can be exchanged."""
    root = tmp_path_factory.mktemp("indexes")
    return convert(tiny_folders["sd3.5-medium"], root / "model", "diffusers", max_shard_bytes=3_000_000)


def describe(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        inspect(path)


def test_generated_json_files(folder):
    texts = {name: (folder / name).read_text() for name in NAMES}
    described = refused = 0
    for seed, random in cases(12):
        name = random.choice(NAMES)
        value = json.loads(texts[name])
        for _ in range(random.choice((1, 1, 2, 3))):
            value = mutated(value, random)
        text = json.dumps(value)
        if random.random() < 0.2:
            place = random.randrange(len(text) + 1)
            text = text[:place] + random.choice(("[" * 3000, "9" * 5000, "NaN", '"', "\0", "\\ud800")) + text[place:]
        (folder / name).write_text(text)
        succeeded = survives(lambda: describe(folder), (CheckpointError,), f"{seed} ({name})")
        described, refused = described + succeeded, refused + (not succeeded)
        (folder / name).write_text(texts[name])
    assert described
    assert refused


# Every input that ever failed: with which error of Python's.
REGRESSIONS = {
    "nesting (RecursionError)": ("vae/config.json", '{"a":' * 3000),
    "digits (ValueError)": ("vae/config.json", '{"norm_num_groups": ' + "9" * 5000 + "}"),
    "groups null (TypeError)": ("vae/config.json", '{"norm_num_groups": null}'),
    "shift of 400 digits (OverflowError)": ("scheduler/scheduler_config.json", '{"shift": 1' + "0" * 400 + "}"),
    "shift of 40 digits": ("scheduler/scheduler_config.json", '{"shift": 1' + "0" * 39 + "}"),
    "heads of 20 digits": ("text_encoder/config.json", '{"num_attention_heads": 99999999999999999999}'),
    "activation that is a list (TypeError)": ("text_encoder/config.json", '{"hidden_act": ["gelu"]}'),
    "shard that is a number": (INDEX, '{"weight_map": {"a": 1}}'),
    "shard of 5,000 letters (OSError)": (INDEX, '{"weight_map": {"a": "' + "x" * 5000 + '.safetensors"}}'),
    "shard with a zero byte (ValueError)": (INDEX, '{"weight_map": {"a": "\\u0000.safetensors"}}'),
    "shard that is half a character": (INDEX, '{"weight_map": {"a": "\\ud800.safetensors"}}'),
    "the same key twice": (INDEX, '{"weight_map": {}, "weight_map": {}}'),
    "an empty map": (INDEX, '{"weight_map": {}}'),
}


@pytest.mark.parametrize("case", REGRESSIONS)
def test_inputs_that_once_failed(folder, tmp_path, case):
    name, text = REGRESSIONS[case]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_text(text)
    problems: list[str] = []
    if survives(lambda: problems.extend(inspect(copy).problems), (CheckpointError,), case):
        assert problems
    else:
        refuses(lambda: inspect(copy), copy / name)


def test_a_pipe_in_the_place_of_a_file(folder, tmp_path):
    import os

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "vae" / "config.json").unlink()
    os.mkfifo(copy / "vae" / "config.json")
    os.mkfifo(copy / "pipe.safetensors")
    describe(copy)
    refuses(lambda: inspect(copy / "pipe.safetensors"), "pipe.safetensors", "not a regular file")
