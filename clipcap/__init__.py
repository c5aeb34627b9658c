"""Image captioning by a prefix for GPT-2 made from CLIP's embedding (ClipCap, Mokady et al. 2021)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

try:
    from common.exports import lazy_exports
    from common.imports import when_imported
except ModuleNotFoundError:  # a folder of the caller's has that name
    import common

    raise ImportError(
        f"clipcap needs the toolkit's 'common', but Python finds {common.__file__} first: rename yours, or "
        "run Python from another folder."
    ) from None

if TYPE_CHECKING:
    from clipcap.captioner import Captioner
    from clipcap.config import ClipCapConfig
    from clipcap.model import ClipCapModel
    from clipcap.original import load_original_checkpoint
    from clipcap.processing import ClipCapProcessor

__version__: str
__all__ = ["Captioner", "ClipCapConfig", "ClipCapModel", "ClipCapProcessor", "__version__", "load_original_checkpoint"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Captioner": "clipcap.captioner",
        "ClipCapConfig": "clipcap.auto",
        "ClipCapModel": "clipcap.auto",
        "ClipCapProcessor": "clipcap.auto",
        "load_original_checkpoint": "clipcap.original",
    },
)


def _register(auto: ModuleType) -> None:
    """Let transformers' Auto classes know a captioner's directory; `clipcap.auto` is imported when they meet one.

    They take a class by its name from the module transformers.models.MODEL_TYPE: here, this package.
    """
    sys.modules.setdefault("transformers.models.clipcap", sys.modules[__name__])
    for names, kind in (("CONFIG_MAPPING_NAMES", "ClipCapConfig"), ("PROCESSOR_MAPPING_NAMES", "ClipCapProcessor")):
        getattr(auto, names, {}).setdefault("clipcap", kind)


for _module in ("configuration_auto", "processing_auto"):
    when_imported(f"transformers.models.auto.{_module}", _register)
