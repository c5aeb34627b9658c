"""What of a text cannot be read: left out, counted and named, up to a share of the whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.checks import UserError, printable, require_between

NAMED = 10
"""Bad rows and files that are named; the others are counted."""


@dataclass(frozen=True)
class TextOptions:
    """How text is read."""

    column: str = "text"
    """Column, or key, with the text: of JSON, CSV, Parquet and saved datasets."""
    bad_share: float = 0.01
    """Share of rows (lines of plain text), and of files, that may be damaged, not UTF-8, or without text: they are left
    out and named. More stops the command."""


class BadRows:
    """Counts rows and files, good and bad; `settle` says what was left out, or that it is too much."""

    def __init__(self, share: float, opened: Callable[[Path], IO[bytes]] | None = None) -> None:
        """`share` of the rows, and of the files, may be bad; `opened` opens files of lines, in place of `open`.

        Raises:
            UserError: the share is not within 0 and 1.
        """
        require_between("bad_share", share, 0, 1)
        self.share = share
        self.opened = opened or _open
        self.rows = self.files = self.bad_rows = self.bad_files = 0
        self._named: list[str] = []

    def bad_row(self, message: str) -> None:
        """Leave out one of the `rows`; `message` names it and the cure."""
        self.bad_rows += 1
        self._name(message)

    def bad_file(self, message: str) -> None:
        """Leave out one of the `files`, or what is left of it."""
        self.bad_files += 1
        self._name(message)

    def _name(self, message: str) -> None:
        if len(self._named) < NAMED:
            self._named.append(message)

    def settle(self) -> None:
        """Name on stderr what was left out.

        Raises:
            UserError: it is more than the share.
        """
        if not (self.bad_rows or self.bad_files):
            return
        counted = f"{self.bad_rows:,} of {self.rows:,} rows and {self.bad_files:,} of {self.files:,} files"
        if self.bad_rows > self.share * self.rows or self.bad_files > self.share * self.files:
            raise UserError(
                f"{self._named[0]} In all {counted} are bad, more than bad_share {self.share:g}: raise it to leave "
                f"them out."
            )
        print(f"left out: {counted}:", file=sys.stderr)
        for message in self._named:
            print(f"  {printable(message)}", file=sys.stderr)
        if (rest := self.bad_rows + self.bad_files - len(self._named)) > 0:
            print(f"  and {rest:,} more", file=sys.stderr)


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb")
