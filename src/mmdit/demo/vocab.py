"""The embedded model's own small tokenizers, in the folder layout of the official repository.

    tokenizer/, tokenizer_2/   CLIP byte-pair encoding: vocab.json, merges.txt
    tokenizer_3/               T5 unigram with byte fallback: tokenizer.json and the same as spiece.model

Each has `SIZE` tokens, encodes any text, and gives every word of the caption grammar one token. Everything is computed
from the word lists below, without a trainer, so the files are the same to the byte wherever they are written.
"""

import json
import struct
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmdit.demo.grammar import WORDS

__all__ = ["SIZE", "write_tokenizers"]

SIZE = 1000
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_SPACE = "▁"  # a space, in sentencepiece's spelling
_GRAMMAR_WEIGHT = 1000  # above the count of any pair in the common words, so grammar words are merged first

# Common words, so that other English is cut into pieces longer than letters.
_COMMON = """
about above across after again all also always and another any are around ask away back ball bar be because been
before behind beside best better between bird black book both bottom box boy bright brown but by call can cat center
centre child city clear close cloud color colour come corner could dark day deep did different dog dot down draw each
edge end even every eye face family far fast field find fire first fish five flag flat floor flower for form found
from front full game garden gave get girl give glass go gold good grass great hand happy hard has have head heart here
high hill him his home horse hot house how hundred ice if inside into just keep kind know land last leaf let life
light like line long look made make man many map maybe me mean men middle might more morning most mother mountain
mouse much must name near never new next night nine no not now number oil old once only open other our out outside
over page paint paper part people photo photograph place plain plant play point put rain read real rectangle right
river road rock room round said same sand say sea see seven shadow sharp she ship side silver simple six sky sleep
snow so soft some something sound space stand start step still stone stop story street strong such summer sun surface
table take tall tell ten than that them then these they thing think this those thousand through time today together
too top toward town tree try turn under until up upon us use very view wall want warm was watch water way we well went
were what wheel when where which while whole why wide will wind window winter without wood word work world would write
year yes yet you young your
"""


def write_tokenizers(folder: str | Path) -> None:
    """Write tokenizer/, tokenizer_2/ and tokenizer_3/ into a folder, over what is there; made where missing.

    CLIP: BOS is the id before the last, EOS the last; padding is EOS in tokenizer/ and "!" (id 0) in tokenizer_2/.
    T5: padding 0, end 1, unknown 2, then 256 bytes, then pieces. sentencepiece and tokenizers fall back to bytes;
    transformers and `encoders.tokenize` read only the pieces, so there what is not printable ASCII is unknown.
    """
    merges = _clip_merges()
    vocabulary = [*_byte_symbols(), *(s + "</w>" for s in _byte_symbols()), *(a + b for a, b in merges), _BOS, _EOS]
    for name, pad in (("tokenizer", _EOS), ("tokenizer_2", "!")):
        place = Path(folder, name)
        place.mkdir(parents=True, exist_ok=True)
        _write_json(place / "vocab.json", {token: i for i, token in enumerate(vocabulary)})
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_json(place / "special_tokens_map.json", _clip_special_tokens(pad))
        _write_json(place / "tokenizer_config.json", _clip_config(pad))
    _write_t5(Path(folder, "tokenizer_3"))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _learn_merges(words: dict[tuple[str, ...], int], limit: int) -> list[tuple[str, str]]:
    """Return up to `limit` byte-pair merges of weighted words, given as symbols: always the commonest pair next."""
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        counts: Counter[tuple[str, str]] = Counter()
        for word, weight in words.items():
            for pair in pairwise(word):
                counts[pair] += weight
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = {_merged(word, best) if best[0] in word else word: weight for word, weight in words.items()}
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        out.append(word[i] + word[i + 1] if joined else word[i])
        i += 2 if joined else 1
    return tuple(out)


def _weighted(split: Iterable[tuple[tuple[str, ...], int]]) -> dict[tuple[str, ...], int]:
    weights: dict[tuple[str, ...], int] = {}
    for symbols, weight in split:
        weights[symbols] = max(weight, weights.get(symbols, 0))
    return weights


def _byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in CLIP's order (openai/CLIP simple_tokenizer.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@cache
def _clip_merges() -> list[tuple[str, str]]:
    weights = [(word, 1) for word in _COMMON.split()] + [(word, _GRAMMAR_WEIGHT) for word in WORDS]
    words = _weighted(((*word[:-1], word[-1] + "</w>"), weight) for word, weight in weights)
    limit = SIZE - 2 * 256 - 2
    merges = _learn_merges(words, limit)
    return _exactly(merges, limit)


def _exactly(items: list[Any], n: int) -> list[Any]:
    if len(items) != n:
        raise AssertionError(f"the word lists give {len(items)} pieces where the vocabulary has room for {n}")
    return items


