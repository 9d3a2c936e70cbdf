"""Prompts to token ids: CLIP's byte-level BPE and T5's Unigram, built from the official tokenizer folders.

Ids are those of transformers 5's `CLIPTokenizer` and `T5Tokenizer` on the same folder, which is what diffusers'
`StableDiffusion3Pipeline` uses. Which tokens are special is data of the folder, not of this code: CLIP-G's makes "!"
its padding, so "wow!" is 2781, 0 there and 2781, 256 in CLIP-L's, although both have the same vocabulary and merges.
"""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from encoders.json_files import JSONError, parse_json

_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_KNOWN_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", *_CONFIG_FILES)
_Needs = tuple[tuple[tuple[str, ...], ...], ...]  # each need is a choice of file sets, one of which must be complete
_CLIP_NEEDS: _Needs = (
    (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    (("tokenizer_config.json",), ("special_tokens_map.json",), ("tokenizer.json",)),
)
_T5_NEEDS: _Needs = ((("tokenizer.json",), ("spiece.model",)),)

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CLIP_ROLES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_T5_ROLES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_Added = dict[str, tuple[int | None, Any]]  # by text: the declared id, if any, and the AddedToken
# openai/CLIP clip/simple_tokenizer.py: the pattern that cuts a prompt into words
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class MissingTokenizerError(FileNotFoundError):
    """Tokenizer files are not where they should be; the message lists them and says where they come from."""


class TokenizerFileError(ValueError):
    """A tokenizer file cannot be used; the message names the file and what is wrong in it."""


@dataclass(frozen=True)
class Tokens:
    """A prompt as token ids with its beginning and end tokens, without padding.

    Attributes:
        text: the prompt as it was given.
        ids: BOS ... EOS for CLIP, ... EOS for T5.
        offsets: for each id, the characters `text[start:stop]` that it came from; (0, 0) for the added BOS and EOS.
            Parts of one character (bytes in CLIP, a compatibility form in T5) share its span, and a character that
            normalization composes has the span of its first code point or of all.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class Padded(NamedTuple):
    """What `pad` returns: exactly `length` ids, the tokens that were kept, and the prompt text that was cut off."""

    ids: tuple[int, ...]
    tokens: Tokens
    cut: str


def pad(tokens: Tokens, length: int, pad_id: int) -> Padded:
    """Bring a prompt to `length` ids: padding after EOS, or as in transformers the first `length - 1` ids and EOS.

    `cut` is the prompt from the first lost token on. Raises ValueError when `length` has no room for BOS and EOS.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, not {length}")
    if len(tokens.ids) <= length:
        return Padded(tokens.ids + (pad_id,) * (length - len(tokens.ids)), tokens, "")
    ids = tokens.ids[: length - 1] + tokens.ids[-1:]
    kept = Tokens(tokens.text, ids, tokens.offsets[: length - 1] + tokens.offsets[-1:])
    return Padded(ids, kept, tokens.text[tokens.offsets[length - 1][0] :])


@dataclass(frozen=True)
class _Files:
    """The tokenizer files of one folder, held as bytes so that they can be written back unchanged."""

    path: Path
    data: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path, needs: _Needs) -> Self:
        _require(path.parent, {path.name: needs})
        return cls(path, {name: (path / name).read_bytes() for name in _KNOWN_FILES if (path / name).is_file()})

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, {} when there is no such file."""
        try:
            value: dict[str, Any] = parse_json(self.data.get(name, b"{}"), self.path / name, kind=dict)
        except JSONError as error:
            raise TokenizerFileError(str(error)) from error
        return value

    @contextmanager
    def blame(self, name: str) -> Iterator[None]:
        """Turn whatever goes wrong inside into an error that names the file."""
        try:
            yield
        except Exception as error:  # the tokenizers library raises nothing narrower; it is raised again, with the file
            if isinstance(error, TokenizerFileError):
                raise
            raise TokenizerFileError(f"{self.path / name}: {type(error).__name__}: {error}") from error


def _require(root: Path, needs: Mapping[str, _Needs]) -> None:
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


@dataclass(frozen=True, eq=False)
class _Tokenizer:
    """What both tokenizers share; `eos` and `pad` are ids, `files` is what the tokenizer was read from."""

    eos: int
    pad: int
    max_length: int
    vocab_size: int
    backend: Any = field(repr=False)
    files: _Files = field(repr=False)

    def encode(self, text: str) -> Tokens:
        """Turn one prompt of any length into ids, without truncation or padding (see `pad`).

        Raises TypeError for what is not a str, UnicodeEncodeError (a ValueError) for a lone surrogate.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a str, not {type(text).__name__}")
        text.encode("utf-8")  # says where a surrogate stands; the library would call it a TypeError
        encoding = self.backend.encode(text)
        return Tokens(text, tuple(encoding.ids), tuple(encoding.offsets))

    __call__ = encode

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were read, into `folder`.

        Raises FileExistsError when `folder` holds tokenizer files of other names: they would change what is read back.
        """
        target = Path(folder)
        others = [name for name in _KNOWN_FILES if name not in self.files.data and (target / name).exists()]
        if others:
            raise FileExistsError(f"{target} already holds files of another tokenizer: {', '.join(others)}")
        target.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.data.items():
            (target / name).write_bytes(data)


@dataclass(frozen=True, eq=False)
class CLIPTokenizer(_Tokenizer):
    """CLIP's tokenizer: NFC, lower case, words without their white space, then byte-level BPE.

    Vocabulary and merges come from vocab.json and merges.txt, or from tokenizer.json where those are not there.
    """

    bos: int

    @classmethod
    def from_folder(cls, path: str | Path, *, pad_token: str | None = None) -> Self:
        """Build from `tokenizer/`; `pad_token` is for files that name none. Raises as `Tokenizers.from_folder` does."""
        files = _Files.read(Path(path), _CLIP_NEEDS)
        roles, added = _special_tokens(files, _CLIP_ROLES | ({"pad_token": pad_token} if pad_token else {}))
        if pad_token not in (None, roles.get("pad_token")) or "pad_token" not in roles:
            raise TokenizerFileError(f"{files.path}: its pad_token is {roles.get('pad_token')}, asked for: {pad_token}")
        backend = Tokenizer(_clip_model(files, roles["unk_token"]))
        # transformers also turns white space runs to one space, but the words below have none of it
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return cls(**_finish(files, backend, roles, added, ["bos_token", "$A", "eos_token"]))


class T5Tokenizer(_Tokenizer):
    """T5's tokenizer: sentencepiece's nmt_nfkc character map, white space to "▁", then a Unigram model.

    Pieces and character map come from tokenizer.json, or from spiece.model where that is not there: equal ids for
    every text, because as in transformers 5 nothing else is taken from either. sentencepiece itself differs in U+0085
    (a space here), marks after a compatibility character (often dropped here) and segmentations of equal score.
    """

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Build from `tokenizer_3/`. Raises as `Tokenizers.from_folder` does."""
        files = _Files.read(Path(path), _T5_NEEDS)
        source = "tokenizer.json" if "tokenizer.json" in files.data else "spiece.model"
        with files.blame(source):
            pieces, unk_id, charsmap = (_t5_json if source == "tokenizer.json" else _t5_spiece)(files)
            backend = Tokenizer(Unigram(pieces, unk_id, False))
            if charsmap:
                backend.normalizer = normalizers.Precompiled(charsmap)
        to_marks = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), to_marks])
        roles, added = _special_tokens(files, _T5_ROLES)
        extra = [piece for piece, _ in pieces if piece.startswith("<extra_id_")]
        added = {text: (None, AddedToken(text, lstrip=True, rstrip=True, special=True)) for text in extra} | added
        return cls(**_finish(files, backend, roles, added, ["$A", "eos_token"]))


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of Stable Diffusion 3: CLIP-L, CLIP-G and T5; None for one that no encoder reads with."""

    clip_l: CLIPTokenizer | None
    clip_g: CLIPTokenizer | None
    t5: T5Tokenizer | None

    @classmethod
    def from_folder(cls, folder: str | Path, *, clip_l: bool = True, clip_g: bool = True, t5: bool = True) -> Self:
        """Build from a folder that holds `tokenizer/`, `tokenizer_2/` and `tokenizer_3/`, without those set to False.

        Raises MissingTokenizerError, one for all that is missing, or TokenizerFileError for a malformed file.
        """
        root, read = Path(folder), {"tokenizer": clip_l, "tokenizer_2": clip_g, "tokenizer_3": t5}
        needs = {"tokenizer": _CLIP_NEEDS, "tokenizer_2": _CLIP_NEEDS, "tokenizer_3": _T5_NEEDS}
        _require(root, {name: needs[name] for name in needs if read[name]})
        one, two = (CLIPTokenizer.from_folder(root / name) if read[name] else None for name in list(needs)[:2])
        return cls(one, two, T5Tokenizer.from_folder(root / "tokenizer_3") if t5 else None)

    def save(self, folder: str | Path) -> None:
        """Write the files back, byte for byte, so that `from_folder(folder)` gives equal ids; raises as theirs do."""
        for name, tokenizer in (("tokenizer", self.clip_l), ("tokenizer_2", self.clip_g), ("tokenizer_3", self.t5)):
            if tokenizer is not None:
                tokenizer.save(Path(folder) / name)


def _clip_model(files: _Files, unk_token: str) -> BPE:
    split = {"vocab.json", "merges.txt"} <= files.data.keys()
    with files.blame("vocab.json" if split else "tokenizer.json"):
        model: Any = {"vocab": files.json("vocab.json")} if split else files.json("tokenizer.json")["model"]
        ids = model["vocab"].values()
        if sorted(ids) != list(range(len(ids))):
            wrong = sorted(set(ids) ^ set(range(len(ids))))
            raise ValueError(f"ids must be 0..{len(ids) - 1}, each once; out of range or missing: {wrong[:9]}")
    with files.blame("merges.txt" if split else "tokenizer.json"):
        # "a b" in merges.txt and older tokenizer.json, ["a", "b"] in newer ones
        rows = [row.decode() for row in files.data["merges.txt"].splitlines()] if split else model["merges"]
        pairs = [tuple(row.split(" ") if isinstance(row, str) else row) for row in rows]
        odd = [f"line {i}: {rows[i - 1]!r}" for i, pair in enumerate(pairs, 1) if len(pair) != 2]
        if odd:
            raise ValueError(f"a merge must be a pair; {odd[0]}")
        merges: Any = [pair for pair in pairs if not pair[0].startswith("#version")]
        return BPE(model["vocab"], merges, end_of_word_suffix="</w>", unk_token=unk_token)


def _t5_json(files: _Files) -> tuple[list[tuple[str, float]], int, bytes]:
    content = files.json("tokenizer.json")
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    charsmap = next((step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"), "")
    pieces = [(piece, score) for piece, score in content["model"]["vocab"]]
    return pieces, content["model"]["unk_id"], base64.b64decode(charsmap)


def _t5_spiece(files: _Files) -> tuple[list[tuple[str, float]], int, bytes]:
    """Pieces by sentencepiece's public interface; the character map, which it does not show, by the wire format."""
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(files.data["spiece.model"])
    proto = dict(_fields(files.data["spiece.model"]))  # sentencepiece_model.proto: 2 trainer_spec, 3 normalizer_spec
    if dict(_fields(proto[2])).get(3, 1) != 1:  # model_type, 1 is UNIGRAM and the default
        raise ValueError("its model is not Unigram")
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    count = files.json("tokenizer_config.json").get("extra_ids", 100)  # the last comes first: t5/tokenization_t5.py
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(count))]
    return pieces, model.unk_id(), dict(_fields(proto[3])).get(2, b"")  # precompiled_charsmap


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Fields (number, int or bytes) of a protobuf message (protobuf.dev/programming-guides/encoding).

    A key is 8 number + wire type: 0 is a varint, 2 has its size before it, 1 and 5 are words of 8 and 4 bytes.
    """
    rest = memoryview(message)
    while rest:
        key, rest = _varint(rest)
        kind = key & 7
        value, rest = _varint(rest) if kind in (0, 2) else ({1: 8, 5: 4}[kind], rest)
        yield key >> 3, bytes(rest[:value]) if kind else value
        rest = rest[value:] if kind else rest


def _varint(message: memoryview) -> tuple[int, memoryview]:
    """Seven bits a byte, the lowest first, the top bit says that more follow: (value, rest of the message)."""
    size = next(i for i, byte in enumerate(message, 1) if byte < 0x80)
    return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(message[:size])), message[size:]


def _special_tokens(files: _Files, defaults: Mapping[str, str]) -> tuple[dict[str, str], _Added]:
    """Which token has which role, and the added tokens; `defaults` are the roles that no file needs to name.

    The order is transformers': added_tokens_decoder in tokenizer_config.json; only without it special_tokens_map.json
    and the added tokens of tokenizer.json.
    """
    stated, source = files.json("tokenizer_config.json"), "tokenizer_config.json"
    declared = stated.get("added_tokens_decoder")
    if declared is None:
        if "added_tokens.json" in files.data:
            raise TokenizerFileError(f"{files.path / 'added_tokens.json'}: not read without an added_tokens_decoder")
        source = "special_tokens_map.json" if "special_tokens_map.json" in files.data else "tokenizer.json"
        stated = stated | files.json("special_tokens_map.json")
        declared = {token["id"]: token for token in files.json("tokenizer.json").get("added_tokens", [])}
    with files.blame(source):
        added: _Added = {token["content"]: (int(i), _added_token(token, False)) for i, token in declared.items()}
        named = {role: _added_token(stated[role]) for role in _ROLES if stated.get(role)}
        named = {role: _added_token(text) for role, text in defaults.items()} | named
        more = [_added_token(token) for token in stated.get("additional_special_tokens") or []]
    for token in (*named.values(), *more):
        added.setdefault(token.content, (None, token))
    return {role: token.content for role, token in named.items()}, added


def _added_token(value: str | dict[str, Any], special: bool = True) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special)
    return AddedToken(**({"special": special} | {k: v for k, v in value.items() if k not in ("id", "__type")}))


def _finish(files: _Files, backend: Any, roles: dict[str, str], added: _Added, template: list[str]) -> dict[str, Any]:
    """Add the special tokens, put BOS and EOS around a prompt as `template` says; return the tokenizer's fields."""
    size = backend.get_vocab_size()
    backend.add_tokens([token for _, token in added.values()])
    for text, (declared, _) in added.items():
        given = backend.token_to_id(text)  # the library takes no ids, it makes up the next free one
        if (given >= size) if declared is None else (given != declared):
            raise TokenizerFileError(f"{files.path}: special token {text!r} has id {given}, declared: {declared}")
    ids = {role: backend.token_to_id(roles[role]) for role in (*template, "pad_token") if role != "$A"}
    ends, parts = [(roles[role], ids[role]) for role in ids], [roles.get(part, part) for part in template]
    backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ends)
    length = files.json("tokenizer_config.json").get("model_max_length", 77 if "bos_token" in ids else 512)
    facts = {"max_length": length, "vocab_size": backend.get_vocab_size(), "backend": backend, "files": files}
    return facts | {role.removesuffix("_token"): index for role, index in ids.items()}
