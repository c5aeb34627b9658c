"""Captions in a language that GPT-2 never saw: does recycling it help, and with how few captions?

    python -m experiments.captions.languages --language nld --recycled out/recycle/nld

Captioners of rendered scenes in Dutch or Italian, on GPT-2s recycled for the language by
experiments/languages/recycle.py, trained from scratch on the same text, and English ones; on 1%, 10% and 100% of the
captions; with GPT-2 frozen (Transformer mapper) and fine-tuned (MLP), the paper's two variants. Every run writes a
JSON file when it is finished and is not made again; one that was stopped resumes from its checkpoint. Those that say
most come first, and the page is rewritten after each.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from clipcap.data.dataset import CaptionedImage
from clipcap.data.embeddings import build_store
from clipcap.data.store import EmbeddingStore
from clipcap.model import ClipCapModel
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import UserError, require_fields_at_least, require_one_of, require_same_settings, run_command
from common.clip import load_clip
from common.files import markdown_table, write_json, write_text
from common.gpt2 import PACKAGED
from common.runtime import RuntimeConfig, provenance, start
from experiments import from_command_line
from experiments.captions.mapper_ablation import caption_images, score_scenes
from experiments.captions.tables import VARIANTS
from experiments.languages.text import LANGUAGES
from experiments.scenes.dataset import load_split, shard_files
from experiments.scenes.karpathy import SAMPLES, captioned_in, packaged_records, save_images, write_dataset
from experiments.scenes.records import ViewRecord
from experiments.scenes.wording import WORDINGS

MODES = {"fine-tuned": "mlp-tuned", "frozen": "transformer-frozen"}
"""What the page says -> variant of the paper."""
MODELS = {
    "recycled": "all-from-English",
    "from scratch": "scratch",
    "English": "tiny",
    "aligned medium": "aligned-medium-all",
    "English medium": "tiny-medium",
}
"""Name of a GPT-2 -> the arm of experiments/languages/recycle.py that makes it, or a packaged one."""
SHARES = (1.0, 0.1, 0.01)
PAGE = "clipcap_languages"


@dataclass(frozen=True)
class Config:
    """Train captioners in one language on several GPT-2s and compare them."""

    language: Literal["nld", "ita"] = "nld"
    """nld or ita."""
    recycled: Path | None = None
    """Directory with the recycled models of the language, out/recycle/LANGUAGE when not given."""
    gpt2: tuple[str, ...] = ()
    """Further GPT-2s, or others of the same name, as name=directory."""
    models: tuple[str, ...] = ()
    """Names of the GPT-2s to run; all that exist when not given."""
    shares: tuple[float, ...] = SHARES
    """Shares of the captions to train on."""
    modes: tuple[str, ...] = tuple(MODES)
    """fine-tuned, frozen."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, each with its own choice of the captions."""
    scenes: Path = Path("out/scenes")
    """Directory written by experiments/scenes/render.py; the few packaged scenes when it is missing."""
    images: int = 4800
    """Training images that are 100%, five captions each."""
    steps: int = 300
    """Training steps of each run; fewer where validation says so."""
    batch_size: int = 64
    """Captions in a step."""
    lr: float = 2e-3
    """Peak learning rate."""
    val_images: int = 100
    """Validation images; they choose the step that is kept."""
    test_images: int = 500
    """Test images."""
    out: Path = Path("out/clipcap_languages")
    """Where images, embeddings and runs go."""
    docs: Path = Path("docs")
    """Where the page and its figures go."""
    report: bool = False
    """Only write the page of the runs that exist."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(device="cpu", precision="bf16", threads=1))


@dataclass(frozen=True)
class Run:
    """One captioner."""

    model: str
    gpt2: str
    """Packaged name or directory."""
    mode: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model.replace(' ', '-')}-{self.mode}-{self.share:g}-seed{self.seed}"


@dataclass(frozen=True)
class Scenes:
    """Images, their captions in the language, and their embeddings."""

    images: Path
    records: dict[str, dict[str, ViewRecord]]
    """By split, then file name."""
    store: EmbeddingStore


def find_models(config: Config) -> dict[str, str]:
    """Name of each GPT-2 that exists -> packaged name or directory; of an arm, what was trained longest.

    Raises:
        UserError: one that is asked for is missing, or is not written as name=directory.
    """
    root = config.recycled or Path("out/recycle") / config.language
    found: dict[str, str] = {}
    for name, arm in MODELS.items():
        if arm in PACKAGED:
            found[name] = arm
        elif trained := [path for path in root.glob(f"runs/{arm}-*/result.json") if (path.parent / "model").is_dir()]:
            longest = max(sorted(trained), key=lambda path: json.loads(path.read_text())["tokens"])
            found[name] = str(longest.parent / "model")
    for text in config.gpt2:
        name, _, place = text.partition("=")
        if not name or not place:
            raise UserError(f"gpt2 is {text!r}: write it as name=directory.")
        if place not in PACKAGED and not (Path(place) / "config.json").is_file():
            raise UserError(f"gpt2 {place!r} has no config.json: give a GPT-2 directory or {' or '.join(PACKAGED)}.")
        found[name] = place
    for name in config.models:
        if name not in found:
            raise UserError(
                f"model {name!r} is missing: choose of {', '.join(found)}, give --gpt2 {name!r}=DIRECTORY, or make "
                f"it: python -m experiments.languages.recycle --language {config.language} --parts main medium budgets."
            )
    return {name: place for name, place in found.items() if not config.models or name in config.models}


def plan(config: Config, models: dict[str, str]) -> list[Run]:
    """The runs, those that say most first: seed by seed, fine-tuned before frozen, much data before little."""
    choices = product(config.seeds, config.modes, config.shares, models.items())
    return [Run(name, gpt2, mode, share, seed) for seed, mode, share, (name, gpt2) in choices]


def prepare(config: Config) -> Scenes:
    """Images as files, captions in the language, and embeddings of all images, which all runs and languages share."""
    sizes = {"train": config.images, "val": config.val_images, "test": config.test_images}
    if shard_files(config.scenes, "train"):
        directory = config.out / "images"
        english = {split: _first_views(config.scenes, split, count, directory) for split, count in sizes.items()}
    else:
        directory = SAMPLES
        english = {split: dict(list(packaged_records(split).items())[:count]) for split, count in sizes.items()}
        print(f"{str(config.scenes)!r} has no rendered scenes: taking the packaged ones")
    records = {split: captioned_in(config.language, part) for split, part in english.items()}
    items = [
        CaptionedImage(name, directory / name, record.captions, record.split)
        for part in records.values()
        for name, record in part.items()
    ]
    store = build_store(items, load_clip("tiny", device="cpu"), config.out / "embeddings")
    return Scenes(directory, records, store)


def _first_views(scenes: Path, split: str, count: int, directory: Path) -> dict[str, ViewRecord]:
    """The first `count` rendered views of a split, with their images as files."""
    shards = shard_files(scenes, split)
    if not shards:
        raise UserError(f"{str(scenes)!r} has no rendered scenes of split {split!r}: run experiments/scenes/render.py.")
    needed = -(-count // len(np.load(shards[0], mmap_mode="r")))
    images, records = load_split(scenes, split, max_shards=needed)
    return save_images(images[:count], records[:count], directory)


def take_share(records: dict[str, ViewRecord], share: float, seed: int) -> dict[str, ViewRecord]:
    """A share of the images with all their captions; a smaller share is part of a larger one of the same seed."""
    order = np.random.default_rng(seed).permutation(len(records))
    chosen = set(order[: max(1, round(share * len(records)))].tolist())
    return {name: record for number, (name, record) in enumerate(records.items()) if number in chosen}


def run(job: Run, config: Config, scenes: Scenes) -> dict[str, Any]:
    """Train and score one captioner, unless its result exists.

    Raises:
        UserError: it was begun with other settings or weights.
    """
    directory = config.out / config.language / job.name
    weights = Path(PACKAGED.get(job.gpt2, job.gpt2)) / "model.safetensors"
    settings = {
        "language": config.language,
        "model": job.model,
        "gpt2": job.gpt2 if job.gpt2 in PACKAGED else "/".join(weights.parent.parts[-3:]),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        "mode": job.mode,
        "share": job.share,
        "seed": job.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "images": {split: len(part) for split, part in scenes.records.items()},
    }
    path = directory / "result.json"
    for file in (directory / "settings.json", path):
        if file.exists():
            require_same_settings(directory, json.loads(file.read_text()), settings)
    if path.exists():
        return json.loads(path.read_text())
    write_json(directory / "settings.json", settings)
    begun = time.process_time()
    runtime = RuntimeConfig(config.runtime.device, config.runtime.precision, job.seed, config.runtime.threads)
    chosen = take_share(scenes.records["train"], job.share, job.seed)
    data = write_dataset(directory / "dataset.json", chosen | scenes.records["val"])
    model_directory = train(
        TrainConfig(
            data=data,
            images=scenes.images,
            out=directory,
            embeddings=config.out / "embeddings",
            clip="tiny",
            gpt2=job.gpt2,
            mapper_layers=4,
            mapper_heads=4,
            steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            warmup=config.steps // 10,
            val_every=max(1, config.steps // 8),
            val_captions=0,
            patience=3,
            runtime=runtime,
            **VARIANTS[MODES[job.mode]],
        )
    )
    model = ClipCapModel.from_pretrained(model_directory)
    tests = scenes.records["test"]
    rows = torch.stack([scenes.store[scenes.store.row(name)] for name in tests])
    captions = dict(zip(tests, caption_images(model, rows), strict=True))
    scores = score_scenes(captions, tests, wording=WORDINGS[config.language], tokenizer="words")
    shares = scores["all_right"].values()
    training = json.loads((directory / "training.json").read_text())
    result = settings | {
        "captions": training["captions"]["train"],
        "steps_done": training["steps"],
        "gpt2_parameters": sum(p.numel() for p in model.gpt2.parameters()),
        "trained_parameters": training["trained_parameters"],
        "fully_right": sum(part["share"] * part["images"] for part in shares if part["images"]) / len(tests),
        "scores": scores,
        "cpu_seconds": round(time.process_time() - begun, 1),
        **provenance(),
    }
    write_json(directory / "captions.json", captions)
    write_json(path, result)
    for name in ("last.ckpt", "best.ckpt"):
        (directory / name).unlink(missing_ok=True)
    return result


def summarise(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation over seeds where there are several."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def finished(out: Path) -> list[dict[str, Any]]:
    """All results in `out`, of all languages, in the order of the page."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*/*/result.json"))]
    names = [*MODELS, *sorted({run["model"] for run in found} - set(MODELS))]
    return sorted(found, key=lambda run: (names.index(run["model"]), run["share"], run["seed"]))


