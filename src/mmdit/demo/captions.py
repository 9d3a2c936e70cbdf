"""Captions of scenes: every object is named, every statement is true and readable by `grammar.statements`.

Some combinations of a subject's shape and colour with a relation are held out: training captions state them in neither
direction ("a red circle above a star" is also "a star below a red circle"), held-out prompts state at least one.
"""

import hashlib
import random
from dataclasses import dataclass, field
from itertools import permutations, product

from mmdit.demo.grammar import NUMBERS, OPPOSITE, RELATIONS, plural
from mmdit.demo.scenes import Scene, SceneObject, Scenes, sample
from mmdit.demo.shapes import COLOURS, SHAPES

__all__ = [
    "HELD_OUT",
    "CaptionStyle",
    "caption",
    "clear_relation",
    "held_out",
    "held_out_caption",
    "inventory",
    "prompts",
    "training_captions",
]

# A relation is stated only when nobody would argue: far apart along its axis, and much less so across it.
CLEAR_DISTANCE = 16.0
CLEAR_RATIO = 1.6

_WORDS = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
_SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_GROUND_WORDS = {"gray": ("gray", "gray", "grey")}
_OPENERS = ("a picture of ", "an image of ", "a drawing of ", "a picture showing ")
_AFTER = (
    "{things} on a {ground} background",
    "{things} on a {ground} background",
    "{things} against a {ground} background",
    "{things} on a {ground} backdrop",
    "{things} on {ground}",
    "{things}, {ground} background",
    "{things}, with a {ground} background",
    "{things}. the background is {ground}",
)
_BEFORE = ("on a {ground} background, {things}", "{ground} background, {things}", "on {ground}, {things}")


@dataclass(frozen=True)
class CaptionStyle:
    """How often captions say what. The defaults are those of all prompts that are scored."""

    relation: float = 0.85  # share of captions that state a relation, where the scene has a clear one
    second: float = 0.4  # of these, the share that states another one
    inventory: float = 0.0  # share of captions that are an `inventory`


