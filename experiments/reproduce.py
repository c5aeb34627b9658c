"""One published table with one command: what is missing, what it costs here, the run, its numbers beside the published.

    python -m experiments.reproduce clipcap-coco                 # DATA and WEIGHTS are ./data and ./weights
    python -m experiments.reproduce recycle-dutch --dry-run      # full size, random weights, two steps of each phase

The work is that of the other scripts of this directory with the papers' settings; each resumes, so the same command
goes on with a run that was stopped. docs/reproduce.md has the list of data and weights.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from common.checks import UserError, require_at_least, run_command
from common.files import write_json, write_text
from common.pretrained import ASSETS, require_reachable
from common.runtime import RuntimeConfig, hardware, resolve_dtype, start, versions
from experiments import from_command_line

CLIP, GPT2, MEDIUM = "openai/clip-vit-base-patch32", "gpt2", "gpt2-medium"
BLENDER = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
ENCODERS = {
    "CLIP ViT-B/32": CLIP,
    "ImageNet ViT-B/32": "torchvision:vit_b_32",
    "ImageNet ResNet-50": "torchvision:resnet50",
}
LANGUAGES: dict[str, dict[str, Any]] = {
    "nld": {"name": "dutch", "vocab_size": 40_000},
    "ita": {"name": "italian", "vocab_size": 30_000},
}
"""De Vries & Nissim 2021, sec. 3.1."""
FIGURES = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3), "fid": ("FID", 1), "kid": ("KID", 3)}
"""Scores of `experiments.dietnerf_synthetic`: the name in the table, and the digits."""
DIETNERF_MEAN: dict[str, tuple[float, ...]] = {
    "nerf": (14.934, 0.687, 0.318, 228.1, 0.076),
    "simplified": (20.092, 0.822, 0.179, 189.2, 0.047),
    "dietnerf": (23.147, 0.866, 0.109, 74.9, 0.005),
    "dietnerf-tuned": (23.591, 0.874, 0.097, 72.0, 0.004),
    "nerf, 100 views": (31.153, 0.954, 0.046, 50.5, 0.001),
}
"""In the order of `FIGURES`, over the 8 scenes from 8 views (Jain et al. 2021, table 1)."""
DIETNERF_LEGO: dict[str, tuple[float, ...]] = {
    "nerf": (9.7,), "simplified": (16.7,), "dietnerf": (23.9,), "dietnerf-tuned": (24.3,), "nerf, 100 views": (31.6,),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Reproduce one published table.

    First it says what is missing and where it goes, and what the run costs on this machine; a run that was stopped goes
    on. With --dry-run nothing has to be there.
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


@dataclass(frozen=True)
class Need:
    """Something that has to be there before a table can be made."""

    path: Path
    what: str
    """What it is, and where it is from."""
    wrong: str = ""
    """What is wrong with what is there."""
    optional: str = ""
    """What goes without it, where it does not have to be there."""

    @property
    def met(self) -> bool:
        """Whether the file, or something in the directory, is there and nothing is wrong with it."""
        there = self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()))
        return there and not self.wrong

    @property
    def lines(self) -> list[str]:
        """What to print of it."""
        head = f"optional, {self.optional}: {self.path}" if self.optional else f"  {self.path}"
        return [head, *(f"      {line}" for line in (self.what, self.wrong) if line)]


@dataclass(frozen=True)
class Cost:
    """What a phase of the published recipe takes."""

    phase: str
    flops: float
    memory: float
    """Bytes: weights, gradients, the optimizer's state and what is kept for the backward pass."""


@dataclass(frozen=True)
class Table:
    """A published table."""

    title: str
    needs: Callable[[Config], list[Need]]
    weights: tuple[str, ...]
    """Hub ids, or library:name."""
    costs: Callable[[Config], list[Cost]]
    run: Callable[[Config, dict[str, str]], None]
    """Takes the weights by name, as found."""
    rehearse: Callable[[Config], Iterator[str]]
    """The dry run: yields a line after each phase."""


# Weights and data

PARTS = {
    "config.json": ("config.json",),
    "model.safetensors": (
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    ),
    "tokenizer.json": ("tokenizer.json", "merges.txt"),
}  # fmt: skip
"""What a model's directory has to have, and the files of which any one will do."""


def find_weights(directory: Path, name: str) -> str | None:
    """Weights called `name`, in `directory` or on the hub or in its cache, as the loaders take them; None: nowhere."""
    library, _, model = name.partition(":")
    if model:
        path = directory / f"{model}.pth"
        return f"{name}:{path}" if path.is_file() else None
    local = directory / name.rpartition("/")[2]
    if not lacking_parts(local):
        return str(local)
    try:
        for files in PARTS.values():
            require_reachable(name, files)
    except OSError:
        return None
    return name


def lacking_parts(directory: Path) -> list[str]:
    """What a model's directory does not have."""
    return [part for part, files in PARTS.items() if not any((directory / file).is_file() for file in files)]


