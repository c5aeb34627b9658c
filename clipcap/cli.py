"""The command `clipcap`: train a captioner, caption images, convert the original project's checkpoints."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from common.checks import run_command
from common.runtime import RuntimeConfig

if TYPE_CHECKING:
    from clipcap.training import TrainConfig


@dataclass(frozen=True)
class CaptionConfig:
    """Caption images.

    Files that cannot be read are skipped and named at the end; the exit code is then 2 if none could be read.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or directories that are searched for images."""
    model: str = "tiny"
    """Captioner: tiny (packaged), a directory that `clipcap train` or `clipcap convert` wrote, or a hub id."""
    format: Literal["text", "json", "csv"] = "text"
    """Output format."""
    out: Path | None = None
    """File to write instead of standard output."""
    strategy: Literal["beam", "beam_original", "greedy", "sample"] = "beam"
    """Decoding."""
    num_beams: int = 5
    """Beams."""
    num_captions: int = 1
    """Captions per image, best first."""
    max_new_tokens: int = 67
    """Longest caption."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this much probability (nucleus)."""
    temperature: float = 1.0
    """Temperature of sampling."""
    batch_size: int = 16
    """Images captioned at once."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint (.pt) of the original ClipCap project to a captioner directory."""

    checkpoint: tyro.conf.Positional[Path]
    """The original project's .pt file."""
    out: tyro.conf.Positional[Path]
    """Directory to write."""
    gpt2: str = "gpt2"
    """GPT-2 that the checkpoint was trained on: where its tokenizer is, and its weights when the file has none."""
    clip: str = "openai/clip-vit-base-patch32"
    """CLIP that the checkpoint was trained on."""
    n_head: int = 12
    """GPT-2's attention heads, which the file does not tell."""


def caption(config: CaptionConfig) -> int:
    """Caption images and print or write the result. Returns an exit code."""
    from tqdm import tqdm

    from clipcap.captioner import Captioner
    from clipcap.images import ImageError, find_images
    from common.report import write_text
    from common.runtime import resolve_dtype, start

    device = start(config.runtime)
    paths = find_images(config.images)
    captioner = Captioner.from_pretrained(config.model, device=device, dtype=resolve_dtype(config.runtime.precision))
    skipped: list[str] = []

    def skip(error: ImageError) -> None:
        skipped.append(str(error))

    options: dict[str, Any] = {
        "strategy": config.strategy,
        "num_captions": config.num_captions,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.batch_size,
        "num_beams": config.num_beams,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "temperature": config.temperature,
        "seed": config.runtime.seed,
    }
    results = captioner.stream(paths, on_error=skip, **options)
    bar = tqdm(results, total=len(paths), unit=" images", disable=len(paths) < 2)
    rows = [
        {"image": str(result.image), "captions": result.captions, "scores": [round(s, 4) for s in result.scores]}
        for result in bar
    ]
    text = FORMATS[config.format](rows)
    if config.out:
        write_text(config.out, text)
    else:
        sys.stdout.write(text)
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} images:", file=sys.stderr)
        for message in skipped:
            print(f"  {message}", file=sys.stderr)
    return 0 if rows else 2


def _as_text(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{row['image']}\t{text}\n" for row in rows for text in row["captions"])


def _as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _as_csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer)
    table.writerow(["image", "rank", "caption", "score"])
    for row in rows:
        for rank, (text, score) in enumerate(zip(row["captions"], row["scores"], strict=True), 1):
            table.writerow([row["image"], rank, text, score])
    return buffer.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], str]] = {"text": _as_text, "json": _as_json, "csv": _as_csv}


def train(config: TrainConfig) -> int:
    """Train a captioner and say where it is. Returns an exit code."""
    from clipcap.training import train as run

    directory = run(config)
    print(f"captioner written to {directory}; try: clipcap caption IMAGE --model {directory}")
    return 0


def convert(config: ConvertConfig) -> int:
    """Convert an original checkpoint. Returns an exit code."""
    from clipcap.original import convert as run

    run(config.checkpoint, config.out, gpt2=config.gpt2, clip=config.clip, n_head=config.n_head)
    print(f"captioner written to {config.out}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `clipcap`."""
    from clipcap.training import TrainConfig

    commands: dict[str, tuple[type, Callable[[Any], int]]] = {
        "train": (TrainConfig, train),
        "caption": (CaptionConfig, caption),
        "convert": (ConvertConfig, convert),
    }

    def run() -> int:
        config = tyro.extras.subcommand_cli_from_dict(
            {name: kind for name, (kind, _) in commands.items()},
            prog="clipcap",
            description="Caption images with CLIP, a mapping network and GPT-2.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        return next(command for kind, command in commands.values() if isinstance(config, kind))(config)

    return run_command(run)


if __name__ == "__main__":
    raise SystemExit(main())
