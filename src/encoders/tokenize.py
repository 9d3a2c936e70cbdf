"""Prompts to token ids: CLIP's byte-level BPE and T5's Unigram, built from the official tokenizer folders.

The ids equal those of transformers 5's `CLIPTokenizer` and `T5Tokenizer` on the same folder, which diffusers'
`StableDiffusion3Pipeline` uses. Which tokens are special is data of the folder and not of this code: CLIP-G's folder
makes "!" its padding, so "wow!" is 2781, 0 there and 2781, 256 with CLIP-L's, although both have the same vocabulary
and merges.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from encoders.json_files import described, printable
from encoders.tokenizer_files import (
    KNOWN_FILES,
    MAX_ADDED,
    MAX_TOKEN_LENGTH,
    MissingTokenizerError,
    Needs,
    TokenizerFileError,
    TokenizerFiles,
    checked_charsmap,
    checked_merges,
    checked_pieces,
    checked_tokens,
    checked_vocabulary,
    expect,
    require,
)

__all__ = [
    "CLIPTokenizer",
    "MissingTokenizerError",
    "Padded",
    "T5Tokenizer",
    "TokenizerFileError",
    "Tokenizers",
    "Tokens",
    "pad",
]

_CLIP_NEEDS: Needs = (
    (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    (("tokenizer_config.json",), ("special_tokens_map.json",), ("tokenizer.json",)),
)
_T5_NEEDS: Needs = ((("tokenizer.json",), ("spiece.model",)),)

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("additional_special_tokens", "extra_special_tokens")  # transformers 4's and 5's word for the same
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CLIP_ROLES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_T5_ROLES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# Entries of tokenizer_config.json that would change the ids and have one value that this code computes with.
FIXED: Mapping[str, Any] = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
CLIP_FIXED: Mapping[str, Any] = {**FIXED, "model_max_length": 77, "add_prefix_space": False, "do_lower_case": True}
T5_FIXED: Mapping[str, Any] = {**FIXED, "add_prefix_space": True, "sp_model_kwargs": {}}
_TRIED = "A cat, é \u00e9 \ufdfa \u0301 <|endoftext|> \U0001f600 </s>"  # a text to see that a new tokenizer works
_Added = dict[str, tuple[int | None, Any]]  # by text: the declared id, if any, and the AddedToken
# openai/CLIP clip/simple_tokenizer.py: the pattern that cuts a prompt into words
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokens:
    """A prompt as token ids with BOS (CLIP only) and EOS, without padding.

    Attributes:
        text: The prompt as it was given.
        ids: BOS ... EOS for CLIP, ... EOS for T5.
        offsets: For each id, the characters `text[start:stop]` that it came from; (0, 0) for the added BOS and EOS.
            Parts of one character (bytes in CLIP, a compatibility form in T5) share its span, and a character that
            normalization composes has the span of its first code point or of all.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class Padded(NamedTuple):
    """The result of `pad`: exactly `length` ids, the tokens that were kept, and the text that was cut off."""

    ids: tuple[int, ...]
    tokens: Tokens
    cut: str


