"""Captions from scene graphs, and scene graphs' looks back from captions.

Every caption names the colour and the shape of every object, so that `names_all` can score what a captioner
writes. Relations (left of, right of, in front of, behind) are those that the camera sees.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from experiments.scenes.graph import (
    ATTRIBUTES,
    Camera,
    Scene,
    SceneObject,
    change_attribute,
    has_held_out,
)
from experiments.scenes.wording import ENGLISH, Noun, Wording

CAPTIONS_PER_VIEW = 5

Word = TypeVar("Word")

_ALIGNED = 0.5  # a relation is named when its part of the distance is larger than this: 60 degrees either way
_USUAL_SHARE = 0.75  # of words that are the usual one of their synonyms
_NAMED_SHARE = {"size": 0.6, "material": 0.6}  # of captions that name an attribute
_RELATED_SHARE = 0.6  # of captions of several objects that say how they stand


@dataclass(frozen=True)
class Named:
    """One object as a caption names it; None where it says nothing."""

    colour: str | None
    shape: str
    material: str | None = None
    size: str | None = None


def caption(
    scene: Scene,
    camera: Camera,
    rng: random.Random,
    *,
    detail: str = "some",
    wording: Wording = ENGLISH,
) -> str:
    """One caption of the scene as the camera sees it.

    `detail` is "some" (size, material and relations by chance) or "full" (all of them: it identifies the scene).
    """
    if detail not in ("some", "full"):
        raise ValueError(f"detail is {detail!r}: use 'some' or 'full'.")
    text = _sentence(scene, camera, rng, detail == "full", wording)
    for long, short in wording.contractions:
        text = text.replace(long, short)
    return text


def _sentence(scene: Scene, camera: Camera, rng: random.Random, full: bool, wording: Wording) -> str:
    attributes = [name for name, share in _NAMED_SHARE.items() if full or rng.random() < share]
    groups = _group(scene.objects, attributes, rng)
    phrases = [_phrase(group, attributes, rng, wording) for group in groups]
    if len(groups) == 1:
        template = rng.choice(wording.alone if len(groups[0]) == 1 else wording.several)
        return _fill(template, phrases[0], len(scene.objects), wording)
    if full or rng.random() < _RELATED_SHARE:
        related = _relate(groups, phrases, camera, rng, wording, full=full)
        if related is not None:
            return related
    return _fill(rng.choice(wording.several), _enumerate(phrases, wording), len(scene.objects), wording)


def view_captions(
    scene: Scene, camera: Camera, rng: random.Random, *, count: int = CAPTIONS_PER_VIEW, wording: Wording = ENGLISH
) -> list[str]:
    """Different captions of one view."""
    captions: list[str] = []
    while len(captions) < count:
        drawn = caption(scene, camera, rng, wording=wording)
        if drawn not in captions:
            captions.append(drawn)
    return captions


def counterfactual(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one attribute of one object changed: its caption is a hard negative for the original.

    A scene without held-out looks stays without, so that training texts never name one.
    """
    while True:
        changed = change_attribute(scene, rng.choice([*ATTRIBUTES]), rng)
        if has_held_out(scene) or not has_held_out(changed):
            return changed


def relations(first: SceneObject, second: SceneObject, camera: Camera) -> list[str]:
    """How `first` stands to `second` for this camera, the clearest relation first.

    "left", "right", "front" (nearer to the camera) and "behind" on the ground plane; one of them, or two near the
    diagonals.
    """
    right, _, backward = camera.axes()
    offset = (first.x - second.x, first.y - second.y)
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    flat = (backward[0] ** 2 + backward[1] ** 2) ** 0.5
    sideways = (offset[0] * right[0] + offset[1] * right[1]) / length
    nearer = (offset[0] * backward[0] + offset[1] * backward[1]) / (length * flat)
    parts = {"right": sideways, "left": -sideways, "front": nearer, "behind": -nearer}
    return sorted((name for name, part in parts.items() if part > _ALIGNED), key=lambda name: -parts[name])


