import json
from collections.abc import Mapping
from typing import Any


def print_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """Print a benchmark's last line, and return what it says: the result to four figures, and what measured it."""
    from common.runtime import provenance

    figures = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}
    said = provenance() | figures
    print(json.dumps(said))
    return said
