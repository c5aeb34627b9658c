"""Readers of captioned images: every common layout, told apart by what is in it, as a list of `CaptionedImage`."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from clipcap.images import IMAGE_SUFFIXES, files_below
from clipcap.untrusted import read_pickle, read_tar
from common.checks import UserError, require_directory, require_file, require_one_of
from common.files import MARKER, whole_file, write_json
from common.images import ImageTooLarge, open_image

Format = Literal[
    "auto", "karpathy", "coco", "nocaps", "original", "original-pickle", "conceptual", "flickr8k", "table", "folder",
    "imagefolder", "datasets", "webdataset",
]  # fmt: skip
TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IMAGE_KEYS = ("file_name", "filename", "image", "path")
_CAPTION_KEYS = ("caption", "text", "captions", "description")
_FLICKR_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")
_FLICKR_SPLITS = {"trainImages": "train", "devImages": "val", "testImages": "test"}
_URL = re.compile(r"https?://", re.IGNORECASE)
LONGEST_LINE = 16 << 20
"""Bytes of a line of a caption file."""
LARGEST_TEXT = 1 << 20
"""Bytes of a text file or JSON file that belongs to one image."""
LARGEST_JSON = 2 << 30
"""Bytes of a JSON file, which is in memory as a whole."""
_HALVES = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class CaptionedImage:
    """An image file with its reference captions."""

    image_id: str
    path: Path
    captions: tuple[str, ...]
    split: str
    """train, val or test."""
    domain: str = ""
    """nocaps: in-domain, near-domain or out-domain."""
    embedding_row: int | None = None
    """Where the source holds CLIP embeddings instead of images: the row in it; `path` is the source itself."""


def read_dataset(
    source: Path,
    *,
    images: Path | None = None,
    val_share: float = 0.1,
    skip_missing: bool = False,
    format: Format = "auto",
    need_images: bool = True,
) -> list[CaptionedImage]:
    """Read captioned images; the layout is told from the content.

    | format | source |
    |---|---|
    | karpathy | Karpathy's JSON (COCO, Flickr8k, Flickr30k): restval counts as train |
    | coco | COCO's captions_*.json, or the folder `annotations` with several |
    | nocaps | the same with a domain for each image |
    | original | the original ClipCap's train_caption.json |
    | original-pickle | its pickle of embeddings and captions, from which no code is run |
    | conceptual | Conceptual Captions' TSV, and in `images` what `clipcap download` made of it |
    | flickr8k | Flickr8k's token file (name#number, tab, caption), with the lists of its splits beside it |
    | table | a CSV or JSON Lines file: columns file_name and caption, and split if you like |
    | folder | images with captions.csv, captions.jsonl, metadata.csv or metadata.jsonl, or a text file for each |
    | imagefolder | Hugging Face's: folders train, validation, test, each of them such a folder, as in `images` then |
    | datasets | what `save_to_disk` of Hugging Face's datasets wrote |
    | webdataset | a tar, a folder of tars or a pattern such as cc-{000..099}.tar: KEY.jpg with KEY.txt or KEY.json |

    Images inside a data set or a tar are written out, once, below `images`, or beside the source.

    Args:
        source: the file or the folder.
        images: directory of the images, when it is not beside `source`.
        val_share: share of the images held out for validation where the source names no splits (by a hash of the id).
        skip_missing: leave out captions whose image is not there, instead of an error.
        format: the layout, where it should not be guessed.
        need_images: False reads captions whose images were never there, too; an item's `path` may then be nowhere.

    Raises:
        UserError: a file cannot be read (the row is named), an image is missing, or nothing is left.
    """
    source = Path(source)
    require_one_of("format", format, get_args(Format))
    if images is not None:
        require_directory(images, "image directory")
    found = list(_read(source, images, format, need_images))
    if not found:
        raise UserError(f"{str(source)!r} holds no captioned image: see `clipcap train --help` for the layouts.")
    seen: set[str] = set()
    for item in found:
        if item.image_id in seen:
            raise UserError(f"{str(source)!r}: image id {item.image_id!r} occurs twice: make the ids distinct.")
        seen.add(item.image_id)
    missing = [item for item in found if not item.path.is_file()] if need_images else []
    if missing and not skip_missing:
        raise UserError(
            f"{str(source)!r} names {len(missing)} images that are not there, the first {str(missing[0].path)!r}: "
            f"give their directory with --images, or leave them out with --skip-missing."
        )
    if len(missing) == len(found):
        raise UserError(f"none of the {len(found)} images that {str(source)!r} names is there: check --images.")
    absent = {item.image_id for item in missing}
    kept = [item for item in found if item.image_id not in absent]
    if any(item.split for item in kept):
        return [item if item.split else replace(item, split="train") for item in kept]
    return [replace(item, split="val" if hash_share(item.image_id) < val_share else "train") for item in kept]


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _read(source: Path, images: Path | None, format: Format, need_images: bool) -> Iterator[CaptionedImage]:
    if format == "auto":
        format = _guess(source)
    if format in ("folder", "imagefolder", "datasets"):
        require_directory(source, "data set")
    elif format not in ("webdataset", "coco"):
        require_file(source, "caption file")
    if format == "datasets":
        return _read_saved(source, images, need_images)
    if format == "webdataset":
        return _read_shards(source, images, need_images)
    if format == "imagefolder":
        return _read_split_folders(source, images or source, need_images)
    if format == "folder":
        return _read_folder(source, images or source, need_images)
    if format == "table":
        return _read_table(source, images or source.parent)
    if format == "conceptual":
        return _read_conceptual(source, images, need_images)
    if format == "flickr8k":
        return _read_flickr8k(source, images)
    if format == "original-pickle":
        return _read_original_pickle(source)
    if format == "coco" and source.is_dir():
        return (item for file in _coco_files(source) for item in _read_coco(file, _load_json(file), images))
    data = _load_json(require_file(source, "caption file"))
    if format == "auto":
        format = _guess_json(source, data)
    if format == "original":
        return _read_original(source, data, images, need_images)
    if format == "karpathy":
        return _read_karpathy(source, data, images)
    return _read_coco(source, data, images, domains=format == "nocaps")


def _guess(source: Path) -> Format:
    """The layout of a source; "auto" for a JSON file, whose content decides."""
    if source.is_dir():
        if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
            return "datasets"
        if _coco_files(source):
            return "coco"
        if next(source.glob("*.tar"), None):
            return "webdataset"
        if any((source / split / table).is_file() for split in SPLITS for table in TABLES):
            return "imagefolder"
        return "folder"
    if source.name.endswith((".tar", ".tar.gz", ".tgz")) or (not source.exists() and "{" in str(source)):
        return "webdataset"
    suffix = require_file(source, "caption file").suffix.lower()
    if suffix in (".csv", ".jsonl"):
        return "table"
    if suffix in (".pkl", ".pickle"):
        return "original-pickle"
    if suffix == ".json":
        return "auto"
    first = _first_line(source)
    found = _guess_line(first)
    if found is None:
        raise UserError(
            f"caption file {str(source)!r} is of no layout that is known (its first line: {first[:60]!r}): name the "
            f"layout with format, one of {', '.join(get_args(Format)[1:])}."
        )
    return found


def is_plain_text(path: Path) -> bool:
    """Whether this is a text file of no layout: captions alone, one a line."""
    return path.suffix.lower() == ".txt" and path.is_file() and _guess_line(_first_line(path)) is None


def _first_line(path: Path) -> str:
    return next((line for _, line in _lines(path) if line.strip()), "")


def _guess_line(first: str) -> Format | None:
    """The layout of a file by its first line."""
    if _FLICKR_LINE.fullmatch(first):
        return "flickr8k"
    if "\t" in first and (_URL.search(first) or set(first.lower().split("\t")) == {"caption", "url"}):
        return "conceptual"
    if {field.strip().lower() for field in first.split(",")} & set(_IMAGE_KEYS):
        return "table"
    return None


def _guess_json(path: Path, data: Any) -> Format:
    if isinstance(data, list) and data and isinstance(data[0], dict) and "caption" in data[0]:
        return "original"
    rows = data.get("images") if isinstance(data, dict) else None
    if isinstance(rows, list) and "annotations" in data:
        return "nocaps" if any(isinstance(row, dict) and "domain" in row for row in rows) else "coco"
    if isinstance(rows, list) and any(isinstance(row, dict) and "sentences" in row for row in rows):
        return "karpathy"
    raise UserError(
        f"caption file {str(path)!r} has none of the JSON layouts: Karpathy's needs a list 'images' of objects with "
        f"'filename' and 'sentences', COCO's lists 'images' and 'annotations', the original ClipCap's a list of "
        f"objects with 'image_id' and 'caption'."
    )


# JSON: Karpathy, COCO, nocaps, the original project


def _load_json(path: Path) -> Any:
    def drop_words(row: dict[str, Any]) -> dict[str, Any]:
        # Karpathy's file holds every caption a second time, in words: most of the memory it would take.
        row.pop("tokens", None)
        return row

    try:
        return json.loads(_read_text(path, LARGEST_JSON), object_hook=drop_words)
    except json.JSONDecodeError as error:
        raise UserError(f"caption file {str(path)!r} is not JSON, line {error.lineno}: {error.msg}.") from None
    except RecursionError:
        raise UserError(f"caption file {str(path)!r} is nested too deeply: it is no caption file.") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"caption file {str(path)!r} is not JSON that can be read: {error}.") from None


def _read_karpathy(path: Path, data: Any, images: Path | None) -> Iterator[CaptionedImage]:
    root = images or (path.parent / "images" if (path.parent / "images").is_dir() else path.parent)
    for number, row in enumerate(_list(path, data, "images")):
        where = f"caption file {str(path)!r}, images[{number}]"
        try:
            name = str(row["filename"])
            captions = tuple(str(sentence["raw"]) for sentence in row["sentences"])
            split = SPLITS[row.get("split", "train")]
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: no or unknown {error}.") from None
        # The id is the file's name: COCO's cocoid and Flickr's imgid are not in every file.
        yield CaptionedImage(name, root / str(row.get("filepath", "")) / name, _check_captions(captions, where), split)


def _coco_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("captions_*.json")) or sorted(folder.glob("annotations/captions_*.json"))


def _read_coco(path: Path, data: Any, images: Path | None, *, domains: bool = False) -> Iterator[CaptionedImage]:
    from pycocotools.coco import COCO

    rows, notes = _list(path, data, "images"), _list(path, data, "annotations")
    _require_keys(path, "images", rows, ("id", "file_name", *(["domain"] if domains else [])))
    _require_keys(path, "annotations", notes, ("id", "image_id", "caption"))
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
            kept = _check_captions(captions, f"caption file {str(path)!r}, images[{number}]")
            name = str(row["file_name"])
            yield CaptionedImage(name, _place(name, roots, folders), kept, split, str(row.get("domain", "")))


def _read_original(path: Path, data: Any, images: Path | None, need_images: bool) -> Iterator[CaptionedImage]:
    _require_keys(path, "", _list(path, data, ""), ("image_id", "caption"), distinct=False)
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
        places = [_place(name, roots, ["", name.split("_")[1]]) for name in names]
        place = next((place for place in places if place.is_file()), places[0])
        yield CaptionedImage(place.name, place, captions, "")


def _read_original_pickle(path: Path) -> Iterator[CaptionedImage]:
    data = read_pickle(path)
    embeddings: Any = data.get("clip_embedding") if isinstance(data, dict) else None
    rows = data.get("captions") if isinstance(data, dict) else None
    if not hasattr(embeddings, "shape") or len(embeddings.shape) != 2 or not isinstance(rows, list):
        raise UserError(
            f"pickle {str(path)!r} is not the original ClipCap's: it needs 'clip_embedding', a tensor (n, e), and "
            f"'captions', a list."
        )
    _require_keys(path, "captions", rows, ("caption", "clip_embedding"), distinct=False)
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
        found.setdefault(str(row["image_id"]), []).extend(_check_captions([str(row["caption"])], where))
    return {image_id: tuple(captions) for image_id, captions in found.items()}


def _list(path: Path, data: Any, name: str) -> list[Any]:
    rows = (data.get(name) if isinstance(data, dict) else None) if name else data
    if not isinstance(rows, list):
        raise UserError(f"caption file {str(path)!r} needs a list {name!r}: give another file or format.")
    return rows


def _require_keys(
    path: Path, name: str, rows: list[Any], keys: Sequence[str], *, distinct: bool = True
) -> None:
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


def _place(name: str, roots: Sequence[Path], folders: Sequence[str]) -> Path:
    """The first place where a file is; the first of all where it is nowhere."""
    places = [root / folder / name for root in roots for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


# Lines: tables, Flickr8k, Conceptual Captions


def _read_folder(folder: Path, images: Path, need_images: bool) -> Iterator[CaptionedImage]:
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is not None:
        yield from _read_table(table, images)
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
            captions = _check_captions(_read_text(sidecar, LARGEST_TEXT).split("\n"), f"caption file {str(sidecar)!r}")
            yield CaptionedImage(str(file.relative_to(images)), file, captions, "")


def _read_split_folders(folder: Path, images: Path, need_images: bool) -> Iterator[CaptionedImage]:
    for name, split in SPLITS.items():
        if (folder / name).is_dir():
            for item in _read_folder(folder / name, images / name, need_images):
                yield replace(item, image_id=f"{name}/{item.image_id}", split=split)


def _read_table(table: Path, images: Path) -> Iterator[CaptionedImage]:
    grouped: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for number, row in _rows(table):
        where = f"caption file {str(table)!r}, line {number}"
        name = next((row[key] for key in _IMAGE_KEYS if row.get(key)), None)
        text = next((row[key] for key in _CAPTION_KEYS if row.get(key)), None)
        if name is None or text is None:
            raise UserError(f"{where}: it needs a {_IMAGE_KEYS[0]!r} and a {_CAPTION_KEYS[0]!r}.")
        texts = text if isinstance(text, list) else [text]
        grouped.setdefault(str(name), []).extend(_check_captions(tuple(map(str, texts)), where))
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
        reader = csv.DictReader(f"{part}\n" for _, line in _lines(table) for part in line.split("\r"))
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"caption file {str(table)!r}, line {reader.line_num} is not CSV: {error}.") from None
        return
    for number, line in _lines(table):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise UserError(f"caption file {str(table)!r}, line {number} is not JSON: {reason}.") from None
            if not isinstance(row, dict):
                raise UserError(f"caption file {str(table)!r}, line {number} is not a JSON object.")
            yield number, row


def _read_flickr8k(path: Path, images: Path | None) -> Iterator[CaptionedImage]:
    grouped: dict[str, list[str]] = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"caption file {str(path)!r}, line {number}"
        match = _FLICKR_LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{where}: {line[:60]!r} is not name#number, a tab and a caption.")
        grouped.setdefault(match[1], []).extend(_check_captions([match[2]], where))
    splits: dict[str, str] = {}
    for name, split in _FLICKR_SPLITS.items():
        for listed in path.parent.glob(f"*{name}.txt"):
            splits |= {line.strip(): split for _, line in _lines(listed) if line.strip()}
    roots = [images] if images else [path.parent]
    folders = ["", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset"]
    for name, captions in grouped.items():
        if not splits or name in splits:  # outside the three lists are images that the protocol leaves out
            yield CaptionedImage(name, _place(name, roots, folders), tuple(captions), splits.get(name, ""))


def conceptual_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """The rows of a Conceptual Captions TSV as (line, caption, URL).

    CC3M has the caption first, CC12M the URL: the first row decides. A header is skipped.

    Raises:
        UserError: a row has no URL or no caption, or is not UTF-8; its line is named.
    """
    column: int | None = None
    for number, line in _lines(require_file(path, "caption file")):
        fields = line.split("\t")
        if not line.strip() or number == 1 and {field.strip().lower() for field in fields} == {"caption", "url"}:
            continue
        where = f"caption file {str(path)!r}, line {number}"
        if column is None:
            column = next((at for at, field in enumerate(fields[:2]) if _URL.match(field.strip())), None)
        if len(fields) < 2 or column is None or not _URL.match(fields[column].strip()):
            raise UserError(f"{where}: {line[:60]!r} is not a caption and a URL with a tab between them.")
        yield number, _check_captions([fields[1 - column]], where)[0], fields[column].strip()


def _read_conceptual(path: Path, images: Path | None, need_images: bool) -> Iterator[CaptionedImage]:
    from clipcap.download import read_journal, url_key

    directory = images or path.parent
    journal = read_journal(directory)
    if not journal and need_images:
        raise UserError(
            f"{str(directory)!r} holds nothing that `clipcap download {path} --out DIR` wrote: download first, and "
            f"give DIR with --images."
        )
    grouped: dict[str, list[str]] = {}
    for _, caption, url in conceptual_rows(path):
        grouped.setdefault(url_key(url), []).append(caption)
    for key, captions in grouped.items():
        entry = journal.get(key)
        if entry is not None and entry.file:
            yield CaptionedImage(key, directory / entry.file, tuple(captions), "")
        elif entry is None or not need_images:  # not tried yet, or dropped
            yield CaptionedImage(key, directory / "images" / key, tuple(captions), "")


# Images inside other files: data sets on disk, tars


def _read_saved(source: Path, images: Path | None, need_images: bool) -> Iterator[CaptionedImage]:
    from datasets import DatasetDict, Image, load_from_disk

    try:
        loaded = load_from_disk(str(source))
    except Exception as error:  # pyarrow and datasets each have their own for a broken file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data set {str(source)!r} cannot be loaded ({reason}): save it again.") from error
    root = images.resolve() if images else source.with_name(f"{source.name}.images")
    for name, part in loaded.items() if isinstance(loaded, DatasetDict) else [("", loaded)]:
        if name and name not in SPLITS:
            raise UserError(f"data set {str(source)!r}: split is {name!r}: use train, val or test.")
        image_key = next((key for key, feature in part.features.items() if isinstance(feature, Image)), None)
        caption_key = next((key for key in _CAPTION_KEYS if key in part.features), None)
        if caption_key is None or image_key is None and need_images:
            raise UserError(
                f"data set {str(source)!r} has the columns {', '.join(part.features)}: it needs one of images, and "
                f"one named {_CAPTION_KEYS[0]!r} or {_CAPTION_KEYS[1]!r}."
            )
        for number, row in enumerate(part.cast_column(image_key, Image(decode=False)) if image_key else part):
            where = f"data set {str(source)!r}, {name or 'row'} {number}"
            text, image = row[caption_key], row[image_key] if image_key else None
            captions = _check_captions([str(t) for t in (text if isinstance(text, list) else [text]) if t], where)
            image_id = f"{name or 'row'}-{number:08}"
            if image is None and need_images:
                raise UserError(f"{where}: it has no image.")
            path = Path(image["path"]) if image and image["path"] else root
            if image and image["bytes"]:
                file = f"{image_id}{_suffix(image['bytes'], where)}"
                path = root / file
                write_image(root, file, image["bytes"])
            yield CaptionedImage(image_id, path, captions, SPLITS[name] if name else "")


def _suffix(data: bytes, where: str) -> str:
    """File suffix of an image's bytes."""
    try:
        with open_image(io.BytesIO(data), where, max_pixels=sys.maxsize) as image:  # counted when it is read
            return f".{(image.format or '').lower()}"
    except ImageTooLarge:
        raise
    except UserError:
        raise UserError(f"{where}: its image is not one that Pillow knows: leave the row out.") from None