def plot(runs: Sequence[dict[str, Any]]) -> Figure:
    """Fully right captions and CIDEr over the captions trained on, a curve for each GPT-2, a row for each mode."""
    modes = [mode for mode in MODES if any(run["mode"] == mode for run in runs)]
    figure = Figure(figsize=(8, 3.2 * len(modes)), layout="constrained")
    rows = figure.subplots(len(modes), 2, squeeze=False, sharex=True)
    for axes, mode in zip(rows, modes, strict=True):
        for one, (title, key) in zip(axes, (("captions fully right", "fully_right"), ("CIDEr", "cider")), strict=True):
            for name in dict.fromkeys(run["model"] for run in runs):
                these = [run for run in runs if run["mode"] == mode and run["model"] == name]
                counts = sorted({run["captions"] for run in these})
                values = [[_value(run, key) for run in these if run["captions"] == count] for count in counts]
                spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
                one.errorbar(counts, list(map(statistics.mean, values)), spread, label=name, marker="o", capsize=2)
            one.set(xscale="log", title=f"{title}, {mode}", xlabel="captions trained on")
            one.spines[["top", "right"]].set_visible(False)
            one.grid(alpha=0.25)
    rows[0][0].legend(frameon=False, fontsize=8)
    return figure


def _value(run: dict[str, Any], key: str) -> float:
    return run["fully_right"] if key == "fully_right" else run["scores"]["cider"]


