"""nerfstudio's entry points dietnerf, dietnerf-nerfacto, dietnerf-grid; what breaks here breaks no other method."""

from __future__ import annotations

import sys
from typing import Any

METHODS = ("dietnerf", "dietnerf-nerfacto", "dietnerf-grid")


def load_specification(method: str) -> Any:
    """The MethodSpecification, or None after a warning where something that it needs cannot be imported.

    nerfstudio loads every plug-in before any method runs, and an exception would end `ns-train` for all of them.
    """
    try:
        from nerfstudio.plugins.types import MethodSpecification

        from dietnerf.methods import DESCRIPTIONS, method_config

        return MethodSpecification(config=method_config(method), description=DESCRIPTIONS[method])
    except Exception as error:  # whatever a broken installation raises
        print(f"warning: method {method!r} is not available: {type(error).__name__}: {error}", file=sys.stderr)
        return None


dietnerf, dietnerf_nerfacto, dietnerf_grid = map(load_specification, METHODS)
