"""Image captioning by a prefix for GPT-2 made from CLIP's embedding (ClipCap, Mokady et al. 2021)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipcap.captioner import Captioner
    from clipcap.model import ClipCapConfig, ClipCapModel
    from clipcap.original import load_original_checkpoint
    from clipcap.processing import ClipCapProcessor

__version__: str
__all__ = ["Captioner", "ClipCapConfig", "ClipCapModel", "ClipCapProcessor", "__version__", "load_original_checkpoint"]

_HOMES = {
    "Captioner": "clipcap.captioner",
    "ClipCapConfig": "clipcap.model",
    "ClipCapModel": "clipcap.model",
    "ClipCapProcessor": "clipcap.processing",
    "load_original_checkpoint": "clipcap.original",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("clip-gpt-toolkit")
        except metadata.PackageNotFoundError:
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
