"""ClipCap's ablations on photographs: mapper and decoder, prefix length, text-only training, retrieved captions.

    python -m experiments.captions.photograph_ablations --made out/photographs --images flickr8k/images

The backbones are those that experiments/captions/photographs.py made (`--made` is its output): the packaged CLIP for
photographs, of which the captioners read the pooled embedding, and the small GPT-2. Mokady et al. 2021 ablate mapper
and decoder in section 4.2 and the prefix length in figure 4. Each captioner is scored on the test split in the order
of GPT-2 alone, with 5 beams. The table is written again after each; what is finished is kept.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from clipcap.evaluation.evaluate import EvaluateConfig, evaluate
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import require_at_least, require_file, require_one_of, run_command
from common.files import markdown_table, write_json, write_text
from common.report import plot_lines
from common.runtime import RuntimeConfig, provenance, start
from experiments import from_command_line
from experiments.captions.photographs import RECIPE
from experiments.captions.tables import MAPPERS, VARIANTS

BEYOND: dict[str, dict[str, Any]] = {
    "mlp-one-view": {"mapper": "mlp", "tune_gpt2": True, "views": 1},
    "mlp-text-only": {"mapper": "mlp", "tune_gpt2": True, "views": 1, "text_only": True},
    "mlp-retrieval": {"mapper": "mlp", "tune_gpt2": True, "views": 1, "retrieval": 1},
}
"""Trained on the captions alone (CapDec, Nukrai et al. 2022) and with a retrieved caption before each (SmallCap, Ramos
et al. 2023), for more of which the small GPT-2 has no room; the first is what they are to be compared with."""
METRICS = ("BLEU-4", "ROUGE-L", "CIDEr")


@dataclass(frozen=True)
class Config:
    """Train and score the paper's variants on photographs."""

    made: Path = Path("out/photographs")
    """Output of experiments.captions.photographs, which has the backbones and the captions."""
    images: Path | None = None
    """Directory of the images, when they are not where the captions say."""
    out: Path = Path("out/photograph-ablations")
    """Where runs, scores and the table go."""
    captioners: tuple[str, ...] = (*MAPPERS, *BEYOND)
    """Which: mlp-frozen, mlp-tuned, transformer-frozen, transformer-tuned; mlp-one-view, mlp-text-only,
    mlp-retrieval."""
    seeds: int = 3
    """Seeds of transformer-frozen and mlp-tuned; the others have one."""
    length: int = 4
    """Prefix length K of the captioners."""
    lengths: tuple[int, ...] = (1, 2, 8, 16)
    """Further ones, of transformer-frozen and mlp-tuned."""
    views: int = 3
    """Views of each training photograph."""
    steps: int = 1500
    """Steps of each captioner."""
    batch_size: int = 64
    """Captions in a step."""
    lr: float = 1e-3
    """Peak rate."""
    docs: Path | None = None
    """Directory that gets the table and the figure, such as docs."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


@dataclass(frozen=True)
class Run:
    """One captioner to train."""

    captioner: str
    length: int
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.captioner}-{self.length}-seed{self.seed}"


def runs_of(config: Config) -> Iterator[Run]:
    """All captioners to train, the ones that decide most first."""
    first = config.runtime.seed
    for name in config.captioners:
        yield Run(name, config.length, first)
    pair = [name for name in VARIANTS if name in config.captioners]
    for length in config.lengths:
        yield from (Run(name, length, first) for name in pair if length != config.length)
    for seed in range(first + 1, first + config.seeds):
        yield from (Run(name, config.length, seed) for name in pair)


def score(run: Run, config: Config) -> dict[str, Any]:
    """Train a captioner, or take up what is there, and score it."""
    options = (MAPPERS | BEYOND)[run.captioner]
    runtime = replace(config.runtime, seed=run.seed)
    data, out = config.made / "photographs.json", config.out / run.name
    model = train(
        TrainConfig(
            data=data,
            images=config.images,
            out=out,
            clip=str(config.made / "clip" / "clip-photo"),
            gpt2=str(config.made / "gpt2" / "gpt2-captions"),
            embeddings=config.out / ("texts" if options.get("text_only") else "embeddings"),
            prefix_length=run.length,
            clip_length=run.length,
            batch_size=config.batch_size,
            steps=config.steps,
            lr=config.lr,
            val_captions=0,
            workers=0,
            runtime=runtime,
            **RECIPE | {"views": config.views} | options,
        )
    )
    found = evaluate(
        EvaluateConfig(
            data=data,
            images=config.images,
            model=str(model),
            out=out / "evaluation",
            metrics=("BLEU", "ROUGE-L", "CIDEr"),
            rerank=0,
            clip_score="",
            resamples=0,
            runtime=runtime,
        )
    )
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    losses = validation_losses(out)
    best = min(losses, key=losses.__getitem__)
    return {
        "captioner": run.captioner,
        "K": run.length,
        "seed": run.seed,
        **{metric: found.scores[metric] for metric in METRICS},
        "distinct": len(set(found.captions.values())),
        "photographs": len(found.captions),
        "loss": losses[best],
        "falling": best == max(losses),
        "trained": record["trained_parameters"],
        "cpu_seconds": record["cpu_seconds"],
    }


def validation_losses(run: Path) -> dict[int, float]:
    """Validation loss by step, in nats a token."""
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return {int(row["step"]): float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")}


def row(scores: list[Mapping[str, Any]]) -> dict[str, str]:
    """A row of the table: the mean over the seeds of one captioner and length, with its spread."""

    def spread(name: str, scale: float) -> str:
        values = [scale * found[name] for found in scores]
        return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    first = scores[0]
    return {
        "captioner": first["captioner"],
        "K": str(first["K"]),
        "seeds": str(len(scores)),
        **{metric: spread(metric, 100) for metric in METRICS},
        "distinct": f"{mean(found['distinct'] for found in scores):.0f} of {first['photographs']}",
        "val loss": spread("loss", 1) + (" ↓" if all(found["falling"] for found in scores) else ""),
        "trained": f"{first['trained'] / 1e6:.2f} M",
        "CPU min": f"{mean(found['cpu_seconds'] for found in scores) / 60:.0f}",
    }


def write_page(found: list[dict[str, Any]], config: Config) -> str:
    """Write the table, and the figure of the prefix lengths where there are several; returns the table."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for scores in found:
        groups.setdefault((scores["captioner"], scores["K"]), []).append(scores)
    order = {name: place for place, name in enumerate(config.captioners)}
    rows = [row(groups[key]) for key in sorted(groups, key=lambda key: (order[key[0]], key[1]))]
    table = "\n".join(markdown_table(tuple(rows[0]), rows)) + "\n"
    curves: dict[str, tuple[list[float], list[float]]] = {
        name: (
            sorted(length for captioner, length in groups if captioner == name),
            [100 * mean(s["CIDEr"] for s in groups[key]) for key in sorted(groups) if key[0] == name],
        )
        for name in VARIANTS
    }
    several = any(len(lengths) > 1 for lengths, _ in curves.values())
    for folder in (config.out, config.docs):
        if folder:
            write_text(folder / "photograph_ablations.md", table)
            if several:
                figure = plot_lines(curves, x="prefix length K", y="CIDEr x 100")
                figure.savefig(folder / "photograph_prefix_length.png", dpi=110)
    record = {"runs": found, "config": config, **provenance()}
    write_json(config.out / "results.json", record)
    return table


def main(config: Config) -> None:
    """Train and score what is missing, and write the table after each."""
    for name in config.captioners:
        require_one_of("captioners", name, (*MAPPERS, *BEYOND))
    for length in (config.length, *config.lengths):
        require_at_least("length", length, 1)
    require_at_least("seeds", config.seeds, 1)
    require_file(config.made / "photographs.json", "made")
    start(config.runtime)
    found: list[dict[str, Any]] = []
    for run in runs_of(config):
        found.append(score(run, config))
        print(write_page(found, config))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
