"""A text: known by a hash of its files, and in a run read once, its documents kept for all stages that need them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from common.checks import UserError, require_file
from common.files import clear_leftovers, hash_content, whole_file, write_json
from common.processes import is_first_process
from common.progress import Progress
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.documents import files_of, find_texts, read_with_positions, size_of
from recycle_gpt2.formats import Document
from recycle_gpt2.hub import is_hub
from recycle_gpt2.records import MALFORMED

KEPT, RECORD = "documents.jsonl.gz", "text.json"
SETTLED = 2_000_000_000
"""Nanoseconds after a file's last change from which on a further one is sure to have another time."""


def text_hash(paths: Sequence[Path], *, known: Mapping[Path, bytes] | None = None, progress: bool = False) -> str:
    """SHA-256 of all that the text files hold, in the order that they are read in, whatever they are called.

    Args:
        paths: what `read_documents` takes.
        known: hashes of files that have been read already.
        progress: show a bar where there is a gigabyte or more.

    Raises:
        UserError: what `find_texts` raises.
    """
    texts = [path for path, _ in find_texts(paths)]
    known, digest = known or {}, hashlib.sha256()
    total = sum(size_of(path) for path in texts if path not in known)
    with Progress(total=total, desc="hash", unit="B", unit_scale=True, disable=not progress or total < 1 << 30) as bar:
        for path in texts:
            if is_hub(path):  # known by its name: what the hub has is not read for this
                digest.update(str(path).encode())
            elif not path.is_dir():
                require_file(path, "text file")
            for file in files_of(path):
                if file in known:
                    digest.update(known[file])
                    continue
                with open(file, "rb") as stream:
                    digest.update(hash_content(stream, hashlib.sha256(), bar.update).digest())
    return digest.hexdigest()


class Text:
    """Documents in files or on the hub, read whenever they are asked for."""

    def __init__(self, paths: Sequence[Path], options: TextOptions | None = None) -> None:
        """`paths` are what `read_documents` takes, read as `options` say."""
        self.paths, self.options = tuple(paths), options or TextOptions()

    def check(self) -> None:
        """Raise UserError where a path is missing or holds no text, before anything is read."""
        for path, _ in find_texts(self.paths):
            if not (is_hub(path) or path.is_dir()):
                require_file(path, "text file")

    def hash(self, *, progress: bool = False) -> str:
        """See `text_hash`."""
        return text_hash(self.paths, progress=progress)

    def size(self) -> int:
        """Bytes on the disk that `documents` reads."""
        return sum(size_of(path) for path, _ in find_texts(self.paths))

    def documents(self) -> Iterator[tuple[Document, int]]:
        """The documents, each with the bytes that have been read so far.

        Raises:
            UserError: what `read_documents` raises.
        """
        return read_with_positions(self.paths, self.options)


