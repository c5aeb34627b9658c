"""Train, caption and score on real photographs in Karpathy's layout, such as Flickr8k, with any backbones.

    python -m experiments.captions.photographs --data flickr8k/dataset_flickr8k.json

Writes scores and a page with the test photographs, their captions and references. With the packaged tiny backbones,
which have seen rendered scenes and software manuals only, the captions are poor; the path is the same for real weights:
`--clip openai/clip-vit-base-patch32 --gpt2 gpt2`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from clipcap.evaluation.evaluate import EvaluateConfig, evaluate
from clipcap.evaluation.page import print_scores
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import run_command
from common.runtime import RuntimeConfig
from experiments import from_command_line


@dataclass(frozen=True)
class Config:
    """Captions of photographs, end to end."""

    data: Path
    """Karpathy JSON file."""
    images: Path | None = None
    """Directory of the images, when they are not beside the file."""
    out: Path = Path("out/photographs")
    """Where the run, the scores and the page go."""
    clip: str = "tiny"
    """CLIP."""
    gpt2: str = "tiny"
    """GPT-2."""
    clip_score: str = "tiny"
    """CLIP of CLIPScore; empty leaves it out."""
    steps: int = 600
    """Training steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    resamples: int = 1000
    """Resamples of the images for the 95% intervals."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(precision="bf16"))


def main(config: Config) -> None:
    """Train on the train split, then caption and score the test split."""
    directory = train(
        TrainConfig(
            data=config.data,
            images=config.images,
            out=config.out,
            clip=config.clip,
            gpt2=config.gpt2,
            tune_gpt2=True,
            mapper_layers=4,
            mapper_heads=4,
            steps=config.steps,
            lr=config.lr,
            warmup=60,
            val_every=100,
            runtime=config.runtime,
        )
    )
    out = config.out / "evaluation"
    found = evaluate(
        EvaluateConfig(
            data=config.data,
            images=config.images,
            model=str(directory),
            out=out,
            clip_score=config.clip_score,
            resamples=config.resamples,
            runtime=RuntimeConfig(device=config.runtime.device, seed=config.runtime.seed),
        )
    )
    print_scores(found)
    print(f"page: {out / 'index.html'}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
