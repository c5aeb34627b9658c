"""Rows that are done, a line each, so that a run that was stopped loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from common.checks import UserError, require_same_settings

Row = dict[str, Any]


class Journal:
    """Rows by key, in a file of JSON lines whose first line is {"made_by": settings}; use it in a `with` block.

    A last line that was cut short, or is no row, is taken off with what follows it.

    Raises:
        UserError: the file was begun with other settings, or is none of these.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        valid: Callable[[Row], bool],
        *,
        cure: str = "use the same again, delete it, or give another --out",
    ) -> None:
        """
        Args:
            path: its directory is made.
            settings: what the rows depend on, in JSON's types.
            valid: whether a row that was read is one that this command writes.
            cure: what to do about other settings, for the error.
        """
        self.path, self.rows = path, dict[str, Row]()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as file:
                self._check(file.readline(), settings, cure)
                whole = file.tell()
                for line in file:
                    row = _parsed(line)
                    key = row.pop("key", None)
                    if not isinstance(key, str) or not valid(row):
                        break
                    self.rows[key] = row
                    whole += len(line)
        self._file = open(path, "r+b" if whole else "wb")  # noqa: SIM115, closed by close()
        self._file.seek(whole)
        self._file.truncate()
        if not whole:
            self._write({"made_by": settings})

    def _check(self, line: bytes, settings: Mapping[str, Any], cure: str) -> None:
        made_by = _parsed(line).get("made_by")
        if not isinstance(made_by, dict):
            raise UserError(f"{str(self.path)!r} was not written by this command: delete it, or give another --out.")
        require_same_settings(self.path, made_by, settings, cure)

    def add(self, key: str, row: Row) -> None:
        """Write one row, at once."""
        self.rows[key] = row
        self._write(row | {"key": key})

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(row).encode("ascii") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, which stays, unless it holds no row."""
        self._file.close()
        if not self.rows:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parsed(line: bytes) -> Row:
    """The object on a whole line; an empty one for any other."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