class KeptText(Text):
    """A text that is read once: its documents are written to a directory, and read from there from then on.

    The record beside them has the text's hash, computed while it is read, and size and times of its files: as long as
    these are the same, the files are not opened again.
    """

    def __init__(self, paths: Sequence[Path], options: TextOptions, directory: Path) -> None:
        super().__init__(paths, options)
        self.directory = Path(directory)
        self._hash: str | None = None

    def hash(self, *, progress: bool = False) -> str:
        """The text's hash: the record's where no file has changed since, or else of the files, as `text_hash`."""
        if self._hash is None:
            record, found = self._record(), _stamps(self.paths)
            if record and found and record.get("stamps") == found:
                self._hash = str(record["text"])
            else:
                self._hash = super().hash(progress=progress)
                if record.get("text") == self._hash and is_first_process():  # moved, copied or touched
                    write_json(self.directory / RECORD, record | {"stamps": found})
        return self._hash

    def size(self) -> int:
        """Bytes of the kept documents."""
        self.keep()
        return size_of(self.directory / KEPT)

    def documents(self) -> Iterator[tuple[Document, int]]:
        """The documents as they are kept, read before if they are not, each with the bytes read so far.

        Raises:
            UserError: what `read_documents` raises, or what is kept is damaged.
        """
        self.keep()
        path = self.directory / KEPT
        with open(path, "rb") as raw:
            try:
                for line in gzip.open(raw):
                    yield Document(**json.loads(line.decode("utf-8", "surrogatepass"))), raw.tell()
            except (EOFError, gzip.BadGzipFile, zlib.error, *MALFORMED) as error:
                raise UserError(f"{str(path)!r} is damaged ({error}): delete it, and the text is read again.") from None

    def keep(self, *, progress: bool = True) -> str:
        """Read the text and keep its documents, unless they are kept; returns the text's hash.

        Raises:
            UserError: what `read_documents` raises.
        """
        record = self._record()
        if (
            (self.directory / KEPT).is_file()
            and record.get("column") == self.options.column
            and record.get("text") == self.hash()
        ):
            return self.hash()
        self.directory.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.directory)
        (self.directory / RECORD).unlink(missing_ok=True)  # first, or after a stop it might vouch for another text
        stamps, hashes, number = _stamps(self.paths), FileHashes(), 0
        total = super().size()
        bar = Progress(total=total, desc="text", unit="B", unit_scale=True, disable=not progress)
        with bar, whole_file(self.directory / KEPT) as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed:
            for document, position in read_with_positions(self.paths, self.options, opened=hashes.opened):
                line = json.dumps(asdict(document), ensure_ascii=False) + "\n"
                packed.write(line.encode("utf-8", "surrogatepass"))  # a file's name need not be UTF-8
                number += 1
                bar.update(position - bar.n)
        self._hash = text_hash(self.paths, known=hashes.found)
        record = {"text": self._hash, "documents": number, "column": self.options.column, "stamps": stamps}
        write_json(self.directory / RECORD, record)
        return self._hash

    def _record(self) -> dict[str, Any]:
        try:
            found = json.loads((self.directory / RECORD).read_text(encoding="utf-8"))
            return found if isinstance(found["text"], str) else {}
        except (FileNotFoundError, *MALFORMED):  # it is written again
            return {}


class FileHashes:
    """SHA-256 of each file that `opened` opens, computed while somebody reads it from front to back."""

    def __init__(self) -> None:
        self.found: dict[Path, bytes] = {}

    def opened(self, path: Path) -> IO[bytes]:
        """The file, whose hash is in `found` when it is closed."""
        return _Hashed(_Counted(path), path, self.found)


class _Counted(io.FileIO):
    """A file that hashes what is read of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.digest = hashlib.sha256()

    def readinto(self, buffer: Any, /) -> int | None:
        number = super().readinto(buffer)
        self.digest.update(memoryview(buffer)[: number or 0])
        return number

    def readall(self) -> bytes:
        content = super().readall()
        self.digest.update(content or b"")
        return content


class _Hashed(io.BufferedReader):
    def __init__(self, raw: _Counted, path: Path, found: dict[Path, bytes]) -> None:
        super().__init__(raw, 1 << 20)
        self._counted, self._path, self._found = raw, path, found

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:  # what reads lines may have stopped before the end
                while self.read(1 << 20):
                    pass
                self._found[self._path] = self._counted.digest.digest()
        finally:
            self.close()


def _stamps(paths: Sequence[Path]) -> list[list[Any]] | None:
    """Name, bytes, and times of change (ns) of each file; None where one was changed just now."""
    files = [file for path, _ in find_texts(paths) if not is_hub(path) for file in files_of(path)]
    found: list[list[Any]] = [[str(path)] for path in paths if is_hub(path)]
    for file in files:
        stat = file.stat()
        if max(stat.st_mtime_ns, stat.st_ctime_ns) + SETTLED > time.time_ns():
            return None
        found.append([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return found
