"""Captions in one JSON file or pickle: Karpathy's, COCO's, nocaps' and the original project's."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipcap.data.readers.captioned import SPLITS, CaptionedImage, check_captions
from clipcap.data.readers.text import read_text
from clipcap.data.untrusted import read_pickle
from common.checks import UserError

LARGEST_JSON = 2 << 30
"""Bytes of a JSON file, which is in memory as a whole."""


def load_json(path: Path) -> Any:
    def drop_words(row: dict[str, Any]) -> dict[str, Any]:
        # Karpathy's file holds every caption a second time, in words: most of the memory it would take.
        row.pop("tokens", None)
        return row

    try:
        return json.loads(read_text(path, LARGEST_JSON), object_hook=drop_words)
    except json.JSONDecodeError as error:
        raise UserError(f"caption file {str(path)!r} is not JSON, line {error.lineno}: {error.msg}.") from None
    except RecursionError:
        raise UserError(f"caption file {str(path)!r} is nested too deeply: it is no caption file.") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"caption file {str(path)!r} is not JSON that can be read: {error}.") from None


def read_karpathy(path: Path, data: Any, images: Path | None) -> Iterator[CaptionedImage]:
    root = images or (path.parent / "images" if (path.parent / "images").is_dir() else path.parent)
    for number, row in enumerate(list_of(path, data, "images")):
        where = f"caption file {str(path)!r}, images[{number}]"
        try:
            name = str(row["filename"])
            captions = tuple(str(sentence["raw"]) for sentence in row["sentences"])
            split = SPLITS[row.get("split", "train")]
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: no or unknown {error}.") from None
        # The id is the file's name: COCO's cocoid and Flickr's imgid are not in every file.
        yield CaptionedImage(name, root / str(row.get("filepath", "")) / name, check_captions(captions, where), split)


def coco_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("captions_*.json")) or sorted(folder.glob("annotations/captions_*.json"))


def read_coco(path: Path, data: Any, images: Path | None, *, domains: bool = False) -> Iterator[CaptionedImage]:
    from pycocotools.coco import COCO

    rows, notes = list_of(path, data, "images"), list_of(path, data, "annotations")
    require_keys(path, "images", rows, ("id", "file_name", *(["domain"] if domains else [])))
    require_keys(path, "annotations", notes, ("id", "image_id", "caption"))
    known = {row["id"] for row in rows}
    for number, note in enumerate(notes):
        if note["image_id"] not in known:
            raise UserError(
                f"caption file {str(path)!r}, annotations[{number}]: image_id {note['image_id']!r} is not in 'images'."
            )
    index = COCO()
    index.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    match = re.search(r"(train|val|test)\d*", path.stem)
    split = SPLITS[match[1]] if match else ""
    roots = [images] if images else [path.parent / "images", path.parent, path.parent.parent]
    folders = ["", *([match[0]] if match else [])]
    for number, row in enumerate(rows):
        captions = [str(note["caption"]) for note in index.imgToAnns.get(row["id"], [])]
        if captions:  # COCO's test images have none
            kept = check_captions(captions, f"caption file {str(path)!r}, images[{number}]")
            name = str(row["file_name"])
            yield CaptionedImage(name, place_of(name, roots, folders), kept, split, str(row.get("domain", "")))


def read_original(path: Path, data: Any, images: Path | None, need_images: bool) -> Iterator[CaptionedImage]:
    require_keys(path, "", list_of(path, data, ""), ("image_id", "caption"), distinct=False)
    roots = [images] if images else [path.parent / "images", path.parent, path.parent.parent]
    for image_id, captions in _grouped(path, data).items():
        try:
            number = int(image_id)
        except ValueError:
            if not need_images:
                yield CaptionedImage(image_id, roots[0] / image_id, captions, "")
                continue
            raise UserError(
                f"caption file {str(path)!r}: image_id {image_id!r} is no COCO number, so its file is not known: "
                f"use a layout that names files."
            ) from None
        names = [f"COCO_{folder}_{number:012d}.jpg" for folder in ("train2014", "val2014")]
        places = [place_of(name, roots, ["", name.split("_")[1]]) for name in names]
        place = next((place for place in places if place.is_file()), places[0])
        yield CaptionedImage(place.name, place, captions, "")


def read_original_pickle(path: Path) -> Iterator[CaptionedImage]:
    data = read_pickle(path)
    embeddings: Any = data.get("clip_embedding") if isinstance(data, dict) else None
    rows = data.get("captions") if isinstance(data, dict) else None
    if not hasattr(embeddings, "shape") or len(embeddings.shape) != 2 or not isinstance(rows, list):
        raise UserError(
            f"pickle {str(path)!r} is not the original ClipCap's: it needs 'clip_embedding', a tensor (n, e), and "
            f"'captions', a list."
        )
    require_keys(path, "captions", rows, ("caption", "clip_embedding"), distinct=False)
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        at = row["clip_embedding"]
        if not isinstance(at, int) or not 0 <= at < len(embeddings):
            raise UserError(
                f"pickle {str(path)!r}, captions[{number}]: clip_embedding is {at!r}, of {len(embeddings)} embeddings."
            )
        row.setdefault("image_id", at)
        first.setdefault(str(row["image_id"]), at)
    for image_id, captions in _grouped(path, rows).items():
        yield CaptionedImage(image_id, path, captions, "", embedding_row=first[image_id])


def _grouped(path: Path, rows: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Captions by image, of rows with an image_id and a caption each."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        where = f"caption file {str(path)!r}, row {number}"
        found.setdefault(str(row["image_id"]), []).extend(check_captions([str(row["caption"])], where))
    return {image_id: tuple(captions) for image_id, captions in found.items()}


def list_of(path: Path, data: Any, name: str) -> list[Any]:
    rows = (data.get(name) if isinstance(data, dict) else None) if name else data
    if not isinstance(rows, list):
        raise UserError(f"caption file {str(path)!r} needs a list {name!r}: give another file or format.")
    return rows


def require_keys(path: Path, name: str, rows: list[Any], keys: Sequence[str], *, distinct: bool = True) -> None:
    """Raise UserError unless every row is an object with `keys`, the first of them distinct if asked for."""
    seen = set()
    for number, row in enumerate(rows):
        where = f"caption file {str(path)!r}, {name}[{number}]"
        if not isinstance(row, dict):
            raise UserError(f"{where}: it is a {type(row).__name__} instead of an object.")
        for key in keys:
            if isinstance(row.get(key), (dict, list, type(None))):
                raise UserError(f"{where}: it has no {key!r}.")
        if distinct and row[keys[0]] in seen:
            raise UserError(f"{where}: {keys[0]} {row[keys[0]]!r} occurs twice: make the ids distinct.")
        seen.add(row[keys[0]])


def place_of(name: str, roots: Sequence[Path], folders: Sequence[str]) -> Path:
    """The first place where a file is; the first of all where it is nowhere."""
    places = [root / folder / name for root in roots for folder in folders]
    return next((place for place in places if place.is_file()), places[0])