def missing_weights(directory: Path, name: str) -> Need:
    """Where weights called `name` go."""
    library, _, model = name.partition(":")
    if model:
        return Need(directory / f"{model}.pth", f"{library}'s ImageNet weights of {model}, its state_dict")
    path = directory / name.rpartition("/")[2]
    wrong = f"it is there, but without {', '.join(lacking_parts(path))}" if path.is_dir() else ""
    return Need(path, f"hf download {name} --local-dir {path}", wrong)


def without_images(paths: Iterable[Path]) -> str:
    """How many of these images, whose names may lack the suffix, are not there, and one of them; nothing when all are.

    Each directory is listed once.
    """
    from clipcap.images import IMAGE_SUFFIXES

    listed: dict[Path, set[str]] = {}
    count, absent = 0, []
    for path in paths:
        folder = path.parent
        if folder not in listed:
            names = [Path(name) for name in os.listdir(folder)] if folder.is_dir() else []
            listed[folder] = {n.name for n in names} | {n.stem for n in names if n.suffix.lower() in IMAGE_SUFFIXES}
        count += 1
        if path.name not in listed[folder]:
            absent.append(path.name)
    return f"{len(absent):,} of {count:,} images are not there, such as {absent[0]}" if absent else ""


def check(config: Config, table: Table) -> tuple[dict[str, str], int]:
    """The weights by name, as found, and how much is missing; that and what is optional is printed."""
    found = {name: find_weights(config.weights, name) for name in table.weights}
    needs = table.needs(config)
    needs += [missing_weights(config.weights, name) for name, place in found.items() if place is None]
    missing = [need for need in needs if not need.met and not need.optional]
    print("missing:" if missing else "nothing is missing.")
    for need in missing + [need for need in needs if not need.met and need.optional]:
        print("\n".join(need.lines))
    return {name: place for name, place in found.items() if place is not None}, len(missing)


# What it costs


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product (2048 x 768 by 768 x 3072), the best of five.

    On a CPU seconds are of one thread's work, times the threads: what else runs here does not count.
    """
    x, y = (torch.randn(shape, device=device).to(dtype) for shape in ((2048, 768), (768, 3072)))
    on_cpu, best = device.type == "cpu", float("inf")
    products = 1 if on_cpu else 100  # one lasts no longer on a GPU than to ask for it
    clock = time.process_time if on_cpu else time.perf_counter
    for _ in range(6):  # the first only warms up
        begun = clock()
        for _ in range(products):
            z = x @ y
        z[0, 0].item()  # waits for a GPU
        best = min(best, clock() - begun)
    return products * 2.0 * 2048 * 768 * 3072 / best * (torch.get_num_threads() if on_cpu else 1)


def memory_here(device: torch.device) -> float:
    """Bytes of the GPU, or those of the machine that are free."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
    return 1024.0 * int(line.split()[1])


def estimate(config: Config, table: Table, device: torch.device) -> list[str]:
    """Lines that say what each phase takes in time and memory."""
    rate, how = 1e9 * config.matrix_rate, "as given"
    if not config.matrix_rate:
        rate = matrix_rate(device, resolve_dtype(config.runtime.precision))
        how = f"a {config.runtime.precision} matrix product measured here: {hardware()}"
    costs = table.costs(config)
    lines = [f"estimate at {rate / 1e9:,.0f} GFLOP/s ({how})"]
    for cost in costs:
        lines.append(f"  {cost.phase:<48} {cost.flops:9.2e} FLOP  {duration(cost.flops / rate):>10}  "
                     f"{cost.memory / 2**30:6.1f} GiB")
    total = sum(cost.flops for cost in costs)
    lines.append(f"  {'in all':<48} {total:9.2e} FLOP  {duration(total / rate):>10}")
    lines.append("  Time is arithmetic over that rate and so the least; docs/clipcap_speed.md has the share of it that "
                 "is reached.")
    lines.append(f"  For another machine: python -m experiments.reproduce {config.name} --dry-run --matrix-rate RATE, "
                 f"its GFLOP/s in {config.runtime.precision}, in which this run computes (--precision).")
    free, most = memory_here(device), max(cost.memory for cost in costs)
    if not config.matrix_rate and most > free:
        lines.append(f"  MEMORY: {most / 2**30:.1f} GiB are needed and {free / 2**30:.1f} are free here.")
    return lines


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def blocks(layers: int, width: int) -> float:
    """Weights of a Transformer's matrices."""
    return 12.0 * layers * width**2


def training_memory(weights: float, trained: float, *, states: int, kept: float) -> float:
    """Bytes in float32: weights; for trained ones a gradient, the optimizer's `states` and what it computes with.

    `kept` is for the backward pass; a GiB is for the program.
    """
    return 4 * (weights + trained * (2 + states)) + kept + 2**30


def kept_for_backward(layers: int, width: int, heads: int, batch: int, tokens: int) -> float:
    """Bytes of activations in float32 (Korthikanti et al. 2022, eq. 2, twice its 16 bits)."""
    return 2.0 * layers * batch * tokens * (34 * width + 5 * heads * tokens)


