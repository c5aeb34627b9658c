"""Novel views from a few posed photographs: NeRF with a semantic consistency loss (Jain et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from common.exports import lazy_exports
except ModuleNotFoundError:  # a folder of the caller's has that name
    import common

    raise ImportError(
        f"dietnerf needs the toolkit's 'common', but Python finds {common.__file__} first: rename yours, or "
        "run Python from another folder."
    ) from None

if TYPE_CHECKING:
    from dietnerf.scene import Scene

__version__: str
__all__ = ["Scene", "__version__"]

__getattr__, __dir__ = lazy_exports(__name__, {"Scene": "dietnerf.scene"})
