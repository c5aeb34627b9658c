"""Errors for users: what is wrong, which value, what to do; one clear line instead of a traceback."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import stat
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.signals import Stopped, StopRequest, name_of

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of characters that move the cursor, turn text round or end a line."""
JOINERS = "\u00ad\u200c\u200d"
"""Of these, what words and emoji are spelled with."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes of a file's name and of a whole path, at most."""
LEAST_TEMPERATURE = 1e-6
INTEGERS = 2**63
"""Whole numbers lie below, as torch's and NumPy's do."""


class UserError(ValueError):
    """A mistake that the user can mend. The message names the value and the fix."""


def reason_of(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(text: object, *, lines: bool = False) -> str:
    """`text` as a terminal may show it: a name from somebody's data cannot colour, hide or overwrite what is there.

    Control characters, bidirectional marks and the bytes of file names that are not UTF-8 become escapes.

    Args:
        text: anything that `str` takes.
        lines: keep line breaks and tabs.
    """
    return "".join(
        repr(char)[1:-1]
        if unicodedata.category(char) in HIDDEN and char not in JOINERS and not (lines and char in "\n\t")
        else char
        for char in str(text)
    )


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """Return `path` when it is a file that holds something; raise UserError otherwise."""
    found = _status(path, what)
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{what} {str(path)!r} is a directory: give the path of a file.")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{what} {str(path)!r} is a pipe, a socket or a device: give the path of a file.")
    if found.st_size == 0:
        raise UserError(f"{what} {str(path)!r} is empty (0 bytes): make or copy it again.")
    return Path(path)


def require_directory(path: str | os.PathLike[str], what: str) -> Path:
    """Return `path` when it is a directory; raise UserError otherwise."""
    if not stat.S_ISDIR(_status(path, what).st_mode):
        raise UserError(f"{what} {str(path)!r} is a file: give the path of a directory.")
    return Path(path)


def _status(path: str | os.PathLike[str], what: str) -> os.stat_result:
    """What the system knows of a file that exists."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what} {str(path)!r} does not exist: check the path.") from None
    except (OSError, ValueError) as error:  # a name that is too long, a NUL in it, no permission, links in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {str(path)!r} cannot be opened ({reason}): check the path.") from None


def require_place(path: str | os.PathLike[str], what: str = "out", *, directory: bool = False) -> None:
    """Raise UserError when no file, or no directory, can be written at `path`: ask before any long work."""
    path = Path(os.path.abspath(path))
    long = next((part for part in path.parts if len(os.fsencode(part)) > LONGEST_NAME), "")
    if long or len(os.fsencode(path)) > LONGEST_PATH:
        raise UserError(f"{what} is a path with a name of {len(long or str(path))} characters: give a shorter one.")
    if os.path.exists(path) and directory != os.path.isdir(path):
        found, wanted = ("a file", "a directory") if directory else ("a directory", "a file")
        raise UserError(f"{what} {str(path)!r} is {found}: give the path of {wanted}.")
    if os.path.exists(path) and not directory and not os.path.isfile(path):  # it would be replaced, not written to
        raise UserError(f"{what} {str(path)!r} is a pipe, a socket or a device: give the path of a file.")
    there = next(above for above in (path, *path.parents) if os.path.exists(above) and (directory or above != path))
    if not os.path.isdir(there):
        raise UserError(f"{what} {str(path)!r} lies below the file {str(there)!r}: give another path.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what} {str(path)!r}: {str(there)!r} may not be written to: give another path.")


def require_at_least(name: str, value: float, least: float) -> None:
    """Raise UserError when `value` is below `least` or not a finite number."""
    if not (value >= least and math.isfinite(value)):
        raise UserError(f"{name} is {value}: use at least {least}.")


def require_fields_at_least(config: object, least: float, *names: str) -> None:
    """Raise UserError when one of these fields is below `least` or not a finite number."""
    for name in names:
        require_at_least(name, getattr(config, name), least)


def require_between(name: str, value: float, least: float, most: float) -> None:
    """Raise UserError when `value` is below `least`, above `most` or not a number."""
    require_at_least(name, value, least)
    if value > most:
        raise UserError(f"{name} is {value}: use at most {most}.")


def require_above(name: str, value: float, bound: float) -> None:
    """Raise UserError when `value` is not above `bound` or not a finite number."""
    if not (value > bound and math.isfinite(value)):
        raise UserError(f"{name} is {value}: use a number above {bound}.")


def require_rate(name: str, rate: float | None) -> None:
    """Raise UserError for a learning rate that is not above 0; None leaves the choice to what trains."""
    if rate is not None and not rate > 0:
        raise UserError(f"{name} is {rate}: use a rate above 0.")


def require_share(name: str, value: float) -> None:
    """Raise UserError when `value` is not above 0 and at most 1."""
    if not 0 < value <= 1:
        raise UserError(f"{name} is {value}: use a number above 0 and at most 1.")


def require_temperature(value: float) -> None:
    """Raise UserError when logits cannot be divided by `value`: below the least, they are too large for float32."""
    require_at_least("temperature", value, LEAST_TEMPERATURE)


def require_text(name: str, text: object) -> None:
    """Raise UserError when a text, or a path, is not Unicode, which tokenizers and libraries that save models need."""
    if "".join(char for char in str(text) if unicodedata.category(char) == "Cs"):
        raise UserError(f"{name} is {str(text)!r}, which is not UTF-8: write it in UTF-8.")


def require_usable(config: Any) -> None:
    """Raise UserError when a value in a configuration can be no setting at all, whatever it is for.

    That is a number that is not finite or has no place in 64 bits, and a NUL in a text. Every command asks this of its
    whole configuration.

    Args:
        config: a dataclass; others inside it are asked too.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            require_usable(value)
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise UserError(f"{field.name} is {one}: use a finite number.")
            if isinstance(one, int) and not -INTEGERS <= one < INTEGERS:
                raise UserError(f"{field.name} is {one:.3g}: use a number below {INTEGERS}.")
            if "\0" in str(one) and one is value:  # of several, one that cannot be read may be left out
                raise UserError(f"{field.name} is {str(one)!r}: leave out the NUL character.")


def require_one_of(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """Raise UserError when `value` is not among `choices`."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}: choose one of {', '.join(choices)}.")


def require_language(code: str) -> None:
    """Raise UserError when a text has not the form of a language's code: two or three letters, and perhaps more behind
    a hyphen (BCP 47)."""
    if not re.fullmatch(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*", code):
        raise UserError(f"language is {code!r}: give a code of two or three letters, such as nld, it or pt-BR.")


def require_same_settings(
    place: str | os.PathLike[str],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    cure: str = "give another --out, or delete it",
) -> None:
    """Raise UserError when what lies at `place` was begun with other settings than are asked for now."""
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(f"{str(place)!r} was begun with {name} {before.get(name)!r}, now it is {value!r}: {cure}.")


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
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
