"""The command `clipcap caption`: captions of files and directories as text, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from common.runtime import RuntimeConfig


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