VIT = (blocks(12, 768) + 3072 * 768) * 50
"""Multiply-adds of ViT-B/32 for an image: 49 patches and the class token."""
SMALL, HEAD = blocks(12, 768), 50257.0 * 768
CAPTION, PREFIX = 13, 10
"""Tokens of a caption with its end (COCO's mean, benchmarks/training_throughput.py), and of the prefix."""


def captioner_costs(images: int, captions: int, scored: int) -> list[Cost]:
    """Both of the paper's captioners, 10 epochs at batch 40."""
    language = SMALL * (PREFIX + CAPTION) + HEAD * CAPTION
    kept = kept_for_backward(12, 768, 12, 40, PREFIX + CAPTION) + 40 * CAPTION * 50257 * 8
    mappers = {
        "transformer-frozen": (512 * 7680 + 64.0 * 768**2 * 20, 512 * 7680 + 64.0 * 768**2),
        "mlp-tuned": (512 * 3840 + 3840.0 * 7680,) * 2,
    }
    scoring = scored * (2 * VIT + 5 * CAPTION * 2 * (SMALL + HEAD))
    costs = [Cost("embedding the images", 2 * VIT * images, 4 * 151e6 + 1e9)]
    for name, (work, size) in mappers.items():
        tuned = name == "mlp-tuned"
        trained = size + tuned * (SMALL + HEAD)
        flops = 10.0 * captions * ((6 if tuned else 4) * language + 6 * work)
        weights = SMALL + HEAD + size
        costs.append(Cost(f"training {name}", flops, training_memory(weights, trained, states=2, kept=kept)))
        costs.append(Cost(f"captioning {scored:,} images by {name}", scoring, 4 * (weights + 151e6) + 1e9))
    return costs


FIELD = 593_408
"""Multiply-adds of the published MLP for a point."""
FIELD_STEPS = 200_000


def field_costs(arms: dict[str, tuple[int, bool]], scenes: int) -> list[Cost]:
    """Training and scoring by 25 views of 400x400; `arms` has the samples of a ray and whether CLIP is in the loss."""
    costs = []
    for name, (samples, semantic) in arms.items():
        step = 1024.0 * samples * 6 * FIELD
        if semantic:
            step += (168**2 * samples * 8 * FIELD + 6 * VIT) / 10  # 8: rendered again in the backward pass
        scoring = 25.0 * 400**2 * samples * 2 * FIELD
        kept = 4096.0 * samples * 256 * 11 * 4 if semantic else 1024.0 * samples * 256 * 11 * 4
        memory = training_memory(semantic * 151e6 + 2 * FIELD, 2 * FIELD, states=2, kept=kept)
        phase = f"{name}, {scenes} scene{'s' * (scenes > 1)}"
        costs.append(Cost(phase, scenes * (FIELD_STEPS * step + scoring), memory))
    return costs


def recycling_costs(text: Path, vocab_size: int) -> list[Cost]:
    """One pass over the text there, or over a gigabyte where there is none, at 4 bytes a token."""
    size = sum(file.stat().st_size for file in text.rglob("*") if file.is_file()) if text.is_dir() else 0
    given = f"{size / 1e6:,.1f} MB" if size else "a GB of text"
    tokens = (size or 1e9) / 4
    costs = []
    for name, layers, width, heads, share, whole in (
        ("relearning small", 12, 768, 12, 1.0, False),
        ("relearning medium after alignment", 24, 1024, 16, 0.25, False),
        ("fine-tuning small", 12, 768, 12, 1.0, True),
    ):
        matrices, table = blocks(layers, width), float(vocab_size * width)
        attention = 3 * 4.0 * 1024 * width * layers
        flops = share * tokens * ((6 if whole else 4) * matrices + 6 * table + attention)
        trained = table + whole * matrices
        kept = kept_for_backward(layers, width, heads, 8, 1024)
        memory = training_memory(matrices + table, trained, states=3, kept=kept)
        costs.append(Cost(f"{name}, {given}", flops, memory))
    return costs


# Captioners


def named_images(captions: Path, images: Path) -> tuple[list[Path], str]:
    """The images that a file of captions names, and what is wrong with the file."""
    from clipcap.data import read_dataset

    if not captions.is_file() or not images.is_dir():
        return [], ""
    try:
        return [item.path for item in read_dataset(captions, images=images, need_images=False)], ""
    except UserError as error:
        return [], str(error)


def java_needs() -> list[Need]:
    """What METEOR and SPICE need."""
    from pycocoevalcap.spice import spice

    from clipcap.metrics import SPICE_JARS

    library = Path(spice.__file__).parent / "lib"
    return [
        Need(
            Path(shutil.which("java") or "java"),
            "Java, on the path; the tokenizer of the published scores needs it, too",
            optional="without it METEOR and SPICE are not measured",
        ),
        *(
            Need(library / jar, "of Stanford CoreNLP 3.6.0", optional="without it SPICE is not measured")
            for jar in SPICE_JARS
        ),
    ]