def _read_shards(source: Path, images: Path | None, need_images: bool) -> Iterator[CaptionedImage]:
    from braceexpand import braceexpand

    shards = sorted(source.glob("*.tar")) if source.is_dir() else [Path(name) for name in braceexpand(str(source))]
    if not shards:
        raise UserError(f"folder {str(source)!r} holds no .tar: give a folder of WebDataset shards.")
    for shard in shards:
        root = (images or shard.parent / f"{shard.stem}.images") / (shard.stem if images else "")
        files: dict[str, Path] = {}
        texts: dict[str, list[str]] = {}
        for name, data in read_tar(shard):
            base, _, suffix = name.name.partition(".")
            key, suffix = str(name.parent / base), f".{suffix.lower()}"
            where = f"tar {str(shard)!r}, member {str(name)!r}"
            if suffix in (".txt", ".caption", ".json") and len(data) > LARGEST_TEXT:
                raise UserError(f"{where} has {len(data):,} bytes, of at most {LARGEST_TEXT:,}: it is no caption.")
            if suffix in IMAGE_SUFFIXES:
                if key in files:
                    raise UserError(f"{where}: sample {key!r} has two images: make the keys distinct.")
                files[key] = root / name
                write_image(root, str(name), data)
            elif suffix in (".txt", ".caption"):
                texts[key] = [line for line in _decode(data, where).split("\n") if line.strip()]
            elif suffix == ".json" and key not in texts:
                texts[key] = _captions_of_json(data, where)
        if not need_images:
            files |= {key: root / key for key in texts if key not in files}
        for key, path in files.items():
            captions = _check_captions(texts.get(key, []), f"tar {str(shard)!r}, sample {key!r}")
            yield CaptionedImage(f"{shard.stem}/{key}", path, captions, "")


