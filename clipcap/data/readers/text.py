"""Text files of captions: bounded lines, bounded sizes, UTF-8 or a clear error."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from common.checks import UserError, require_file

LONGEST_LINE = 16 << 20
"""Bytes of a line of a caption file."""
LARGEST_TEXT = 1 << 20
"""Bytes of a text file or JSON file that belongs to one image."""
HALVES = re.compile(r"[\ud800-\udfff]")


def first_line(path: Path) -> str:
    return next((line for _, line in lines(path) if line.strip()), "")


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}, line {line} is not UTF-8: convert it.") from None


def read_text(path: Path, most: int) -> str:
    """A file's text, with "\\n" at the end of every line."""
    size = require_file(path, "caption file").stat().st_size
    if size > most:
        raise UserError(
            f"caption file {str(path)!r} has {size:,} bytes, of at most {most:,}: use JSON Lines (.jsonl) or CSV."
        )
    text = decode(path.read_bytes(), f"caption file {str(path)!r}")
    return text.replace("\r\n", "\n")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, one at a time: some files are larger than memory."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            where = f"caption file {str(path)!r}, line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where} has more than {LONGEST_LINE:,} bytes: it is no line of captions.")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"{where} is not UTF-8: convert it.") from None


def whole_characters(text: str) -> str:
    """A text with U+FFFD in place of halves of a character, as in JSON's "\\ud83d", which no tokenizer takes."""
    return HALVES.sub("\ufffd", text)