def coco_needs(config: Config) -> list[Need]:
    place = config.data / "coco"
    captions, train, val = place / "dataset_coco.json", place / "train2014", place / "val2014"
    named, wrong = named_images(captions, place)
    elsewhere = without_images(path for path in named if path.parent not in (train, val))
    absent = {folder: without_images(path for path in named if path.parent == folder) for folder in (train, val)}
    return [
        Need(captions, "Karpathy's splits of COCO with the captions", wrong or elsewhere),
        Need(train, "COCO's training images of 2014", absent[train]),
        Need(val, "COCO's validation images of 2014", absent[val]),
        *java_needs(),
    ]


def conceptual_needs(config: Config) -> list[Need]:
    place, needs = config.data / "conceptual", []
    for split, file in (("train", "Train_GCC-training.tsv"), ("validation", "Validation_GCC-1.1.0-Validation.tsv")):
        captions = Need(place / file, f"Conceptual Captions, {split}: captions and URLs")
        journal = Need(place / split / "journal.jsonl", f"clipcap download {place / file} --out {place / split}")
        if captions.met and journal.met:
            try:
                there, lines = downloaded(captions.path, place / split)
            except UserError as error:
                captions = replace(captions, wrong=str(error))
            else:
                if there < lines or not there:
                    journal = replace(journal, wrong=f"{there:,} of the {lines:,} lines have their image")
                if there and 2 * there >= lines:
                    journal = replace(journal, optional="URLs die, and lines without an image are left out")
        needs += [captions, journal]
    return [*needs, *java_needs()]


def downloaded(captions: Path, place: Path) -> tuple[int, int]:
    """Of how many lines of a Conceptual Captions file `clipcap download` left the image, and how many there are."""
    from clipcap.download import read_journal, url_key
    from clipcap.readers import conceptual_rows

    images = {key: entry.file for key, entry in read_journal(place).items() if entry.file}
    names = {name for folder in {Path(file).parent for file in images.values()} if (place / folder).is_dir()
             for name in os.listdir(place / folder)}  # fmt: skip
    keys = [url_key(url) for _, _, url in conceptual_rows(captions)]
    return sum(key in images and Path(images[key]).name in names for key in keys), len(keys)


def nocaps_needs(config: Config) -> list[Need]:
    place = config.data / "nocaps"
    captions, images = place / "nocaps_val_4500_captions.json", place / "images"
    named, wrong = named_images(captions, images)
    return [
        *(java_needs() if trained_captioners(config) else coco_needs(config)),
        Need(captions, "nocaps' validation captions, with domains", wrong),
        Need(images, "its images", without_images(named)),
    ]


def trained_captioners(config: Config) -> tuple[str, ...]:
    """The captioners of clipcap-coco, when both are there."""
    from experiments.clipcap_tables import VARIANTS

    models = [config.place.parent / "clipcap-coco" / name / "model" for name in VARIANTS]
    files = [model / file for model in models for file in ("config.json", "model.safetensors")]
    return tuple(map(str, models)) if all(file.is_file() for file in files) else ()


def nocaps_costs(config: Config) -> list[Cost]:
    """Those of COCO's captioners too, unless they are there."""
    if not trained_captioners(config):
        return captioner_costs(123_287 + 4_500, 566_747, 4_500)
    return [cost for cost in captioner_costs(4_500, 0, 4_500) if cost.flops]


def table_options(config: Config, weights: dict[str, str]) -> dict[str, Any]:
    """What all captioning tables are given."""
    return {
        "clip": weights[CLIP], "gpt2": weights[GPT2], "out": config.place, "steps": config.steps,
        "runtime": config.runtime,
    }  # fmt: skip


def run_coco(config: Config, weights: dict[str, str]) -> None:
    from experiments import clipcap_coco

    place = config.data / "coco"
    options = table_options(config, weights)
    clipcap_coco.main(clipcap_coco.Config(data=place / "dataset_coco.json", images=place, **options))


def run_conceptual(config: Config, weights: dict[str, str]) -> None:
    from experiments import clipcap_conceptual

    place = config.data / "conceptual"
    clipcap_conceptual.main(
        clipcap_conceptual.Config(
            data=place / "Train_GCC-training.tsv",
            images=place / "train",
            test=place / "Validation_GCC-1.1.0-Validation.tsv",
            test_images=place / "validation",
            skip_missing=True,
            **table_options(config, weights),
        )
    )


def run_nocaps(config: Config, weights: dict[str, str]) -> None:
    """Scores the captioners of clipcap-coco when they are there, or trains them."""
    from experiments import clipcap_nocaps

    coco, place, trained = config.data / "coco", config.data / "nocaps", trained_captioners(config)
    clipcap_nocaps.main(
        clipcap_nocaps.Config(
            data=None if trained else coco / "dataset_coco.json",
            images=None if trained else coco,
            nocaps=place / "nocaps_val_4500_captions.json",
            nocaps_images=place / "images",
            models=trained,
            **table_options(config, weights),
        )
    )


