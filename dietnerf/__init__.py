"""Novel views from a few posed photographs: NeRF with a semantic consistency loss (Jain et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dietnerf.scene import Scene

__all__ = ["Scene"]


def __getattr__(name: str) -> Any:
    """Import nerfstudio only when a scene is asked for."""
    if name == "Scene":
        from dietnerf.scene import Scene

        return Scene
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
