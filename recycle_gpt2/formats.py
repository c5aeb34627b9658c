"""The formats that text comes in: the documents of one file or saved dataset, what is bad in it left out."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.checks import UserError, printable
from common.running_text import RunningText
from recycle_gpt2.bad_rows import BadRows


def _open_zstd(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))


COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".zst": _open_zstd,
}
BYTE_ORDER_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
LONGEST_CELL = 1 << 27
"""Characters of a cell of a CSV file."""
_MARKUP = re.compile(r"^(#{1,6}\s+|>\s?|[-*+]\s+)")
"""What begins a heading, a quotation or an item of a list in Markdown."""


@dataclass(frozen=True)
class Document:
    """A text, its paragraphs separated by line breaks."""

    text: str
    source: str
    """The file that it is from."""
    genre: str
    """The row's own "genre", or the top folder below the directory that was given, or the file's name."""


def kind_of(path: Path) -> str:
    """The suffix that says what a file is: of `news.txt.xz` it is .txt."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _lines(path: Path, bad: BadRows) -> Iterator[tuple[str, int, int]]:
    """Lines of a text file without their ends, with their numbers from 1 and the bytes of the file read so far."""
    opener = COMPRESSED.get(path.suffix.lower())
    with bad.opened(path) as raw:
        number, blank = 0, True
        try:
            stream: IO[bytes] = opener(raw) if opener else raw
            for number, line in enumerate(stream, 1):
                if number == 1:
                    mark = next((name for start, name in BYTE_ORDER_MARKS.items() if line.startswith(start)), None)
                    if mark:
                        bad.bad_file(f"text file {str(path)!r}, line 1 is {mark}, not UTF-8: convert the file.")
                        return
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    bad.rows += 1
                    blank = False
                text = _decoded(line, path, number, bad)
                if text is not None:
                    yield text.rstrip("\r\n"), number, raw.tell()
        except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is packed
                raise
            bad.bad_file(
                f"text file {str(path)!r} is damaged or cut short after line {number} ({error}): copy it again."
            )
            return
        if blank:
            bad.bad_file(f"text file {str(path)!r} is empty (no text in {number} lines): leave it out.")


def _decoded(line: bytes, path: Path, number: int, bad: BadRows) -> str | None:
    """The line's text; None, and a bad row, where it is none."""
    if b"\0" in line:
        bad.bad_row(f"text file {str(path)!r} is binary (line {number} has a zero byte): leave it out.")
        return None
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad.bad_row(
            f"text file {str(path)!r}, line {number} is not UTF-8 (byte {error.start + 1} of the line is "
            f"0x{line[error.start]:02x}): convert the file to UTF-8."
        )
        return None


def _read_plain(path: Path, genre: str, column: str, bad: BadRows) -> Iterator[tuple[Document, int]]:
    paragraphs: list[str] = []
    position = 0
    for line, _, position in _lines(path, bad):
        paragraph = line.strip()
        if paragraph:
            paragraphs.append(paragraph)
        elif paragraphs:
            yield Document("\n".join(paragraphs), str(path), genre), position
            paragraphs = []
    if paragraphs:
        yield Document("\n".join(paragraphs), str(path), genre), position


def _read_markdown(path: Path, genre: str, column: str, bad: BadRows) -> Iterator[tuple[Document, int]]:
    """One document, its paragraphs' lines joined, without front matter, code blocks and the marks of headings."""
    paragraphs: list[str] = []
    lines: list[str] = []
    position, fence = 0, ""

    def end() -> None:
        if lines:
            paragraphs.append(" ".join(lines))
            lines.clear()

    for line, number, position in _lines(path, bad):  # noqa: B007
        text = line.strip()
        if fence:
            fence = "" if text.startswith(fence) else fence
        elif text.startswith(("```", "~~~")) or (number == 1 and text == "---"):
            end()
            fence = text[:3]
        elif not text or set(text) <= set("-=*_ "):  # also the line under a heading, or between sections
            end()
        else:
            if mark := _MARKUP.match(text):
                end()
                text = text[mark.end() :].strip()
            lines.append(text)
            if mark and mark[0].startswith("#"):
                end()
    end()
    if paragraphs:
        yield Document("\n".join(filter(None, paragraphs)), str(path), genre), position


def _read_html(path: Path, genre: str, column: str, bad: BadRows) -> Iterator[tuple[Document, int]]:
    parser, position = _Page(), 0
    for line, _, position in _lines(path, bad):  # noqa: B007
        parser.feed(line + "\n")
    text = parser.finish()
    if text:  # a page of pictures or a redirection has none
        yield Document(text, str(path), genre), position


def _read_jsonl(path: Path, genre: str, column: str, bad: BadRows) -> Iterator[tuple[Document, int]]:
    for line, number, position in _lines(path, bad):
        if not line.strip():
            continue
        where = f"text file {str(path)!r}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            bad.bad_row(f"{where} is not JSON ({error}): mend or remove the line.")
            continue
        if document := _of_row(row, column, path, genre, where, bad):
            yield document, position


def _read_json(path: Path, genre: str, column: str, bad: BadRows) -> Iterator[tuple[Document, int]]:
    """A list of objects, or an object with one list of them, held in memory in full."""
    text, position = [], 0
    for line, _, position in _lines(path, bad):  # noqa: B007
        text.append(line)
    bad.rows -= len([line for line in text if line.strip()])  # what counts here are the objects
    if not text:
        return
    try:
        found = json.loads("\n".join(text))
    except (ValueError, RecursionError) as error:
        bad.bad_file(f"text file {str(path)!r} is not JSON ({error}): mend it, or name it .jsonl if it has many.")
        return
    if isinstance(found, dict) and column not in found:
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    for number, row in enumerate(found if isinstance(found, list) else [found]):
        bad.rows += 1
        if document := _of_row(row, column, path, genre, f"text file {str(path)!r}, object {number}", bad):
            yield document, position


