"""Documents in text files, JSON Lines, HTML and saved datasets, streamed, or what is wrong with them."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.checks import UserError, require_file
from common.running_text import RunningText

SUFFIXES: tuple[str, ...] = (".txt", ".jsonl", ".html", ".htm", ".xhtml")
"""Files that are read in a directory; each also with .xz or .gz."""
COMPRESSED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
BYTE_ORDER_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class Document:
    """A text, its paragraphs separated by line breaks."""

    text: str
    source: str
    """The file that it is from."""
    genre: str
    """The jsonl's own "genre", or the top folder below the directory that was given, or the file's name."""


def read_documents(paths: Sequence[Path], *, suffixes: Sequence[str] = SUFFIXES) -> Iterator[Document]:
    """Stream the documents of files and directories, in an order that is always the same.

    `.txt` has a paragraph a line and an empty line between documents; `.jsonl` an object a line with "text" and
    perhaps "genre"; `.html` is one document of its running text; a directory that `datasets` has saved gives its column
    "text". `.xz` and `.gz` are unpacked on the way. Any other file that is named itself is read as `.txt`. White space
    at both ends of a paragraph is dropped.

    Args:
        paths: files or directories; inside directories, files with one of `suffixes` are read.
        suffixes: with their dots.

    Raises:
        UserError: a file is missing, empty, binary, damaged or not UTF-8 (the line is named), or there is no text.
    """
    for document, _ in read_with_positions(paths, suffixes):
        yield document


def read_with_positions(paths: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> Iterator[tuple[Document, int]]:
    """What `read_documents` yields, each with the bytes of all files that have been read so far, as on the disk."""
    done, empty = 0, True
    for path, genre in find_texts(paths, suffixes):
        if path.is_dir():
            for document in _read_dataset(path, genre):
                empty = False
                yield document, done
            done += size_of(path)
            continue
        require_file(path, "text file")
        for document, position in _READERS.get(_kind(path), _read_plain)(path, genre):
            empty = False
            yield document, done + position
        done += size_of(path)
    if empty:
        raise UserError(f"{', '.join(repr(str(path)) for path in paths)}: no text there: give files with text.")


def find_texts(paths: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> Iterator[tuple[Path, str]]:
    """Files, and directories that `datasets` has saved, each with its genre; sorted inside directories.

    Raises:
        UserError: a path is missing, or a directory holds no text file.
    """
    if not paths:
        raise UserError("no text is given: name files or directories.")
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"text {str(given)!r} does not exist: check the path.")
        if not given.is_dir() or _is_dataset(given):
            yield given, _stem(given)
            continue
        found = False
        skip: Path | None = None
        for path in sorted(given.rglob("*")):
            inside = path.relative_to(given)
            if any(part.startswith(".") for part in inside.parts) or (skip is not None and skip in path.parents):
                continue
            dataset = path.is_dir() and _is_dataset(path)
            if dataset:
                skip = path
            if dataset or (path.is_file() and _kind(path) in suffixes):
                found = True
                yield path, inside.parts[0] if len(inside.parts) > 1 else _stem(path)
        if not found:
            kinds = ", ".join(suffixes)
            raise UserError(f"directory {str(given)!r} holds no text: put {kinds} files there (or .xz, .gz of them).")


def files_of(path: Path) -> list[Path]:
    """A file, or all files in a directory, sorted."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(file.stat().st_size for file in files_of(path))


