"""Captions with images inside archives: data sets on disk and WebDataset shards."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap.data.members import member_path
from clipcap.data.readers.captioned import SPLITS, CaptionedImage, Gaps
from clipcap.data.readers.csv_rows import CAPTION_KEYS
from clipcap.data.readers.text import LARGEST_TEXT, decode
from clipcap.data.untrusted import is_compressed, read_tar
from common.checks import UserError, reason_of, require_file
from common.files import MARKER, whole_file, write_json
from common.images import UNREAD_SUFFIXES, ImageTooLarge, image_suffixes, open_image, tell_unread


def read_saved(source: Path, images: Path | None, need_images: bool, gaps: Gaps) -> Iterator[CaptionedImage]:
    from datasets import DatasetDict, Image, load_from_disk

    try:
        loaded = load_from_disk(str(source))
    except Exception as error:  # pyarrow and datasets each have their own for a broken file
        raise UserError(f"data set {str(source)!r} cannot be loaded ({reason_of(error)}): save it again.") from error
    root = images.resolve() if images else source.with_name(f"{source.name}.images")
    for name, part in loaded.items() if isinstance(loaded, DatasetDict) else [("", loaded)]:
        if name and name not in SPLITS:
            raise UserError(f"data set {str(source)!r}: split is {name!r}: use train, val or test.")
        image_key = next((key for key, feature in part.features.items() if isinstance(feature, Image)), None)
        caption_key = next((key for key in CAPTION_KEYS if key in part.features), None)
        if caption_key is None or image_key is None and need_images:
            raise UserError(
                f"data set {str(source)!r} has the columns {', '.join(part.features)}: it needs one of images, and "
                f"one named {CAPTION_KEYS[0]!r} or {CAPTION_KEYS[1]!r}."
            )
        for number, row in enumerate(part.cast_column(image_key, Image(decode=False)) if image_key else part):
            where = f"data set {str(source)!r}, {name or 'row'} {number}"
            text, image = row[caption_key], row[image_key] if image_key else None
            captions = gaps.check(text if isinstance(text, list) else [text], where)
            image_id = f"{name or 'row'}-{number:08}"
            if image is None and need_images:
                raise UserError(f"{where}: it has no image.")
            path = Path(image["path"]) if image and image["path"] else root / image_id
            if image and image["bytes"]:
                file = f"{image_id}{image_suffix(image['bytes'], where)}"
                path = root / file
                write_image(root, file, image["bytes"])
            yield CaptionedImage(image_id, path, captions, SPLITS[name] if name else "")


def image_suffix(data: bytes, where: str) -> str:
    """File suffix of an image's bytes."""
    try:
        with open_image(io.BytesIO(data), where, max_pixels=sys.maxsize) as image:  # counted when it is read
            return f".{(image.format or '').lower()}"
    except ImageTooLarge:
        raise
    except UserError:
        raise UserError(f"{where}: its image is not one that Pillow knows: leave the row out.") from None


def read_shards(source: Path, images: Path | None, need_images: bool, gaps: Gaps) -> Iterator[CaptionedImage]:
    from braceexpand import braceexpand

    shards = sorted(source.glob("*.tar")) if source.is_dir() else [Path(name) for name in braceexpand(str(source))]
    if not shards:
        raise UserError(f"folder {str(source)!r} holds no .tar: give a folder of WebDataset shards.")
    for shard in shards:
        root = (images or shard.parent / f"{shard.stem}.images") / (shard.stem if images else "")
        files: dict[str, Path] = {}
        texts: dict[str, list[Any]] = {}
        unread: list[str] = []
        in_place = images is None and shard.suffix == ".tar" and not is_compressed(require_file(shard, "tar"))
        for name, offset, size, read in read_tar(shard):
            key, suffix = str(name.parent / name.stem), name.suffix.lower()
            where = f"tar {str(shard)!r}, member {str(name)!r}"
            if suffix in (".txt", ".caption", ".json") and size > LARGEST_TEXT:
                raise UserError(f"{where} has {size:,} bytes, of at most {LARGEST_TEXT:,}: it is no caption.")
            if suffix in UNREAD_SUFFIXES and suffix not in image_suffixes():
                unread.append(str(name))
            elif suffix in image_suffixes():
                if key in files:
                    raise UserError(f"{where}: sample {key!r} has two images: make the keys distinct.")
                files[key] = member_path(shard, name, offset, size) if in_place else root / name
                if not in_place:
                    write_image(root, str(name), read())
            elif suffix in (".txt", ".caption"):
                texts[key] = [line for line in decode(read(), where).split("\n") if line.strip()]
            elif suffix == ".json" and key not in texts:
                texts[key] = _captions_of_json(read(), where)
        if not need_images:
            files |= {key: root / key for key in texts if key not in files}
        tell_unread(unread, f"tar {str(shard)!r}")
        for key, path in files.items():
            short = _first_name(key)
            if key not in texts and short in files:  # another picture of that sample, such as x.mask.png of x.jpg
                continue
            cause = f" (its captions would be in {key}.txt, .caption or .json)" if short else ""
            where = f"tar {str(shard)!r}, sample {key!r}{cause}"
            captions = gaps.check(texts.get(key, texts.get(short, [])), where)
            yield CaptionedImage(f"{shard.stem}/{key}", path, captions, "")


def _first_name(key: str) -> str:
    """A sample's key by WebDataset's own rule, up to the first dot: of a.b that is a; here it is up to the last."""
    path = PurePosixPath(key)
    base, dot, _ = path.name.partition(".")
    return str(path.parent / base) if dot else ""


def _captions_of_json(data: bytes, where: str) -> list[Any]:
    try:
        row = json.loads(decode(data, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno} is not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON that can be read: {error}.") from None
    text: Any = next((row[key] for key in CAPTION_KEYS if row.get(key)), []) if isinstance(row, dict) else []
    return text if isinstance(text, list) else [text]


def write_image(root: Path, name: str, data: bytes) -> None:
    """Write a file below `root`, all at once, unless it exists with this content.

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