def write_page(out: Path, docs: Path) -> Path:
    """All finished runs as one page with a figure for each language; returns its path.

    Raises:
        UserError: no run is finished.
    """
    runs = finished(out)
    if not runs:
        raise UserError(f"{str(out)!r} has no finished run: leave out --report.")
    lines = [
        "# Captions in a language that GPT-2 never saw",
        "",
        "Captions of held-out rendered scenes in Dutch and Italian, learned from captions generated from the scene",
        "graphs. *Fully right*: the share of captions that name the colour and shape of every object and nothing else.",
        "Beam search, 5 beams; mean ± standard deviation over seeds, each with its own choice of captions. Frozen:",
        "Transformer mapper; fine-tuned: MLP mapper (the paper's two variants). The step with the lowest validation",
        "loss is kept. [recycling.md](recycling.md) has the conclusions and the commands that make the GPT-2s",
        "(out/recycle); `python -m experiments.scenes.render` makes the scenes (out/scenes).",
    ]
    docs.mkdir(parents=True, exist_ok=True)
    for language, title in LANGUAGES.items():
        these = [run for run in runs if run["language"] == language]
        if these:
            lines += ["", f"## {title}", *_section(these)]
            plot(these).savefig(docs / f"{PAGE}_{language}.png", dpi=110)
            lines += ["", f"![{title}: fully right captions and CIDEr over captions]({PAGE}_{language}.png)"]
            seconds, first = [run["cpu_seconds"] for run in these], these[0]
            sizes, seen = first["images"], first["steps"] * first["batch_size"]
            passes = ", ".join(
                f"{seen / count:.2g} passes over {share:.0%}"
                for share, count in sorted({(run["share"], run["captions"]) for run in these})
            )
            command = f"--language {language} --steps {first['steps']} --images {sizes['train']}"
            lines += [
                "",
                f"`python -m experiments.captions.languages {command}` ({len(these)} runs of {min(seconds):.0f} to "
                f"{max(seconds):.0f} CPU seconds, at most {first['steps']} steps of {first['batch_size']} captions: "
                f"{passes}; {sizes['val']} validation and {sizes['test']} test images; "
                f"{first['hardware']}; scoring tokenizer: {first['scores']['tokenizer']})",
            ]
    return write_text(docs / f"{PAGE}.md", "\n".join([*lines, ""]))