def pad(tokens: Tokens, length: int, pad_id: int) -> Padded:
    """Pad a prompt to `length` ids after EOS, or cut it as transformers does to its first `length - 1` ids and EOS.

    `cut` in the result is the prompt from the first lost token on. Raises ValueError where `length` is below 2, which
    leaves no room for BOS and EOS.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, not {length}")
    if len(tokens.ids) <= length:
        return Padded(tokens.ids + (pad_id,) * (length - len(tokens.ids)), tokens, "")
    ids = tokens.ids[: length - 1] + tokens.ids[-1:]
    kept = Tokens(tokens.text, ids, tokens.offsets[: length - 1] + tokens.offsets[-1:])
    return Padded(ids, kept, tokens.text[tokens.offsets[length - 1][0] :])


@dataclass(frozen=True, eq=False)
class _Tokenizer:
    """The common part of both tokenizers; `eos` and `pad` are ids, `files` the files that it was read from."""

    eos: int
    pad: int
    max_length: int
    vocab_size: int
    backend: Any = field(repr=False)
    files: TokenizerFiles = field(repr=False)

    def encode(self, text: str) -> Tokens:
        """Tokenize one prompt of any length, without truncation or padding (see `pad`).

        Raises:
            TypeError: the prompt is not a str.
            UnicodeEncodeError: the prompt holds a lone surrogate (a ValueError).
            TokenizerFileError: the tokenizers library fails on the prompt, so its files must be broken.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a str, not {type(text).__name__}")
        text.encode("utf-8")  # says where a surrogate stands; the library would call it a TypeError
        with self.files.blame(""):
            encoding = self.backend.encode(text)
        return Tokens(text, tuple(encoding.ids), tuple(encoding.offsets))

    __call__ = encode

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were read, into `folder`.

        Raises FileExistsError where `folder` holds tokenizer files of other names, because reading `folder` would then
        give another tokenizer.
        """
        target = Path(folder)
        others = [name for name in KNOWN_FILES if name not in self.files.data and (target / name).exists()]
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
        files = TokenizerFiles.read(Path(path), _CLIP_NEEDS)
        _check_fixed(files, CLIP_FIXED)
        roles, added = _special_tokens(files, _CLIP_ROLES | ({"pad_token": pad_token} if pad_token else {}))
        if pad_token not in (None, roles.get("pad_token")) or "pad_token" not in roles:
            found = printable(str(roles.get("pad_token")), MAX_TOKEN_LENGTH)
            raise TokenizerFileError(f"{files.path}: its pad_token is {found}, asked for: {pad_token}")
        backend = Tokenizer(_clip_model(files, roles["unk_token"]))
        # transformers also turns white space runs to one space, but the words below have none of it
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return cls(**_finish(files, backend, roles, added, ["bos_token", "$A", "eos_token"]))


class T5Tokenizer(_Tokenizer):
    """T5's tokenizer: sentencepiece's nmt_nfkc character map, white space to "▁", then a Unigram model.

    Pieces and character map come from tokenizer.json, or else from spiece.model. Both give equal ids for every text,
    because nothing else is taken from either, as in transformers 5. sentencepiece itself differs in U+0085 (a space
    here), in marks after a compatibility character (often dropped here) and in segmentations of equal score.
    """

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Build from `tokenizer_3/`. Raises as `Tokenizers.from_folder` does."""
        files = TokenizerFiles.read(Path(path), _T5_NEEDS)
        _check_fixed(files, T5_FIXED)
        source = "tokenizer.json" if "tokenizer.json" in files.data else "spiece.model"
        with files.blame(source):
            pieces, unk_id, charsmap = (_t5_json if source == "tokenizer.json" else _t5_spiece)(files)
            backend = Tokenizer(Unigram(pieces, unk_id, False))
            if charsmap:
                backend.normalizer = normalizers.Precompiled(checked_charsmap(charsmap))
        to_marks = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), to_marks])
        roles, added = _special_tokens(files, _T5_ROLES)
        extra = [piece for piece, _ in pieces if piece.startswith("<extra_id_")]
        added = {text: (None, AddedToken(text, lstrip=True, rstrip=True, special=True)) for text in extra} | added
        return cls(**_finish(files, backend, roles, added, ["$A", "eos_token"]))


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of Stable Diffusion 3: CLIP-L, CLIP-G and T5; None for one that no encoder needs."""

    clip_l: CLIPTokenizer | None
    clip_g: CLIPTokenizer | None
    t5: T5Tokenizer | None

    @classmethod
    def from_folder(cls, folder: str | Path, *, clip_l: bool = True, clip_g: bool = True, t5: bool = True) -> Self:
        """Build from a folder that holds `tokenizer/`, `tokenizer_2/` and `tokenizer_3/`, without those set to False.

        Raises:
            MissingTokenizerError: files are missing; one error lists all of them.
            TokenizerFileError: a file is malformed, or asks for something else than this code computes.
        """
        root, read = Path(folder), {"tokenizer": clip_l, "tokenizer_2": clip_g, "tokenizer_3": t5}
        needs = {"tokenizer": _CLIP_NEEDS, "tokenizer_2": _CLIP_NEEDS, "tokenizer_3": _T5_NEEDS}
        require(root, {name: needs[name] for name in needs if read[name]})
        one, two = (CLIPTokenizer.from_folder(root / name) if read[name] else None for name in list(needs)[:2])
        return cls(one, two, T5Tokenizer.from_folder(root / "tokenizer_3") if t5 else None)

    def save(self, folder: str | Path) -> None:
        """Write the files of all three back, byte for byte; raises as `save` of a tokenizer does."""
        for name, tokenizer in (("tokenizer", self.clip_l), ("tokenizer_2", self.clip_g), ("tokenizer_3", self.t5)):
            if tokenizer is not None:
                tokenizer.save(Path(folder) / name)


def _clip_model(files: TokenizerFiles, unk_token: str) -> BPE:
    split = {"vocab.json", "merges.txt"} <= files.data.keys()
    with files.blame("vocab.json" if split else "tokenizer.json"):
        model: Any = {"vocab": files.json("vocab.json")} if split else _model(files.json("tokenizer.json"))
        vocabulary = checked_vocabulary(model.get("vocab"))
    with files.blame("merges.txt" if split else "tokenizer.json"):
        # "a b" in merges.txt and older tokenizer.json, ["a", "b"] in newer ones
        rows = [row.decode() for row in files.data["merges.txt"].splitlines()] if split else model.get("merges")
        merges = checked_merges(expect(rows, list, "model.merges"))
        return BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=unk_token)


def _model(content: Mapping[str, object]) -> dict[str, Any]:
    model: dict[str, Any] = expect(content.get("model"), dict, "model")
    return model


def _t5_json(files: TokenizerFiles) -> tuple[list[tuple[str, float]], int, bytes]:
    """Pieces, the id of the unknown token and the character map, which may be empty, from tokenizer.json."""
    content = files.json("tokenizer.json")
    model = _model(content)
    pieces, unk_id = checked_pieces(model.get("vocab"), model.get("unk_id"))
    normalizer = content.get("normalizer") or {}
    steps = expect(expect(normalizer, dict, "normalizer").get("normalizers", [normalizer]), list, "normalizers")
    maps = [step for step in steps if expect(step, dict, "a normalizer").get("type") == "Precompiled"]
    charsmap = expect(maps[0].get("precompiled_charsmap"), str, "precompiled_charsmap") if maps else ""
    try:
        return pieces, unk_id, base64.b64decode(charsmap, validate=True)
    except binascii.Error as error:
        raise ValueError(f"precompiled_charsmap is not base64: {error}") from error


def _t5_spiece(files: TokenizerFiles) -> tuple[list[tuple[str, float]], int, bytes]:
    """Pieces by sentencepiece's public interface; the character map, which it does not show, by the wire format."""
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(files.data["spiece.model"])
    proto = dict(_fields(files.data["spiece.model"]))  # sentencepiece_model.proto: 2 trainer_spec, 3 normalizer_spec
    if dict(_fields(proto[2])).get(3, 1) != 1:  # model_type, 1 is UNIGRAM and the default
        raise ValueError("its model is not Unigram")
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    count = expect(files.json("tokenizer_config.json").get("extra_ids", 100), int, "extra_ids")
    if not 0 <= count <= MAX_ADDED:
        raise ValueError(f"extra_ids in tokenizer_config.json is {count}, expected 0 to {MAX_ADDED} (officially 100)")
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(count))]  # the last is first: t5/tokenization_t5.py
    charsmap = dict(_fields(proto[3])).get(2, b"")  # precompiled_charsmap
    return *checked_pieces(pieces, model.unk_id()), charsmap


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Fields (number, int or bytes) of a protobuf message (protobuf.dev/programming-guides/encoding).

    A key is 8 number + wire type: 0 is a varint, 2 has its size before it, 1 and 5 are words of 8 and 4 bytes.
    """
    rest = memoryview(message)
    while rest:
        key, rest = _varint(rest)
        kind = key & 7
        if kind not in (0, 1, 2, 5):
            raise ValueError(f"not a sentencepiece model: wire type {kind}")
        value, rest = _varint(rest) if kind in (0, 2) else ({1: 8, 5: 4}[kind], rest)
        yield key >> 3, bytes(rest[:value]) if kind else value
        rest = rest[value:] if kind else rest


def _varint(message: memoryview) -> tuple[int, memoryview]:
    """Decode a varint (7 bits per byte, lowest first, top bit for continuation): (value, rest of the message)."""
    size = next((i for i, byte in enumerate(message[:10], 1) if byte < 0x80), None)
    if size is None:
        raise ValueError("not a sentencepiece model: a number in it does not end")
    return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(message[:size])), message[size:]


def _check_fixed(files: TokenizerFiles, fixed: Mapping[str, object]) -> None:
    """Refuse a tokenizer_config.json that asks for something else than this code computes, and a wrong length."""
    stated = files.json("tokenizer_config.json")
    for name, value in fixed.items():
        found = stated.get(name)
        if found is not None and (type(found) is not type(value) or found != value):
            raise TokenizerFileError(
                f"{files.path / 'tokenizer_config.json'}: {name} is {described(found)}, the tokenizers of Stable "
                f"Diffusion 3 have {value!r}; use the official file, or leave the entry out"
            )
    with files.blame("tokenizer_config.json"):
        length = stated.get("model_max_length")
        if length is not None and expect(length, (int, float), "model_max_length") < 2:
            raise ValueError(f"model_max_length is {length}, expected at least 2")


def _special_tokens(files: TokenizerFiles, defaults: Mapping[str, str]) -> tuple[dict[str, str], _Added]:
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
        with files.blame("tokenizer.json"):
            listed = expect(files.json("tokenizer.json").get("added_tokens", []), list, "added_tokens")
            declared = {str(_id(token)): token for token in listed}
    with files.blame(source):
        rows = expect(declared, dict, "added_tokens_decoder")
        tokens = [(_declared_id(key), _added_token(token, False)) for key, token in rows.items()]
        added: _Added = {token.content: (index, token) for index, token in tokens}
        named = {role: _added_token(stated[role]) for role in _ROLES if stated.get(role)}
        named = {role: _added_token(text) for role, text in defaults.items()} | named
        more = [_added_token(token) for name in _MORE for token in expect(stated.get(name) or [], list, name)]
        for token in (*named.values(), *more):
            added.setdefault(token.content, (None, token))
        checked_tokens(list(added), "the added tokens", MAX_ADDED)
    return {role: token.content for role, token in named.items()}, added


def _id(token: object) -> int:
    index: int = expect(expect(token, dict, "an added token").get("id"), int, "the id of an added token")
    return index


def _declared_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"{printable(repr(key), 40)} in added_tokens_decoder is no token id")
    return int(key[:20])


def _added_token(value: object, special: bool = True) -> AddedToken:
    """A token from its text or from an object with its text and flags."""
    entry = {"content": value} if isinstance(value, str) else expect(value, dict, "an added token")
    if not expect(entry.get("content"), str, "the content of an added token"):
        raise ValueError("an added token is empty")
    flags = {name: expect(entry[name], bool, f"{name} of an added token") for name in _FLAGS if name in entry}
    return AddedToken(entry["content"], **({"special": special} | flags))


def _finish(
    files: TokenizerFiles, backend: Any, roles: dict[str, str], added: _Added, template: list[str]
) -> dict[str, Any]:
    """Add the special tokens, put BOS and EOS around a prompt as `template` says; return the tokenizer's fields."""
    size = backend.get_vocab_size()
    with files.blame(""):
        backend.add_tokens([token for _, token in added.values()])
    for text, (declared, _) in added.items():
        given = backend.token_to_id(text)  # the library accepts no ids and assigns the next free one
        if (given >= size) if declared is None else (given != declared):
            shown = printable(repr(text), 80)
            raise TokenizerFileError(f"{files.path}: special token {shown} has id {given}, declared: {declared}")
    ids = {role: backend.token_to_id(roles[role]) for role in (*template, "pad_token") if role != "$A"}
    ends, parts = [(roles[role], ids[role]) for role in ids], [roles.get(part, part) for part in template]
    with files.blame(""):
        backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ends)
        backend.encode(_TRIED)
    length = int(files.json("tokenizer_config.json").get("model_max_length") or (77 if "bos_token" in ids else 512))
    facts = {"max_length": length, "vocab_size": backend.get_vocab_size(), "backend": backend, "files": files}
    return facts | {role.removesuffix("_token"): index for role, index in ids.items()}
