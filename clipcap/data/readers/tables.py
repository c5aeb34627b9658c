"""Captions in tables, in text files beside images, and Flickr8k's own layout."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipcap.data.readers.captioned import SPLITS, CaptionedImage, Gaps, place_of, split_of_folder
from clipcap.data.readers.csv_rows import CAPTION_KEYS, IMAGE_KEYS, column, csv_rows, needed
from clipcap.data.readers.text import LARGEST_TEXT, lines, read_text
from common.checks import UserError, printable
from common.images import files_below, images_below

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
JSON_LINES = (".jsonl", ".ndjson")
SIDECARS = (".txt", ".caption")
FLICKR_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")
_FLICKR_SPLITS = {"trainImages": "train", "devImages": "val", "testImages": "test"}
URL = re.compile(r"https?://", re.IGNORECASE)


def read_folder(folder: Path, images: Path, need_images: bool, gaps: Gaps) -> Iterator[CaptionedImage]:
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is not None:
        yield from read_table(table, images, gaps)
        return
    files = images_below(images)
    if not need_images:
        known = {file.with_suffix("") for file in files}
        texts = {text.with_suffix("") for text in files_below(images, SIDECARS)}
        files += sorted(texts - known)
    if not files:
        raise UserError(f"folder {str(images)!r} holds no image: put images and captions in it.")
    alone = []
    for file in files:
        sidecar = next((text for text in map(file.with_suffix, SIDECARS) if text.is_file()), None)
        if sidecar is None:
            alone.append(file)
            continue
        name = file.relative_to(images)
        split = next(filter(None, map(split_of_folder, name.parts[:-1])), "")
        captions = read_text(sidecar, LARGEST_TEXT).split("\n")
        yield CaptionedImage(str(name), file, gaps.check(captions, f"caption file {str(sidecar)!r}"), split)
    if alone:
        print(
            f"{len(alone)} of {len(files)} images in {str(images)!r} have no {' or '.join(SIDECARS)} file beside them "
            f"and are left out, the first {printable(alone[0].name)!r}.",
            file=sys.stderr,
        )


def split_folders(folder: Path) -> list[tuple[Path, str]]:
    """The folders for splits in a folder, with their splits: train, val, test."""
    inside = [(place, split_of_folder(place.name)) for place in sorted(folder.iterdir()) if place.is_dir()]
    order = list(SPLITS.values())
    return sorted(((place, split) for place, split in inside if split), key=lambda each: order.index(each[1]))


def read_split_folders(folder: Path, images: Path, need_images: bool, gaps: Gaps) -> Iterator[CaptionedImage]:
    for place, split in split_folders(folder):
        for item in read_folder(place, images / place.name, need_images, gaps):
            yield replace(item, image_id=f"{place.name}/{item.image_id}", split=split)


def read_table(table: Path, images: Path, gaps: Gaps) -> Iterator[CaptionedImage]:
    rows = json_rows(table) if table.suffix.lower() in JSON_LINES else csv_rows(table)
    named = ((f"caption file {str(table)!r}, line {number}", row) for number, row in rows)
    return group_rows(named, lambda name: images / name, gaps)


def group_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], place: Callable[[str], Path], gaps: Gaps, split: str = ""
) -> Iterator[CaptionedImage]:
    """Items of rows with an image's file and a caption, or several, and perhaps a split; an image may have many rows.

    Args:
        rows: what errors call each, and the row, by its columns.
        place: from a file's name to its path.
        gaps: what to do without a caption.
        split: of all, where a row says none.
    """
    grouped: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for where, row in rows:
        name = next((row[key] for key in IMAGE_KEYS if row.get(key)), None)
        if name is None:
            raise UserError(f"{where} {needed(list(row))}.")
        key = os.path.normpath(str(name))  # ./a.jpg is a.jpg
        text = next((row[key] for key in CAPTION_KEYS if row.get(key)), None)
        grouped.setdefault(key, []).extend(gaps.check(text if isinstance(text, list) else [text], where))
        said = row.get("split")
        if said:
            found = SPLITS.get(str(said).strip().lower())
            if found is None:
                raise UserError(f"{where}: split is {said!r}: use train, val or test.")
            if splits.setdefault(key, found) != found:
                raise UserError(
                    f"{where}: image {key!r} is in split {found!r} here and in {splits[key]!r} above: give it one."
                )
    for name, several in grouped.items():
        yield CaptionedImage(name, place(name), tuple(several), splits.get(name, split))


def json_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON Lines file with their line numbers."""
    for number, line in lines(table):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise UserError(f"caption file {str(table)!r}, line {number} is not JSON: {reason}.") from None
            if not isinstance(row, dict):
                raise UserError(f"caption file {str(table)!r}, line {number} is not a JSON object.")
            yield number, {column(key): value for key, value in row.items()}


def read_flickr8k(path: Path, images: Path | None, gaps: Gaps) -> Iterator[CaptionedImage]:
    grouped: dict[str, list[str]] = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"caption file {str(path)!r}, line {number}"
        match = FLICKR_LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{where}: {line[:60]!r} is not name#number, a tab and a caption.")
        grouped.setdefault(match[1], []).extend(gaps.check([match[2]], where))
    splits: dict[str, str] = {}
    for name, split in _FLICKR_SPLITS.items():
        for listed in path.parent.glob(f"*{name}.txt"):
            splits |= {line.strip(): split for _, line in lines(listed) if line.strip()}
    roots = [images] if images else [path.parent]
    folders = ["", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset"]
    for name, captions in grouped.items():
        if not splits or name in splits:  # outside the three lists are images that the protocol leaves out
            yield CaptionedImage(name, place_of(name, roots, folders), tuple(captions), splits.get(name, ""))
