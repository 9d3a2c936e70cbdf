"""The files of one tokenizer folder: found, bounded in size, and checked before the tokenizers library gets them.

The library trusts its input: it panics on an empty vocabulary and reads past the end of a broken character map. Its
input is therefore checked here first, and a panic that still happens becomes a `TokenizerFileError`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from encoders.json_files import MAX_BYTES, JSONError, described, parse_json, printable, read_bytes

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
KNOWN_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", *CONFIG_FILES)
Needs = tuple[tuple[tuple[str, ...], ...], ...]  # each need is a choice of sets of files, one of which must be complete

MAX_TOKENS = 200_000  # CLIP has 49,408, T5 32,100
MAX_TOKEN_LENGTH = 256  # characters; the longest official one has 32
MAX_TEXT = 2_000_000  # characters of all tokens together; CLIP has 0.4 million
MAX_ADDED = 10_000  # added tokens, extra_ids among them; officially 100


class MissingTokenizerError(FileNotFoundError):
    """Tokenizer files are not where they should be; the message lists them and says where they come from."""


class TokenizerFileError(ValueError):
    """A tokenizer file cannot be used; the message names the file and what is wrong in it."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of one folder, held as bytes so that they can be written back unchanged."""

    path: Path
    data: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path, needs: Needs) -> Self:
        """Read the known files of a folder.

        Raises:
            MissingTokenizerError: a needed file is missing.
            TokenizerFileError: a file is larger than any tokenizer's, or cannot be read.
        """
        require(path.parent, {path.name: needs})
        try:
            found = {name: read_bytes(path / name) for name in KNOWN_FILES if (path / name).is_file()}
        except JSONError as error:
            raise TokenizerFileError(str(error)) from error
        if large := [name for name, data in found.items() if len(data) > MAX_BYTES]:
            raise TokenizerFileError(
                f"{path / large[0]} has more than {MAX_BYTES} bytes; no tokenizer file is so large"
            )
        return cls(path, found)

    def json(self, name: str) -> dict[str, Any]:
        """Parse a JSON file that holds an object; {} where the file does not exist."""
        try:
            value: dict[str, Any] = parse_json(self.data.get(name, b"{}"), self.path / name, kind=dict)
        except JSONError as error:
            raise TokenizerFileError(str(error)) from error
        return value

    @contextmanager
    def blame(self, name: str) -> Iterator[None]:
        """Turn every failure inside, a panic of the tokenizers library too, into an error that names the file."""
        try:
            yield
        except TokenizerFileError:
            raise
        except BaseException as error:  # the library raises nothing narrower than Exception, and its panic is none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise TokenizerFileError(f"{self.path / name}: {printable(said, 500)}") from error


def require(root: Path, needs: Mapping[str, Needs]) -> None:
    """Raise MissingTokenizerError, which lists everything that is missing, unless each folder has what it needs."""
    missing = []
    for folder, choice in ((folder, choice) for folder, choices in needs.items() for choice in choices):
        lacks = [[name for name in names if not (root / folder / name).is_file()] for names in choice]
        if all(lacks):
            missing.append(f"{folder}/: no {' or '.join(' and '.join(names) for names in lacks)}")
    if missing:
        raise MissingTokenizerError(
            f"tokenizer files are missing in {root}:\n  " + "\n  ".join(missing) + "\n"
            "Copy them there from the official repository, stabilityai/stable-diffusion-3.5-large on Hugging Face:\n"
            f'  hf download stabilityai/stable-diffusion-3.5-large --include "tokenizer*/*" --local-dir {root}'
        )


