"""The command `clipcap`."""

from __future__ import annotations

from common.commands import Subcommand, run_cli

SUBCOMMANDS = {
    "caption": Subcommand("clipcap.captioning", "CaptionConfig", "caption", "caption images"),
    "serve": Subcommand("clipcap.serve", "ServeConfig", "run", "open a page to caption images in"),
    "train": Subcommand("clipcap.training.train", "TrainConfig", "run", "train a captioner on your images"),
    "evaluate": Subcommand(
        "clipcap.evaluation.evaluate", "EvaluateConfig", "run", "score captions, and show best and worst"
    ),
    "calibrate": Subcommand(
        "clipcap.calibrate", "CalibrateConfig", "run", "learn when a captioner is right, for its confidence"
    ),
    "interpret": Subcommand(
        "clipcap.evaluation.interpret", "InterpretConfig", "run", "read a captioner's prefixes as words"
    ),
    "embed": Subcommand("clipcap.data.embeddings", "EmbedConfig", "run", "encode images once, for training"),
    "download": Subcommand("clipcap.data.download", "DownloadConfig", "run", "download images by URL"),
    "convert": Subcommand(
        "clipcap.original", "ConvertConfig", "run", "convert a checkpoint of the original ClipCap project"
    ),
    "bundle": Subcommand("clipcap.bundling", "BundleConfig", "run", "copy a captioner together with its backbones"),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `clipcap`."""
    return run_cli("clipcap", "Caption images with CLIP, a mapping network and GPT-2.", SUBCOMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
