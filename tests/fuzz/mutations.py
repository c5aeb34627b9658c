"""Good files made bad: JSON with something replaced, removed or doubled, and bytes flipped, cut or put in."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.checks import UserError

FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""The same examples in every run; no file of ours is written beside the tests."""

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**30, -(10**30), 10**400, 1e308, float("nan"), float("inf")]),
    st.sampled_from(
        ["", ".", "/", "..", "../../outside", "/etc/hostname", "a\0b", "\ud800", "x" * 5000, "é" * 300, "nan"]
    ),
    st.text(max_size=8),
    st.sampled_from([[], {}, [[]], [{}], {"": None}, [None, 1, "a"]]),
)
"""Values that somebody's file may hold where something else belongs."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: Any, junk: st.SearchStrategy[Any] = JUNK) -> Any:
    """`value` with one to three of its parts replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        parent = value
        for step in above:
            parent = parent[step]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if how == "remove":
            del parent[key]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = draw(junk)
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with bytes flipped, cut off, put in, or nothing left of it."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "deep", "number"]))
        if how == "flip" and found:
            found[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del found[at:]
        elif how == "insert":
            found[at:at] = draw(st.binary(max_size=6))
        elif how == "deep":
            found[at:at] = b"[" * 20_000
        else:
            found[at:at] = b"9" * 5000
    return bytes(found)


def json_text(value: Any) -> bytes:
    """JSON of any value, half surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def bad_json(draw: st.DrawFn, value: Any) -> bytes:
    """JSON of `value` with other parts or other bytes."""
    if draw(st.booleans()):
        return json_text(draw(changed(value)))
    return draw(damaged(json_text(value)))


@contextlib.contextmanager
def only_user_errors() -> Iterator[None]:
    """Nothing but what the command line turns into one line: a UserError, or the system's own error with its number."""
    try:
        yield
    except UserError as error:
        assert str(error).strip()
    except OSError as error:
        assert error.errno is not None


def break_file(path: Path, data: st.SearchStrategy[bytes], read: Callable[[], object], examples: int = 100) -> None:
    """Put other bytes in the place of a file: `read` has to get along with them, or to refuse them."""

    @settings(FUZZ, max_examples=examples)
    @given(data)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with only_user_errors():
            read()

    check()


def files_below(root: Path) -> set[str]:
    """All paths below a directory."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def edit(path: Path, part: str | None = None, **values) -> None:
    """Change fields of a JSON file, or of one of its parts."""
    fields = json.loads(path.read_text())
    (fields[part] if part else fields).update(values)
    path.write_text(json.dumps(fields))


def refused(read, *words: str) -> None:
    """A UserError of one line with these words."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000 and all(word in message for word in words), message