def rehearse_captioners(config: Config) -> Iterator[str]:
    """Embeds, trains both captioners for two steps of 4 captions, and captions by beam search."""
    from transformers import GPT2Config

    from clipcap.decoding import decode
    from clipcap.embeddings import encode
    from clipcap.model import ClipCapConfig, ClipCapModel
    from clipcap.training import Captioning
    from common.clip import load_clip
    from experiments.clipcap_tables import VARIANTS

    clip = load_clip(random_clip(config.place), device=config.runtime.device)
    begun = clock()
    for _ in range(2):
        embeddings = encode(clip, torch.randn(2, 3, 224, 224, device=clip.device), "embedding")
    seconds = (clock() - begun) / 2
    yield f"embedding: CLIP ViT-B/32, {seconds:.2f} s for 2 images"
    del clip
    sizes = GPT2Config().to_dict()
    for name, variant in VARIANTS.items():
        model = ClipCapModel(ClipCapConfig(gpt2_config=sizes, clip_width=512, eos_token_id=50256, **variant)).train()
        module = Captioning(model, lr=2e-5, warmup=1, total=2, weight_decay=0.01, schedule="linear")
        ids = torch.randint(50257, (4, CAPTION))
        batch = {"clip_embeddings": torch.randn(4, 512), "input_ids": ids, "labels": ids}
        seconds = two_steps(module, batch, config.runtime)
        yield f"training {name}: {sizes_of(model)}, {seconds:.2f} s a step of 4 captions (published: 40)"
        model.eval().to(embeddings.device)
        begun = clock()
        found = decode(model, embeddings, strategy="beam", num_beams=5, max_new_tokens=2)
        seconds = (clock() - begun) / 2
        yield f"captioning by {name}: {seconds:.2f} s a token of {len(found)} images with 5 beams"
        del model, module


# Fields


def scene_needs(config: Config) -> list[Need]:
    from dietnerf.metrics import INCEPTION_FILE, VGG_FILE

    place, cache = config.data / "nerf_synthetic", Path(torch.hub.get_dir()) / "checkpoints"
    files = [place / scene / f"transforms_{split}.json" for scene in config.scenes for split in ("train", "test")]
    without = "without it, before a run is scored,"
    return [
        *(Need(f, f"NeRF-synthetic's scene {f.parent.name}, with its images", wrong_with(f)) for f in files),
        Need(cache / VGG_FILE, "torchvision's VGG-16", optional=f"{without} LPIPS is not measured"),
        Need(cache / INCEPTION_FILE, "torch-fidelity's Inception", optional=f"{without} FID and KID are not measured"),
    ]


def wrong_with(transforms: Path) -> str:
    """What is wrong with a transforms file that is there, or with its images."""
    if not transforms.is_file():
        return ""
    try:
        frames = json.loads(transforms.read_text(encoding="utf-8"))["frames"]
        paths = [transforms.parent / frame["file_path"] for frame in frames]
    except (ValueError, KeyError, TypeError):
        paths = []
    return without_images(paths) if paths else "it names no images"


FIELD_ARMS = {
    "nerf": (256, False), "simplified": (128, False), "dietnerf": (256, True), "dietnerf-tuned": (256, True),
}  # fmt: skip


def published_options(config: Config, out: Path, **changes: Any) -> dict[str, Any]:
    """Options of `experiments.dietnerf_synthetic` for the paper's protocol."""
    from dietnerf.data import PAPER_VIEWS

    return {
        "scenes": tuple(config.data / "nerf_synthetic" / scene for scene in config.scenes),
        "view_ids": PAPER_VIEWS, "sizes": (400,), "seeds": (config.runtime.seed,), "eval_every": 8,
        "resolution": 168, "steps": config.steps, "out": out, "runtime": config.runtime,
    } | changes  # fmt: skip


def small_options(config: Config, out: Path, encoder: str) -> dict[str, Any]:
    """The same on few rays of the packaged scene at 16 pixels, the field and the encoder at full size.

    In the arm that ends without the semantic loss, the last two of ten steps do.
    """
    return published_options(
        config, out, scenes=(ASSETS / "samples" / "multiview",), view_ids=(0, 1), sizes=(16,), eval_every=16,
        resolution=8, steps=10, rays=4, encoder=encoder,
    )  # fmt: skip


