"""Train the packaged tiny CLIP again: the whole curriculum, each stage from the weights of the one before.

    python -m experiments.backbones.clip_recipe --scenes out/scenes --out out/clip

First everything at once, which teaches colours, materials and sizes; then single objects with phrases that differ in
the shape alone, large and then of every size, where shapes are learned in a few hundred steps; then everything again.
A stage that is finished is not run again, and one that was stopped resumes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.checks import run_command
from common.runtime import RuntimeConfig
from experiments import from_command_line
from experiments.backbones.train_clip import Config as Stage
from experiments.backbones.train_clip import main as train

STAGES: tuple[dict[str, Any], ...] = (
    {"steps": 1300, "phrase_weight": 0.0, "max_shards": 80},
    {"steps": 700, "phrase_weight": 0.0, "max_shards": 80},
    {"steps": 200, "phrase_weight": 2.0, "max_shards": 80, "max_objects": 1, "augmentation": 0.3, "zoom_out": 1.036},
    {"steps": 250, "phrase_weight": 2.0, "max_shards": 80, "max_objects": 1, "augmentation": 0.4, "zoom_out": 1.8},
    {"steps": 1500, "phrase_weight": 1.5, "max_shards": 94, "augmentation": 0.5},
)


@dataclass(frozen=True)
class Config:
    """The curriculum of the packaged tiny CLIP."""

    scenes: Path = Path("out/scenes")
    """Directory written by experiments/scenes/render.py."""
    out: Path = Path("out/clip")
    """Where the stages go; the model is in the last one's folder clip-tiny."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1, precision="bf16"))


def main(config: Config) -> None:
    """Train every stage that is not finished."""
    before = None
    for number, settings in enumerate(STAGES):
        out = config.out / f"stage-{number}"
        model = out / "clip-tiny"
        if not (model / "training.json").is_file():
            print(f"stage {number + 1} of {len(STAGES)}: {settings}")
            runtime = replace(config.runtime, seed=config.runtime.seed + number)
            train(Stage(config.scenes, out, before, precision=runtime.precision, runtime=runtime, **settings))
        before = model
    print(f"tiny CLIP: {before}; score it with: python -m experiments.backbones.evaluate_clip --clip {before}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
