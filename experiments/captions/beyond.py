"""Three ways beyond the paper, in small: text-only training (CapDec), self-critical training, retrieval prompts.

    python -m experiments.captions.beyond --scenes out/scenes --variants plain text-only ...

Trains each with the tiny backbones on rendered scenes beside the plain captioner, with the same mapper, frozen or
fine-tuned GPT-2, steps and seed, and scores them on held-out scenes as experiments/captions/mapper_ablation.py does.
"scst" continues from the plain captioner of the same seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import UserError, require_one_of, run_command
from common.files import write_json, write_text
from common.runtime import RuntimeConfig, provenance, seed_everything
from experiments import from_command_line
from experiments.captions.mapper_ablation import score_split
from experiments.scenes.karpathy import export

VARIANTS = ("plain", "text-only", "text-only, no noise", "retrieval", "scst")


@dataclass(frozen=True)
class Config:
    """Train and compare captioners on scenes."""

    scenes: Path = Path("out/scenes")
    """Directory written by experiments/scenes/render.py."""
    out: Path = Path("out/beyond")
    """Where data, runs and results go."""
    docs: Path = Path("docs")
    """Where the table goes."""
    variants: tuple[str, ...] = VARIANTS
    """Which captioners: plain, text-only, "text-only, no noise", retrieval, scst (after plain)."""
    clip: str = "tiny"
    """CLIP."""
    gpt2: str = "tiny"
    """GPT-2."""
    tune_gpt2: bool = True
    """Train GPT-2 with the mapper."""
    steps: int = 2000
    """Training steps of each but scst."""
    batch_size: int = 64
    """Captions in a step."""
    lr: float = 2e-3
    """Peak learning rate."""
    text_noise: float = 0.016
    """Variance of the noise of "text-only" (Nukrai et al. 2022)."""
    retrieval: int = 2
    """Captions in a retrieval prompt."""
    scst_steps: int = 200
    """Steps of scst."""
    scst_batch_size: int = 16
    """Images in a step of scst, with 5 sampled captions each."""
    scst_lr: float = 1e-4
    """Peak learning rate of scst."""
    split: Literal["val", "test"] = "test"
    """Score on val (for choices) or on test (for the table)."""
    images: int = 0
    """Images that are scored, all when 0."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


def settings(name: str, config: Config, data: Path) -> TrainConfig:
    """The training of one variant."""
    common: dict[str, Any] = {
        "data": data,
        "out": run_directory(name, config),
        "batch_size": config.batch_size,
        "warmup": 100,
        "val_every": 250,
        "val_captions": 200,
        "max_tokens": 60,
        "runtime": config.runtime,
        "embeddings": config.out / "embeddings",
    }
    if name == "scst":
        init = run_directory("plain", config) / "model"
        if not init.is_dir():
            raise UserError(f"scst continues from {str(init)!r}, which is missing: add the variant plain.")
        changes = {"steps": config.scst_steps, "lr": config.scst_lr, "batch_size": config.scst_batch_size}
        return TrainConfig(**common | changes | {"init": init, "scst": True, "val_every": 50, "warmup": 20})
    common |= {
        "clip": config.clip,
        "gpt2": config.gpt2,
        "mapper": "mlp",
        "tune_gpt2": config.tune_gpt2,
        "steps": config.steps,
        "lr": config.lr,
    }
    if name.startswith("text-only"):
        noise = config.text_noise if name == "text-only" else 0.0
        return TrainConfig(**common | {"text_only": True, "text_noise": noise, "embeddings": config.out / "texts"})
    return TrainConfig(**common, retrieval=config.retrieval if name == "retrieval" else 0)


def run_directory(name: str, config: Config) -> Path:
    """Where one variant's run goes."""
    return config.out / f"{name.replace(', ', '-').replace(' ', '-')}-seed{config.runtime.seed}"


def run_variant(name: str, config: Config, data: Path) -> dict[str, Any]:
    """Train one captioner and score it."""
    directory = train(settings(name, config, data))
    record = json.loads((directory.parent / "training.json").read_text())
    return {
        "steps": record["steps"],
        "cpu_seconds": record["cpu_seconds"],
        "metrics": record["metrics"],
        config.split: score_split(directory, config, config.split, most=config.images),
    }


def write_table(config: Config) -> Path:
    """All finished runs in `out` as one Markdown page; returns its path."""
    runs = [json.loads(path.read_text()) for path in sorted(config.out.glob("*/scores.json"))]
    runs = sorted((run for run in runs if "test" in run), key=lambda run: (VARIANTS.index(run["variant"]), run["seed"]))
    lines = [
        "# Beyond the paper, in small",
        "",
        "Captions of held-out rendered scenes by the tiny backbones (MLP mapper, GPT-2 "
        + ("fine-tuned" if config.tune_gpt2 else "frozen")
        + "), beam search, 5 beams: the share",
        "of captions that get the colour and shape of every object right ± its standard error, by number of objects;",
        "BLEU-4 and CIDEr on the test split. `text-only` sees no image in training (CapDec), `retrieval` puts "
        f"{config.retrieval}",
        "captions of similar images before each caption (SmallCap's idea), `scst` continues from `plain` with CIDEr as",
        "the reward (its steps and minutes come on top of those of `plain`).",
        "",
        "| variant | seed | steps | 1 object | 2 objects | 3 objects | BLEU-4 | CIDEr | distinct captions | CPU min |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        shares = [run["test"]["all_right"][n] for n in "123"]
        cells = [f"{part['share']:.3f} ± {part['standard_error']:.3f}" for part in shares]
        lines.append(
            f"| {run['variant']} | {run['seed']} | {run['steps']} | {' | '.join(cells)} | {run['test']['bleu_4']:.3f} "
            f"| {run['test']['cider']:.3f} | {run['test']['distinct_captions']} | {run['cpu_seconds'] / 60:.0f} |"
        )
    lines += [
        "",
        f"`python -m experiments.captions.beyond --steps {config.steps} --images {config.images}`, `--seed` "
        f"{', '.join(map(str, sorted({run['seed'] for run in runs})))}; hardware: "
        f"{runs[-1]['hardware']}; scoring tokenizer: {runs[-1]['test']['tokenizer']}.",
        "",
    ]
    return write_text(config.docs / "clipcap_beyond.md", "\n".join(lines))


def main(config: Config) -> None:
    """Train what is not trained yet, score, and write each run's scores.json and the table of all."""
    for name in config.variants:
        require_one_of("variant", name, VARIANTS)
    seed_everything(config.runtime.seed)
    data = export(config.scenes, config.out / "data")
    for name in config.variants:
        result = run_variant(name, config, data)
        about = {"variant": name, "seed": config.runtime.seed, **provenance()}
        write_json(run_directory(name, config) / "scores.json", about | result)
        scores = result[config.split]
        right = {n: round(part["share"], 3) for n, part in scores["all_right"].items()}
        print(f"{name:20} all right {right} BLEU-4 {scores['bleu_4']:.3f} CIDEr {scores['cider']:.3f}", flush=True)
    if config.split == "test":
        print(f"table: {write_table(config)}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