def held_out(shape: str, colour: str, relation: str) -> bool:
    """Return whether an object of this shape and colour as the subject of a relation is kept from training.

    About one combination in ten, by SHA-256 of "shape|colour|relation": the same on every machine, for ever.
    """
    digest = hashlib.sha256(f"{shape}|{colour}|{relation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


HELD_OUT = frozenset(triple for triple in product(SHAPES, COLOURS, RELATIONS) if held_out(*triple))


def clear_relation(subject: SceneObject, other: SceneObject) -> str | None:
    """Return the relation of subject to other where it is clear beyond argument, else None."""
    right, down = subject.x - other.x, subject.y - other.y
    along, across = max(abs(right), abs(down)), min(abs(right), abs(down))
    if along < CLEAR_DISTANCE or along < CLEAR_RATIO * across:
        return None
    if abs(down) > abs(right):
        return "above" if down < 0 else "below"
    return "left of" if right < 0 else "right of"


def caption(scene: Scene, rng: random.Random, style: CaptionStyle = CaptionStyle()) -> str:
    """Return one random caption: at least three statements, all true of the scene, no held-out combination.

    Args:
        scene: what to describe.
        rng: where the wording comes from.
        style: how often the caption says what.
    """
    if style.inventory and rng.random() < style.inventory:
        return inventory(scene)
    allowed = [r for r in _clear_relations(scene, rng) if not r.held_out and not r.reversed.held_out]
    stated = _stated(allowed, rng, style.second) if rng.random() < style.relation else []
    return _Draft(scene, rng, stated).text()


def inventory(scene: Scene) -> str:
    """Return the caption that names every object of a scene with its size, and the background."""
    things = [f"a {one.size} {one.colour} {one.shape}" for one in scene.objects]
    said = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    return f"{said}, on a {scene.background} background"


def held_out_caption(scene: Scene, rng: random.Random) -> str | None:
    """Return one random caption as `caption` does, but with a held-out combination; None where the scene has none."""
    clear = sorted(_clear_relations(scene, rng), key=lambda r: not r.held_out)
    return _Draft(scene, rng, _stated(clear, rng)).text() if clear and clear[0].held_out else None


def training_captions(
    scenes: Scenes,
    per_scene: int,
    seed: int,
    style: CaptionStyle = CaptionStyle(),
) -> list[list[str]]:
    """Return `per_scene` captions of each scene, none of which states a held-out combination.

    The wording depends on the seed and the scene's place in the batch only: give each chunk of scenes its own seed.
    """
    rng = random.Random(seed)
    return [[caption(scene, rng, style) for _ in range(per_scene)] for scene in scenes.words()]


def prompts(n: int, seed: int, *, held_out: bool) -> list[str]:
    """Return `n` prompts of random scenes that nobody drew, so each of them can be drawn.

    Args:
        n: how many.
        seed: Seed of the scenes and of the wording.
        held_out: True: each states at least one held-out combination; False: none does, as in training.

    Raises:
        ValueError: `n` is negative.
    """
    if n < 0:
        raise ValueError(f"the number of prompts must not be negative, got {n}")
    rng = random.Random(seed)
    write = held_out_caption if held_out else caption
    found: list[str] = []
    while len(found) < n:
        drafts = (write(scene, rng) for scene in sample(256, rng.getrandbits(62)).words())
        found += [text for text in drafts if text]
    return found[:n]


@dataclass(frozen=True)
class _Group:
    """Objects that share shape and colour."""

    objects: tuple[SceneObject, ...]

    @property
    def name(self) -> str:
        return f"{self.objects[0].colour} {self.objects[0].shape}"


@dataclass(frozen=True)
class _Relation:
    subject: _Group
    name: str
    other: _Group

    @property
    def held_out(self) -> bool:
        thing = self.subject.objects[0]
        return (thing.shape, thing.colour, self.name) in HELD_OUT

    @property
    def reversed(self) -> "_Relation":
        return _Relation(self.other, OPPOSITE[self.name], self.subject)


def _groups(scene: Scene) -> list[_Group]:
    found: dict[tuple[str, str], list[SceneObject]] = {}
    for thing in scene.objects:
        found.setdefault((thing.shape, thing.colour), []).append(thing)
    return [_Group(tuple(objects)) for objects in found.values()]


def _clear_relations(scene: Scene, rng: random.Random) -> list[_Relation]:
    """Return in random order every clear relation between objects that shape and colour identify."""
    single = [group for group in _groups(scene) if len(group.objects) == 1]
    pairs = list(permutations(single, 2))
    rng.shuffle(pairs)
    named = ((a, clear_relation(a.objects[0], b.objects[0]), b) for a, b in pairs)
    return [_Relation(a, name, b) for a, name, b in named if name]


def _stated(relations: list[_Relation], rng: random.Random, second: float = CaptionStyle.second) -> list[_Relation]:
    """Choose the first relation and sometimes one more, of another pair."""
    chosen = relations[:1]
    if chosen and rng.random() < second:
        pair = {chosen[0].subject, chosen[0].other}
        chosen += [r for r in relations if {r.subject, r.other} != pair][:1]
    return chosen


@dataclass
class _Draft:
    """One caption in the making: each method writes one part of it, in words drawn from `rng`."""

    scene: Scene
    rng: random.Random
    relations: list[_Relation]
    sentences: list[str] = field(default_factory=list)
    extras: int = 0  # statements beyond shape and colour

    def text(self) -> str:
        groups = _groups(self.scene)
        self.rng.shuffle(groups)
        things = self._things(groups)
        things = self._opening(things, groups)
        # One object states shape and colour: a third statement is due.
        if self.rng.random() < 0.85 or len(self.scene.objects) + self.extras < 2:
            things = self._on_ground(things)
        self.rng.shuffle(self.sentences)
        return self._punctuated([things, *self.sentences])

    def _chance(self, odds: float) -> bool:
        return self.rng.random() < odds

    def _things(self, groups: list[_Group]) -> str:
        """Name every group; a first relation may be said on the spot, the others get sentences of their own."""
        inline = self.relations[:1] if self._chance(0.6) else []
        for relation in self.relations[len(inline) :]:
            words = self.rng.choice(_WORDS[relation.name])
            self.sentences.append(f"the {relation.subject.name} is {words} the {relation.other.name}")
        self.extras += len(self.relations)
        if not inline:
            return self._list([phrase for group in groups for phrase in self._phrases(group)])
        link = inline[0]
        words = self.rng.choice(_WORDS[link.name])
        said = f"{self._phrases(link.subject)[0]} {words} {self._phrases(link.other)[0]}"
        rest = [phrase for g in groups if g not in (link.subject, link.other) for phrase in self._phrases(g)]
        # "above a star and a ring" could mean above both, so what is left starts anew.
        return said + (self.rng.choice((", plus ", ". there is also ")) + self._list(rest) if rest else "")

    def _phrases(self, group: _Group) -> list[str]:
        """Name one group: "a red circle", "two red circles", or by size "one large red circle and two small ..."."""
        small = [thing for thing in group.objects if thing.size == "small"]
        mixed = 0 < len(small) < len(group.objects)
        if not mixed and not self._chance(0.5):
            return [self._counted(len(group.objects), group.name)]
        if mixed and not self._chance(0.4):
            return [self._counted(len(group.objects), group.name)]
        self.extras += 1
        if len(group.objects) == 1 and self._chance(0.15):
            size = self.rng.choice(_SIZE_WORDS[group.objects[0].size])
            self.sentences.append(f"the {group.name} is {size}")
            return [self._counted(1, group.name)]
        counts = {"small": len(small), "large": len(group.objects) - len(small)}
        sizes = [(size, n) for size, n in counts.items() if n]
        self.rng.shuffle(sizes)
        return [self._counted(n, f"{self.rng.choice(_SIZE_WORDS[size])} {group.name}") for size, n in sizes]

    def _counted(self, n: int, name: str) -> str:
        if n > 1 or self._chance(0.08):
            self.extras += 1
            return f"{NUMBERS[n - 1]} {plural(name) if n > 1 else name}"
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

    def _list(self, phrases: list[str]) -> str:
        *first, last = phrases
        if not first:
            return last
        style = self.rng.random()
        if style < 0.15:
            return " and ".join(phrases)
        if style < 0.3:
            return ", ".join(phrases)
        return ", ".join(first) + " and " + last

    def _opening(self, things: str, groups: list[_Group]) -> str:
        if self._chance(0.3):
            counts = self._count_words(groups)
            self.extras += 1
            if counts.endswith(("shape", "object", "shapes", "objects")) and self._chance(0.6):
                return f"{self.rng.choice(('', *_OPENERS))}{counts}: {things}"
            self.sentences.append(f"there {'is' if counts.startswith('one') else 'are'} {counts}")
        if self._chance(0.25):
            return self.rng.choice(_OPENERS) + things
        if self._chance(0.15):
            return f"there {'is' if things.startswith(('a', 'one')) else 'are'} {things}"
        return things

    def _count_words(self, groups: list[_Group]) -> str:
        """Count all objects, or those of one shape or one colour where several share it."""
        things = self.scene.objects
        generic = self.rng.choice(("shape", "shape", "object"))
        shape, colour = (self.rng.choice([getattr(t, of) for t in things]) for of in ("shape", "colour"))
        same_shape, same_colour = sum(t.shape == shape for t in things), sum(t.colour == colour for t in things)
        options = [(len(things), generic)]
        if len(groups) > 1:
            options += [(same_shape, shape)] * (same_shape > 1) + [(same_colour, f"{colour} {generic}")] * (
                same_colour > 1
            )
        n, name = self.rng.choice(options)
        return f"{NUMBERS[n - 1]} {plural(name) if n > 1 else name}"

    def _on_ground(self, things: str) -> str:
        self.extras += 1
        ground = self.rng.choice(_GROUND_WORDS.get(self.scene.background, (self.scene.background,)))
        if ". " in things or ":" in things or things.startswith("there"):
            self.sentences.append(f"the background is {ground}")
            return things
        forms = _BEFORE if self._chance(0.3) and not things.startswith(_OPENERS) else _AFTER
        return self.rng.choice(forms).format(things=things, ground=ground)

    def _punctuated(self, sentences: list[str]) -> str:
        if self._chance(0.3):
            sentences = [s[0].upper() + s[1:] for part in sentences for s in part.split(". ")]
        return ". ".join(sentences) + ("." if len(sentences) > 1 or self._chance(0.3) else "")
