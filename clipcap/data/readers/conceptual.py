"""Conceptual Captions: rows of captions and URLs, with what was downloaded of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from clipcap.data.journal import read_journal, url_key
from clipcap.data.readers.captioned import CaptionedImage, Gaps
from clipcap.data.readers.tables import URL
from clipcap.data.readers.text import lines
from common.checks import UserError, require_file


def conceptual_rows(path: Path, gaps: Gaps | None = None) -> Iterator[tuple[int, str, str]]:
    """The rows of a Conceptual Captions TSV as (line, caption, URL).

    CC3M has the caption first, CC12M the URL: the first row decides. A header is skipped, and so
    are rows without a caption where `gaps` has it so.

    Raises:
        UserError: a row has no URL or no caption, or is not UTF-8; its line is named.
    """
    column: int | None = None
    gaps = gaps or Gaps()
    for number, line in lines(require_file(path, "caption file")):
        fields = line.split("\t")
        if not line.strip() or number == 1 and {field.strip().lower() for field in fields} == {"caption", "url"}:
            continue
        where = f"caption file {str(path)!r}, line {number}"
        if column is None:
            column = next((at for at, field in enumerate(fields[:2]) if URL.match(field.strip())), None)
        if len(fields) < 2 or column is None or not URL.match(fields[column].strip()):
            raise UserError(f"{where}: {line[:60]!r} is not a caption and a URL with a tab between them.")
        for caption in gaps.check([fields[1 - column]], where):
            yield number, caption, fields[column].strip()


def read_conceptual(path: Path, images: Path | None, need_images: bool, gaps: Gaps) -> Iterator[CaptionedImage]:
    directory = images or path.parent
    journal = read_journal(directory)
    if not journal and need_images:
        raise UserError(
            f"{str(directory)!r} holds nothing that `clipcap download {path} --out DIR` wrote: download first, and "
            f"give DIR with --images."
        )
    grouped: dict[str, list[str]] = {}
    for _, caption, url in conceptual_rows(path, gaps):
        grouped.setdefault(url_key(url), []).append(caption)
    for key, captions in grouped.items():
        entry = journal.get(key)
        if entry is not None and entry.file:
            yield CaptionedImage(key, directory / entry.file, tuple(captions), "")
        elif entry is None or not need_images:  # not tried yet, or dropped
            yield CaptionedImage(key, directory / "images" / key, tuple(captions), "")