def field_table(runs: list[dict[str, Any]], published: dict[str, dict[str, tuple[float, ...]]]) -> list[str]:
    """Markdown of the scores of runs of `experiments.dietnerf_synthetic` beside the published ones; the means last.

    A published mean is over all eight scenes, and stands beside ours of all eight only.
    """
    names = [name for name, _ in FIGURES.values()]
    lines = ["| scene | run | " + " | ".join(f"{name} | published" for name in names) + " |"]
    lines.append("|---|---" + "|--:" * 2 * len(names) + "|")
    arms: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in published["mean"]}
    for run in runs:
        name = run["arm"] if run["views"] != 100 else f"{run['arm']}, 100 views"
        arms.setdefault(name, {}).setdefault(run["scene"], []).append(run["scores"])

    def line(scene: str, name: str, scores: list[dict[str, float]], figures: tuple[float, ...]) -> str:
        cells = [scene, name]
        for number, (key, (_, digits)) in enumerate(FIGURES.items()):
            values = [score[key] for score in scores if score.get(key) is not None]
            whole = len(values) == len(scores)
            cells.append(f"{statistics.fmean(values):.{digits}f}" if whole else "not measured")
            cells.append(str(figures[number]) if number < len(figures) else "–")
        return f"| {' | '.join(cells)} |"

    for scene in sorted({run["scene"] for run in runs}):
        for name, scenes in arms.items():
            if scene in scenes:
                lines.append(line(scene, name, scenes[scene], published.get(scene, {}).get(name, ())))
    for name, scenes in arms.items():
        if scenes:
            figures = published["mean"].get(name, ()) if scenes.keys() == set(BLENDER) else ()
            lines.append(line(f"mean of {len(scenes)}", name, [s for found in scenes.values() for s in found], figures))
    lines.append("")
    for key, (title, _) in FIGURES.items():
        reasons = Counter(run["not_measured"][key].partition(":")[0] for run in runs if key in run["not_measured"])
        lines += [f"{title} of {n} of {len(runs)} runs is not measured: {reason}." for reason, n in reasons.items()]
    if absent := [scene for scene in BLENDER if all(run["scene"] != scene for run in runs)]:
        lines.append(f"The published means are of all 8 scenes, and not here are {', '.join(absent)}.")
    return [
        *lines,
        "SSIM is with a Gaussian window and LPIPS of values in [-1, 1]; the paper's are with a uniform window and of "
        "values in [0, 1], which `dietnerf evaluate RUN --protocol paper` measures.",
    ]


def run_fields(config: Config, weights: dict[str, str]) -> None:
    from experiments import dietnerf_synthetic as script

    options = published_options(config, config.place, encoder=weights[CLIP])
    script.main(script.Config(arms=tuple(FIELD_ARMS), **options))
    script.main(script.Config(arms=("nerf",), **options | {"view_ids": (), "views": (100,)}))
    conclude(config, field_table(script.read_runs(config.place), {"lego": DIETNERF_LEGO, "mean": DIETNERF_MEAN}))


def run_encoders(config: Config, weights: dict[str, str]) -> None:
    from experiments import dietnerf_synthetic as script

    runs = []
    for name, encoder in ENCODERS.items():
        out = config.place / name.replace("/", "").replace(" ", "-")
        script.main(script.Config(arms=("dietnerf",), **published_options(config, out, encoder=weights[encoder])))
        runs += [run | {"arm": name} for run in script.read_runs(out)]
    tables = {"lego": DIETNERF_LEGO, "mean": DIETNERF_MEAN}
    lines = field_table(runs, {place: {"CLIP ViT-B/32": table["dietnerf"]} for place, table in tables.items()})
    conclude(config, [*lines, "", "The paper's figures of the other encoders are in its ablation, not here."])


def rehearse_fields(config: Config) -> Iterator[str]:
    from experiments import dietnerf_synthetic as script

    encoder = random_clip(config.place)
    for arm in FIELD_ARMS:
        begun = clock()
        options = small_options(config, config.place / "dry-run", encoder)
        script.main(script.Config(arms=(arm,), **options))
        yield f"{arm}: 10 steps of 4 rays (published: 1,024) and a view of 16x16, {clock() - begun:.1f} s"


def rehearse_encoders(config: Config) -> Iterator[str]:
    from torchvision import models

    from experiments import dietnerf_synthetic as script

    for name, encoder in ENCODERS.items():
        library, _, model = encoder.partition(":")
        place = random_clip(config.place)
        if model:
            path = config.place / "dry-run" / f"{model}.pth"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(models.get_model(model, weights=None).state_dict(), path)
            place = f"{encoder}:{path}"
        begun = clock()
        options = small_options(config, config.place / "dry-run" / name.replace("/", ""), place)
        script.main(script.Config(arms=("dietnerf",), **options | {"steps": 2}))
        yield f"{name}: 2 steps of 4 rays and a view of 16x16, {clock() - begun:.1f} s"


# Languages


def text_needs(language: str) -> Callable[[Config], list[Need]]:
    def needs(config: Config) -> list[Need]:
        name = LANGUAGES[language]["name"].capitalize()
        about = f"{name} text: .txt, .jsonl, .html (also .xz, .gz) or a Hugging Face dataset on disk, some gigabytes"
        return [
            Need(config.data / "text" / language, about),
            *(
                replace(missing_weights(config.weights, hub), optional=f"without it '{what}' is not measured")
                for what, hub in released(language).items()
                if find_weights(config.weights, hub) is None
            ),
        ]

    return needs


