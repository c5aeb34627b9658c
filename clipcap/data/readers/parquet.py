"""Captions in parquet files, as Hugging Face's data sets are published, with the images' bytes or their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipcap.data.readers.archives import image_suffix, write_image
from clipcap.data.readers.captioned import CaptionedImage, Gaps, split_in
from clipcap.data.readers.csv_rows import CAPTION_KEYS, IMAGE_KEYS, column, needed
from clipcap.data.readers.tables import group_rows
from common.checks import UserError, reason_of, require_file

ROWS = 64
"""Read at once."""
_PICTURES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
"""Columns of bytes, or of Hugging Face's {"bytes", "path"}."""


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its folder `data`, as on the hub."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def read_parquet(source: Path, images: Path | None, need_images: bool, gaps: Gaps) -> Iterator[CaptionedImage]:
    """Items of a parquet file, or of a folder's; a file's name says the split of rows that say none."""
    files = parquet_files(source) if source.is_dir() else [require_file(source, "parquet file")]
    if not files:
        raise UserError(f"folder {str(source)!r} holds no .parquet: give a folder of them, or a file.")
    for file in files:
        split, _ = split_in(file.stem)
        root = images or file.with_name(f"{file.stem}.images")
        written: set[str] = set()
        prefix = f"{file.stem}/" if len(files) > 1 else ""
        for item in group_rows(_rows(file, root, written, need_images), Path, gaps, split):
            path = (root if item.image_id in written else images or file.parent) / item.path
            yield replace(item, image_id=f"{prefix}{item.image_id}", path=path)


def _rows(file: Path, root: Path, written: set[str], need_images: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with a file's name for the image; the bytes of those that have them are written below `root`."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            schema = {column(name): name for name in table.schema_arrow.names}
            text = next((schema[key] for key in CAPTION_KEYS if key in schema), None)
            picture = next((schema[key] for key in (*_PICTURES, *IMAGE_KEYS) if key in schema), None)
            if text is None or picture is None and need_images:
                raise UserError(f"parquet file {str(file)!r} {needed(list(schema))}.")
            chosen = [name for name in (picture, text, schema.get("split")) if name is not None]
            number = 0
            for batch in table.iter_batches(batch_size=ROWS, columns=chosen):
                for row in batch.to_pylist():
                    where = f"parquet file {str(file)!r}, row {number}"
                    name = _file_of(row.get(picture), root, written, number, where, need_images)
                    found = {"file_name": name, "caption": row[text]}
                    yield where, found | ({"split": row[schema["split"]]} if "split" in schema else {})
                    number += 1
    except (ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError) or isinstance(error, OSError) and error.filename is not None:
            raise
        raise UserError(f"parquet file {str(file)!r} cannot be read ({reason_of(error)}): copy it again.") from error


def _file_of(value: Any, root: Path, written: set[str], number: int, where: str, need_images: bool) -> str:
    """The name of an image's file, or of the one that its bytes are written to."""
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        file = f"{number:08}{image_suffix(data, where)}"
        written.add(file)
        if need_images:
            write_image(root, file, data)
        return file
    if path:
        return str(path)
    if need_images:
        raise UserError(f"{where}: it has no image: leave the row out.")
    return f"{number:08}"
