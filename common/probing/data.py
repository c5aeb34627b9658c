"""What the probes read: class folders with splits, lists of labels, templates and captions."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from common.checks import UserError, require_directory, require_file, require_share, require_text
from common.images import image_suffixes, images_below
from common.probes import TEMPLATES, fill, split_by_class

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folders of splits."""
LARGEST_TEXT = 1 << 26
"""Bytes of a file of labels, templates or captions, at most."""


@dataclass(frozen=True)
class Labelled:
    """Images with their classes."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    """Names, in the order of the labels; underscores of folders are spaces."""

    def take(self, rows: Sequence[int]) -> Labelled:
        """Some of the images."""
        return replace(self, paths=tuple(self.paths[i] for i in rows), labels=tuple(self.labels[i] for i in rows))

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """`labels` as a tensor."""
        return torch.tensor(self.labels, dtype=torch.long)


@dataclass(frozen=True)
class Shares:
    """What is held out of training if the data do not say."""

    test_share: float = 0.25
    """Share of each class that is tested on, if the folder has no test/."""
    val_share: float = 0.2
    """Share of the training images of each class that the strength C is chosen on, if the folder has no val/."""


@dataclass(frozen=True)
class PromptConfig:
    """What classes are called in."""

    templates: str = "photo"
    """Prompt templates: photo ("a photo of a {}."), ensemble (seven, whose embeddings are averaged), bare ("{}"), or a
    text file with one on each line, {} where the class goes."""


def find_images(folder: Path) -> list[Path]:
    """The images in a folder and those inside it, sorted; pictures of kinds that are not read are counted and named.

    Raises:
        UserError: it is missing, or holds none.
    """
    found = images_below(require_directory(folder, "folder"))
    if not found:
        kinds = ", ".join(sorted(image_suffixes()))
        raise UserError(f"folder {str(folder)!r} holds no image: give one with {kinds} files.")
    return found


def read_classes(folder: Path) -> dict[str, Labelled]:
    """Labelled images by split: train, val and test if the folder has such folders of class folders, else "all".

    Folders without an image are no classes.

    Raises:
        UserError: the folder is missing, or has fewer than two classes or two of the same name.
    """
    require_directory(folder, "folder")
    splits: dict[str, dict[str, list[Path]]] = {}
    for inside in _folders(folder):
        if inside.name.lower() in SPLITS and (classes := _class_folders(inside)):
            splits.setdefault(SPLITS[inside.name.lower()], {}).update(classes)
    splits = splits or {"all": _class_folders(folder)}
    names = sorted({name for classes in splits.values() for name in classes})
    if len(names) < 2:
        raise UserError(
            f"folder {str(folder)!r} has {len(names)} class folders with images: give a folder with a subfolder of "
            f"images for each of at least 2 classes."
        )
    shown = tuple(name.replace("_", " ").strip() or name for name in names)
    for name in shown:
        require_text("class", name)
        if shown.count(name) > 1:
            raise UserError(f"folder {str(folder)!r} has {shown.count(name)} classes {name!r}: rename a subfolder.")
    found = {}
    for split, classes in splits.items():
        rows = [(path, names.index(name)) for name in sorted(classes) for path in classes[name]]
        found[split] = Labelled(tuple(path for path, _ in rows), tuple(label for _, label in rows), shown)
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    found = {inside.name: images_below(inside) for inside in _folders(folder)}
    return {name: paths for name, paths in found.items() if paths}


def train_val_test(folder: Path, shares: Shares, seed: int) -> tuple[Labelled, Labelled, Labelled]:
    """Training, validation and test images; what the folder does not split is drawn of each class by `seed`.

    Raises:
        UserError: a share out of range; there is a train/ but no test/, or the other way round; a class without
            training images.
    """
    require_share("test_share", shares.test_share)
    require_share("val_share", shares.val_share)
    splits = read_classes(folder)
    generator = torch.Generator().manual_seed(seed)
    if "all" in splits:
        kept, held = split_by_class(splits["all"].targets, shares.test_share, generator)
        splits |= {"train": splits["all"].take(kept.tolist()), "test": splits["all"].take(held.tolist())}
    for name in ("train", "test"):
        if name not in splits:
            raise UserError(f"folder {str(folder)!r} has no {name}/ beside its other splits: add it, or use none.")
    train, test = splits["train"], splits["test"]
    for number, name in enumerate(train.classes):
        if number not in train.labels:
            raise UserError(f"class {name!r} of {str(folder)!r} has no training images: add some, or remove it.")
    if "val" in splits:
        return train, splits["val"], test
    kept, held = split_by_class(train.targets, shares.val_share, generator)
    return train.take(kept.tolist()), train.take(held.tolist()), test


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file that are not empty."""
    file = require_file(path, what)
    if file.stat().st_size > LARGEST_TEXT:
        raise UserError(f"{what} {str(path)!r} has {file.stat().st_size:,} bytes: give at most {LARGEST_TEXT:,}.")
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {str(path)!r} is not UTF-8 ({error.reason}): write it in UTF-8.") from error


def read_labels(given: str) -> tuple[str, ...]:
    """Class names: "dog,cat,horse", or the path of a text file with one on each line.

    Raises:
        UserError: fewer than two, or one twice.
    """
    parts = read_lines(given, "labels") if os.path.isfile(given) else given.split(",")
    names = tuple(part.strip() for part in parts if part.strip())
    if len(names) < 2:
        raise UserError(f"labels is {given!r}: give at least 2, with commas between, or a file with one on each line.")
    for name in names:
        require_text("labels", name)
        if names.count(name) > 1:
            raise UserError(f"labels name {name!r} {names.count(name)} times: give each once.")
    return names


def read_templates(given: str) -> tuple[str, ...]:
    """A built-in set of templates, or those of a file.

    Raises:
        UserError: neither, or a template without {}.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    if not os.path.isfile(given):
        raise UserError(f"templates is {given!r}: give {', '.join(TEMPLATES)}, or a file with one on each line.")
    templates = tuple(read_lines(given, "templates"))
    fill(templates, "")
    return templates


def read_captions(path: Path, folder: Path) -> tuple[list[Path], list[str], list[int]]:
    """Images, captions, and the image's row for each caption, of a CSV file with columns file_name and caption.

    Raises:
        UserError: it has other columns, no rows, or names an image that is missing.
    """
    lines = read_lines(path, "captions")
    images: dict[Path, int] = {}
    captions, owners = [], []
    try:
        rows = csv.DictReader(lines)
        if not {"file_name", "caption"} <= set(rows.fieldnames or ()):
            raise UserError(f"captions {str(path)!r} has columns {rows.fieldnames}: give file_name and caption.")
        for number, row in enumerate(rows, start=2):
            name, caption = (row["file_name"] or "").strip(), (row["caption"] or "").strip()
            if not name or not caption:
                raise UserError(f"captions {str(path)!r}, row {number}: the file name or the caption is empty.")
            require_text(f"captions row {number}", caption)
            image = require_file(folder / name, f"captions {str(path)!r}, row {number}: image")
            owners.append(images.setdefault(image, len(images)))
            captions.append(caption)
    except csv.Error as error:
        raise UserError(f"captions {str(path)!r} is no CSV file ({error}): write it again.") from error
    if not captions:
        raise UserError(f"captions {str(path)!r} has no rows: give at least one.")
    return list(images), captions, owners