def released(language: str) -> dict[str, str]:
    """The models that the authors released, by what they are."""
    name = LANGUAGES[language]["name"]
    return {
        "released, small relearned": f"GroNLP/gpt2-small-{name}-embeddings",
        "released, small fine-tuned": f"GroNLP/gpt2-small-{name}",
        "released, medium relearned": f"GroNLP/gpt2-medium-{name}-embeddings",
    }


def run_language(language: str) -> Callable[[Config, dict[str, str]], None]:
    def run(config: Config, weights: dict[str, str]) -> None:
        from common.gpt2 import load_gpt2
        from recycle_gpt2.corpus import load_documents
        from recycle_gpt2.evaluate import score_documents, summarise
        from recycle_gpt2.run import RunConfig, recycle
        from recycle_gpt2.stages import FinetuneConfig, finetune
        from recycle_gpt2.training import StageConfig

        stage = StageConfig()
        stage = replace(stage, tokens=config.steps * stage.batch_size * 1024)
        medium = recycle(
            RunConfig(
                text=(config.data / "text" / language,),
                out=config.place / "medium",
                language=language,
                small=weights[GPT2],
                large=weights[MEDIUM],
                vocab_size=LANGUAGES[language]["vocab_size"],
                choose=False,
                unfreeze="none",
                stage=stage,
                runtime=config.runtime,
            )
        )
        stages = config.place / "medium.stages"
        relearned = stages / "relearn" / "model"
        tuned = finetune(
            FinetuneConfig(
                model=relearned,
                corpus=stages / "corpus",
                out=config.place / "small-fine-tuned",
                stage=replace(stage, lr=1e-4),
                runtime=config.runtime,
            )
        )
        models: dict[str, str | None] = {
            "small relearned": str(relearned), "small fine-tuned": str(tuned), "medium relearned": str(medium),
        }  # fmt: skip
        models |= {name: find_weights(config.weights, hub) for name, hub in released(language).items()}
        documents, device = load_documents(stages / "corpus", "test"), start(config.runtime)
        lines = ["| model | bits per byte | 95% interval | perplexity |", "|---|--:|--:|--:|"]
        for name, source in models.items():
            if source is None:
                lines.append(f"| {name} | not measured: its weights are not at hand | | |")
                continue
            model, tokenizer = load_gpt2(source, device=device, frozen=True)
            found = summarise(score_documents(model, tokenizer, documents, progress=True), seed=config.runtime.seed)
            low, high = found.bits_per_byte_interval
            figures = f"{found.bits_per_byte:.4f} | {low:.4f} to {high:.4f} | {found.perplexity:.2f}"
            lines.append(f"| {name} | {figures} |")
        lines += [
            "",
            f"{len(documents)} held-out documents of this text. The papers' perplexities are of texts that are not "
            f"public, so what stands beside ours is the authors' released models on the same documents; bits per byte "
            f"compare them, perplexities only models with one tokenizer.",
        ]
        conclude(config, lines)

    return run


def rehearse_language(language: str) -> Callable[[Config], Iterator[str]]:
    def rehearse(config: Config) -> Iterator[str]:
        from transformers import GPT2Config, GPT2LMHeadModel

        from common.gpt2 import replace_token_table, token_table
        from common.language import score
        from recycle_gpt2.alignment import align
        from recycle_gpt2.lexical import train_only
        from recycle_gpt2.training import Plan, Recycling, StageConfig

        def train(model: GPT2LMHeadModel, lr: float = 1e-3) -> float:
            batch = torch.randint(vocab_size, (1, 64))
            return two_steps(Recycling(model, StageConfig(lr=lr), Plan(2, 2, 64), 1024), batch, config.runtime)

        vocab_size, sizes = LANGUAGES[language]["vocab_size"], GPT2Config()
        step = "s a step of 64 tokens (published: 8 blocks of 1,024)"
        small = GPT2LMHeadModel(sizes)
        english = token_table(small)
        replace_token_table(small, torch.randn(vocab_size, 768) * sizes.initializer_range)
        train_only(small)
        yield f"relearning small: {sizes_of(small)}, {train(small):.2f} {step}"
        train_only(small, layers="all")
        yield f"fine-tuning small: {sizes_of(small)}, {train(small, 1e-4):.2f} {step}"
        nats = score(small.eval().cpu(), torch.randint(vocab_size, (96,)), block=64, stride=32).nats
        yield f"scoring: {nats / 96:.2f} nats a token"
        target = token_table(small).clone()
        del small
        medium = GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16))
        begun = clock()
        replace_token_table(medium, align(english, token_table(medium), target))
        yield f"alignment by least squares: {len(english):,} rows, {clock() - begun:.1f} s"
        train_only(medium)
        yield f"relearning medium: {sizes_of(medium)}, {train(medium):.2f} {step}"

    return rehearse


# What all have


