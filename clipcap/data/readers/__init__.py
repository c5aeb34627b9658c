"""Readers of captioned images: every common layout, told apart by what is in it, as a list of `CaptionedImage`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from clipcap.data.members import exists
from clipcap.data.readers.archives import read_saved, read_shards
from clipcap.data.readers.captioned import CaptionedImage, Gaps, hash_share
from clipcap.data.readers.conceptual import read_conceptual
from clipcap.data.readers.csv_rows import CAPTION_KEYS, IMAGE_KEYS, column, header_of, is_header
from clipcap.data.readers.json_files import (
    coco_files,
    load_json,
    read_coco,
    read_karpathy,
    read_lavis,
    read_llava,
    read_original,
    read_original_pickle,
)
from clipcap.data.readers.parquet import parquet_files, read_parquet
from clipcap.data.readers.tables import (
    FLICKR_LINE,
    JSON_LINES,
    TABLES,
    URL,
    read_flickr8k,
    read_folder,
    read_split_folders,
    read_table,
    split_folders,
)
from clipcap.data.readers.text import first_line
from common.checks import UserError, require_directory, require_file, require_one_of

Format = Literal[
    "auto", "karpathy", "coco", "nocaps", "original", "original-pickle", "lavis", "llava", "conceptual", "flickr8k",
    "table", "folder", "imagefolder", "datasets", "parquet", "webdataset",
]  # fmt: skip


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
    | lavis | LAVIS's JSON, and any list of objects with image and caption |
    | llava | LLaVA's JSON of pretraining: image and conversations of one answer, the caption |
    | conceptual | Conceptual Captions' TSV, and in `images` what `clipcap download` made of it |
    | flickr8k | Flickr8k's token file (name#number, tab, caption), with the lists of its splits beside it |
    | table | a CSV (commas, semicolons, tabs, bars) or JSON Lines file: file_name and caption, and split if you like |
    | folder | images with captions.csv, captions.jsonl, metadata.csv or metadata.jsonl, or .txt or .caption for each |
    | imagefolder | Hugging Face's: folders train, validation, test, each of them such a folder, as in `images` then |
    | datasets | what `save_to_disk` of Hugging Face's datasets wrote |
    | parquet | a .parquet file, or a folder of them: a caption, and the image's bytes or file name |
    | webdataset | a tar, a folder of tars or a pattern such as cc-{000..099}.tar: KEY.jpg with KEY.txt or KEY.json |

    A folder named train, val or test says the split of images with text files in it, and so does such a word of its own
    in the name of COCO's and LAVIS's files. A picture that is named twice, such as a.jpg and ./a.jpg, is one, with the
    captions of both, and may be in one split only.

    Images inside a tar are read where they lie. Those inside a compressed tar, a parquet file or a data set are written
    out, once, below `images`, or beside the source; with `images`, a tar's are, too.

    Args:
        source: the file or the folder.
        images: directory of the images, when it is not beside `source`.
        val_share: share of the images held out for validation where the source names no splits (by a hash of the id).
        skip_missing: leave out captions whose image is missing, and images without a caption, instead of an error;
            standard error says how many have none.
        format: the layout, where it should not be guessed.
        need_images: False reads captions whose images were never there, too; an item's `path` may then be nowhere.

    Raises:
        UserError: a file cannot be read (the row is named), an image or its captions are missing, a picture is in two
            splits, or nothing is left.
    """
    source = Path(source)
    require_one_of("format", format, get_args(Format))
    if images is not None:
        require_directory(images, "image directory")
    gaps = Gaps(skip_missing)
    found = [item for item in _read(source, images, format, need_images, gaps) if item.captions]
    if gaps.count:
        print(
            f"{gaps.count} images or rows have no caption and are left out, the first: {gaps.first}.", file=sys.stderr
        )
    if not found:
        raise UserError(f"{str(source)!r} holds no captioned image: see `clipcap train --help` for the layouts.")
    seen: set[str] = set()
    for item in found:
        if item.image_id in seen:
            raise UserError(f"{str(source)!r}: image id {item.image_id!r} occurs twice: make the ids distinct.")
        seen.add(item.image_id)
    found = _once(found, source)
    missing = [item for item in found if not exists(item.path)] if need_images else []
    if missing and not skip_missing:
        raise UserError(
            f"{str(source)!r} names {len(missing)} missing images, the first {str(missing[0].path)!r}: "
            f"give their directory with --images, or leave them out with --skip-missing."
        )
    if len(missing) == len(found):
        raise UserError(f"none of the {len(found)} images that {str(source)!r} names is there: check --images.")
    absent = {item.image_id for item in missing}
    kept = [item for item in found if item.image_id not in absent]
    if any(item.split for item in kept):
        return [item if item.split else replace(item, split="train") for item in kept]
    return [replace(item, split="val" if hash_share(item.image_id) < val_share else "train") for item in kept]


