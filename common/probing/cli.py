"""The command `clip-probe`."""

from __future__ import annotations

from common.commands import Subcommand, run_cli

SUBCOMMANDS = {
    "zero-shot": Subcommand("common.probing.texts", "ZeroShotConfig", "zero_shot", "classify images by class names"),
    "retrieve": Subcommand("common.probing.texts", "RetrieveConfig", "retrieve", "find images by texts"),
    "linear": Subcommand(
        "common.probing.trained", "LinearConfig", "linear", "train and score a linear classifier on frozen features"
    ),
    "few-shot": Subcommand(
        "common.probing.trained", "FewShotConfig", "few_shot", "the same from 1, 2, 4, ... images of each class"
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `clip-probe`."""
    return run_cli("clip-probe", "See what an image encoder knows about your images.", SUBCOMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