def _token(content: str, *, normalized: bool = False, special: bool | None = None) -> dict[str, Any]:
    token: dict[str, Any] = {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False}
    token["single_word"] = False
    return token if special is None else token | {"special": special}


def _clip_special_tokens(pad: str) -> dict[str, Any]:
    names = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": pad, "unk_token": _EOS}
    return {name: _token(content, normalized=content == _BOS) for name, content in names.items()}


def _clip_config(pad: str) -> dict[str, Any]:
    added = {SIZE - 2: _token(_BOS, normalized=True, special=True), SIZE - 1: _token(_EOS, special=True)}
    if pad == "!":
        added = {0: _token(pad, special=True)} | added
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "bos_token": _BOS,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": _EOS,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": _EOS,
    }


def _write_t5(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    pieces = _t5_pieces()
    _write_json(place / "tokenizer.json", _t5_tokenizer(pieces))
    (place / "spiece.model").write_bytes(_sentencepiece_model(pieces))
    special = {"eos_token": _END, "pad_token": _PAD, "unk_token": _UNKNOWN}
    _write_json(place / "special_tokens_map.json", {name: _token(content) for name, content in special.items()})
    added = {str(i): _token(content, special=True) for i, content in enumerate((_PAD, _END, _UNKNOWN))}
    config = {"add_prefix_space": True, "added_tokens_decoder": added, "additional_special_tokens": []}
    config |= {"clean_up_tokenization_spaces": True, "eos_token": _END, "extra_ids": 0, "legacy": True}
    config |= {"model_max_length": 512, "pad_token": _PAD, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    _write_json(place / "tokenizer_config.json", config | {"unk_token": _UNKNOWN})


def _t5_pieces() -> list[tuple[str, float]]:
    """Return pieces with scores: about -10 each, so the cut with the fewest pieces wins and a known word stays whole.

    Every grammar word comes in lower case and capitalized, as at the start of a sentence.
    """
    special = [(_PAD, 0.0), (_END, 0.0), (_UNKNOWN, 0.0)]
    letters = [_SPACE, *map(chr, range(ord("!"), ord("~") + 1))]
    weights = [(word, 1) for word in _COMMON.split()] + [
        (w, _GRAMMAR_WEIGHT) for word in WORDS for w in (word, word.title())
    ]
    room = SIZE - 256 - len(special) - len(letters)
    merges = _learn_merges(_weighted(((_SPACE, *word), weight) for word, weight in weights), 2 * room)
    joined = list(dict.fromkeys(a + b for a, b in merges))[:room]
    ranked = [*_exactly(joined, room), *letters]
    bytes_ = [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    # The rank decides between cuts of equal length; 1/1024 is exact in float32, so both readers decide alike.
    return special + bytes_ + [(piece, -10.0 - rank / 1024) for rank, piece in enumerate(ranked)]


def _t5_tokenizer(pieces: list[tuple[str, float]]) -> dict[str, Any]:
    """Return tokenizer.json for the `tokenizers` library: as the official one, without its Unicode table."""
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
    single: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": _END, "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}, single[1]]
    ending = {_END: {"id": _END, "ids": [1], "tokens": [_END]}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | _token(content, special=True) for i, content in enumerate((_PAD, _END, _UNKNOWN))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Strip", "strip_left": True, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": metaspace,
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ending},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, metaspace]},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [list(p) for p in pieces], "byte_fallback": True},
    }


def _sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    """Return the ModelProto of sentencepiece (sentencepiece_model.proto): pieces 1, trainer 2, normalizer 3."""
    kinds = [3, 3, 2, *[6] * 256]  # control, control, unknown, bytes; the rest is 1, normal
    kinds += [1] * (len(pieces) - len(kinds))
    body = b""
    for (piece, score), kind in zip(pieces, kinds, strict=True):
        body += _field(1, _field(1, piece.encode()) + _tag(2, 5) + struct.pack("<f", score) + _field(3, kind))
    trainer = _field(3, 1) + _field(4, len(pieces)) + _field(35, 1)  # unigram, size, byte fallback
    trainer += _field(40, 2) + _field(41, -1) + _field(42, 1) + _field(43, 0)  # ids: unknown, no start, end, padding
    trainer += _field(45, _UNKNOWN.encode()) + _field(47, _END.encode()) + _field(48, _PAD.encode())
    return body + _field(2, trainer) + _field(3, _field(1, b"identity"))


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _field(number: int, value: int | bytes) -> bytes:
    """Encode one protobuf field: an integer as varint (wire type 0), bytes with their length (2)."""
    if isinstance(value, int):
        return _tag(number, 0) + _varint(value)
    return _tag(number, 2) + _varint(len(value)) + value