def _section(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for mode in MODES:
        these = [run for run in runs if run["mode"] == mode]
        if not these:
            continue
        shares = sorted({run["share"] for run in these})
        counts = {share: next(run["captions"] for run in these if run["share"] == share) for share in shares}
        rows = []
        for name in dict.fromkeys(run["model"] for run in these):
            of = [run for run in these if run["model"] == name]
            row: dict[str, Any] = {"GPT-2": name, "parameters": f"{of[0]['gpt2_parameters'] / 1e6:.1f} M"}
            for key, digits in (("fully right", 3), ("CIDEr", 2)):
                for share in shares:
                    values = [_value(run, key.replace(" ", "_")) for run in of if run["share"] == share]
                    row[f"{key}, {share:.0%}"] = summarise(values, digits)
            row["seeds"] = len({run["seed"] for run in of})
            rows.append(row)
        said = ", ".join(f"{share:.0%} is {counts[share]:,}" for share in shares)
        lines += ["", f"GPT-2 {mode}; captions: {said}.", "", *markdown_table(list(rows[0]), rows)]
    return lines


def check(config: Config) -> None:
    """Raise UserError for settings that cannot work."""
    for mode in config.modes:
        require_one_of("mode", mode, tuple(MODES))
    for share in config.shares:
        if not 0 < share <= 1:
            raise UserError(f"share is {share:g}: use more than 0, at most 1.")
    require_fields_at_least(config, 1, "images", "steps", "batch_size", "val_images", "test_images")


def main(config: Config) -> None:
    """Run what is not finished yet, and write the page after each run."""
    check(config)
    if not config.report:
        models = find_models(config)
        jobs = plan(config, models)
        start(config.runtime)
        scenes = prepare(config)
        for number, job in enumerate(jobs, 1):
            there = (config.out / config.language / job.name / "result.json").exists()
            result = run(job, config, scenes)
            if not there:
                print(
                    f"{time.strftime('%H:%M:%S')} [{number}/{len(jobs)}] {config.language} {job.name}: fully right "
                    f"{result['fully_right']:.3f} CIDEr {result['scores']['cider']:.3f} after {result['steps_done']} "
                    f"steps ({result['cpu_seconds']:.0f} s)",
                    flush=True,
                )
                write_page(config.out, config.docs)
    print(f"page: {write_page(config.out, config.docs)}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
