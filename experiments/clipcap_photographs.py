"""Train, caption and score on real photographs in Karpathy's layout, such as Flickr8k, with any backbones.

    python -m experiments.clipcap_photographs --data flickr8k/dataset_flickr8k.json

Writes a page with the test photographs, their captions and references. With the packaged tiny backbones, which have
seen rendered scenes and software manuals only, the captions are poor; the path is the same for real weights:
`--clip openai/clip-vit-base-patch32 --gpt2 gpt2`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from clipcap.captioner import Captioner
from clipcap.data import read_dataset
from clipcap.metrics import score_captions
from clipcap.training import TrainConfig, train
from common.checks import UserError, run_command
from common.report import Page, write_json
from common.runtime import RuntimeConfig, hardware, versions


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
    steps: int = 600
    """Training steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    shown: int = 24
    """Photographs on the page."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(precision="bf16"))


def main(config: Config) -> None:
    """Train on the train split, caption the test split, score it and write the page."""
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
    test = [item for item in read_dataset(config.data, images=config.images) if item.split == "test"]
    if not test:
        raise UserError(f"{str(config.data)!r} has no image in its test split: nothing to score.")
    captioner = Captioner.from_pretrained(directory, device=config.runtime.device)
    captions = dict(
        zip(
            (item.image_id for item in test),
            captioner.caption([item.path for item in test], progress=True),
            strict=True,
        )
    )
    scores = score_captions(captions, {item.image_id: item.captions for item in test})
    result = {
        "images": len(test),
        "bleu_4": scores.bleu[3],
        "cider": scores.cider,
        "tokenizer": scores.tokenizer,
        "distinct_captions": len(set(captions.values())),
        "steps": config.steps,
        "seed": config.runtime.seed,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(config.out / "scores.json", result | {"captions": captions})
    page = Page("Captions of photographs", f"CLIP {config.clip}, GPT-2 {config.gpt2}, {len(test)} test images")
    if config.clip == "tiny":
        page.text(
            "The tiny backbones have never seen a photograph, so these captions are poor; what is shown is "
            "that the whole path works on real files. Real weights go through the same command."
        )
    page.table([{name: result[name] for name in ("images", "bleu_4", "cider", "distinct_captions")}])
    page.command(f"python -m experiments.clipcap_photographs --data {config.data.name} --steps {config.steps}")
    page.gallery(
        [(item.path, captions[item.image_id], [f"reference: {item.captions[0]}"]) for item in test[: config.shown]]
    )
    print(f"BLEU-4 {scores.bleu[3]:.3f}  CIDEr {scores.cider:.3f}  page: {page.write(config.out / 'index.html')}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(tyro.cli(Config))))
