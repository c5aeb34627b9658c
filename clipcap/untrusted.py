"""Files from others that could do harm when they are opened: pickles that run code, archives that leave their place."""

from __future__ import annotations

import collections
import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from common.checks import UserError, require_file


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


def read_tar(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of a tar, in its order, as (name, content); every name stays below the directory it is put in.

    Raises:
        UserError: a member is a link or a device or its name leaves the directory; the tar is damaged.
    """
    try:
        with tarfile.open(require_file(path, "tar")) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
                    raise UserError(
                        f"tar {str(path)!r}: member {member.name!r} leaves the directory: it is refused; "
                        f"make the tar again without it."
                    )
                if member.isdir():
                    continue
                if not member.isfile():
                    raise UserError(
                        f"tar {str(path)!r}: member {member.name!r} is a link or a device: it is refused; "
                        f"make the tar again with plain files."
                    )
                file = tar.extractfile(member)
                assert file is not None
                yield name, file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, tarfile.TarError) and error.filename is not None:
            raise
        raise UserError(f"tar {str(path)!r} is damaged or cut short ({error}): copy it again.") from error
