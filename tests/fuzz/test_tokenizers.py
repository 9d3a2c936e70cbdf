"""Broken tokenizer folders: each is read and then tokenizes, or is refused with our error, soon and in few words.

MMDIT_FUZZ_SECONDS sets how long the test draws folders; one that fails is named by its seed.
"""

import base64
import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from encoders import CLIPTokenizer, T5Tokenizer
from encoders.tokenize import MissingTokenizerError, TokenizerFileError
from fuzzing import SECONDS
from mmdit.embedded import EMBEDDED

FEWEST = 30  # folders, however slow the machine
TEXTS = ("a red circle", "\u00e9\u0301 \ufdfa \U0001f600!", "</s> <|endoftext|> b b", "")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 1e300, 0.5, "", "a", "a b", "\u202e", "x" * 5000, [], {}),
    *([None], [[]], ["a", "b"], {"a": {}}, {"content": "a"}, "AAAA", 2_000_000),
)
Folder = dict[str, bytes]


def charsmap(r: random.Random) -> bytes:
    """A character map of one block of 256 units, in which "b" becomes "a", often broken."""
    units = [0] * 256
    units[98], units[99] = 98 | 1 << 8 | 1 << 10, 1 << 31
    data = bytearray(struct.pack("<257I", 1024, *units) + b"a\0")
    for _ in range(r.randrange(4)):
        data[r.choice((0, 1, 2, 3, 4 + 4 * 98, 4 + 4 * 98 + 1, 4 + 4 * 98 + 2, r.randrange(len(data))))] = r.randrange(
            256
        )
    return bytes(data[: r.choice((len(data), len(data), r.randrange(len(data))))])


def changed(value: Any, r: random.Random) -> Any:
    """A JSON value with one place changed: replaced, left out or renamed."""
    if isinstance(value, dict) and value and r.random() < 0.85:
        key, found = r.choice([*value]), dict(value)
        if r.random() < 0.2:
            del found[key]
        elif r.random() < 0.2:
            found[r.choice(("", "a", f"{key}x", "7"))] = found.pop(key)
        else:
            found[key] = changed(found[key], r)
        return found
    if isinstance(value, list) and value and r.random() < 0.75:
        i = r.randrange(len(value))
        return [*value[:i], changed(value[i], r), *value[i + r.randrange(2) :]]
    return r.choice(VALUES)


def broken(files: Mapping[str, bytes], r: random.Random) -> Folder:
    """The files of a folder, one of them changed, cut, left out or with other bytes in it."""
    found, name = dict(files), r.choice([*files])
    data = found[name]
    kind = r.random()
    if name == "tokenizer.json" and kind < 0.3:
        content = json.loads(data)
        content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap(r)).decode()}
        found[name] = json.dumps(content).encode()
    elif name.endswith(".json") and kind < 0.8:
        found[name] = json.dumps(changed(json.loads(data), r)).encode()
    elif kind < 0.85:
        del found[name]
    elif kind < 0.9:
        found[name] = data[: r.randrange(len(data))]
    else:
        edited = bytearray(data)
        for _ in range(r.randrange(1, 5)):
            edited[r.randrange(len(edited))] = r.randrange(256)
        found[name] = bytes(edited)
    return found


@pytest.fixture(scope="module")
def spiece() -> bytes:
    model, text = (
        BytesIO(),
        "a photo of a cat and the dog in a red house with many small windows on the hill by the sea ",
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text[i:] + text[:i] for i in range(len(text))]),
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


def seeds() -> Iterator[int]:
    end, seed = time.monotonic() + SECONDS, 0
    while seed < FEWEST or time.monotonic() < end:
        yield seed
        seed += 1


def test_a_broken_folder_is_read_or_refused(tmp_path: Path, spiece: bytes) -> None:
    whole = {
        name: {file.name: file.read_bytes() for file in (EMBEDDED / name).iterdir() if file.is_file()}
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
    }
    config = json.dumps({"extra_ids": 3, "model_max_length": 512}).encode()
    whole["spiece"] = {"spiece.model": spiece, "tokenizer_config.json": config}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds():
        r = random.Random(seed)
        name = r.choice([*whole])
        reader: Callable[[Path], CLIPTokenizer | T5Tokenizer]
        reader = T5Tokenizer.from_folder if name in ("tokenizer_3", "spiece") else CLIPTokenizer.from_folder
        folder = tmp_path / str(seed)
        folder.mkdir()
        for file, data in broken(whole[name], r).items():
            (folder / file).write_bytes(data)
        began = time.process_time()
        try:
            tokenizer = reader(folder)
            for text in TEXTS:
                tokenizer.encode(text)
        except (MissingTokenizerError, TokenizerFileError) as error:
            assert len(str(error)) < 2500 and str(tmp_path) in str(error), seed
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {name}: {type(error).__name__}: {str(error)[:300]}") from error
        assert time.process_time() - began < 5, seed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KiB more than before"
