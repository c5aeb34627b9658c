"""Captions in tables, in text files beside images, and Flickr8k's own layout."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipcap.data.readers.captioned import SPLITS, CaptionedImage, check_captions
from clipcap.data.readers.json_files import place_of
from clipcap.data.readers.text import LARGEST_TEXT, lines, read_text
from common.checks import UserError
from common.images import IMAGE_SUFFIXES, files_below

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
IMAGE_KEYS = ("file_name", "filename", "image", "path")
CAPTION_KEYS = ("caption", "text", "captions", "description")
FLICKR_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")
_FLICKR_SPLITS = {"trainImages": "train", "devImages": "val", "testImages": "test"}
URL = re.compile(r"https?://", re.IGNORECASE)


def read_folder(folder: Path, images: Path, need_images: bool) -> Iterator[CaptionedImage]:
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is not None:
        yield from read_table(table, images)
        return
    files = sorted(files_below(images, IMAGE_SUFFIXES))
    if not need_images:
        known = {file.with_suffix(".txt") for file in files}
        files += [text.with_suffix("") for text in sorted(files_below(images, (".txt",))) if text not in known]
    if not files:
        raise UserError(f"folder {str(images)!r} holds no image: put images and captions in it.")
    for file in files:
        sidecar = file.with_suffix(".txt")
        if sidecar.is_file():
            captions = check_captions(read_text(sidecar, LARGEST_TEXT).split("\n"), f"caption file {str(sidecar)!r}")
            yield CaptionedImage(str(file.relative_to(images)), file, captions, "")


def read_split_folders(folder: Path, images: Path, need_images: bool) -> Iterator[CaptionedImage]:
    for name, split in SPLITS.items():
        if (folder / name).is_dir():
            for item in read_folder(folder / name, images / name, need_images):
                yield replace(item, image_id=f"{name}/{item.image_id}", split=split)


def read_table(table: Path, images: Path) -> Iterator[CaptionedImage]:
    grouped: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for number, row in _rows(table):
        where = f"caption file {str(table)!r}, line {number}"
        name = next((row[key] for key in IMAGE_KEYS if row.get(key)), None)
        text = next((row[key] for key in CAPTION_KEYS if row.get(key)), None)
        if name is None or text is None:
            raise UserError(f"{where}: it needs a {IMAGE_KEYS[0]!r} and a {CAPTION_KEYS[0]!r}.")
        texts = text if isinstance(text, list) else [text]
        grouped.setdefault(str(name), []).extend(check_captions(tuple(map(str, texts)), where))
        if row.get("split"):
            if str(row["split"]) not in SPLITS:
                raise UserError(f"{where}: split is {row['split']!r}: use train, val or test.")
            splits[str(name)] = SPLITS[str(row["split"])]
    for name, several in grouped.items():
        yield CaptionedImage(name, images / name, tuple(several), splits.get(name, ""))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or JSON Lines file with their line numbers."""
    if table.suffix.lower() != ".jsonl":
        # A return by itself ends a line of old Macs.
        reader = csv.DictReader(f"{part}\n" for _, line in lines(table) for part in line.split("\r"))
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"caption file {str(table)!r}, line {reader.line_num} is not CSV: {error}.") from None
        return
    for number, line in lines(table):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise UserError(f"caption file {str(table)!r}, line {number} is not JSON: {reason}.") from None
            if not isinstance(row, dict):
                raise UserError(f"caption file {str(table)!r}, line {number} is not a JSON object.")
            yield number, row


def read_flickr8k(path: Path, images: Path | None) -> Iterator[CaptionedImage]:
    grouped: dict[str, list[str]] = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"caption file {str(path)!r}, line {number}"
        match = FLICKR_LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{where}: {line[:60]!r} is not name#number, a tab and a caption.")
        grouped.setdefault(match[1], []).extend(check_captions([match[2]], where))
    splits: dict[str, str] = {}
    for name, split in _FLICKR_SPLITS.items():
        for listed in path.parent.glob(f"*{name}.txt"):
            splits |= {line.strip(): split for _, line in lines(listed) if line.strip()}
    roots = [images] if images else [path.parent]
    folders = ["", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset"]
    for name, captions in grouped.items():
        if not splits or name in splits:  # outside the three lists are images that the protocol leaves out
            yield CaptionedImage(name, place_of(name, roots, folders), tuple(captions), splits.get(name, ""))
