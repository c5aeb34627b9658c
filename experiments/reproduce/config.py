"""What `python -m experiments.reproduce` is asked for, and where its results go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from common.files import write_json, write_text
from common.runtime import RuntimeConfig, provenance

CLIP, GPT2, MEDIUM = "openai/clip-vit-base-patch32", "gpt2", "gpt2-medium"
BLENDER = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")


@dataclass(frozen=True)
class Config:
    """Reproduce one published table.

    First it says what is missing and where it goes, and what the run costs on this machine; a run that was stopped goes
    on. With --dry-run nothing need be present.
    """

    name: tyro.conf.Positional[
        Literal[
            "clipcap-coco", "clipcap-conceptual", "clipcap-nocaps", "dietnerf-synthetic", "dietnerf-encoders",
            "recycle-dutch", "recycle-italian",
        ]
    ]  # fmt: skip
    """The table."""
    data: Path = Path("data")
    """Directory of the data sets."""
    weights: Path = Path("weights")
    """Directory of the pre-trained weights; what is not in it is taken from the hub or its cache."""
    out: Path | None = None
    """Where runs and results go; out/reproduce and the name when not given."""
    dry_run: bool = False
    """Build every model at full size with random weights and make two steps of each phase, on small batches."""
    steps: int = 0
    """Training steps of each run, when not 0, instead of the paper's."""
    scenes: tuple[str, ...] = BLENDER
    """Scenes of the DietNeRF tables: fewer here, and the runs can be shared out among machines."""
    matrix_rate: float = 0.0
    """GFLOP/s of the machine that the estimate is for; 0 measures this one."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def place(self) -> Path:
        """Where runs and results go."""
        return self.out or Path("out") / "reproduce" / self.name


def conclude(config: Config, lines: list[str]) -> None:
    """Print a table and write it beside its record."""
    print("\n".join(lines))
    write_text(config.place / "table.md", "\n".join(lines) + "\n")
    write_json(
        config.place / "reproduction.json",
        {"lines": lines, "config": config, **provenance()},
    )