def _read_table(path: Path, genre: str, column: str, bad: BadRows) -> Iterator[tuple[Document, int]]:
    """CSV, or TSV, with the names of the columns in its first row."""
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        for line, _, position in _lines(path, bad):  # noqa: B007
            yield line + "\n"

    csv.field_size_limit(LONGEST_CELL)
    rows = csv.DictReader(lines(), delimiter="\t" if kind_of(path) == ".tsv" else ",")
    if rows.fieldnames is None:
        return
    _require_column(column, list(rows.fieldnames), f"text file {str(path)!r}")
    while True:
        where = f"text file {str(path)!r}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            bad.bad_row(f"{where} is not CSV ({error}): mend or remove the row.")
            continue
        if row is None:
            break
        if document := _of_row(row, column, path, genre, where, bad):
            yield document, position


def _read_parquet(path: Path, genre: str, column: str, bad: BadRows) -> Iterator[tuple[Document, int]]:
    from pyarrow import ArrowException, parquet

    where, number = f"text file {str(path)!r}", 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _require_column(column, names, where)
        for batch in file.iter_batches(1024, columns=[name for name in (column, "genre") if name in names]):
            for row in batch.to_pylist():
                bad.rows += 1
                if document := _of_row(row, column, path, genre, f"{where}, row {number}", bad):
                    yield document, path.stat().st_size * number // max(1, file.metadata.num_rows)
                number += 1
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        bad.bad_file(f"{where} is damaged or cut short after row {number} ({error}): copy it again.")


def read_dataset(directory: Path, genre: str, column: str, bad: BadRows, held_out: bool) -> Iterator[Document]:
    """The rows of a dataset on disk; of one with a split "test", only that one (`held_out`) or all others.

    Raises:
        UserError: it cannot be read, or has no such column.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(directory))
    except Exception as error:  # pyarrow's and datasets' own kinds, many
        raise UserError(f"dataset {str(directory)!r} cannot be read ({error}): save or copy it again.") from None
    parts = dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}
    yield from rows_of_splits(parts, f"dataset {str(directory)!r}", str(directory), genre, column, bad, held_out)


def rows_of_splits(
    parts: Mapping[str, Any], dataset: str, source: str, genre: str, column: str, bad: BadRows, held_out: bool
) -> Iterator[Document]:
    """The documents of a dataset's splits; where one is called "test", of that one (`held_out`) or of all others.

    Raises:
        UserError: a split has no such column.
    """
    if "test" in parts:
        if not held_out:
            print(f"left out: split 'test' of {printable(dataset)}, which is for scores.", file=sys.stderr)
        parts = {name: part for name, part in parts.items() if (name == "test") == held_out}
    for name, part in parts.items():
        where = dataset + (f", split {name!r}" if name else "")
        names = part.column_names or list(next(iter(part), {column: ""}))  # a stream may know them by its first row
        _require_column(column, names, where)
        for number, row in enumerate(part):
            bad.rows += 1
            if document := _of_row(row, column, Path(source), genre, f"{where}, row {number}", bad):
                yield document


Reader = Callable[[Path, str, str, BadRows], Iterator[tuple[Document, int]]]
_READERS: dict[str, Reader] = {
    ".txt": _read_plain,
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".html": _read_html,
    ".htm": _read_html,
    ".xhtml": _read_html,
}
SUFFIXES: tuple[str, ...] = tuple(_READERS)
"""Files that are read in a directory; each also with the suffix of what packed it."""


def reader_of(path: Path) -> Reader:
    """What yields the documents of a file, each with the bytes of it that have been read; plain text by default.

    It takes the file, its genre, the column of the text and the count of what is bad.
    """
    return _READERS.get(kind_of(path), _read_plain)


def _require_column(column: str, names: list[str], where: str) -> None:
    if column not in names:
        columns = ", ".join(names) or "none"
        raise UserError(
            f'{where} has no column "{column}" (columns: {columns}): name the one with the text (--column).'
        )


def _of_row(row: Any, column: str, path: Path, genre: str, where: str, bad: BadRows) -> Document | None:
    """The document of a row; None where it has no text, or a bad one."""
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        bad.bad_row(f'{where} has no "{column}" that is a string: name the column of the text, or leave the row out.')
        return None
    text = row[column]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        bad.bad_row(f"{where} holds half of a surrogate pair, which is no character: mend the text.")
        return None
    own = row.get("genre")
    # Paragraphs without white space at their ends and without empty ones.
    text = "\n".join(line for line in (part.strip() for part in text.split("\n")) if line)
    return Document(text, str(path), own if isinstance(own, str) and own else genre) if text else None


class _Page(RunningText):
    """The paragraphs of an HTML page, white space collapsed, without scripts, styles, forms and navigation."""

    BREAKS = frozenset(
        "p div li dd dt td th tr table ul ol dl h1 h2 h3 h4 h5 h6 section article main header aside figure figcaption"
        " blockquote pre br hr body".split()
    )
    SKIPPED = frozenset("head script style noscript template nav footer title button select textarea svg form".split())

    def finish(self) -> str:
        """The text, when all of the page has been fed."""
        self.close()
        self.end_paragraph()
        # A character reference such as &#0; or half of a pair has no place in a text.
        text = "\n".join(self.paragraphs)
        return text.encode("utf-8", "ignore").decode("utf-8").replace("\0", "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":  # a head that was never closed ends here
            self._open.clear()
        super().handle_starttag(tag, attrs)
