"""CPU seconds of `clipcap caption` for one photograph, beside the bare imports that a captioner in Python begins with.

The floor imports torch and transformers' GPT-2 and does nothing. Each command is run in a process of its own, in
turns, so that a busy machine slows all; the least of its times counts.

Keys of the last line: `ratio`, of a caption to the floor; `caption_seconds`, `floor_seconds`, `torch_seconds` (torch
alone) and `help_seconds` (`clipcap caption --help`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

from common.pretrained import ASSETS
from common.runtime import hardware, versions

PHOTOGRAPH = next((ASSETS / "samples" / "photographs").glob("*.jpg"))
COMMANDS = {
    "torch": ["-c", "import torch"],
    "floor": ["-c", "import torch; from transformers import GPT2LMHeadModel"],
    "help": ["-m", "clipcap.cli", "caption", "--help"],
    "caption": ["-m", "clipcap.cli", "caption", str(PHOTOGRAPH), "--device", "cpu"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Of a Python process with one thread, children included, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    best = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(2 if arguments.quick else 5):
        for name, command in COMMANDS.items():
            best[name] = min(best[name], cpu_seconds(command))
    result = {
        "hardware": hardware(),
        "versions": versions(),
        "ratio": best["caption"] / best["floor"],
        **{f"{name}_seconds": seconds for name, seconds in best.items()},
    }
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
