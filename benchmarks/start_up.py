"""CPU seconds of `clipcap caption` for one photograph, beside the bare imports that a captioner in Python begins with.

The floor imports torch and transformers' GPT-2 and does nothing. Each command is run in a process of its own, in
turns, so that a busy machine slows all; the least of its times counts.

Keys of the last line: `ratio`, of a caption to the floor; `caption_seconds`, `floor_seconds`, `torch_seconds` (torch
alone) and `help_seconds` (`clipcap caption --help`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from benchmarks import parser_of, print_result
from benchmarks.timing import in_turns, with_children
from common.pretrained import ASSETS

PHOTOGRAPH = next((ASSETS / "samples" / "photographs").glob("*.jpg"))
COMMANDS = {
    "torch": ["-c", "import torch"],
    "floor": ["-c", "import torch; from transformers import GPT2LMHeadModel"],
    "help": ["-m", "clipcap.cli", "caption", "--help"],
    "caption": ["-m", "clipcap.cli", "caption", str(PHOTOGRAPH), "--device", "cpu"],
}


def run(arguments: list[str]) -> None:
    """A Python process with one thread."""
    subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def main() -> None:
    arguments = parser_of(__doc__, quick="fewer rounds").parse_args()
    ways = {name: partial(run, command) for name, command in COMMANDS.items()}
    best = in_turns(ways, 2 if arguments.quick else 5, with_children)
    result = {
        "ratio": best["caption"] / best["floor"],
        **{f"{name}_seconds": seconds for name, seconds in best.items()},
    }
    print_result(result)


if __name__ == "__main__":
    main()
