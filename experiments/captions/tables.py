"""What the captioning tables share: check the data, train a captioner, score it, and write the table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipcap.data.dataset import read_dataset
from clipcap.evaluation.evaluate import EvaluateConfig, evaluate
from clipcap.evaluation.scores import Evaluation
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import UserError
from common.files import markdown_table, write_json, write_text
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig, hardware, provenance

SCENES = ASSETS / "samples" / "scenes" / "dataset.json"
MAPPERS: dict[str, dict[str, Any]] = {
    "mlp-frozen": {"mapper": "mlp", "tune_gpt2": False},
    "mlp-tuned": {"mapper": "mlp", "tune_gpt2": True},
    "transformer-frozen": {"mapper": "transformer", "tune_gpt2": False},
    "transformer-tuned": {"mapper": "transformer", "tune_gpt2": True},
}
"""The paper's ablation of mapper and decoder (Mokady et al. 2021, sec. 4.2)."""
VARIANTS = {name: MAPPERS[name] for name in ("transformer-frozen", "mlp-tuned")}
"""The paper's two captioners (sec. 3)."""
METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE", "CLIPScore", "RefCLIPScore")
PUBLISHED_CLIP, PUBLISHED_GPT2 = "openai/clip-vit-base-patch32", "gpt2"


@dataclass(frozen=True)
class TableConfig:
    """Where data, weights and results are, and how long to train."""

    data: Path | None = None
    """Captioned images with a train split, in any layout that `clipcap train` reads."""
    images: Path | None = None
    """Directory of the images, when they are not beside the captions."""
    clip: str | None = None
    """CLIP, openai/clip-vit-base-patch32 when not given (tiny with --small)."""
    gpt2: str | None = None
    """GPT-2, gpt2 when not given (tiny with --small)."""
    small: bool = False
    """The packaged tiny backbones and rendered scenes (--scenes if it exists, else the packaged samples)."""
    scenes: Path = Path("out/scenes")
    """Scenes written by experiments/scenes/render.py, for --small."""
    out: Path | None = None
    """Where runs and results go; out/ and the table's name when not given."""
    docs: Path | None = None
    """Directory that gets a copy of the table (and figure), such as docs."""
    steps: int = 0
    """Training steps of each captioner, when not 0, instead of the paper's epochs (800 with --small)."""
    scored_images: int = 0
    """With --small: scenes of the test split that are scored, evenly chosen; all when 0."""
    resamples: int = 1000
    """Resamples of the images for the 95% intervals."""
    clip_score: str | None = None
    """CLIP of CLIPScore; the captioner's own when not given, empty leaves it out."""
    skip_missing: bool = False
    """Leave out captions whose image is missing, instead of stopping."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class Setting:
    """A table's configuration with every choice made."""

    name: str
    data: Path
    images: Path | None
    clip: str
    gpt2: str
    out: Path
    training: dict[str, Any]
    """Fields of TrainConfig."""
    config: TableConfig


def prepare(name: str, config: TableConfig, *, epochs: int, layout: str) -> Setting:
    """Check that the data is there and settle the recipe: the paper's, or the small one.

    Args:
        name: of the table.
        config: as given.
        epochs: of the published run.
        layout: what `--data` should be, for the error when it is missing.

    Raises:
        UserError: no data, with what to give.
    """
    out = config.out or Path("out") / f"{name}{'_small' * config.small}"
    recipe: dict[str, Any] = {"epochs": epochs, "batch_size": 40, "lr": 2e-5, "warmup": 5000, "schedule": "linear"}
    data, images = config.data, config.images
    if config.small:
        recipe = {"steps": 800, "batch_size": 64, "lr": 2e-3, "warmup": 100, "mapper_layers": 4, "mapper_heads": 4}
        recipe |= {"val_every": 250, "val_captions": 0}
        data, images = (data, images) if data else small_data(config.scenes, out / "data", config.scored_images)
    elif data is None:
        raise UserError(f"there is no data: give --data, {layout}, or --small for the packaged backbones and scenes.")
    assert data is not None
    if not data.exists():
        raise UserError(f"data {str(data)!r} does not exist: give {layout}.")
    if config.steps:
        recipe["steps"] = config.steps
    return Setting(
        name=name,
        data=data,
        images=images,
        clip=config.clip or ("tiny" if config.small else PUBLISHED_CLIP),
        gpt2=config.gpt2 or ("tiny" if config.small else PUBLISHED_GPT2),
        out=out,
        training=recipe,
        config=config,
    )


