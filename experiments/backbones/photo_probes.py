"""Zero-shot classification and a linear probe on photographs, whose classes are nouns that their captions agree on.

    python -m experiments.backbones.photo_probes --data dataset_flickr8k.json --clip openai/clip-vit-base-patch32

An image has a class when at least two of its captions name exactly one of the nouns, and no other noun has as many
such captions. The nouns are the most frequent in training; C is chosen on val, and test is scored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipcap.data.readers import read_dataset
from clipcap.data.readers.captioned import CaptionedImage
from common.checks import UserError, require_between, require_place, run_command
from common.files import write_json, write_text
from common.probes import TEMPLATES, Scores, linear_probe, score, zero_shot
from common.probing.data import Labelled
from common.probing.embed import EncoderConfig, embed_classes, embed_images, load
from common.runtime import hardware, provenance
from experiments import from_command_line

VOTES = 2
"""Captions that must name a noun, and no other."""
NOUNS: dict[str, str] = {
    "ball": "ball balls",
    "basketball": "basketball",
    "beach": "beach beaches",
    "bicycle": "bicycle bicycles bike bikes biker bikers cyclist cyclists",
    "bird": "bird birds",
    "boat": "boat boats canoe canoes kayak kayaks",
    "bus": "bus buses",
    "car": "car cars",
    "cat": "cat cats kitten",
    "dog": "dog dogs puppy puppies",
    "football player": "football",
    "fountain": "fountain fountains",
    "guitar": "guitar guitars",
    "horse": "horse horses",
    "motorcycle": "motorcycle motorcycles motorbike motorbikes motorcyclist",
    "mountain": "mountain mountains",
    "skateboard": "skateboard skateboards skateboarder skateboarders skateboarding",
    "snow": "snow snowy",
    "soccer game": "soccer",
    "surfer": "surfer surfers surfing surfboard surfboards",
    "swimming pool": "pool pools",
    "swing": "swing swings",
    "tennis": "tennis",
    "tree": "tree trees",
}
"""Classes, as prompts name them, and the words of captions that stand for each."""


@dataclass(frozen=True)
class Config:
    """Score an encoder on classes of photographs."""

    data: Path
    """Karpathy JSON file with train, val and test images."""
    images: Path | None = None
    """Directory of the images, when they are not beside the file."""
    classes: int = 12
    """Nouns: those of most training images."""
    most: int = 0
    """Images of each split, at most, evenly chosen; 0 takes all."""
    out: Path = Path("out/photo_probes.json")
    """JSON file to write."""
    docs: Path | None = None
    """Markdown file to write the table to, such as docs/photo_probes.md."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def named(caption: str, nouns: Mapping[str, str]) -> set[str]:
    """The nouns that a caption names, by any of their words."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    return {noun for noun, forms in nouns.items() if words & set(forms.split())}


def noun_of(captions: Iterable[str], nouns: Mapping[str, str]) -> str | None:
    """The noun that most captions name alone, if they are at least `VOTES` and no other noun has as many."""
    votes = Counter(noun for caption in captions if len(found := named(caption, nouns)) == 1 for noun in found)
    ranked = [*votes.most_common(2), ("", 0), ("", 0)]
    return ranked[0][0] if ranked[0][1] >= VOTES and ranked[0][1] > ranked[1][1] else None


def choose_nouns(items: Sequence[CaptionedImage], number: int) -> tuple[str, ...]:
    """The nouns of most training images, in alphabetical order.

    Raises:
        UserError: fewer have an image.
    """
    found = (noun_of(item.captions, NOUNS) for item in items if item.split == "train")
    counts = Counter(noun for noun in found if noun)
    if len(counts) < number:
        raise UserError(f"classes is {number}, but captions of training images name {len(counts)} nouns: use fewer.")
    return tuple(sorted(sorted(counts, key=lambda noun: (-counts[noun], noun))[:number]))


def label(items: Sequence[CaptionedImage], classes: tuple[str, ...], split: str, most: int = 0) -> Labelled:
    """The images of a split that have a class.

    Raises:
        UserError: there are none.
    """
    nouns = {name: NOUNS[name] for name in classes}
    own = [(item.path, noun) for item in items if item.split == split and (noun := noun_of(item.captions, nouns))]
    if not own:
        raise UserError(f"no image of split {split!r} has a class: give captions in English with train, val and test.")
    if most and len(own) > most:
        own = [own[row * len(own) // most] for row in range(most)]
    return Labelled(tuple(path for path, _ in own), tuple(classes.index(noun) for _, noun in own), classes)


def evaluate(config: Config) -> dict[str, Any]:
    """Scores on test by one template, by the ensemble, and by a linear probe."""
    items = read_dataset(config.data, images=config.images)
    if any(item.embedding_row is not None for item in items):
        raise UserError(f"{str(config.data)!r} holds embeddings instead of images: give a Karpathy JSON file.")
    classes = choose_nouns(items, config.classes)
    splits = {name: label(items, classes, name, config.most) for name in ("train", "val", "test")}
    clip = load(config.encoder, text_for="zero-shot classification")
    pairs = {}
    for name, data in splits.items():
        features, kept, _ = embed_images(clip, data.paths, config.encoder)
        pairs[name] = features, data.targets[kept]
    test, labels = pairs["test"]
    found = {
        f"zero-shot, {name}": score(zero_shot(test, embed_classes(clip, classes, TEMPLATES[name])), labels)
        for name in ("bare", "photo", "ensemble")
    }
    probe = linear_probe(pairs["train"], pairs["val"], test, len(classes))
    found["linear probe"] = score(probe.guesses, labels, known=pairs["train"][1])
    return {
        "classes": {name: int(torch.sum(labels == number)) for number, name in enumerate(classes)},
        "images": {name: len(targets) for name, (_, targets) in pairs.items()},
        "strength": probe.strength,
        "scores": found,
    }


def table(config: Config, found: dict[str, Any], machine: str) -> str:
    """The scores as a Markdown page."""
    scores: dict[str, Scores] = found["scores"]
    images = found["images"]
    lines = [
        "# Classes of photographs",
        "",
        f"`{config.encoder.clip}` on photographs whose captions agree on one of {len(found['classes'])} nouns "
        f"({', '.join(found['classes'])}):",
        f"{images['test']} held-out test images; the linear probe has {images['train']} training and {images['val']} "
        f"validation images (C = {found['strength']:.3g}).",
        "",
        "| | accuracy | 95% interval | mean per class | top-5 |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, one in scores.items():
        low, high = one.interval
        top = "–" if one.top_5 is None else f"{one.top_5:.3f}"
        lines.append(f"| {name} | {one.accuracy:.3f} | {low:.3f} to {high:.3f} | {one.mean_per_class:.3f} | {top} |")
    frequent = scores["linear probe"].most_frequent
    command = f"python -m experiments.backbones.photo_probes --data DATASET.json --clip {config.encoder.clip}"
    command += f" --classes {config.classes}" + (f" --most {config.most}" if config.most else "")
    lines += [f"| most frequent class | {frequent:.3f} | | {1 / len(found['classes']):.3f} | |", ""]
    return "\n".join([*lines, f"`{command}`; hardware: {machine}.", ""])


def main(config: Config) -> None:
    """Score, print and write."""
    require_between("classes", config.classes, 2, len(NOUNS))
    require_between("most", config.most, 0, 10**9)
    require_place(config.out)
    if config.docs:
        require_place(config.docs)
    found = evaluate(config)
    about = {"configuration": asdict(config), **provenance()}
    write_json(config.out, about | found)
    page = table(config, found, hardware())
    print(page)
    if config.docs:
        write_text(config.docs, page)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
