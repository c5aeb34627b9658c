"""Names that a package exports and imports only when they are asked for: torch and transformers cost seconds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: its name.
        homes: the module of each exported name; `__version__`, the distribution's, comes on top.
    """

    def __getattr__(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        if name == "__version__":
            from importlib import metadata

            try:
                return metadata.version("clip-gpt-toolkit")
            except metadata.PackageNotFoundError:
                return "0+source"
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, "__version__"})

    return __getattr__, __dir__
