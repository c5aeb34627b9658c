"""Captions made elsewhere, read from a file and matched with their images."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcap.data.dataset import CaptionedImage
from clipcap.data.members import name_of
from clipcap.data.readers.csv_rows import csv_rows
from clipcap.data.readers.text import whole_characters
from common.checks import UserError, require_file

_ID_KEYS = ("image_id", "image", "file_name", "filename", "path")


def read_captions(path: Path, items: Sequence[CaptionedImage]) -> dict[str, str]:
    """Captions of `items` from a file: JSON or CSV of `clipcap caption`, JSON Lines, or COCO's results format.

    The best caption of an image counts. An id may be the image's id, path, file name or its stem, or the number at
    the end of the stem, as in COCO_val2014_000000391895.jpg; ids of other images are left out.

    Raises:
        UserError: not such a file (the row is named), an id twice, or no id of these images.
    """
    known = _index(items)
    found: dict[str, str] = {}
    unknown = ""
    for number, row in enumerate(_rows(path)):
        where = f"captions {str(path)!r}, row {number + 1}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object: give each image an 'image_id' and a 'caption'.")
        if "made_by" in row:
            continue
        name = next((row[key] for key in _ID_KEYS if row.get(key) not in (None, "")), None)
        text = row.get("caption")
        if text is None and isinstance(row.get("captions"), list) and row["captions"]:
            text = row["captions"][0]
        if name is None or not isinstance(text, str):
            raise UserError(f"{where} has no 'image_id' or no 'caption': give each image both.")
        if str(row.get("rank", "1")) != "1":
            continue
        image_id = next((known[key] for key in (str(name), Path(str(name)).name) if key in known), None)
        if image_id is None:
            unknown = unknown or str(name)
            continue
        if image_id in found:
            raise UserError(f"{where}: image {str(name)!r} occurs a second time: give one caption for each image.")
        found[image_id] = whole_characters(text)
    if not found:
        example = f"{unknown!r} is none of them" if unknown else "the file is empty"
        raise UserError(
            f"captions {str(path)!r} has no caption of the {len(items)} images (such as {items[0].image_id!r}): "
            f"{example}; give file names or their numbers as ids, or another --split."
        )
    return found


def _index(items: Sequence[CaptionedImage]) -> dict[str, str]:
    """What an image may be called, to its id; names that two images share are left out."""
    found: dict[str, str | None] = {}
    for item in items:
        number = re.search(r"\d+$", item.path.stem)
        paths = (item.path, Path(item.image_id))
        names = {str(item.path), name_of(item.path), *(path.name for path in paths), *(path.stem for path in paths)}
        if number:
            names.add(str(int(number.group())))
        for name in names:
            found[name] = item.image_id if found.get(name, item.image_id) == item.image_id else None
    unique = {name: image_id for name, image_id in found.items() if image_id is not None}
    return unique | {item.image_id: item.image_id for item in items}


def _rows(path: Path) -> list[Any]:
    if path.suffix.lower() in (".csv", ".tsv"):
        return [row for _, row in csv_rows(require_file(path, "captions"), _ID_KEYS)]
    text = _read(path)
    try:
        if path.suffix.lower() == ".jsonl":  # a line ends with "\n" alone: U+2028 may stand in a caption
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"captions {str(path)!r} is not JSON, line {error.lineno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
        raise UserError(f"captions {str(path)!r} is JSON that cannot be read ({error}): write it again.") from None
    rows = rows.get("annotations") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(f"captions {str(path)!r} is no list: give a list of objects with 'image_id' and 'caption'.")
    return rows


def _read(path: Path) -> str:
    try:
        return require_file(path, "captions").read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"captions {str(path)!r} is not UTF-8 (byte {error.start}): convert it.") from None
