"""Files from others that could do harm when they are opened: pickles that run code, archives that leave their place or
fill the memory or the disk."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from common.checks import UserError, require_file

MEMBER_BYTES = 256 << 20
"""Largest file in a tar."""
HEADER_BYTES = 1 << 20
"""Largest header of one."""
GROWTH = 50
"""How many times its size a compressed tar may hold, beyond the size of one largest file. Images, which are compressed
by themselves, hardly grow; zeros grow a thousandfold."""
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


def read_pickle(path: Path) -> Any:
    """The tensors, containers, strings and numbers of a pickle; nothing in it is run.

    Raises:
        UserError: it holds anything else, or is damaged.
    """
    with open(require_file(path, "pickle"), "rb") as file:
        try:
            return _TensorUnpickler(file).load()
        except _Refused as error:
            raise UserError(
                f"pickle {str(path)!r} asks to run {error}: it is refused, as it may do anything; only tensors, lists, "
                f"dictionaries, text and numbers are read."
            ) from None
        except Exception as error:  # a damaged pickle may raise anything
            raise UserError(
                f"pickle {str(path)!r} is damaged or cut short ({type(error).__name__}): copy it again."
            ) from error


class _Refused(Exception):
    """Names what a pickle wanted to import."""


def _load_storage(data: bytes) -> Any:
    """A tensor's numbers, which torch pickles inside the pickle; its own loader there would run code."""
    import torch

    if data.startswith(b"PK"):  # torch never puts an archive here, and it could unpack to any size
        raise _Refused("an archive inside a tensor")
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise _Refused("code inside a tensor") from error


def _to_bytes(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 and lower hold bytes."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            import torch

            return torch._utils._rebuild_tensor_v2
        allowed = {
            ("torch.storage", "_load_from_bytes"): _load_storage,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("_codecs", "encode"): _to_bytes,
        }
        if (module, name) not in allowed:
            raise _Refused(f"{module}.{name}")
        return allowed[module, name]


class Member(NamedTuple):
    """A file in a tar."""

    name: PurePosixPath
    """Stays below the directory that the file is put in."""
    offset: int
    """Where its content begins in the tar, unpacked."""
    size: int
    read: Callable[[], bytes]
    """Its content; only before the next member is asked for."""


def is_compressed(path: Path) -> bool:
    """Whether a tar must be unpacked to be read."""
    with open(path, "rb") as file:
        return file.read(6).startswith(tuple(_OPENERS))


def read_tar(path: Path) -> Iterator[Member]:
    """The files of a tar, in its order; what is not asked for is passed over.

    Raises:
        UserError: a member is a link, a device or sparse, its name leaves the directory, or it is larger than
            `MEMBER_BYTES`; all of them are much larger than the tar (`GROWTH`); the tar is damaged.
    """
    refused = "it is refused; make the tar again"
    try:
        with _unpacked(require_file(path, "tar")) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else every member stays in memory
                where = f"tar {str(path)!r}: member {member.name[:200]!r}"
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
                    raise UserError(f"{where} leaves the directory: {refused} without it.")
                if not 0 <= member.size <= MEMBER_BYTES:
                    raise UserError(
                        f"{where} has {member.size:,} bytes, of at most {MEMBER_BYTES:,}: {refused} without it."
                    )
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    raise UserError(f"{where} is a link, a device or sparse: {refused} with plain files.")
                yield Member(name, member.offset_data, member.size, partial(unpacked.content, member))
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        if isinstance(error, UserError) or isinstance(error, OSError) and error.filename is not None:
            raise
        raise UserError(f"tar {str(path)!r} is damaged or cut short ({error}): copy it again.") from error


def _unpacked(path: Path) -> _Bounded:
    """The bytes of a tar, which may be compressed."""
    with open(path, "rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), open)
    size = path.stat().st_size
    most = max(size, MEMBER_BYTES + GROWTH * size)
    return _Bounded(opener(path, "rb"), most, f"tar {str(path)!r}")


class _Bounded(io.BufferedIOBase):
    """The bytes of a tar, of which no more than `most` are read in all."""

    def __init__(self, file: IO[bytes], most: int, name: str) -> None:
        self.file, self.left, self.name = file, most, name

    def read(self, size: int | None = -1, /) -> bytes:
        """For `tarfile`, which takes a header's word for its own length."""
        size = -1 if size is None else size
        if not 0 <= size <= HEADER_BYTES:
            raise UserError(f"{self.name} has a header of {size:,} bytes: it is refused; make the tar again.")
        data = self.file.read(size)
        self._count(len(data))
        return data

    def content(self, member: tarfile.TarInfo) -> bytes:
        """A complete member."""
        self.seek(member.offset_data)
        data = self.file.read(member.size)
        if len(data) < member.size:
            raise tarfile.ReadError(f"member {member.name[:200]!r} ends early")
        self._count(len(data))
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._count(max(0, offset - self.file.tell()))  # what is passed over is unpacked, too
        return self.file.seek(offset, whence)

    def _count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UserError(f"{self.name} unpacks to more than {GROWTH} times its size: it is refused.")

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()
