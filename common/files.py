"""Files and directories written whole or not at all, and directories that one run at a time may use."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any

from common.checks import UserError, require_place

MARKER = ".written-by-clip-gpt-toolkit.json"
"""Names, in a directory that was written in one piece, what was put there."""
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
"""Name of a file that `whole_file` had begun when it was killed."""
LOCK = ".lock"
"""Is there, and locked, while a run uses a directory."""


@contextlib.contextmanager
def whole_file(
    path: str | os.PathLike[str], mode: str = "wb", *, sync: bool = True, **options: Any
) -> Iterator[IO[Any]]:
    """Open a file whose content appears at `path` all at once, when the block ends without an error.

    A reader, a kill or a full disk finds the old file or the new one, never half of it. A symlink stays one.

    Args:
        path: its directory is made.
        mode: of writing, as `open` takes it.
        sync: have it survive a power cut; False is faster for thousands of files that can be made again.
        options: further ones of `open`.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = _begin(target)
    try:
        with _naming(path), os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)  # before the file is closed, which gives up its lock
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(target.parent)


def _begin(target: Path) -> tuple[int, str]:
    """A temporary file beside `target`, locked, so that `clear_leftovers` leaves it to whoever writes it."""
    while True:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
        with contextlib.suppress(OSError):  # some file systems cannot
            fcntl.flock(handle, fcntl.LOCK_SH)
        if os.path.exists(temporary):
            return handle, temporary
        os.close(handle)  # it was cleared away before it was locked


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have a system that cannot write (a full disk, a quota) come out as an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
    except RuntimeError as error:  # of torch's writer, about what it missed after the system's error
        if not isinstance(error.__context__, OSError):
            raise
        error.__context__.filename = os.fspath(path)
        raise error.__context__ from None
    except Exception as error:  # safetensors has one of its own
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def sync(path: Path) -> None:
    """Have what was written to a file survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    """Have a directory's own entries, such as a file that took another's place, survive a power cut."""
    with contextlib.suppress(OSError):  # some file systems cannot
        sync(directory)


def hash_content(file: IO[bytes], digest: Any, told: Callable[[int], object] = lambda size: None) -> Any:
    """Add what is left of a file to one of hashlib's digests, which is returned; `told` gets each part's bytes."""
    while part := file.read(1 << 20):
        digest.update(part)
        told(len(part))
    return digest


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` all at once (see `whole_file`)."""
    with whole_file(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    return Path(path)


def write_json(path: str | os.PathLike[str], obj: Any) -> Path:
    """Write `obj` as JSON, all at once.

    Paths become strings; dataclasses, NumPy and torch values plain ones; NaN and infinity null, as JSON has none.

    Raises:
        TypeError: a value that has no JSON form.
    """
    return write_text(path, json.dumps(plain(obj), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch, scalars too
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} {value!r} has no JSON form.")


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike[str], what: str = "model") -> Iterator[Path]:
    """Yield an empty directory that takes the place of `path` when the block ends without an error.

    What lay there before goes only if `require_own_directory` lets it; a symlink stays one.

    Raises:
        UserError: `path` holds something that was not written so.
    """
    target = require_own_directory(path, what)
    partial, before = (target.with_name(f".{target.name}.{end}") for end in ("partial", "before"))
    target.parent.mkdir(parents=True, exist_ok=True)
    _take_up(target, before)
    if (partial / MARKER).is_file():  # of a call that was killed
        shutil.rmtree(partial)
    clear_leftovers(partial)
    with contextlib.suppress(OSError):  # of one that was killed before it had written the marker
        partial.rmdir()
    partial.mkdir()
    try:
        write_json(partial / MARKER, {"files": []})
        with _naming(path):
            yield partial
        files = (file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
        names = sorted(name for name in files if name != MARKER)
        for name in names:
            (partial / name).chmod(0o644)
            sync(partial / name)
        write_json(partial / MARKER, {"files": names})
        require_own_directory(target, what)  # somebody may have put something there meanwhile
        if (target / MARKER).exists():
            os.replace(target, before)
        os.replace(partial, target)  # an empty directory gives way by itself
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def move_into(source: Path, target: Path, last: str) -> None:
    """Move all that `source` holds into the directory `target`, over what has the same names there.

    A stop leaves old or new files, each complete; `last` moves last, so it should be what readers look for.
    """
    for name in sorted({entry.name for entry in source.iterdir()} - {MARKER}, key=lambda name: (name == last, name)):
        if (source / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
        else:
            (source / name).chmod(0o644)  # safetensors makes files that nobody else may read
        os.replace(source / name, target / name)


def _take_up(target: Path, before: Path) -> None:
    """Finish or undo a swap that a kill stopped between its two steps."""
    if not (before / MARKER).is_file():
        return
    if target.exists():
        shutil.rmtree(before)
    else:
        os.replace(before, target)


def require_own_directory(path: str | os.PathLike[str], what: str = "model") -> Path:
    """Return `path`, its symlinks followed, when `whole_directory` may write there: ask before any long work.

    It may where nothing is, where the directory is empty, and where it wrote all that exists.

    Raises:
        UserError: something else lies there.
    """
    target = Path(os.path.realpath(path))
    if not target.exists():
        return target
    cure = "move it away or give another place"
    if not target.is_dir():
        raise UserError(f"{what} {str(path)!r} would take the place of a file: {cure}.")
    known = _written(target) | {MARKER}
    for file in sorted(target.rglob("*")):
        name = file.relative_to(target).as_posix()
        if name not in known and (file.is_symlink() or not file.is_dir() or not any(file.iterdir())):
            raise UserError(
                f"{what} {str(path)!r} would take the place of {name!r}, which was not written by this command: {cure}."
            )
    return target


def _written(directory: Path) -> set[str]:
    """What the marker of a directory names."""
    try:
        names = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
        return set(map(str, names))
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def clear_leftovers(directory: Path) -> None:
    """Delete what `whole_file` had begun in a directory when it was killed, but not what a process still writes."""
    for path in directory.glob(".*.tmp"):
        if not LEFTOVER.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError), open(path, "rb") as file:  # it may be gone, or be in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of a directory, which is made, until the block ends; a kill ends the claim too.

    What a run that was killed had begun to write there with `whole_file` goes.

    Raises:
        UserError: another run uses it, or no directory can be there.
    """
    require_place(directory, directory=True)
    path = Path(directory) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(path, str(directory))
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        clear_leftovers(path.parent)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, shown: str) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:  # whoever had it deleted it in between
            pass
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise UserError(f"{shown!r} is in use by {holder}: wait for it, stop it, or give another --out.") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextlib.contextmanager
def alone(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Wait until no other process is in such a block for this directory, where it can be written; a kill ends it."""
    try:
        file = open(Path(directory) / LOCK, "w")  # noqa: SIM115, closed below
    except OSError:  # it may only be read
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another process that writes {directory}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table; what a row lacks is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return lines + ["| " + " | ".join(str(row.get(column, "–")) for column in columns) + " |" for row in rows]
