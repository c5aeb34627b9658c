"""The paper's ablation in small (Mokady et al. 2021, sec. 4.2): MLP or Transformer mapper, GPT-2 frozen or fine-tuned.

    python -m experiments.captions.mapper_ablation --scenes out/scenes --variants transformer-tuned ...

Trains captioners on rendered scenes with the tiny backbones and reports, on held-out scenes, how many captions name
the colour and shape of every object right (by number of objects, and for combinations never seen in training), with
BLEU-4 and CIDEr. Two further variants read CLIP's patch features instead of its pooled embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipcap.data.dataset import read_dataset
from clipcap.data.embeddings import Inputs, build_store
from clipcap.decoding import decode
from clipcap.evaluation.metrics import score_captions
from clipcap.model import ClipCapModel
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import require_one_of, run_command
from common.clip import load_clip
from common.files import write_json, write_text
from common.report import plot_bars
from common.runtime import RuntimeConfig, provenance, seed_everything
from experiments import from_command_line
from experiments.captions.tables import MAPPERS
from experiments.scenes.captions import looks, names_all, parse
from experiments.scenes.dataset import load_split
from experiments.scenes.graph import HELD_OUT
from experiments.scenes.karpathy import export, filename
from experiments.scenes.records import ViewRecord
from experiments.scenes.wording import ENGLISH, Wording

VARIANTS: dict[str, dict[str, Any]] = MAPPERS | {
    "patches-frozen": {"mapper": "transformer", "tune_gpt2": False, "inputs": "patches"},
    "patches-tuned": {"mapper": "transformer", "tune_gpt2": True, "inputs": "patches"},
}
SPLITS = ("test", "test_unseen")


@dataclass(frozen=True)
class Config:
    """Train and compare captioners on scenes."""

    scenes: Path = Path("out/scenes")
    """Directory written by experiments/scenes/render.py."""
    out: Path = Path("out/ablation")
    """Where data, runs and results go."""
    docs: Path = Path("docs")
    """Where the table and the figure go."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which captioners: mlp-frozen, mlp-tuned, transformer-frozen, transformer-tuned, patches-frozen, patches-tuned."""
    clip: str = "tiny"
    """CLIP."""
    gpt2: str = "tiny"
    """GPT-2."""
    steps: int = 2000
    """Training steps of each."""
    batch_size: int = 64
    """Captions in a step."""
    lr: float = 2e-3
    """Peak learning rate."""
    mapper_layers: int = 4
    """Layers of the Transformer mapper."""
    split: Literal["val", "test"] = "test"
    """Score on val (for choices) or on test and test_unseen (for the table)."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


def caption_images(model: ClipCapModel, embeddings: torch.Tensor, *, batch: int = 50) -> list[str]:
    """The best caption of beam search for each row."""
    assert model.tokenizer is not None
    texts = []
    for rows in embeddings.split(batch):
        for captions in decode(model, rows, strategy="beam", max_new_tokens=60):
            texts.append(model.tokenizer.decode(captions[0].token_ids, skip_special_tokens=True).strip())
    return texts


def share(flags: Sequence[bool]) -> dict[str, float]:
    """The share of True, with its standard error and the count."""
    mean = float(np.mean(flags)) if flags else float("nan")
    return {
        "share": mean,
        "standard_error": float(np.sqrt(mean * (1 - mean) / max(len(flags), 1))),
        "images": len(flags),
    }


def score_scenes(
    captions: Mapping[str, str],
    records: Mapping[str, ViewRecord],
    *,
    wording: Wording = ENGLISH,
    tokenizer: str = "auto",
) -> dict[str, Any]:
    """Shares of captions that name everything right, and BLEU-4 and CIDEr, of one split.

    Args:
        captions: of each image.
        records: the scene of each image, with its references.
        wording: the language of both.
        tokenizer: of BLEU and CIDEr.
    """
    right = {key: names_all(text, records[key].scene, wording=wording) for key, text in captions.items()}
    counts = {key: len(records[key].scene.objects) for key in captions}
    result: dict[str, Any] = {
        "all_right": {str(n): share([right[k] for k in captions if counts[k] == n]) for n in (1, 2, 3)},
        "colours_right": _partial(captions, records, counts, 0, wording),
        "shapes_right": _partial(captions, records, counts, 1, wording),
    }
    unseen = [k for k in captions if counts[k] == 1 and records[k].scene.objects[0].look in HELD_OUT]
    if unseen:
        result["one_unseen_object_right"] = share([right[k] for k in unseen])
    scores = score_captions(captions, {key: list(records[key].captions) for key in captions}, tokenizer=tokenizer)
    return result | {
        "bleu_4": scores.bleu[3],
        "cider": scores.cider,
        "tokenizer": scores.tokenizer,
        "distinct_captions": len(set(captions.values())),
    }


def _partial(
    captions: Mapping[str, str],
    records: Mapping[str, ViewRecord],
    counts: Mapping[str, int],
    part: int,
    wording: Wording,
) -> dict[str, dict[str, float]]:
    """The same shares for colours alone (part 0) or shapes alone (part 1)."""

    def project(pairs: Any) -> list[str]:
        return sorted(str(pair[part]) for pair in pairs.elements())

    right = {
        key: project(looks(parse(text, wording=wording))) == project(looks(records[key].scene.objects))
        for key, text in captions.items()
    }
    return {str(n): share([right[k] for k in captions if counts[k] == n]) for n in (1, 2, 3)}


def score_split(
    directory: Path, config: Any, split: str, *, inputs: Inputs = "embedding", most: int = 0
) -> dict[str, Any]:
    """Scores of a captioner on a split's scenes, all or evenly chosen ones; its captions go beside it.

    Args:
        directory: of the captioner.
        config: has scenes, clip and out.
        split: of the scenes.
        inputs: what the captioner reads.
        most: scenes, about; 0 is all.
    """
    _, records = load_split(config.scenes, split)
    items = read_dataset(export(config.scenes, config.out / f"data-{split}", (split,)))
    if most:
        items = items[:: max(1, len(items) // most)]
    clip = load_clip(config.clip, device="cpu")
    store = build_store(items, clip, config.out / f"embeddings-{inputs}-{split}", inputs=inputs)
    rows = torch.stack([store[store.row(item.image_id)] for item in items])
    texts = caption_images(ClipCapModel.from_pretrained(directory), rows)
    captions = dict(zip((item.image_id for item in items), texts, strict=True))
    write_json(directory.parent / f"captions-{split}.json", captions)
    return score_scenes(captions, {filename(record): record for record in records})


def run_variant(name: str, config: Config, data: Path) -> dict[str, Any]:
    """Train one captioner and score it."""
    settings = VARIANTS[name]
    inputs = settings.get("inputs", "embedding")
    run = config.out / f"{name}-seed{config.runtime.seed}"
    directory = train(
        TrainConfig(
            data=data,
            out=run,
            embeddings=config.out / f"embeddings-{inputs}",
            clip=config.clip,
            gpt2=config.gpt2,
            mapper_layers=config.mapper_layers,
            mapper_heads=4,
            steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            warmup=100,
            val_every=250,
            runtime=config.runtime,
            **settings,
        )
    )
    record = json.loads((run / "training.json").read_text())
    result: dict[str, Any] = {"training": record["metrics"], "cpu_seconds": record["cpu_seconds"]}
    for split in ("val",) if config.split == "val" else SPLITS:
        result[split] = score_split(directory, config, split, inputs=inputs)
    return result


def write_tables(config: Config) -> Path:
    """All finished runs in `out` as one Markdown page with a figure; returns the page's path."""
    runs = [json.loads(path.read_text()) for path in sorted(config.out.glob("*/scores.json"))]
    runs = [run for run in runs if "test" in run]
    runs.sort(key=lambda run: (list(VARIANTS).index(run["variant"]), run["seed"]))
    lines = [
        "# Mapper and fine-tuning, in small",
        "",
        "Captions of held-out rendered scenes by the tiny backbones: the share of captions that get the colour and",
        "shape of every object right, by number of objects, and for one object whose colour and shape never occur",
        "together in training; share ± standard error. Beam search, 5 beams. BLEU-4 and CIDEr on the test split.",
        "",
        "| variant | seed | steps | 1 object | 2 objects | 3 objects | unseen pair | BLEU-4 | CIDEr | val loss "
        "| CPU min |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        shares = [run["test"]["all_right"][n] for n in ("1", "2", "3")] + [
            run["test_unseen"]["one_unseen_object_right"]
        ]
        cells = [f"{part['share']:.3f} ± {part['standard_error']:.3f}" for part in shares]
        lines.append(
            f"| {run['variant']} | {run['seed']} | {run['steps']} | {' | '.join(cells)} | {run['test']['bleu_4']:.3f} "
            f"| {run['test']['cider']:.3f} | {run['training']['val/loss']:.3f} | {run['cpu_seconds'] / 60:.0f} |"
        )
    lines += [
        "",
        "Colours alone and shapes alone, test split:",
        "",
        "| variant | seed | " + " | ".join(f"{part}, {n}" for part in ("colours", "shapes") for n in "123") + " |",
        "|---|--:|" + "--:|" * 6,
    ]
    for run in runs:
        cells = [f"{run['test'][f'{part}_right'][n]['share']:.3f}" for part in ("colours", "shapes") for n in "123"]
        lines.append(f"| {run['variant']} | {run['seed']} | {' | '.join(cells)} |")
    lines += [
        "",
        "![shares](clipcap_mapper_ablation.png)",
        "",
        f"`python -m experiments.captions.mapper_ablation --steps {config.steps}` "
        f"(hardware: {runs[-1]['hardware']}; scoring tokenizer: {runs[-1]['test']['tokenizer']})",
        "",
    ]
    figure = plot_bars(
        {
            f"{run['variant']}, {n} object{'s' * (n > 1)}": run["test"]["all_right"][str(n)]["share"]
            for run in runs
            for n in (1, 2, 3)
        },
        x="captions that name every colour and shape right",
    )
    config.docs.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.docs / "clipcap_mapper_ablation.png", dpi=110)
    return write_text(config.docs / "clipcap_mapper_ablation.md", "\n".join(lines))


def main(config: Config) -> None:
    """Train what is not trained yet, score, and write each run's scores.json and the table of all."""
    for name in config.variants:
        require_one_of("variant", name, tuple(VARIANTS))
    seed_everything(config.runtime.seed)
    data = export(config.scenes, config.out / "data")
    for name in config.variants:
        result = run_variant(name, config, data)
        write_json(
            config.out / f"{name}-seed{config.runtime.seed}" / "scores.json",
            {
                "variant": name,
                "seed": config.runtime.seed,
                "steps": config.steps,
                **provenance(),
            }
            | result,
        )
        for split, scores in result.items():
            if split in (*SPLITS, "val"):
                right = {n: round(s["share"], 3) for n, s in scores["all_right"].items()}
                unseen = scores.get("one_unseen_object_right", {}).get("share")
                print(
                    f"{name:20} {split:12} all right {right} unseen {unseen} "
                    f"BLEU-4 {scores['bleu_4']:.3f} CIDEr {scores['cider']:.3f}",
                    flush=True,
                )
    if config.split == "test":
        print(f"table: {write_tables(config)}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
