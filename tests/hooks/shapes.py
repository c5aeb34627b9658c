"""What checks the shapes that signatures promise, in every test (pytest's --jaxtyping-packages)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray
from transformers.configuration_utils import PreTrainedConfig

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484
PreTrainedConfig.__no_type_check__ = True  # a dataclass whose __init__ takes more than its fields


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arrays of a signature; other types are mypy's, and tests may give stand-ins for them."""
    promised = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not promised:
        return function
    function.__annotations__ = promised
    return _check(function)


def _has_shape(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, AbstractArray) or any(map(_has_shape, get_args(hint)))
