"""The command `dietnerf`."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings

from common.commands import Subcommand, run_cli

SUBCOMMANDS = {
    "pose": Subcommand("dietnerf.posing", "PoseConfig", "run", "find where photographs were taken"),
    "train": Subcommand("dietnerf.training", "TrainConfig", "run", "train a field on a few photographs, posed or not"),
    "render": Subcommand("dietnerf.render", "RenderConfig", "run", "render a path through a trained scene"),
    "evaluate": Subcommand("dietnerf.evaluation", "EvaluateConfig", "run", "score held-out views"),
    "consistency": Subcommand(
        "dietnerf.consistency", "ConsistencyConfig", "run", "similarity of embeddings within and across scenes"
    ),
}


def silence_nerfstudio() -> None:
    """Keep back what torch says to nerfstudio's authors about its code."""
    for message in ("Using a non-tuple sequence", "`torch.jit.script`", "`torch.cuda.amp", "No CUDA runtime"):
        warnings.filterwarnings("ignore", message=re.escape(message))


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `dietnerf`."""
    given = sys.argv[1:] if arguments is None else arguments
    silence_nerfstudio()
    if given and given[0] in SUBCOMMANDS and importlib.util.find_spec("nerfstudio") is None:
        print("error: dietnerf needs nerfstudio: pip install 'clip-gpt-toolkit[dietnerf]'.", file=sys.stderr)
        return 2
    return run_cli("dietnerf", "Novel views from a few photographs.", SUBCOMMANDS, given)


if __name__ == "__main__":
    raise SystemExit(main())
