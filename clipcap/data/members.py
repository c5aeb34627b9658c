"""Images inside tars, read where they lie: the path of one names the tar, the member, and where its bytes are.

`shards/00000.tar/cat.jpg#1536+20480` are the 20,480 bytes at 1,536 of `shards/00000.tar`; any other path is a file's.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

_PLACE = re.compile(r"#(\d{1,18})\+(\d{1,18})$")


class _Bytes(NamedTuple):
    file: Path
    offset: int
    size: int


def member_path(tar: Path, name: PurePosixPath, offset: int, size: int) -> Path:
    """The path of a tar's member; the tar's own name must end in .tar."""
    return tar / f"{name}#{offset}+{size}"


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file, or a tar's member, to read its bytes."""
    found = _find(path)
    if found is None:
        return open(path, "rb")
    with open(found.file, "rb") as file:
        file.seek(found.offset)
        return io.BytesIO(file.read(found.size))


def status_of(path: Path) -> tuple[int, int]:
    """Bytes of a file or member, and when the file or the tar was changed, in nanoseconds.

    Raises:
        FileNotFoundError: it does not exist.
    """
    found = _find(path)
    status = (found.file if found else path).stat()
    return found.size if found else status.st_size, status.st_mtime_ns


def exists(path: Path) -> bool:
    """Whether a file is there, or the tar of a member."""
    return _find(path) is not None or path.is_file()


def is_member(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a member of a tar that is there."""
    return _find(path) is not None


def name_of(path: Path) -> str:
    """The name of a file, or of a member in its tar."""
    return _PLACE.sub("", path.name)


def _find(path: str | os.PathLike[str]) -> _Bytes | None:
    place = _PLACE.search(os.fspath(path))
    if place is None:
        return None
    tars = (above for above in Path(path).parents if above.suffix == ".tar" and above.is_file())
    tar = next(tars, None)
    return _Bytes(tar, int(place[1]), int(place[2])) if tar else None