def _is_dataset(directory: Path) -> bool:
    return (directory / "dataset_dict.json").is_file() or (
        (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    )


def _kind(path: Path) -> str:
    """The suffix that says what a file is: of `news.txt.xz` it is .txt."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _stem(path: Path) -> str:
    name = path.name
    for _ in range(2):
        suffix = Path(name).suffix
        if suffix.lower() in COMPRESSED or suffix.lower() in SUFFIXES:
            name = name[: -len(suffix)]
    return name or path.name


def _lines(path: Path) -> Iterator[tuple[str, int, int]]:
    """Lines of a text file without their ends, with their numbers from 1 and the bytes of the file read so far."""
    opener = COMPRESSED.get(path.suffix.lower())
    with open(path, "rb") as raw:
        stream: IO[bytes] = opener(raw) if opener else raw
        number, blank = 0, True
        try:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    mark = next((name for start, name in BYTE_ORDER_MARKS.items() if line.startswith(start)), None)
                    if mark:
                        raise UserError(f"text file {str(path)!r}, line 1 is {mark}, not UTF-8: convert the file.")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if b"\0" in line:
                    raise UserError(f"text file {str(path)!r} is binary (line {number} has a zero byte): leave it out.")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"text file {str(path)!r}, line {number} is not UTF-8 (byte {error.start + 1} of the line is "
                        f"0x{line[error.start]:02x}): convert the file to UTF-8."
                    ) from None
                text = text.rstrip("\r\n")
                blank = blank and not text.strip()
                yield text, number, raw.tell()
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(
                f"text file {str(path)!r} is damaged or cut short after line {number} ({error}): copy it again."
            ) from None
        if blank:
            raise UserError(f"text file {str(path)!r} is empty (no text in {number} lines): leave it out.")


def _read_plain(path: Path, genre: str) -> Iterator[tuple[Document, int]]:
    paragraphs: list[str] = []
    position = 0
    for line, _, position in _lines(path):
        paragraph = line.strip()
        if paragraph:
            paragraphs.append(paragraph)
        elif paragraphs:
            yield Document("\n".join(paragraphs), str(path), genre), position
            paragraphs = []
    if paragraphs:
        yield Document("\n".join(paragraphs), str(path), genre), position


def _read_jsonl(path: Path, genre: str) -> Iterator[tuple[Document, int]]:
    for line, number, position in _lines(path):
        if not line.strip():
            continue
        where = f"text file {str(path)!r}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise UserError(f"{where} is not JSON ({error}): mend or remove the line.") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{where} has no "text" that is a string: give one object with it in each line.')
        text = _clean(row["text"], where)
        own = row.get("genre")
        if text:
            yield Document(text, str(path), own if isinstance(own, str) and own else genre), position


def _read_html(path: Path, genre: str) -> Iterator[tuple[Document, int]]:
    parser, position = _Page(), 0
    for line, _, position in _lines(path):  # noqa: B007
        parser.feed(line + "\n")
    text = parser.finish()
    if text:  # a page of pictures or a redirection has none
        yield Document(text, str(path), genre), position


def _read_dataset(directory: Path, genre: str) -> Iterator[Document]:
    import datasets

    try:
        found = datasets.load_from_disk(str(directory))
    except Exception as error:  # pyarrow's and datasets' own kinds, many
        raise UserError(f"dataset {str(directory)!r} cannot be read ({error}): save or copy it again.") from None
    for name, part in found.items() if isinstance(found, datasets.DatasetDict) else [("", found)]:
        where = f"dataset {str(directory)!r}" + (f", split {name!r}" if name else "")
        if "text" not in part.column_names:
            columns = ", ".join(part.column_names) or "none"
            raise UserError(f'{where} has no column "text" (columns: {columns}): rename the one with the text.')
        for number, row in enumerate(part):
            if not isinstance(row["text"], str):
                raise UserError(f'{where}, row {number}: "text" is not a string: leave the row out.')
            text = _clean(row["text"], f"{where}, row {number}")
            own = row.get("genre")
            if text:
                yield Document(text, str(directory), own if isinstance(own, str) and own else genre)


_READERS = {".jsonl": _read_jsonl, ".html": _read_html, ".htm": _read_html, ".xhtml": _read_html}


def _clean(text: str, where: str) -> str:
    """Paragraphs without white space at their ends and without empty ones."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half of a surrogate pair, which is no character: mend the text.") from None
    return "\n".join(line for line in (part.strip() for part in text.split("\n")) if line)


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
