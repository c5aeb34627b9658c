"""Errors for users: what is wrong, which value, what to do; one clear line instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.signals import Stopped, StopRequest, name_of


class UserError(ValueError):
    """A mistake that the user can mend. The message names the value and the fix."""


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """Return `path` when it is a file that holds something; raise UserError otherwise."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{what} {str(path)!r} is a directory: give the path of a file.")
    if not path.exists():
        raise UserError(f"{what} {str(path)!r} does not exist: check the path.")
    if path.stat().st_size == 0:
        raise UserError(f"{what} {str(path)!r} is empty (0 bytes): make or copy it again.")
    return path


def require_directory(path: str | os.PathLike[str], what: str) -> Path:
    """Return `path` when it is a directory; raise UserError otherwise."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what} {str(path)!r} does not exist: check the path.")
    if not path.is_dir():
        raise UserError(f"{what} {str(path)!r} is a file: give the path of a directory.")
    return path


def require_at_least(name: str, value: float, least: float) -> None:
    """Raise UserError when `value` is below `least` or not a number."""
    if not value >= least:
        raise UserError(f"{name} is {value}: use at least {least}.")


def require_one_of(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """Raise UserError when `value` is not among `choices`."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}: choose one of {', '.join(choices)}.")


def require_same_settings(
    place: str | os.PathLike[str],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    cure: str = "give another --out, or delete it",
) -> None:
    """Raise UserError when what lies at `place` was begun with other settings than are asked for now."""
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{str(place)!r} was begun with {name} {before.get(name)!r}, now it is {value!r}: {cure}."
            )


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command line's body; a user's mistake becomes one line on stderr and exit code 2.

    Exit codes: 0 done (or what `command` returns), 2 a user's mistake or no room or permission on
    the disk, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, which unwind it as Ctrl-C does. Anything else is
    our bug and keeps its traceback.
    """
    try:
        with StopRequest((signal.SIGTERM, signal.SIGHUP)):
            return command() or 0
    except UserError as error:
        message = str(error)
    except (KeyboardInterrupt, Stopped) as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        print(f"\nstopped by {name_of(signum)}; what was saved before is kept.", file=sys.stderr)
        return 128 + signum
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        place = error.filename or ""
        message = f"{error.strerror or error}: {place} (check the path, the permissions and free disk space)."
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