def _captions_of_json(data: bytes, where: str) -> list[str]:
    try:
        row = json.loads(_decode(data, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno} is not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON that can be read: {error}.") from None
    text = next((row[key] for key in _CAPTION_KEYS if row.get(key)), []) if isinstance(row, dict) else []
    return [str(t) for t in (text if isinstance(text, list) else [text])]


def write_image(root: Path, name: str, data: bytes) -> None:
    """Write a file below `root`, all at once, unless it is there with this content.

    Raises:
        UserError: a link leads elsewhere, or another file lies there that was not written so.
    """
    path, marker = root / name, root / MARKER
    for place in itertools.takewhile(lambda place: place != root.parent, (path, *path.parents)):
        if place.is_symlink():
            raise UserError(f"{str(place)!r} is a link, and images would be written through it: move it away.")
    if not root.exists():
        write_json(marker, {"files": []})
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    if path.exists() and not marker.is_file():
        raise UserError(f"{str(path)!r} is another image than the data set's: move it away, or give --images.")
    with whole_file(path, sync=False) as file:
        file.write(data)


# Text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}, line {line} is not UTF-8: convert it.") from None


def _read_text(path: Path, most: int) -> str:
    """A file's text, with "\\n" at the end of every line."""
    size = require_file(path, "caption file").stat().st_size
    if size > most:
        raise UserError(
            f"caption file {str(path)!r} has {size:,} bytes, of at most {most:,}: use JSON Lines (.jsonl) or CSV."
        )
    text = _decode(path.read_bytes(), f"caption file {str(path)!r}")
    return text.replace("\r\n", "\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, one at a time: some files are larger than memory."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            where = f"caption file {str(path)!r}, line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where} has more than {LONGEST_LINE:,} bytes: it is no line of captions.")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"{where} is not UTF-8: convert it.") from None


def _check_captions(captions: Iterable[str], where: str) -> tuple[str, ...]:
    kept = tuple(whole_characters(caption).strip() for caption in captions if caption.strip())
    if not kept:
        raise UserError(f"{where}: the image has no caption that is not empty.")
    return kept


def whole_characters(text: str) -> str:
    """A text with U+FFFD in place of halves of a character, as in JSON's "\\ud83d", which no tokenizer takes."""
    return _HALVES.sub("\ufffd", text)
