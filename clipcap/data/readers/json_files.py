"""Captions in one JSON file or pickle: Karpathy's, COCO's, nocaps' and the original project's."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipcap.data.readers.captioned import SPLITS, CaptionedImage, Gaps, place_of, split_in
from clipcap.data.readers.csv_rows import column
from clipcap.data.readers.tables import group_rows
from clipcap.data.readers.text import read_text
from clipcap.data.untrusted import read_pickle
from common.checks import UserError

LARGEST_JSON = 2 << 30
"""Bytes of a JSON file, which is in memory in full."""


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


def read_karpathy(path: Path, data: Any, images: Path | None, gaps: Gaps) -> Iterator[CaptionedImage]:
    root = images or (path.parent / "images" if (path.parent / "images").is_dir() else path.parent)
    for number, row in enumerate(list_of(path, data, "images")):
        where = f"caption file {str(path)!r}, images[{number}]"
        try:
            name = str(row["filename"])
            captions = [sentence["raw"] for sentence in row["sentences"]]
            split = SPLITS[row.get("split", "train")]
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: no or unknown {error}.") from None
        # The id is the file's name: COCO's cocoid and Flickr's imgid are not in every file.
        yield CaptionedImage(name, root / str(row.get("filepath", "")) / name, gaps.check(captions, where), split)


def coco_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("captions_*.json")) or sorted(folder.glob("annotations/captions_*.json"))


def read_coco(
    path: Path, data: Any, images: Path | None, gaps: Gaps, *, domains: bool = False
) -> Iterator[CaptionedImage]:
    from pycocotools.coco import COCO

    rows, notes = list_of(path, data, "images"), list_of(path, data, "annotations")
    require_keys(path, "images", rows, ("id", "file_name", *(["domain"] if domains else [])))
    require_keys(path, "annotations", notes, ("id", *_keys("image_id", gaps)))
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
    split, word = split_in(path.stem)
    roots = [images] if images else [path.parent / "images", path.parent, path.parent.parent]
    folders = ["", *([word] if word else [])]
    for number, row in enumerate(rows):
        captions = [note.get("caption") for note in index.imgToAnns.get(row["id"], [])]
        if captions:  # COCO's test images have none
            kept = gaps.check(captions, f"caption file {str(path)!r}, images[{number}]")
            name = str(row["file_name"])
            yield CaptionedImage(name, place_of(name, roots, folders), kept, split, str(row.get("domain", "")))


def read_original(
    path: Path, data: Any, images: Path | None, need_images: bool, gaps: Gaps
) -> Iterator[CaptionedImage]:
    require_keys(path, "", list_of(path, data, ""), _keys("image_id", gaps), distinct=False)
    roots = [images] if images else [path.parent / "images", path.parent, path.parent.parent]
    for image_id, captions in _grouped(path, data, gaps).items():
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


def read_lavis(path: Path, data: Any, images: Path | None, gaps: Gaps) -> Iterator[CaptionedImage]:
    """Objects with an image's file and its caption, or a list of them, as in LAVIS's coco_karpathy_train.json."""
    rows = [
        (f"caption file {str(path)!r}, [{number}]", {column(key): value for key, value in row.items()})
        for number, row in enumerate(_objects(path, data))
    ]
    return _rows_of_list(path, rows, images, gaps)


def read_llava(path: Path, data: Any, images: Path | None, gaps: Gaps) -> Iterator[CaptionedImage]:
    """LLaVA's blip_laion_cc_sbu_558k.json: the one answer of a conversation about an image is its caption."""
    rows = []
    for number, row in enumerate(_objects(path, data)):
        where = f"caption file {str(path)!r}, [{number}]"
        turns = row.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"{where}: it has no list 'conversations': give another file or format.")
        if not row.get("image"):
            if gaps.skip:
                continue
            raise UserError(f"{where}: it has no 'image': leave it out, or use --skip-missing.")
        answers = [turn.get("value") for turn in turns if turn.get("from") in ("gpt", "assistant")]
        if len(answers) > 1:
            raise UserError(f"{where}: it has {len(answers)} answers, so none is the caption: leave it out.")
        rows.append((where, {"image": row.get("image"), "caption": answers}))
    return _rows_of_list(path, rows, images, gaps)


def _objects(path: Path, data: Any) -> list[dict[str, Any]]:
    rows = list_of(path, data, "")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"caption file {str(path)!r}, [{number}]: it is a {type(row).__name__}, no object.")
    return rows


def _rows_of_list(
    path: Path, rows: list[tuple[str, dict[str, Any]]], images: Path | None, gaps: Gaps
) -> Iterator[CaptionedImage]:
    split, word = split_in(path.stem)
    roots = [images] if images else [path.parent / "images", path.parent, path.parent.parent]
    folders = ["", *([word] if word else [])]
    return group_rows(rows, lambda name: place_of(name, roots, folders), gaps, split)


def read_original_pickle(path: Path, gaps: Gaps) -> Iterator[CaptionedImage]:
    data = read_pickle(path)
    embeddings: Any = data.get("clip_embedding") if isinstance(data, dict) else None
    rows = data.get("captions") if isinstance(data, dict) else None
    if not hasattr(embeddings, "shape") or len(embeddings.shape) != 2 or not isinstance(rows, list):
        raise UserError(
            f"pickle {str(path)!r} is not the original ClipCap's: it needs 'clip_embedding', a tensor (n, e), and "
            f"'captions', a list."
        )
    require_keys(path, "captions", rows, _keys("clip_embedding", gaps), distinct=False)
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        at = row["clip_embedding"]
        if not isinstance(at, int) or not 0 <= at < len(embeddings):
            raise UserError(
                f"pickle {str(path)!r}, captions[{number}]: clip_embedding is {at!r}, of {len(embeddings)} embeddings."
            )
        row.setdefault("image_id", at)
        first.setdefault(str(row["image_id"]), at)
    for image_id, captions in _grouped(path, rows, gaps).items():
        yield CaptionedImage(image_id, path, captions, "", embedding_row=first[image_id])


def _keys(name: str, gaps: Gaps) -> tuple[str, ...]:
    """What a row of the original must have."""
    return (name,) if gaps.skip else (name, "caption")


def _grouped(path: Path, rows: list[dict[str, Any]], gaps: Gaps) -> dict[str, tuple[str, ...]]:
    """Captions by image, of rows with an image_id and a caption each."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        where = f"caption file {str(path)!r}, row {number}"
        found.setdefault(str(row["image_id"]), []).extend(gaps.check([row.get("caption")], where))
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
