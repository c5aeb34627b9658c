"""Image captioning by a prefix for GPT-2 made from CLIP's embedding (ClipCap, Mokady et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from common.exports import lazy_exports
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
        "ClipCapConfig": "clipcap.model",
        "ClipCapModel": "clipcap.model",
        "ClipCapProcessor": "clipcap.processing",
        "load_original_checkpoint": "clipcap.original",
    },
)
