"""What earlier commands wrote, or one line on what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.checks import UserError

RENEW = "delete it and give the same command again, which writes it of what was trained"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What comes of JSON that is cut short, or that has something else where a value belongs."""


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], cure: str) -> Iterator[None]:
    """Raise UserError with the `cure` where the file that is read does not hold what belongs there."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{str(path)!r} is damaged ({type(error).__name__}): {cure}.") from error


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file holds anything else.
    """
    with reading(path, cure):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError
        return found