def expect(value: object, kind: type | tuple[type, ...], what: str) -> Any:
    """Return a value from a file, or raise ValueError that names it unless it has the kind; true is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {dict: "an object", list: "an array", str: "a string", int: "a whole number", bool: "true or false"}
        expected = "a number" if isinstance(kind, tuple) else names[kind]
        raise ValueError(f"{what} is {described(value)}, expected {expected}")
    return value


def checked_tokens(tokens: Sequence[Any], what: str, most: int = MAX_TOKENS) -> None:
    """Raise ValueError unless these are strings, some and not too many, none of them too long."""
    if not 0 < len(tokens) <= most:
        raise ValueError(f"{what} has {len(tokens)} entries, expected 1 to {most}")
    for token in tokens:
        if len(expect(token, str, f"a token of {what}")) > MAX_TOKEN_LENGTH:
            raise ValueError(f"{what} has a token of {len(token)} characters, {MAX_TOKEN_LENGTH} are the most")
    if (total := sum(map(len, tokens))) > MAX_TEXT:
        raise ValueError(f"the tokens of {what} have {total} characters, {MAX_TEXT} are the most")


def checked_vocabulary(value: object) -> dict[str, int]:
    """A vocabulary {token: id} whose ids are 0 .. n - 1, each once; raises ValueError for everything else."""
    vocabulary: dict[str, int] = expect(value, dict, "vocab")
    checked_tokens(list(vocabulary), "vocab")
    for token, index in vocabulary.items():
        expect(index, int, f"the id of {printable(token, 40)!r}")
    if wrong := sorted(set(vocabulary.values()) ^ set(range(len(vocabulary)))):
        raise ValueError(f"ids must be 0..{len(vocabulary) - 1}, each once; out of range or missing: {wrong[:9]}")
    return vocabulary


def checked_merges(rows: Sequence[object]) -> list[tuple[str, str]]:
    """The merges of a BPE model as pairs, from "a b" or ["a", "b"]; raises ValueError for everything else."""
    if len(rows) > MAX_TOKENS:
        raise ValueError(f"there are {len(rows)} merges, {MAX_TOKENS} are the most")
    pairs = []
    for i, row in enumerate(rows, 1):
        pair = row.split(" ") if isinstance(row, str) else row
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"a merge must be a pair; line {i}: {printable(repr(row), 80)}")
        if not pair[0].startswith("#version"):
            pairs.append((pair[0], pair[1]))
    return pairs


def checked_pieces(value: Any, unk_id: Any) -> tuple[list[tuple[str, float]], int]:
    """The pieces [token, score] of a Unigram model, and the id of its unknown token; raises ValueError otherwise."""
    rows = expect(value, list, "model.vocab")
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) != 2:
            raise ValueError(f"entry {i} of model.vocab is {described(row)}, expected [token, score]")
        if not math.isfinite(expect(row[1], (int, float), f"the score of entry {i} of model.vocab")):
            raise ValueError(f"the score of entry {i} of model.vocab is {row[1]}, expected a finite number")
    checked_tokens([token for token, _ in rows], "model.vocab")
    if not 0 <= expect(unk_id, int, "unk_id") < len(rows):
        raise ValueError(f"unk_id is {unk_id}, expected the id of one of the {len(rows)} pieces")
    return [(token, float(score)) for token, score in rows], unk_id


def checked_charsmap(data: bytes) -> bytes:
    """A precompiled character map, checked so that no text makes the library read outside the map.

    It is the size of a double-array trie, the trie, and the texts that its leaves point to, each ended by a zero
    (sentencepiece `normalizer.cc`; the fields of a unit are those of `darts_clone`). A step from unit i goes to
    i ^ offset, from there by one byte to another unit of the same block of 256.

    Raises:
        ValueError: the sizes do not fit, or a unit or leaf points outside.
    """
    size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    if size < 1024 or size % 1024 or size > len(data) - 4:
        raise ValueError(f"precompiled_charsmap of {len(data)} bytes says that its trie has {size}, which cannot be")
    texts = data[4 + size :]
    texts.decode("utf-8")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    inner = units >> 31 == 0
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    targets = np.arange(len(units)) ^ offsets
    if (bad := int((inner & (targets >= len(units))).sum())) != 0:
        raise ValueError(f"precompiled_charsmap: {bad} of {len(units)} units of its trie point outside of it")
    values = units[targets[inner & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF
    starts = np.array([byte & 0xC0 != 0x80 for byte in texts] + [True])
    if (bad := int((values >= len(starts)).sum())) or (bad := int((~starts[values]).sum())):
        raise ValueError(f"precompiled_charsmap: {bad} of {len(values)} leaves point to no text")
    return data
