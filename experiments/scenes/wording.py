"""The words and the grammar of each language that captions are made of; the logic is in `captions.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from experiments.scenes.graph import COLOURS


class Noun(NamedTuple):
    """A noun with its gender, where the language has one."""

    singular: str
    plural: str
    gender: str = ""


@dataclass(frozen=True)
class Wording:
    """One language's words. In every list the first entry is the usual word; no word has two meanings.

    An adjective is one word, or its forms with a slash between them, from which `form` chooses.
    """

    shapes: Mapping[str, tuple[Noun, ...]]
    colours: Mapping[str, tuple[str, ...]]
    materials: Mapping[str, tuple[str, ...]]
    """Adjectives."""
    made_of: Mapping[str, tuple[str, ...]]
    """Phrases after the noun that name a material."""
    sizes: Mapping[str, tuple[str, ...]]
    numbers: Mapping[int, tuple[str, ...]]
    """Words before a noun; those of 1 include the indefinite articles."""
    one: str | None
    """A word for exactly one, used now and then instead of the article."""
    indefinite: Callable[[str, str], str]
    """Indefinite article for a gender and the word that follows."""
    definite: Callable[[str, str], str]
    """Definite article for a gender and the word that follows, with the space after it where there is one."""
    form: Callable[[str, bool, bool], int]
    """Which form an adjective takes for (gender, plural, definite)."""
    after_noun: frozenset[str]
    """Adjectives that follow the noun: "colour", "material"."""
    contractions: tuple[tuple[str, str], ...]
    """What becomes one word: ("di il ", "del ")."""
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
        "cube": (Noun("cube", "cubes"), Noun("block", "blocks")),
        "ball": (Noun("ball", "balls"), Noun("sphere", "spheres")),
        "cylinder": (Noun("cylinder", "cylinders"),),
        "cone": (Noun("cone", "cones"),),
        "ring": (Noun("ring", "rings"),),
        "monkey": (Noun("monkey", "monkeys"), Noun("monkey head", "monkey heads")),
        "star": (Noun("star", "stars"),),
        "stool": (Noun("stool", "stools"),),
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
    one="one",
    indefinite=lambda gender, following: "an" if following[0] in "aeiou" else "a",
    definite=lambda gender, following: "the ",
    form=lambda gender, plural, definite: 0,
    after_noun=frozenset(),
    contractions=(),
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


def _dutch_form(gender: str, plural: bool, definite: bool) -> int:
    """Neuter nouns take the bare form after an indefinite article: een rood blok, het rode blok, een rode bal."""
    if plural:
        return 2
    return 1 if gender == "het" and not definite else 0


DUTCH = Wording(
    shapes={
        "cube": (Noun("kubus", "kubussen", "de"), Noun("blok", "blokken", "het")),
        "ball": (Noun("bal", "ballen", "de"), Noun("bol", "bollen", "de")),
        "cylinder": (Noun("cilinder", "cilinders", "de"),),
        "cone": (Noun("kegel", "kegels", "de"),),
        "ring": (Noun("ring", "ringen", "de"),),
        "monkey": (Noun("aap", "apen", "de"), Noun("apenkop", "apenkoppen", "de")),
        "star": (Noun("ster", "sterren", "de"),),
        "stool": (Noun("kruk", "krukken", "de"), Noun("krukje", "krukjes", "het")),
    },
    colours={
        "red": ("rode/rood/rode",),
        "orange": ("oranje",),
        "yellow": ("gele/geel/gele",),
        "green": ("groene/groen/groene",),
        "cyan": ("turquoise",),
        "blue": ("blauwe/blauw/blauwe",),
        "purple": ("paarse/paars/paarse",),
        "pink": ("roze",),
    },
    materials={
        "rubber": ("rubberen", "matte/mat/matte"),
        "metal": ("metalen", "glimmende/glimmend/glimmende"),
        "glowing": ("lichtgevende/lichtgevend/lichtgevende", "stralende/stralend/stralende"),
    },
    made_of={
        "rubber": ("van rubber",),
        "metal": ("van metaal",),
        "glowing": ("die licht geeft/dat licht geeft/die licht geven",),
    },
    sizes={"small": ("kleine/klein/kleine",), "large": ("grote/groot/grote",)},
    numbers={1: ("een", "één"), 2: ("twee",), 3: ("drie",)},
    one="één",
    indefinite=lambda gender, following: "een",
    definite=lambda gender, following: gender + " ",
    form=_dutch_form,
    after_noun=frozenset(),
    contractions=(),
    plural_verbs=((" staat ", " staan "), (" is ", " zijn ")),
    relations={
        "left": ("links van", "aan de linkerkant van"),
        "right": ("rechts van", "aan de rechterkant van"),
        "front": ("voor",),
        "behind": ("achter",),
    },
    conjunction="en",
    alone=(
        "{0}",
        "{0}",
        "een foto van {0}",
        "een plaatje van {0}",
        "een afbeelding van {0}",
        "hier is {0}",
        "dit is {0}",
        "de afbeelding toont {0}",
        "we zien {0}",
    ),
    several=(
        "{0}",
        "{0}",
        "een foto van {0}",
        "een plaatje van {0}",
        "er zijn {count} voorwerpen: {0}",
        "{count} voorwerpen: {0}",
        "de afbeelding toont {0}",
        "we zien {0}",
        "een tafereel met {0}",
        "{0} naast elkaar",
    ),
    related=(
        "{0} {1} {2}",
        "{0} {1} {2}",
        "{0} staat {1} {2}",
        "een foto van {0} {1} {2}",
        "de afbeelding toont {0} {1} {2}",
        "we zien {0} {1} {2}",
        "er staat {0} {1} {2}",
    ),
    added=("{0}, en {1} {2} {3}", "{0}; {1} staat {2} {3}", "{0}, met {1} {2} {3}"),
)


def _takes_uno(word: str) -> bool:
    """Whether masculine articles before the word are uno and lo: s with a consonant, z, gn, ps."""
    return word[0] == "z" or word[:2] in ("gn", "ps") or (word[0] == "s" and word[1] not in "aeiou")


def _italian_indefinite(gender: str, following: str) -> str:
    if gender == "f":
        return "una"
    return "uno" if _takes_uno(following) else "un"


def _italian_definite(gender: str, following: str) -> str:
    if following[0] in "aeiou":
        return "l'"
    if gender == "f":
        return "la "
    return "lo " if _takes_uno(following) else "il "


ITALIAN = Wording(
    shapes={
        "cube": (Noun("cubo", "cubi", "m"), Noun("blocco", "blocchi", "m")),
        "ball": (Noun("palla", "palle", "f"), Noun("sfera", "sfere", "f")),
        "cylinder": (Noun("cilindro", "cilindri", "m"),),
        "cone": (Noun("cono", "coni", "m"),),
        "ring": (Noun("anello", "anelli", "m"),),
        "monkey": (Noun("scimmia", "scimmie", "f"), Noun("testa di scimmia", "teste di scimmia", "f")),
        "star": (Noun("stella", "stelle", "f"),),
        "stool": (Noun("sgabello", "sgabelli", "m"),),
    },
    colours={
        "red": ("rosso/rossa/rossi/rosse",),
        "orange": ("arancione/arancione/arancioni/arancioni",),
        "yellow": ("giallo/gialla/gialli/gialle",),
        "green": ("verde/verde/verdi/verdi",),
        "cyan": ("azzurro/azzurra/azzurri/azzurre",),
        "blue": ("blu",),
        "purple": ("viola",),
        "pink": ("rosa",),
    },
    materials={
        "rubber": ("di gomma", "opaco/opaca/opachi/opache"),
        "metal": ("di metallo", "lucido/lucida/lucidi/lucide"),
        "glowing": ("luminoso/luminosa/luminosi/luminose", "splendente/splendente/splendenti/splendenti"),
    },
    made_of={
        "rubber": ("fatto di gomma/fatta di gomma/fatti di gomma/fatte di gomma",),
        "metal": ("fatto di metallo/fatta di metallo/fatti di metallo/fatte di metallo",),
        "glowing": ("che brilla/che brilla/che brillano/che brillano",),
    },
    sizes={"small": ("piccolo/piccola/piccoli/piccole",), "large": ("grande/grande/grandi/grandi",)},
    numbers={1: ("un", "uno", "una"), 2: ("due",), 3: ("tre",)},
    one=None,
    indefinite=_italian_indefinite,
    definite=_italian_definite,
    form=lambda gender, plural, definite: 2 * plural + (gender == "f"),
    after_noun=frozenset({"colour", "material"}),
    contractions=(
        (" di il ", " del "),
        (" di lo ", " dello "),
        (" di la ", " della "),
        (" di l'", " dell'"),
        (" a il ", " al "),
        (" a lo ", " allo "),
        (" a la ", " alla "),
        (" a l'", " all'"),
    ),
    plural_verbs=((" è ", " sono "), ("c'è ", "ci sono ")),
    relations={
        "left": ("a sinistra di", "alla sinistra di"),
        "right": ("a destra di", "alla destra di"),
        "front": ("davanti a",),
        "behind": ("dietro a",),
    },
    conjunction="e",
    alone=(
        "{0}",
        "{0}",
        "una foto di {0}",
        "una fotografia di {0}",
        "un'immagine di {0}",
        "c'è {0}",
        "questa immagine mostra {0}",
        "l'immagine mostra {0}",
        "vediamo {0}",
    ),
    several=(
        "{0}",
        "{0}",
        "una foto di {0}",
        "una fotografia di {0}",
        "ci sono {count} oggetti: {0}",
        "{count} oggetti: {0}",
        "l'immagine mostra {0}",
        "vediamo {0}",
        "una scena con {0}",
        "{0} fianco a fianco",
    ),
    related=(
        "{0} {1} {2}",
        "{0} {1} {2}",
        "{0} è {1} {2}",
        "una foto di {0} {1} {2}",
        "l'immagine mostra {0} {1} {2}",
        "vediamo {0} {1} {2}",
        "c'è {0} {1} {2}",
    ),
    added=("{0}, e {1} {2} {3}", "{0}; {1} è {2} {3}", "{0}, con {1} {2} {3}"),
)

WORDINGS: Mapping[str, Wording] = {"eng": ENGLISH, "nld": DUTCH, "ita": ITALIAN}
"""By ISO 639-3 code."""
