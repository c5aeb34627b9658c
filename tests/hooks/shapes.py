"""What checks the shapes that signatures promise, in every test (pytest's --jaxtyping-packages).

jaxtyping's hook would wrap every function and every dataclass, which costs time, and pickles and stand-ins know the
difference: imported first, this module has it wrap only those that promise the shape of an array.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

_KINDS = tuple(f"{name}[" for name in dir(jaxtyping) if name[0].isupper())
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arrays of a signature; other types are mypy's, and tests may give stand-ins for them."""
    promised = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not promised:
        return function
    function.__annotations__ = promised
    return _check(function)


def _has_shape(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, AbstractArray) or any(map(_has_shape, get_args(hint)))


def _only_promises(*, typechecker: Any) -> Callable[[Any], Any]:
    """In place of `jaxtyping.jaxtyped`, as its hook calls it."""

    def decorate(thing: Any) -> Any:
        own = vars(thing).get("__annotations__", {}) if inspect.isclass(thing) else thing.__annotations__
        promises = any(kind in str(hint) for hint in own.values() for kind in _KINDS)
        return jaxtyped(typechecker=typechecker)(thing) if promises else thing

    return decorate


jaxtyping.jaxtyped = _only_promises
