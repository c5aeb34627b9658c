"""The command `clipcap`."""

from __future__ import annotations

from common.commands import Subcommand, run_cli

SUBCOMMANDS = {
    "caption": Subcommand("clipcap.captioning", "CaptionConfig", "caption", "caption images"),
    "train": Subcommand("clipcap.training", "TrainConfig", "run", "train a captioner on your images"),
    "convert": Subcommand(
        "clipcap.original", "ConvertConfig", "run", "convert a checkpoint of the original ClipCap project"
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `clipcap`."""
    return run_cli("clipcap", "Caption images with CLIP, a mapping network and GPT-2.", SUBCOMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
