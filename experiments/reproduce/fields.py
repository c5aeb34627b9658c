"""DietNeRF's published tables (Jain et al. 2021, table 1 and the ablation of encoders)."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.pretrained import ASSETS
from experiments.reproduce.config import BLENDER, CLIP, Config, conclude
from experiments.reproduce.needs import Need, without_images
from experiments.reproduce.rehearsal import clock, random_clip

ENCODERS = {
    "CLIP ViT-B/32": CLIP,
    "ImageNet ViT-B/32": "torchvision:vit_b_32",
    "ImageNet ResNet-50": "torchvision:resnet50",
}
FIGURES = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3), "fid": ("FID", 1), "kid": ("KID", 3)}
"""Scores of `experiments.fields.synthetic`: the name in the table, and the digits."""
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
    """What is wrong with a transforms file that exists, or with its images."""
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
    """Options of `experiments.fields.synthetic` for the paper's protocol."""
    from dietnerf.views import PAPER_VIEWS

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
    """Markdown of the scores of runs of `experiments.fields.synthetic` beside the published ones; the means last.

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
    from experiments.fields import synthetic as script

    options = published_options(config, config.place, encoder=weights[CLIP])
    script.main(script.Config(arms=tuple(FIELD_ARMS), **options))
    script.main(script.Config(arms=("nerf",), **options | {"view_ids": (), "views": (100,)}))
    conclude(config, field_table(script.read_runs(config.place), {"lego": DIETNERF_LEGO, "mean": DIETNERF_MEAN}))


def run_encoders(config: Config, weights: dict[str, str]) -> None:
    from experiments.fields import synthetic as script

    runs = []
    for name, encoder in ENCODERS.items():
        out = config.place / name.replace("/", "").replace(" ", "-")
        script.main(script.Config(arms=("dietnerf",), **published_options(config, out, encoder=weights[encoder])))
        runs += [run | {"arm": name} for run in script.read_runs(out)]
    tables = {"lego": DIETNERF_LEGO, "mean": DIETNERF_MEAN}
    lines = field_table(runs, {place: {"CLIP ViT-B/32": table["dietnerf"]} for place, table in tables.items()})
    conclude(config, [*lines, "", "The paper's figures of the other encoders are in its ablation, not here."])


def rehearse_fields(config: Config) -> Iterator[str]:
    from experiments.fields import synthetic as script

    encoder = random_clip(config.place)
    for arm in FIELD_ARMS:
        begun = clock()
        options = small_options(config, config.place / "dry-run", encoder)
        script.main(script.Config(arms=(arm,), **options))
        yield f"{arm}: 10 steps of 4 rays (published: 1,024) and a view of 16x16, {clock() - begun:.1f} s"


def rehearse_encoders(config: Config) -> Iterator[str]:
    from torchvision import models

    from experiments.fields import synthetic as script

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
