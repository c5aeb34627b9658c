"""Novel views from a few posed photographs: NeRF with a semantic consistency loss (Jain et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.exports import lazy_exports

if TYPE_CHECKING:
    from dietnerf.scene import Scene

__version__: str
__all__ = ["Scene", "__version__"]

__getattr__, __dir__ = lazy_exports(__name__, {"Scene": "dietnerf.scene"})
