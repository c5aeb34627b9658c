"""Rows of CSV files, whatever their delimiter and however their columns are written; no row is cut or swallowed."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipcap.data.readers.text import first_line, lines
from common.checks import UserError
from common.images import IMAGE_SUFFIXES

IMAGE_KEYS = ("file_name", "filename", "image", "path", "image_path", "image_name", "file")
CAPTION_KEYS = ("caption", "text", "captions", "description", "comment")
DELIMITERS = (",", ";", "\t", "|")
_SWALLOWED = re.compile(
    rf"\n[^\n,;\t|]+(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})\"?\s*[,;\t|]", re.IGNORECASE
)


def column(name: str) -> str:
    """A column's name in lower case, no spaces around it, and "_" for those inside: "File Name" is file_name."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def header_of(line: str, images: Sequence[str] = IMAGE_KEYS) -> tuple[str, list[str]]:
    """The delimiter and the columns of a table's first line: those that name an image and a caption, else the most."""
    found = []
    for delimiter in DELIMITERS:
        try:
            [names] = csv.reader([line], delimiter=delimiter, skipinitialspace=True)
        except (csv.Error, ValueError):  # a quote that is not closed; no line
            names = [line]
        while len(names) > 1 and not names[-1].strip():  # of delimiters at the end of every line
            names.pop()
        found.append((delimiter, [column(name) for name in names]))
    return next((each for each in found if is_header(each[1], images)), max(found, key=lambda each: len(each[1])))


def is_header(columns: list[str], images: Sequence[str] = IMAGE_KEYS) -> bool:
    """Whether columns name an image, by one of `images`, and a caption."""
    return not set(images).isdisjoint(columns) and not set(CAPTION_KEYS).isdisjoint(columns)


def needed(columns: list[str], images: Sequence[str] = IMAGE_KEYS) -> str:
    """Of an error: the columns that were found, and those that a table needs."""
    return (
        f"has the columns {', '.join(map(repr, columns))[:300]}: it needs one for the image, such as "
        f"{images[0]!r}, and one for its caption, such as {CAPTION_KEYS[0]!r}"
    )


def csv_rows(table: Path, images: Sequence[str] = IMAGE_KEYS) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with the lines they begin in.

    Args:
        table: the file.
        images: columns that name an image, one of which it must have.

    Raises:
        UserError: no columns for image and caption, a row with more or fewer fields than the header, or a quote that
            is stray or takes the rows after it in.
    """
    header = first_line(table).lstrip("\r").split("\r")[0]
    if not header:
        return
    delimiter, columns = header_of(header, images)
    if not is_header(columns, images):
        raise UserError(f"caption file {str(table)!r} {needed(columns, images)}.")
    twice = [name for name in (*images, *CAPTION_KEYS, "split") if columns.count(name) > 1]
    if twice:
        raise UserError(f"caption file {str(table)!r} has the column {twice[0]!r} twice: leave one out.")
    # A return by itself ends a line of old Macs.
    parts = (f"{part}\n" for _, line in lines(table) for part in line.split("\r"))
    reader = csv.reader(parts, delimiter=delimiter, strict=True, skipinitialspace=True)
    begin, first = 1, True
    try:
        for row in reader:
            number, begin = begin, reader.line_num + 1
            if not any(field.strip() for field in row):
                continue
            if first:
                first = False
                continue
            _require_whole(row, columns, f"caption file {str(table)!r}, line {number}", delimiter)
            yield number, dict(zip(columns, row, strict=False))
    except csv.Error as error:
        raise UserError(
            f"caption file {str(table)!r}, line {begin} is not CSV ({error}): a field with a quote in it stands "
            f'between quotes, and the quote inside is doubled ("").'
        ) from None


def _require_whole(row: list[str], columns: list[str], where: str, delimiter: str) -> None:
    """Raise UserError unless a row has the header's fields, none of which holds the rows after it."""
    if len(row) < len(columns) or any(field.strip() for field in row[len(columns) :]):
        raise UserError(
            f"{where} has {len(row)} fields, the header {len(columns)}: put a caption that holds {delimiter!r} between "
            f"double quotes."
        )
    if any(_SWALLOWED.search(field) for field in row):
        raise UserError(
            f'{where}: a quote opens there that takes in the rows after it: double it (""), or close it in its row.'
        )