def random_clip(out: Path) -> str:
    """A directory of ViT-B/32 with random weights, written once."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    directory = out / "dry-run" / "clip"
    if not (directory / "tokenizer.json").is_file():
        sizes = CLIPConfig()
        sizes.text_config.eos_token_id = 2  # as in OpenAI's own files: whatever the tokenizer ends with
        CLIPModel(sizes).half().save_pretrained(directory)
        AutoTokenizer.from_pretrained(ASSETS / "clip-tiny").save_pretrained(directory)
    return str(directory)


def sizes_of(model: torch.nn.Module) -> str:
    """How many parameters there are, and how many of them train."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return f"{sum(n for n, _ in counts):,} parameters, {sum(n for n, trained in counts if trained):,} trained"


def two_steps(module: Any, batch: Any, runtime: RuntimeConfig) -> float:
    """Two optimizer steps by Lightning, without checkpoints; returns the seconds of the second."""
    from lightning import Callback, Trainer
    from torch.utils.data import DataLoader

    from common.runtime import resolve_device
    from common.training import LIGHTNING_PRECISION

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.begun = clock()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            loss: Tensor = outputs["loss"]
            self.loss, self.seconds = loss.item(), clock() - self.begun

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    device, watch = resolve_device(runtime.device), Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=2, accelerator={"cuda": "gpu"}.get(device.type, device.type), devices=1, logger=False,
            precision=LIGHTNING_PRECISION[runtime.precision], gradient_clip_val=1.0,  # type: ignore[arg-type]
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        )  # fmt: skip
        twice: Any = [batch, batch]
        trainer.fit(module, DataLoader(twice, batch_size=None))
    if trainer.global_step != 2 or watch.loss != watch.loss:
        raise RuntimeError(f"two steps ended after {trainer.global_step} with the loss {watch.loss}")
    return watch.seconds


def clock() -> float:
    """Seconds: of the processor's work where there is no GPU, so that what else runs here does not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def peak_memory() -> float:
    """The most that this process has held, in bytes: of the GPU when one is used, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def conclude(config: Config, lines: list[str]) -> None:
    """Print a table and write it beside its record."""
    print("\n".join(lines))
    write_text(config.place / "table.md", "\n".join(lines) + "\n")
    write_json(config.place / "reproduction.json",
               {"lines": lines, "config": config, "hardware": hardware(), "versions": versions()})


TABLES: dict[str, Table] = {
    "clipcap-coco": Table(
        "ClipCap on COCO (Mokady et al. 2021, table 1)", coco_needs, (CLIP, GPT2),
        lambda config: captioner_costs(123_287, 566_747, 5_000), run_coco, rehearse_captioners,
    ),
    "clipcap-conceptual": Table(
        "ClipCap on Conceptual Captions (Mokady et al. 2021, table 1)", conceptual_needs, (CLIP, GPT2),
        lambda config: captioner_costs(3_334_173, 3_318_333, 15_840), run_conceptual, rehearse_captioners,
    ),
    "clipcap-nocaps": Table(
        "ClipCap on nocaps (Mokady et al. 2021, table 1)", nocaps_needs, (CLIP, GPT2),
        nocaps_costs, run_nocaps, rehearse_captioners,
    ),
    "dietnerf-synthetic": Table(
        "DietNeRF from 8 views (Jain et al. 2021, table 1)", scene_needs, (CLIP,),
        lambda config: field_costs(FIELD_ARMS | {"nerf, 100 views": (256, False)}, len(config.scenes)),
        run_fields, rehearse_fields,
    ),
    "dietnerf-encoders": Table(
        "DietNeRF with other encoders (Jain et al. 2021, ablation)", scene_needs, tuple(ENCODERS.values()),
        lambda config: field_costs(dict.fromkeys(ENCODERS, (256, True)), len(config.scenes)),
        run_encoders, rehearse_encoders,
    ),
} | {
    f"recycle-{settings['name']}": Table(
        f"GPT-2 recycled, {settings['name'].capitalize()} (de Vries & Nissim 2021, sec. 4)",
        text_needs(language), (GPT2, MEDIUM),
        lambda config, language=language, settings=settings: recycling_costs(  # type: ignore[misc]
            config.data / "text" / language, settings["vocab_size"]
        ),
        run_language(language), rehearse_language(language),
    )
    for language, settings in LANGUAGES.items()
}  # fmt: skip


def main(config: Config) -> None:
    """Say what is missing and what it costs, and run when nothing is missing; or the costs and the dry run."""
    for name in ("steps", "matrix_rate"):
        require_at_least(name, getattr(config, name), 0)
    warnings.filterwarnings("ignore", module=r"nerfstudio\b|torch\b")  # of what they will drop one day
    table, device = TABLES[config.name], start(config.runtime)
    print(table.title)
    weights, missing = ({}, 0) if config.dry_run else check(config, table)
    print("\n".join(estimate(config, table, device)), flush=True)
    if config.dry_run:
        for line in table.rehearse(config):
            print(f"dry run: {line}; peak {peak_memory() / 2**30:.1f} GiB", flush=True)
        print("every phase ran.")
        return
    if missing:
        raise UserError(
            f"{missing} of what {config.name} needs is not there: put it where the list above says, or give "
            f"--data and --weights (--dry-run needs none of it)."
        )
    table.run(config, weights)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
