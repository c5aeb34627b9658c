import argparse
import json
from collections.abc import Mapping
from typing import Any


def parser_of(doc: str | None, *, quick: str, seed: str = "", threads: bool = False) -> argparse.ArgumentParser:
    """The command line of a benchmark: --quick, and --threads and --seed where it has them.

    Args:
        doc: of the benchmark's module.
        quick: what --quick leaves out.
        seed: what is drawn by it.
        threads: whether it computes in this process.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    if threads:
        parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    if seed:
        parser.add_argument("--seed", type=int, default=0, help=f"seed of {seed}")
    return parser


def print_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """Print a benchmark's last line, and return what it says: the result to four figures, and what measured it."""
    from common.runtime import provenance

    figures = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}
    said = provenance() | figures
    print(json.dumps(said))
    return said
