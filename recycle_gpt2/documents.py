"""Documents in files, directories and saved datasets, found and streamed in an order that is always the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from common.checks import UserError, printable, require_file
from recycle_gpt2.bad_rows import BadRows, TextOptions
from recycle_gpt2.formats import COMPRESSED, SUFFIXES, Document, kind_of, read_dataset, reader_of
from recycle_gpt2.hub import is_hub, read_hub

__all__ = ["Document", "read_documents", "read_with_positions"]


def read_documents(
    paths: Sequence[Path],
    options: TextOptions | None = None,
    *,
    suffixes: Sequence[str] = SUFFIXES,
    held_out: bool = False,
) -> Iterator[Document]:
    """Stream the documents of files and directories, in an order that is always the same.

    `.txt` has a paragraph a line and an empty line between documents; `.jsonl` and `.ndjson` an object a line with
    "text" and perhaps "genre"; `.json` a list of such objects; `.csv`, `.tsv`, `.parquet` and a directory that
    `datasets` has saved rows with such columns; `.html` and `.md` are one document of their running text. `.xz`, `.gz`,
    `.bz2` and `.zst` are unpacked on the way. Any other file that is named itself is read as `.txt`. White space at
    both ends of a paragraph is dropped.

    Lines, rows and files that cannot be read are left out and named on stderr at the end, up to a share of all; so are
    the kinds of files in directories that are not read at all.

    Args:
        paths: files or directories; inside directories, files with one of `suffixes` are read; or hf:NAME of a
            dataset on the Hugging Face hub, which is streamed.
        options: the column of the text, and the share that may be bad.
        suffixes: with their dots.
        held_out: of a saved DatasetDict with a split "test", read that one alone; otherwise all but that one.

    Raises:
        UserError: more than the share is empty, binary, damaged or not UTF-8 (the first line is named), a file or a
            column is missing, or there is no text.
    """
    for document, _ in read_with_positions(paths, options, suffixes, held_out=held_out):
        yield document


def read_with_positions(
    paths: Sequence[Path],
    options: TextOptions | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    *,
    held_out: bool = False,
    opened: Callable[[Path], IO[bytes]] | None = None,
) -> Iterator[tuple[Document, int]]:
    """What `read_documents` yields, each with the bytes of all files that have been read so far, as on the disk.

    Files of lines are opened by `opened`, if it is given, and read from front to back.
    """
    options = options or TextOptions()
    bad = BadRows(options.bad_share, opened)
    done, empty = 0, True
    others: Counter[str] = Counter()
    for path, genre in find_texts(paths, suffixes, others):
        bad.files += 1
        if is_hub(path):
            for document in read_hub(path, options.column, bad, held_out):
                empty = False
                yield document, done
        elif path.is_dir():
            for document in read_dataset(path, genre, options.column, bad, held_out):
                empty = False
                yield document, done
        else:
            require_file(path, "text file")
            for document, position in reader_of(path)(path, genre, options.column, bad):
                empty = False
                yield document, done + position
        done += size_of(path)
    bad.settle()
    if others:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(others.items()))
        print(f"left out: files of kinds that are not read: {printable(kinds)}.", file=sys.stderr)
    if empty:
        raise UserError(f"{', '.join(repr(str(path)) for path in paths)}: no text there: give files with text.")


def find_texts(
    paths: Sequence[Path], suffixes: Sequence[str] = SUFFIXES, others: Counter[str] | None = None
) -> Iterator[tuple[Path, str]]:
    """Files, and directories that `datasets` has saved, each with its genre; sorted inside directories.

    Args:
        paths: what `read_documents` takes.
        suffixes: of the files in directories.
        others: counts the files in directories that are of other kinds, hidden ones aside.

    Raises:
        UserError: a path is missing, or a directory holds no text file.
    """
    if not paths:
        raise UserError("no text is given: name files or directories.")
    for given in map(Path, paths):
        if is_hub(given):
            yield given, given.name
            continue
        if not given.exists():
            raise UserError(f"text {str(given)!r} does not exist: check the path.")
        if not given.is_dir() or _is_dataset(given):
            yield given, _stem(given)
            continue
        found = False
        skip: Path | None = None
        for path in sorted(given.rglob("*")):
            inside = path.relative_to(given)
            hidden = any(part.startswith(".") for part in inside.parts)
            if hidden or (skip is not None and skip in path.parents):
                continue
            dataset = path.is_dir() and _is_dataset(path)
            if dataset:
                skip = path
            readme = path.name.lower() == "readme.md"
            if dataset or (path.is_file() and kind_of(path) in suffixes and not readme):
                found = True
                yield path, inside.parts[0] if len(inside.parts) > 1 else _stem(path)
            elif others is not None and path.is_file():
                others["README.md" if readme else path.suffix.lower() or "without a suffix"] += 1
        if not found:
            kinds = ", ".join(suffixes)
            raise UserError(
                f"directory {str(given)!r} holds no text: put {kinds} files there (or .xz, .gz, .bz2, .zst of them)."
            )


def files_of(path: Path) -> list[Path]:
    """A file, or all files in a directory, sorted; none of a dataset on the hub."""
    if is_hub(path):
        return []
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(file.stat().st_size for file in files_of(path))


def _is_dataset(directory: Path) -> bool:
    return (directory / "dataset_dict.json").is_file() or (
        (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    )


def _stem(path: Path) -> str:
    name = path.name
    for _ in range(2):
        suffix = Path(name).suffix
        if suffix.lower() in COMPRESSED or suffix.lower() in SUFFIXES:
            name = name[: -len(suffix)]
    return name or path.name
