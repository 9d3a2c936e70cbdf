"""Files of captures: every file is read, or refused by our own error that names it."""

import json

import pytest
import torch

import mmdit
from fuzzing import cases, mutated, survives
from inspected import inputs, model
from mmdit import CheckpointError, reducers
from mmdit.checkpoints.safetensors_io import open_tensors, write_tensors
from refusals import refuses

POST, PATTERN, OUT = (f"joint_blocks.1.{part}" for part in ("x_block.resid_post", "attend.pattern", "x_block.mlp.out"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file with values, narrowed values, patterns and a running histogram, whose labels are infinite."""
    path = tmp_path_factory.mktemp("captures") / "whole.safetensors"
    kept = {OUT: reducers.running(reducers.histogram([-1.0, 1.0])), PATTERN: reducers.mean("head")}
    small = model()
    with mmdit.capture(small, [POST, PATTERN, OUT], reduce=kept, to=path):
        small(*inputs())
        small(*inputs(2))
    return path


def read(path):
    seen = mmdit.load_capture(path)
    for name in seen:
        for entry in seen.of(name).entries:
            entry.read()
        seen.labelled(name)
    repr(seen)


def written(path, whole, about):
    tensors, _ = open_tensors(whole)
    text = about if isinstance(about, str) else json.dumps(about)
    write_tensors(path, tensors, {"format": "mmdit capture 1", "capture": text})
    return path


def notes(whole):
    return json.loads(open_tensors(whole)[1]["capture"])


def test_what_was_written_is_read(whole):
    seen = mmdit.load_capture(whole)
    assert seen.of(OUT).labels["bin"] == ((-float("inf"), -1.0), (-1.0, 1.0), (1.0, float("inf")))
    assert seen[POST].shape == (2, 2, 6, 128)
    read(whole)


def test_generated_notes(whole, tmp_path):
    path, about = tmp_path / "one.safetensors", notes(whole)
    taken = refused = 0
    for seed, random in cases(300):
        value = about
        for _ in range(random.choice((1, 1, 2, 3))):
            value = mutated(value, random)
        text = json.dumps(value)
        if random.random() < 0.2:
            place = random.randrange(len(text) + 1)
            text = text[:place] + random.choice(("[" * 3000, "9" * 5000, "NaN", '"', "\\ud800")) + text[place:]
        succeeded = survives(lambda: mmdit.load_capture(written(path, whole, text)), (CheckpointError,), seed)  # noqa: B023
        if succeeded:
            survives(lambda: read(path), (CheckpointError, ValueError), seed)  # calls that do not stack say so
        taken, refused = taken + succeeded, refused + (not succeeded)
    assert taken >= 1
    assert refused > 5


def test_generated_bytes(whole, tmp_path):
    path, data = tmp_path / "one.safetensors", whole.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for seed, random in cases(300):
        broken = bytearray(data)
        for _ in range(random.choice((1, 2, 8))):
            broken[random.randrange(length)] = random.randrange(256)
        if random.random() < 0.3:
            broken = broken[: random.randrange(len(broken))]
        path.write_bytes(broken)
        survives(lambda: read(path), (CheckpointError, ValueError), seed)


def changed(about, *places, to):
    """A copy with another value at a place."""
    copy = json.loads(json.dumps(about))
    inner = copy
    for place in places[:-1]:
        inner = inner[place]
    inner[places[-1]] = to
    return copy


# What is changed of the first series, that of the pattern, and what the error names.
BROKEN = {
    "no names": (("names",), None, "names"),
    "one_branch is a number": (("one_branch",), 1, "one_branch"),
    "a series of two parts": (("series", 0), ["a", []], "series"),
    "a point that was not asked for": (("series", 0, 0), "vae.decoder.conv_in", "vae.decoder.conv_in/0"),
    "an axis too many": (("series", 0, 1), ["token", "channel", "head"], PATTERN),
    "labels of no axis": (("series", 0, 2), {"head": [0]}, PATTERN),
    "labels of another length": (("series", 0, 2), {"query": [0, 1]}, PATTERN),
    "a label that is an object": (("series", 0, 2), {"token": [{}]}, "label"),
    "a mark that is a text": (("series", 0, 3), "no", PATTERN),
    "no entries": (("series", 0, 5), [], PATTERN),
    "a step that is a truth": (("series", 0, 5, 0, 0, 1), True, PATTERN),
    "a sigma that is a text": (("series", 0, 5, 0, 0, 3), "1", PATTERN),
    "samples of another number": (("series", 0, 5, 0, 1), [0], PATTERN),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_notes_are_refused_by_name(whole, tmp_path, case):
    places, value, said = BROKEN[case]
    path = written(tmp_path / "one.safetensors", whole, changed(notes(whole), *places, to=value))
    refuses(lambda: mmdit.load_capture(path), path, said)


def test_tensors_and_notes_must_belong_together(whole, tmp_path):
    about = notes(whole)
    without = about | {"series": about["series"][1:]}
    path = written(tmp_path / "one.safetensors", whole, without)
    refuses(lambda: mmdit.load_capture(path), path, f"{PATTERN}/0")
    twice = about | {"series": [*about["series"], about["series"][0]]}
    refuses(lambda: mmdit.load_capture(written(path, whole, twice)), path, PATTERN)
    more = changed(about, "series", 0, 5, to=about["series"][0][5] * 2)
    refuses(lambda: mmdit.load_capture(written(path, whole, more)), path, f"{PATTERN}/2")
    tensors, _ = open_tensors(whole)
    write_tensors(path, tensors, {"format": "mmdit capture 1"})
    refuses(lambda: mmdit.load_capture(path), path)
    assert torch.equal(mmdit.load_capture(whole)[POST], mmdit.load_capture(whole)[POST])
