"""The journal of a download: what became of each URL, a line at a time."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff",
    "AVIF": ".avif",
}  # fmt: skip
JOURNAL = "journal.jsonl"
JOURNAL_LINE = 1 << 16
TEMPORARY = re.compile(r"\.[0-9a-f]{40}\.[a-z]+\.\w+\.tmp")


@dataclass(frozen=True)
class Entry:
    """What became of one URL."""

    file: str = ""
    """Relative to the output directory; empty when it was dropped."""
    dropped: str = ""
    """Why there is no file."""
    again: bool = False
    """It may work another time, so the next run tries it again."""


def url_key(url: str) -> str:
    """The name of a URL's image, without its suffix: a hash, so that no URL decides where something is written."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def place_of(key: str, suffix: str) -> str:
    """Where an image goes in the output directory.

    Raises:
        ValueError: not an `url_key`, or not a suffix of `SUFFIXES`: a name that this command never gives.
    """
    if not re.fullmatch("[0-9a-f]{40}", key) or suffix and suffix not in SUFFIXES.values():
        raise ValueError(key)
    return f"images/{key[:2]}/{key}{suffix}"


def read_journal(directory: Path) -> dict[str, Entry]:
    """What became of every URL so far, by `url_key`; empty where nothing was downloaded."""
    path = directory / JOURNAL
    found: dict[str, Entry] = {}
    if path.is_file():
        with open(path, "rb") as file:
            while line := file.readline(JOURNAL_LINE):
                try:
                    row = json.loads(line)
                    key = row.pop("key")
                    entry = Entry(**row)
                    if entry.file in ("", place_of(key, Path(entry.file).suffix)) and isinstance(entry.dropped, str):
                        found[key] = entry
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # the line that a killed run did not finish, or that this command did not write
    return found