def _once(items: list[CaptionedImage], source: Path) -> list[CaptionedImage]:
    """Items of which none is of the same file as another: those that are become one."""
    found: dict[str, CaptionedImage] = {}
    for item in items:
        row = "" if item.embedding_row is None else f"#{item.embedding_row}"
        key = os.path.abspath(item.path) + row
        first = found.setdefault(key, item)
        if first is item:
            continue
        if {first.split, item.split} - {"", first.split}:
            raise UserError(
                f"{str(source)!r}: one picture is in split {first.split!r} as {first.image_id!r} and in {item.split!r} "
                f"as {item.image_id!r}: give it one split."
            )
        found[key] = replace(first, captions=first.captions + item.captions)
    return list(found.values())


def _read(source: Path, images: Path | None, format: Format, need_images: bool, gaps: Gaps) -> Iterator[CaptionedImage]:
    if format == "auto":
        format = _guess(source)
    if format in ("folder", "imagefolder", "datasets"):
        require_directory(source, "data set")
    elif format not in ("webdataset", "coco", "parquet"):
        require_file(source, "caption file")
    if format == "datasets":
        return read_saved(source, images, need_images, gaps)
    if format == "webdataset":
        return read_shards(source, images, need_images, gaps)
    if format == "parquet":
        return read_parquet(source, images, need_images, gaps)
    if format == "imagefolder":
        return read_split_folders(source, images or source, need_images, gaps)
    if format == "folder":
        return read_folder(source, images or source, need_images, gaps)
    if format == "table":
        return read_table(source, images or source.parent, gaps)
    if format == "conceptual":
        return read_conceptual(source, images, need_images, gaps)
    if format == "flickr8k":
        return read_flickr8k(source, images, gaps)
    if format == "original-pickle":
        return read_original_pickle(source, gaps)
    if format == "coco" and source.is_dir():
        return (item for file in coco_files(source) for item in read_coco(file, load_json(file), images, gaps))
    data = load_json(require_file(source, "caption file"))
    if format == "auto":
        format = _guess_json(source, data)
    if format == "original":
        return read_original(source, data, images, need_images, gaps)
    if format == "karpathy":
        return read_karpathy(source, data, images, gaps)
    if format == "lavis":
        return read_lavis(source, data, images, gaps)
    if format == "llava":
        return read_llava(source, data, images, gaps)
    return read_coco(source, data, images, gaps, domains=format == "nocaps")


def _guess(source: Path) -> Format:
    """The layout of a source; "auto" for a JSON file, whose content decides."""
    if source.is_dir():
        if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
            return "datasets"
        if coco_files(source):
            return "coco"
        if next(source.glob("*.tar"), None):
            return "webdataset"
        if any((place / table).is_file() for place, _ in split_folders(source) for table in TABLES):
            return "imagefolder"
        if not any((source / table).is_file() for table in TABLES) and parquet_files(source):
            return "parquet"
        return "folder"
    if source.name.endswith((".tar", ".tar.gz", ".tgz")) or (not source.exists() and "{" in str(source)):
        return "webdataset"
    suffix = require_file(source, "caption file").suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".csv", *JSON_LINES):
        return "table"
    if suffix in (".pkl", ".pickle"):
        return "original-pickle"
    if suffix == ".json":
        return "auto"
    first = first_line(source)
    found = _guess_line(first)
    if found is None and "\0" in first:
        raise UserError(f"caption file {str(source)!r} is not text: give a file of captions, or a folder of images.")
    if found is None:
        raise UserError(
            f"caption file {str(source)!r} is of no layout that is known (its first line: {first[:60]!r}): name the "
            f"layout with format, one of {', '.join(get_args(Format)[1:])}."
        )
    return found


def is_plain_text(path: Path) -> bool:
    """Whether this is a text file of no layout: captions alone, one a line."""
    return path.suffix.lower() == ".txt" and path.is_file() and _guess_line(first_line(path)) is None


def _guess_line(first: str) -> Format | None:
    """The layout of a file by its first line."""
    if FLICKR_LINE.fullmatch(first):
        return "flickr8k"
    if "\t" in first and (URL.search(first) or set(first.lower().split("\t")) == {"caption", "url"}):
        return "conceptual"
    if is_header(header_of(first)[1]):
        return "table"
    return None


def _guess_json(path: Path, data: Any) -> Format:
    if isinstance(data, list) and data and isinstance(data[0], dict):
        keys = set(map(column, data[0]))
        if "conversations" in keys:
            return "llava"
        if keys & set(IMAGE_KEYS) and keys & set(CAPTION_KEYS):
            return "lavis"
        if "caption" in keys:
            return "original"
    rows = data.get("images") if isinstance(data, dict) else None
    if isinstance(rows, list) and "annotations" in data:
        return "nocaps" if any(isinstance(row, dict) and "domain" in row for row in rows) else "coco"
    if isinstance(rows, list) and any(isinstance(row, dict) and "sentences" in row for row in rows):
        return "karpathy"
    raise UserError(
        f"caption file {str(path)!r} has none of the JSON layouts: Karpathy's needs a list 'images' of objects with "
        f"'filename' and 'sentences', COCO's lists 'images' and 'annotations', the original ClipCap's a list of "
        f"objects with 'image_id' and 'caption', LAVIS's one with 'image' and 'caption', LLaVA's with 'conversations'."
    )