def parse(text: str, *, wording: Wording = ENGLISH) -> list[Named]:
    """The objects that a caption names, in order; phrases with a definite article name none anew."""
    lexicon = _lexicon(wording)
    found: list[Named] = []
    count, named = 0, dict[str, str]()
    latest = 0  # how many of `found` a phrase such as "made of metal" belongs to
    for kind, value in _tokens(text, lexicon):
        if kind == "number":
            count, named = int(value), {}
        elif kind == "made_of":
            found[len(found) - latest :] = [replace(thing, material=value) for thing in found[len(found) - latest :]]
        elif kind == "shape":
            latest = count
            thing = Named(named.get("colour"), value, named.get("material"), named.get("size"))
            found.extend([thing] * count)
            count, named = 0, {}
        elif kind == "other":
            count, named, latest = 0, {}, 0
        elif latest and not count:  # an adjective after its noun
            found[-latest:] = [replace(thing, **{kind: value}) for thing in found[-latest:]]
        else:
            named[kind] = value
    return found


def looks(named: Sequence[Named] | Sequence[SceneObject]) -> Counter[tuple[str | None, str]]:
    """The multiset of (colour, shape)."""
    return Counter((thing.colour, thing.shape) for thing in named)


def names_all(text: str, scene: Scene, *, wording: Wording = ENGLISH) -> bool:
    """Whether a caption names the colour and shape of every object of the scene, and nothing else."""
    return looks(parse(text, wording=wording)) == looks(scene.objects)


def _group(
    objects: Sequence[SceneObject], attributes: Sequence[str], rng: random.Random
) -> list[tuple[SceneObject, ...]]:
    """Objects in random order, those that would be named alike together."""
    groups: dict[tuple[str, ...], list[SceneObject]] = {}
    for thing in rng.sample(objects, len(objects)):
        key = (*thing.look, *(getattr(thing, name) for name in attributes))
        groups.setdefault(key, []).append(thing)
    return [tuple(group) for group in groups.values()]


def _phrase(group: Sequence[SceneObject], attributes: Sequence[str], rng: random.Random, wording: Wording) -> str:
    """For instance "two small red cubes made of metal"."""
    thing, several = group[0], len(group) > 1
    before, after = [], []
    if "size" in attributes:
        before.append(("size", _pick(wording.sizes[thing.size], rng)))
    colour = ("colour", _pick(wording.colours[thing.colour], rng))
    if "material" not in attributes:
        before.append(colour)
    elif not several and rng.random() < 0.2:
        before.append(colour)
        after.append(_pick(wording.made_of[thing.material], rng))
    else:
        material = ("material", _pick(wording.materials[thing.material], rng))
        before.extend((material, colour) if rng.random() < 0.3 else (colour, material))
    noun = _pick(wording.shapes[thing.shape], rng)

    def inflect(adjective: str) -> str:
        return _inflect(adjective, noun, wording, plural=several)

    words = [inflect(word) for kind, word in before if kind not in wording.after_noun]
    words.append(noun.plural if several else noun.singular)
    following = [inflect(word) for kind, word in before if kind in wording.after_noun]
    words += sorted(following, key=lambda word: " " in word)  # "rosso di gomma": what is a phrase comes last
    words += map(inflect, after)
    if several:
        number = wording.numbers[len(group)][0]
    elif rng.random() < 0.1 and wording.one:
        number = wording.one
    else:
        number = wording.indefinite(noun.gender, words[0])
    return " ".join((number, *words))


def _definite(thing: SceneObject, wording: Wording) -> str:
    """For instance "the red cube", for an object that was named before."""
    noun = wording.shapes[thing.shape][0]
    colour = _inflect(wording.colours[thing.colour][0], noun, wording, plural=False, definite=True)
    words = (noun.singular, colour) if "colour" in wording.after_noun else (colour, noun.singular)
    return wording.definite(noun.gender, words[0]) + " ".join(words)


