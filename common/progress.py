"""Progress of long work: a bar on a terminal, and in a log or CI a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines of a log."""


class Progress(tqdm):
    """tqdm's bar. Where it is not written to a terminal, a line every `EVERY` seconds and one at the end, instead of
    thousands of carriage returns; what ends sooner has its last line only, and what `leave=False` takes back none."""

    disable: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        file = options.get("file") or sys.stderr
        self.in_lines = not (hasattr(file, "isatty") and file.isatty())
        self._wrote = time.monotonic()
        if self.in_lines:
            options |= {"mininterval": EVERY, "maxinterval": EVERY, "dynamic_ncols": False, "ncols": 100, "ascii": True}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the state; tqdm calls this far more often than a log should have it."""
        if not self.in_lines:
            return bool(super().display(msg, pos))
        if time.monotonic() - self._wrote >= EVERY:
            self._write_line()
        return True

    def close(self) -> None:
        """Write the last state, if the bar would stay."""
        if not self.in_lines:
            return super().close()
        if self.disable:
            return None
        self.disable = True
        self._decr_instances(self)
        leave = not self.pos if self.leave is None else self.leave
        if leave and time.time() >= self.start_t + self.delay:
            self._write_line()
        return None

    def _write_line(self) -> None:
        self._wrote = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()