def small_data(scenes: Path, out: Path, scored_images: int = 0) -> tuple[Path, Path | None]:
    """Captioned scenes with the splits train, val and test: the rendered ones if they exist, or the samples."""
    if not all(any(scenes.glob(f"{split}-*.npy")) for split in ("train", "val", "test", "test_unseen")):
        return SCENES, None
    from experiments.scenes.karpathy import export

    path = export(scenes, out, ("train", "val", "test", "test_unseen"))
    if scored_images:
        content = json.loads(path.read_text(encoding="utf-8"))
        tests = [row for row in content["images"] if row["split"] == "test"]
        count = min(scored_images, len(tests))
        chosen = [tests[number * len(tests) // count] for number in range(count)]
        content["images"] = [row for row in content["images"] if row["split"] != "test"] + chosen
        write_json(path, content)
    return path, None


def run_captioner(setting: Setting, name: str, **changes: Any) -> Path:
    """Train one captioner, or resume it, and return its directory."""
    return train(
        TrainConfig(
            data=setting.data,
            images=setting.images,
            out=setting.out / name,
            embeddings=setting.out / "embeddings",
            clip=setting.clip,
            gpt2=setting.gpt2,
            skip_missing=setting.config.skip_missing,
            runtime=setting.config.runtime,
            **(setting.training | changes),
        )
    )


def score_captioner(
    setting: Setting,
    model: Path | str,
    name: str,
    *,
    data: Path | None = None,
    images: Path | None = None,
    split: str = "test",
) -> Evaluation:
    """Caption and score one split with a trained captioner, of the setting's data when none is given."""
    chosen = setting.config.clip_score
    return evaluate(
        EvaluateConfig(
            data=data or setting.data,
            images=images if data else setting.images,
            split=split,
            skip_missing=setting.config.skip_missing,
            model=str(model),
            out=setting.out / name / f"evaluation-{split}",
            clip_score=setting.clip if chosen is None else chosen,
            resamples=setting.config.resamples,
            runtime=setting.config.runtime,
        )
    )


def paper_rows(
    setting: Setting, variants: Sequence[str], published: Mapping[str, Mapping[str, str]], **scored: Any
) -> tuple[list[dict[str, str]], str, list[str]]:
    """Train and score the paper's captioners.

    Args:
        setting: of the table.
        variants: names in VARIANTS.
        published: their published scores, which stand below ours at full size.
        scored: what `score_captioner` is to score, when not the setting's test split.

    Returns:
        The table's rows, the tokenizer of the scores, and lines that say what is not measured.
    """
    rows, tokenizer, absent = [], "", []
    for name in variants:
        found = score_captioner(setting, run_captioner(setting, name, **VARIANTS[name]), name, **scored)
        tokenizer, absent = found.tokenizer, not_measured(found, METRICS)
        minutes = cpu_minutes(setting.out / name)
        rows.append({"captioner": name} | {m: cell(found, m) for m in METRICS} | {"CPU min": minutes})
        if not setting.config.small:
            rows.append({"captioner": f"{name}, published"} | dict(published[name]))
    return rows, tokenizer, absent


def last_split(data: Path, images: Path | None, *, skip_missing: bool) -> str:
    """The split to score: test, or else val, as data sets of URLs have no test split with captions."""
    splits = {item.split for item in read_dataset(data, images=images, skip_missing=skip_missing)}
    for split in ("test", "val"):
        if split in splits:
            return split
    raise UserError(f"{str(data)!r} has neither a test nor a val split: nothing to score.")


def cell(found: Evaluation, metric: str) -> str:
    """A score times 100 with its interval, or a dash."""
    return shown(metric, found.scores, found.intervals)


def shown(metric: str, scores: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> str:
    """The score of one metric times 100 with its interval, or a dash."""
    if metric not in scores:
        return "–"
    text = f"{100 * scores[metric]:.2f}"
    if metric in intervals:
        low, high = intervals[metric]
        text += f" ({100 * low:.1f}–{100 * high:.1f})"
    return text


def not_measured(found: Evaluation, metrics: Sequence[str]) -> list[str]:
    """A line for each of `metrics` that could not be computed here, with the reason."""
    return [f"{name} is not measured: {found.not_measured[name]}." for name in metrics if name in found.not_measured]


def write_table(
    setting: Setting,
    title: str,
    text: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: str,
    columns: Sequence[str] = ("captioner", *METRICS, "CPU min"),
    options: str = "",
) -> Path:
    """Write the table as Markdown and JSON to the run's directory, and to `docs` where asked; returns its path.

    Args:
        setting: of the table.
        title: its name and, behind a comma, what is scored at full size.
        text: lines above it.
        rows: a value for each of `columns`.
        tokenizer: that the scores were made with.
        columns: of the table.
        options: of its script, beside those that all have.
    """
    config, command = setting.config, f"python -m experiments.captions.{setting.name.removeprefix('clipcap_')}{options}"
    if config.small:
        title = f"{title.partition(',')[0]}, in small"
        remark = "Rendered scenes and the packaged tiny backbones: not comparable with the published table."
        text = [*text[:1], remark, *text[1:]]
    changed = f" --steps {config.steps}" if config.steps else ""
    changed += f" --scored-images {config.scored_images}" if config.small and config.scored_images else ""
    lines = [
        f"# {title}",
        "",
        *text,
        "",
        *markdown_table(columns, rows),
        "",
        f"`{command}{' --small' * config.small}{changed}` "
        f"(CLIP {Path(setting.clip).name}, GPT-2 {Path(setting.gpt2).name}, "
        f"seed {config.runtime.seed}, {hardware()}; scoring tokenizer: {tokenizer})",
        "",
    ]
    write_json(
        setting.out / "table.json",
        {"rows": rows, "recipe": setting.training, "config": config, **provenance()},
    )
    name = f"{setting.name}{'_small' * config.small}.md"
    if config.docs:
        write_text(config.docs / name, "\n".join(lines))
    path = write_text(setting.out / name, "\n".join(lines))
    print("\n".join(lines))
    return path


def cpu_minutes(run: Path) -> str:
    """CPU minutes of a training run, from its record."""
    return f"{json.loads((run / 'training.json').read_text())['cpu_seconds'] / 60:.0f}"
