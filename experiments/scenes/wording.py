"""The words of each language that captions are made of; the logic is in `captions.py`."""

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.scenes.graph import COLOURS


@dataclass(frozen=True)
class Wording:
    """One language's words. In every list the first entry is the usual word; no word has two meanings."""

    shapes: Mapping[str, tuple[tuple[str, str], ...]]
    """Shape -> (singular, plural) nouns."""
    colours: Mapping[str, tuple[str, ...]]
    materials: Mapping[str, tuple[str, ...]]
    """Adjectives."""
    made_of: Mapping[str, tuple[str, ...]]
    """Phrases after the noun that name a material."""
    sizes: Mapping[str, tuple[str, ...]]
    numbers: Mapping[int, tuple[str, ...]]
    """Words before a noun; those of 1 include the indefinite articles."""
    article: tuple[str, str]
    """Indefinite article before a consonant and before a vowel."""
    definite: str
    """Template for an object that was named before: colour {0}, shape {1}."""
    plural_verbs: tuple[tuple[str, str], ...]
    """Verbs in templates -> the same for several objects."""
    relations: Mapping[str, tuple[str, ...]]
    conjunction: str
    alone: tuple[str, ...]
    """Templates for one phrase: {0}."""
    several: tuple[str, ...]
    """Templates for an enumeration {0} of {count} objects."""
    related: tuple[str, ...]
    """Templates for phrase {0}, relation {1}, phrase {2}."""
    added: tuple[str, ...]
    """Templates that add phrase {1}, with the relation {2} to the known object {3}, to the sentence {0}."""


ENGLISH = Wording(
    shapes={
        "cube": (("cube", "cubes"), ("block", "blocks")),
        "ball": (("ball", "balls"), ("sphere", "spheres")),
        "cylinder": (("cylinder", "cylinders"),),
        "cone": (("cone", "cones"),),
        "ring": (("ring", "rings"),),
        "monkey": (("monkey", "monkeys"), ("monkey head", "monkey heads")),
        "star": (("star", "stars"),),
        "stool": (("stool", "stools"),),
    },
    colours={colour: (colour,) for colour in COLOURS},
    materials={
        "rubber": ("rubber", "matte"),
        "metal": ("metal", "shiny"),
        "glowing": ("glowing", "bright"),
    },
    made_of={"rubber": ("made of rubber",), "metal": ("made of metal",), "glowing": ("that glows",)},
    sizes={"small": ("small", "little"), "large": ("large", "big")},
    numbers={1: ("a", "an", "one"), 2: ("two",), 3: ("three",)},
    article=("a", "an"),
    definite="the {0} {1}",
    plural_verbs=((" is ", " are "),),
    relations={
        "left": ("to the left of", "left of", "on the left of"),
        "right": ("to the right of", "right of", "on the right of"),
        "front": ("in front of",),
        "behind": ("behind",),
    },
    conjunction="and",
    alone=(
        "{0}",
        "{0}",
        "a photo of {0}",
        "a picture of {0}",
        "an image of {0}",
        "there is {0}",
        "this is {0}",
        "the picture shows {0}",
        "we see {0}",
    ),
    several=(
        "{0}",
        "{0}",
        "a photo of {0}",
        "a picture of {0}",
        "there are {count} objects: {0}",
        "{count} objects: {0}",
        "the picture shows {0}",
        "we see {0}",
        "a scene with {0}",
        "{0} next to each other",
    ),
    related=(
        "{0} {1} {2}",
        "{0} {1} {2}",
        "{0} is {1} {2}",
        "a photo of {0} {1} {2}",
        "the picture shows {0} {1} {2}",
        "we see {0} {1} {2}",
        "there is {0} {1} {2}",
    ),
    added=("{0}, and {1} {2} {3}", "{0}; {1} is {2} {3}", "{0}, with {1} {2} {3}"),
)
