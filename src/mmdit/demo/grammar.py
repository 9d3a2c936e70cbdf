"""The words of a caption, and what they state: `statements(prompt)` reads every prompt of this small grammar.

    prompt     = part ...                                        punctuation, case and filler words do not matter
    part       = things | relation | ground
    things     = [a | the | one .. four] [size] [colour] noun [is | are size | colour]
    noun       = circle, square, ... and plurals | shape | object
    relation   = things [is | are] (above | over | below | under | [to the] left of | [to the] right of) things
    ground     = [on | against | with] [a | the] ground colour [background] | the background is ground colour

"a red circle" says that there is at least one; a number says exactly how many there are. What is not read is refused,
never skipped: "it", "and left of ..." (no noun to belong to), "on a square" (on is for backgrounds).
"""

import difflib
import re
from dataclasses import dataclass, replace

from mmdit.demo.shapes import BACKGROUNDS, COLOURS, SHAPES

__all__ = ["KINDS", "NUMBERS", "OPPOSITE", "RELATIONS", "WORDS", "Statement", "What", "plural", "statements"]

KINDS = ("shape", "colour", "size", "count", "relation", "background")
RELATIONS = ("above", "below", "left of", "right of")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
NUMBERS = ("one", "two", "three", "four")

_SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
_GENERIC = {"shape": 1, "object": 1, "shapes": 2, "objects": 2}
_ARTICLES = ("a", "an", "the")
_BACKDROP = ("background", "backdrop")
_ON = ("on", "against")
_IS = ("is", "are")
_FILLERS = (
    *("and", "also", "plus", "with", "there", "picture", "image", "drawing", "of", "showing"),
    *_IS,
    *_ARTICLES,
)
_RELATION_WORDS = {
    ("above",): "above",
    ("over",): "above",
    ("below",): "below",
    ("under",): "below",
    ("left", "of"): "left of",
    ("right", "of"): "right of",
    ("to", "the", "left", "of"): "left of",
    ("to", "the", "right", "of"): "right of",
}


def plural(noun: str) -> str:
    """Return the plural of a shape's or generic noun."""
    return noun + ("es" if noun.endswith("s") else "s")


_NOUNS = {s: s for s in SHAPES} | {plural(s): s for s in SHAPES}
_GROUNDS = {name: name for name in BACKGROUNDS} | {"grey": "gray"}
_DIGITS = {str(i + 1): i + 1 for i in range(4)}
_COUNTS = {word: i + 1 for i, word in enumerate(NUMBERS)} | _DIGITS

# Every word a prompt may use, in a fixed order: the tokenizers give each of them one token.
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*_ARTICLES, *NUMBERS, *_SIZES, *COLOURS, *_NOUNS, *_GENERIC, *_GROUNDS, *_BACKDROP, *_ON, *_FILLERS]
        + [word for phrase in _RELATION_WORDS for word in phrase]
    )
)


_KNOWN = frozenset([*WORDS, *_DIGITS])