def _inflect(adjective: str, noun: Noun, wording: Wording, *, plural: bool, definite: bool = False) -> str:
    forms = adjective.split("/")
    return forms[wording.form(noun.gender, plural, definite)] if len(forms) > 1 else adjective


def _relate(
    groups: Sequence[Sequence[SceneObject]],
    phrases: Sequence[str],
    camera: Camera,
    rng: random.Random,
    wording: Wording,
    *,
    full: bool,
) -> str | None:
    """A sentence with how the objects stand, or None where a group has no one place."""
    shared = _shared_relations(groups[0], groups[1], camera)
    if not shared:
        return None
    relation = _pick(wording.relations[shared[0] if full else rng.choice(shared)], rng)
    if len(groups) == 2:
        template = rng.choice(wording.related)
        return _agree(template, groups[0], wording).format(phrases[0], relation, phrases[1])
    if full or rng.random() < 0.7:
        choices = [(name, groups[i][0]) for i in (0, 1) for name in _shared_relations(groups[2], groups[i], camera)[:1]]
        known = [(name, thing) for name, thing in choices if _unique(thing, groups)]
        if known:
            first = rng.choice(wording.related[:2]).format(phrases[0], relation, phrases[1])
            name, thing = rng.choice(known)
            place = _pick(wording.relations[name], rng)
            template = _agree(rng.choice(wording.added), groups[2], wording)
            return template.format(first, phrases[2], place, _definite(thing, wording))
    pair = rng.choice(wording.related[:2]).format(phrases[0], relation, phrases[1])
    return f"{phrases[2]}, {wording.conjunction} {pair}"


def _shared_relations(first: Sequence[SceneObject], second: Sequence[SceneObject], camera: Camera) -> list[str]:
    """Relations that hold between every object of two groups."""
    each = [relations(a, b, camera) for a in first for b in second]
    return [name for name in each[0] if all(name in names for names in each)]


def _unique(thing: SceneObject, groups: Sequence[Sequence[SceneObject]]) -> bool:
    return sum(other.look == thing.look for group in groups for other in group) == 1


def _agree(template: str, group: Sequence[SceneObject], wording: Wording) -> str:
    """The template with a plural verb where the subject is several objects."""
    if len(group) > 1:
        for singular, plural in wording.plural_verbs:
            template = template.replace(singular, plural)
    return template


def _enumerate(phrases: Sequence[str], wording: Wording) -> str:
    *head, last = phrases
    return f"{', '.join(head)} {wording.conjunction} {last}" if head else last


def _fill(template: str, phrase: str, count: int, wording: Wording) -> str:
    return template.format(phrase, count=wording.numbers[count][0])


def _pick(words: Sequence[Word], rng: random.Random) -> Word:
    return words[0] if len(words) == 1 or rng.random() < _USUAL_SHARE else rng.choice(words[1:])


def _lexicon(wording: Wording) -> dict[str, tuple[str, str]]:
    """Every word or phrase with what it names: "cubes" -> ("shape", "cube")."""
    entries: dict[str, tuple[str, str]] = {}
    for shape, forms in wording.shapes.items():
        entries.update((word, ("shape", shape)) for noun in forms for word in (noun.singular, noun.plural))
    tables = {
        "colour": wording.colours,
        "material": wording.materials,
        "made_of": wording.made_of,
        "size": wording.sizes,
    }
    for kind, table in tables.items():
        for value, words in table.items():
            entries.update((form, (kind, value)) for word in words for form in word.split("/"))
    for number, words in wording.numbers.items():
        entries.update((word, ("number", str(number))) for word in words)
    return entries


def _tokens(text: str, lexicon: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Kind and value of each phrase of the text, the longest first; what is unknown is ("other", itself)."""
    longest = sorted(lexicon, key=len, reverse=True)
    pattern = "|".join(re.escape(phrase) for phrase in longest)
    for match in re.finditer(rf"\b(?:{pattern})\b|\w+|[^\w\s]", text.lower()):
        yield lexicon.get(match.group(), ("other", match.group()))