@dataclass(frozen=True)
class What:
    """A description of objects; None means that the prompt does not say."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape or "shape") if word)


@dataclass(frozen=True)
class Statement:
    """One thing that a prompt claims; `score.check` says how each kind is judged.

    `what` is set for every kind but "background"; `count` for "count" (exactly) and "size" (at least);
    `relation` and `other` for "relation" (`what` is its subject); `background` for "background".
    """

    kind: str
    what: What | None = None
    count: int = 1
    relation: str | None = None
    other: What | None = None
    background: str | None = None

    def __str__(self) -> str:
        match self.kind:
            case "background":
                return f"background: {self.background}"
            case "relation":
                return f"relation: {self.what} {self.relation} {self.other}"
            case "count":
                return f"count: exactly {self.count} {self.what}"
            case _:
                return f"{self.kind}: {self.what}" + (f" x {self.count}" if self.count > 1 else "")


def statements(prompt: str) -> tuple[Statement, ...]:
    """Return what a prompt claims, each statement once, in order of first mention.

    Raises:
        ValueError: a word that the grammar does not know (the message names the nearest known ones), words in an order
            that it does not read, or a prompt that claims nothing.
    """
    words = re.findall(r"[a-z]+|\d+", prompt.lower())
    for word in words:
        if word not in _KNOWN:
            near = difflib.get_close_matches(word, WORDS, n=3, cutoff=0.5)
            hint = f"nearest known words: {', '.join(near)}" if near else f"known words: {', '.join(WORDS)}"
            raise ValueError(f"unknown word {word!r} in {prompt!r}; {hint}")
    found = _Reader(prompt, words).read()
    if not found:
        raise ValueError(f"{prompt!r} states nothing")
    return found


@dataclass(frozen=True)
class _Things:
    """A noun phrase: what, how many, and whether that number was said."""

    what: What
    count: int
    exact: bool

    def statements(self) -> list[Statement]:
        shape, colour, size = self.what.shape, self.what.colour, self.what.size
        said = []
        if shape:
            said.append(Statement("shape", What(shape)))
        if colour:
            said.append(Statement("colour", What(shape, colour)))
        if size:
            said.append(Statement("size", self.what, self.count))
        if self.exact or not said:
            said.append(Statement("count", self.what, self.count))
        return said


class _Reader:
    """Reads words from left to right; each method takes what it knows and leaves the rest."""

    def __init__(self, prompt: str, words: list[str]) -> None:
        self.prompt = prompt
        self.words = words
        self.at = 0

    def read(self) -> tuple[Statement, ...]:
        said: list[Statement] = []
        while self.at < len(self.words):
            said += self._part()
        return tuple(dict.fromkeys(said))

    def _part(self) -> list[Statement]:
        if (ground := self._ground()) is not None:
            return [ground]
        if (subject := self._things()) is not None:
            return self._after(subject)
        if self._next() not in _FILLERS:
            raise self._error("did not expect")
        self.at += 1
        return []

    def _after(self, subject: _Things) -> list[Statement]:
        """Read what follows a noun phrase: a predicate ("is large"), a relation, or neither."""
        self._take(_IS)
        subject = self._predicate(subject)
        relation = self._relation()
        if relation is None:
            return subject.statements()
        other = self._things()
        if other is None:
            raise self._error(f"{relation!r} needs an object after it, not")
        if subject.count > 1 or other.count > 1:
            raise self._error(f"{relation!r} is read between single objects only, before")
        link = Statement("relation", _unsized(subject.what), 1, relation, _unsized(other.what))
        return [*subject.statements(), *other.statements(), link]

    def _predicate(self, subject: _Things) -> _Things:
        what = subject.what
        if what.size is None and self._next() in _SIZES and self.words[self.at - 1] in _IS:
            what = replace(what, size=_SIZES[self._pop()])
        elif what.colour is None and self._next() in COLOURS and self.words[self.at - 1] in _IS:
            what = replace(what, colour=self._pop())
        return replace(subject, what=what)

    def _relation(self) -> str | None:
        for phrase, relation in _RELATION_WORDS.items():
            if tuple(self.words[self.at : self.at + len(phrase)]) == phrase:
                self.at += len(phrase)
                return relation
        return None

    def _things(self) -> _Things | None:
        """Read a noun phrase; without a noun nothing is taken."""
        start = self.at
        self._take(_ARTICLES)
        number = _COUNTS[self._pop()] if self._next() in _COUNTS else None
        size = self._pop() if self._next() in _SIZES else None
        colour = self._pop() if self._next() in COLOURS else None
        noun = self._next()
        if noun in _NOUNS or noun in _GENERIC:
            self.at += 1
            several = _GENERIC[noun] > 1 if noun in _GENERIC else noun != _NOUNS[noun]
            if several != (number is not None and number > 1):
                self.at -= 1
                raise self._error("number and noun do not agree at")
            return _Things(
                What(_NOUNS.get(noun), colour, _SIZES[size] if size else None), number or 1, number is not None
            )
        if number or size or colour:
            raise self._error("expected a shape, got")
        self.at = start
        return None

    def _ground(self) -> Statement | None:
        """Read a background; without one nothing is taken, unless "on" or "the background" has promised one."""
        start = self.at
        promised = self._take(_ON)
        self._take(("with",))
        self._take(_ARTICLES)
        if self._take(_BACKDROP):
            self._take(_IS)
            promised = True
        if self._next() in _GROUNDS:
            return self._ground_colour()
        if promised:
            raise self._error(f"expected a background colour ({', '.join(BACKGROUNDS)}), got")
        self.at = start
        return None

    def _ground_colour(self) -> Statement:
        ground = _GROUNDS[self._pop()]
        if not self._take(_BACKDROP) and (self._next() in _NOUNS or self._next() in _GENERIC):
            raise self._error(f"{ground!r} is a background colour, not that of")
        return Statement("background", background=ground)

    def _next(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def _pop(self) -> str:
        self.at += 1
        return self.words[self.at - 1]

    def _take(self, words: tuple[str, ...]) -> bool:
        taken = self._next() in words
        self.at += taken
        return taken

    def _error(self, why: str) -> ValueError:
        return ValueError(f"cannot read {self.prompt!r}: {why} {self._next() or 'the end'!r}")


def _unsized(what: What) -> What:
    """Shape and colour identify an object of a relation; its size has a statement of its own."""
    return replace(what, size=None) if what.shape and what.colour else what
