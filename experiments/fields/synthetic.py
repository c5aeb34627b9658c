"""The table of DietNeRF's experiments: fields, losses and controls over scenes, numbers of views and seeds.

    python -m experiments.fields.synthetic --scenes common/assets/samples/multiview --arms grid grid-clip grid-random

Each run leaves one JSON file in OUT/runs; a run that exists is not made again, and the tables, curves and contact
sheets are made of whatever exists. --budget ends the work early, between runs.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from common.checks import UserError, require_fields_at_least, require_same_settings, run_command
from common.files import write_json
from common.pretrained import ASSETS
from common.report import Page, contact_sheet, plot_lines
from common.runtime import RuntimeConfig, provenance, start
from dietnerf.cli import silence_nerfstudio
from dietnerf.evaluation import score_scene
from dietnerf.metrics import MetricsConfig
from dietnerf.poses import estimate_ranges
from dietnerf.scene import Scene
from dietnerf.settings import TrainConfig, changed, nerfstudio_config, options_of, train_config, without_effect
from dietnerf.training import train
from experiments import from_command_line
from experiments.fields.arms import ARMS, BASELINES, CHANGE, CONTROL

FINE_TUNED = "-tuned"
"""An arm's name with this ending drops the semantic loss for the last fifth of the steps (the paper's MSE tuning)."""
SCORES = ("psnr", "psnr_farthest", "psnr_foreground", "ssim", "similarity")
FAR_SIDE = tuple(f"{name}_far_side" for name in ("psnr", "psnr_foreground", "similarity"))
"""The same over the views from behind, where all training cameras stand on one side."""
DIFFERENCES = ("psnr", "similarity", *FAR_SIDE)
"""Scores whose paired differences are shown."""
NEAR = 60.0
"""Training cameras within so many degrees of their mean direction stand on one side."""


@dataclass(frozen=True)
class Config:
    """Run the experiments that are missing, and write the tables of all that exist."""

    scenes: tuple[Path, ...] = (ASSETS / "samples" / "multiview",)
    """Directories of scenes."""
    arms: tuple[str, ...] = ("grid", "grid-plain", "grid-clip", "grid-hinge-augment", "grid-random-augment")
    """Rows of the table; with changes such as grid+lr=0.3."""
    views: tuple[int, ...] = (3, 4, 8)
    """Numbers of training views, chosen far from each other; 0 is all."""
    view_ids: tuple[int, ...] = ()
    """Exactly these training views instead."""
    sizes: tuple[int, ...] = (100,)
    """Widths of the images in pixels; 0 keeps theirs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each run."""
    steps: int = 0
    """Training steps; 0 is each method's own number."""
    rays: int = 0
    """Rays a step; 0 is each method's own number."""
    hold_out: int = 0
    """Hold every Nth photograph of a capture out; 0 is the scene's own split."""
    eval_every: int = 1
    """Score every Nth held-out view."""
    eval_first: int = 0
    """The first one: settings are chosen on other views than those that are reported."""
    resolution: int = 64
    """Side of the semantic loss's renders."""
    start: float = 0.0
    """Share of the steps before the first semantic loss."""
    encoder: str = "tiny"
    """Encoder of the semantic loss."""
    text: str = ""
    """What the scene shows, for arms that end in -text."""
    second_encoder: str = ""
    """CLIP that scores similarity and is in no loss."""
    budget: float = 0.0
    """CPU minutes after which no further run begins; 0 is no limit."""
    out: Path = Path("out/dietnerf_synthetic")
    """Where everything goes."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def training_config(config: Config, scene: Path, size: int, arm: str, views: int, seed: int, out: Path) -> TrainConfig:
    """What one run trains.

    Raises:
        UserError: an arm that does not exist.
    """
    base, *changes = arm.split(CHANGE)
    name = base.removesuffix(FINE_TUNED)
    if name not in ARMS:
        raise UserError(f"arm is {arm!r}: choose of {', '.join(ARMS)}, each also with {FINE_TUNED}.")
    options: dict[str, Any] = dict(
        out=out,
        image_size=size,
        hold_out=config.hold_out,
        num_views=0 if config.view_ids else views,
        view_ids=config.view_ids,
        steps=config.steps,
        rays=config.rays,
        semantic_encoder=config.encoder,
        semantic_resolution=config.resolution,
        val_views=0,
        progress=False,
        runtime=replace(config.runtime, seed=seed),
    )
    chosen = train_config(scene, **options | ARMS[name])
    for change in changes:
        key, _, value = change.partition("=")
        if key not in options_of(chosen) or not value:
            raise UserError(f"arm {arm!r}: {change!r} is no setting of dietnerf train, such as lr=0.3.")
        parsed = yaml.safe_load(value)
        chosen = changed(chosen, **{key: tuple(parsed) if isinstance(parsed, list) else parsed})
    if name.endswith("-text"):
        if not config.text:
            raise UserError(f"arm {arm!r} needs a description: give --text.")
        chosen = changed(chosen, semantic_text=config.text)
    steps = nerfstudio_config(chosen).max_num_iterations
    if config.start and chosen.semantic.weight:
        chosen = changed(chosen, semantic_start=round(config.start * steps))
    if base.endswith(FINE_TUNED):
        chosen = changed(chosen, semantic_end=round(0.8 * steps))
    return chosen


def base_arm(arm: str) -> str:
    """The row of `ARMS` that an arm comes from."""
    return arm.split(CHANGE)[0].removesuffix(FINE_TUNED)


def run_one(config: Config, settings: TrainConfig, path: Path, labels: dict[str, Any]) -> dict[str, Any]:
    """Train and score once; writes `path` and a picture of some held-out views beside it."""
    wall, cpu = time.perf_counter(), time.process_time()
    directory = train(settings)
    trained = time.process_time() - cpu
    scene = Scene.load(directory, device=config.runtime.device)
    found = score_scene(
        scene,
        every=config.eval_every,
        first=config.eval_first,
        metrics=MetricsConfig(second_encoder=config.second_encoder),
        progress=False,
    )
    behind = far_side(scene, found.ids)
    rows = found.scores.per_view
    for name in SCORES if behind else ():
        values = [float(rows[i][name]) for i in behind if name in rows[i]]
        if values and f"{name}_far_side" in FAR_SIDE:
            found.scores.values[f"{name}_far_side"] = statistics.fmean(values)
    record = {
        **labels,
        "scores": found.scores.values,
        "not_measured": found.scores.not_measured,
        "training_views": found.record["training_views"],
        "held_out_views": found.ids,
        "steps": scene.step + 1,
        "cpu_seconds": round(trained, 1),
        "cpu_seconds_with_scoring": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - wall, 1),
        "config": options_of(settings),
        "scoring": scoring(config),
        **provenance(),
    }
    seen = behind or list(range(len(found.ids)))
    shown = seen[:: max(1, len(seen) // 3)][:3]
    pairs = [np.concatenate((found.truths[i].numpy(), found.renderings[i].rgb.numpy()), axis=1) for i in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = (np.concatenate(pairs, axis=0).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    Image.fromarray(picture).save(path.with_suffix(".png"))
    write_json(path, record)
    return record


def far_side(scene: Scene, ids: Sequence[int]) -> list[int]:
    """Places among the scored views `ids` of those from behind: more than 90 degrees, around the vertical axis, from
    the mean direction in which the training cameras stand. None where these do not stand on one side."""
    views, training = scene.held_out_views, scene.training_views.cameras.camera_to_worlds
    centre = torch.tensor(estimate_ranges(training).centre)

    def directions(positions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 2"]:
        return torch.nn.functional.normalize((positions - centre)[:, :2], dim=1)

    trained = directions(training[:, :, 3].cpu())
    middle = torch.nn.functional.normalize(trained.mean(dim=0), dim=0)
    if (trained @ middle).min() < math.cos(math.radians(NEAR)):
        return []
    held_out = views.cameras.camera_to_worlds[[views.view_ids.index(i) for i in ids], :, 3].cpu()
    return (directions(held_out) @ middle < 0).nonzero()[:, 0].tolist()


def require_same_run(path: Path, config: Config, settings: TrainConfig) -> None:
    """Raise UserError when a finished run was trained or scored with other settings than are asked for now."""
    record = json.loads(path.read_text())
    before = record["config"] | record.get("scoring", {})
    now = json.loads(json.dumps(options_of(settings) | scoring(config), default=str))
    # Older runs lack later settings, and have None where they left one to the method.
    same = {name for name, value in before.items() if value is not None}
    same -= {"scene", "out", "resume", "progress", "runtime", *without_effect(settings)}
    require_same_settings(path, before, {name: value for name, value in now.items() if name in same})


def scoring(config: Config) -> dict[str, Any]:
    """What the scores of a run depend on, beside its training."""
    return {name: getattr(config, name) for name in ("eval_every", "eval_first", "second_encoder")}


def read_runs(out: Path) -> list[dict[str, Any]]:
    """Records of all runs that exist."""
    return [json.loads(path.read_text()) for path in sorted((out / "runs").glob("**/*.json"))]


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of every score, a row for each scene, size, number of views and arm."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["scene"], run["size"], run["views"], run["arm"]), []).append(run)
    rows = []
    order = list(ARMS)
    for key in sorted(groups, key=lambda k: (*k[:3], order.index(base_arm(k[3])), k[3])):
        group = groups[key]
        row: dict[str, Any] = dict(zip(("scene", "size", "views", "arm"), key, strict=True)) | {"seeds": len(group)}
        for name in (*SCORES, *FAR_SIDE):
            values = [run["scores"][name] for run in group if run["scores"].get(name) is not None]
            if values:
                row[name] = statistics.fmean(values)
                row[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        row["cpu_seconds"] = statistics.fmean(run["cpu_seconds"] for run in group)
        rows.append(row)
    return rows


def rivals(arm: str) -> list[str]:
    """What an arm is compared with: the same field without a semantic loss, and its control."""
    base, *changes = arm.split(CHANGE)
    beginning = next((name for start, name in BASELINES.items() if arm.startswith(start)), "")
    plain = [change for change in changes if not change.startswith("semantic_")]
    return [
        other for other in (CHANGE.join([beginning, *plain]), CHANGE.join([base + CONTROL, *changes])) if other != arm
    ]


def gains(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of each arm less those of each of its `rivals`, all else being equal: mean and standard error."""
    found = {(r["scene"], r["size"], r["views"], r["seed"], r["arm"]): r["scores"] for r in runs}
    paired: dict[tuple[Any, ...], list[tuple[dict[str, float], dict[str, float]]]] = {}
    for (scene, size, views, seed, arm), scores in found.items():
        for rival in rivals(arm):
            other = found.get((scene, size, views, seed, rival))
            if other is not None:
                paired.setdefault((scene, size, views, arm, rival), []).append((scores, other))
    rows = []
    for key, pairs in sorted(paired.items()):
        row: dict[str, Any] = dict(zip(("scene", "size", "views", "arm", "against"), key, strict=True))
        row["pairs"] = len(pairs)
        for name in DIFFERENCES:
            values = [ours[name] - theirs[name] for ours, theirs in pairs if name in ours and name in theirs]
            if values:
                row[f"{name}_gain"] = statistics.fmean(values)
                row[f"{name}_error"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        rows.append(row)
    return rows


def write_tables(out: Path) -> list[dict[str, Any]]:
    """results.json, table.md, views.png and index.html from the runs in `out`; returns the rows."""
    runs = read_runs(out)
    rows, differences = tabulate(runs), gains(runs)
    write_json(out / "results.json", {"rows": rows, "gains": differences, "runs": len(runs)})
    names = [name for name in (*SCORES, *FAR_SIDE) if any(name in row for row in rows)]
    lines = ["| scene | size | views | arm | seeds | " + " | ".join(names) + " | CPU s |"]
    lines.append("|" + "---|" * (6 + len(names)))
    for row in rows:
        cells = [_with_spread(row, name) for name in names]
        head = [str(row[key]) for key in ("scene", "size", "views", "arm", "seeds")]
        lines.append("| " + " | ".join([*head, *cells, f"{row['cpu_seconds']:.0f}"]) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    page = Page("DietNeRF on synthetic scenes", "Held-out views after training on few")
    page.section("Scores", "Means over seeds; PSNR in dB.")
    page.table([{k: v for k, v in row.items() if not k.endswith("_spread")} for row in rows])
    if differences:
        page.section("Against no semantic loss and the control", "Less the score with the same views and seed.")
        page.table(differences)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        xs, ys = curves.setdefault(f"{row['scene']} {row['size']} {row['arm']}", ([], []))
        xs.append(row["views"])
        ys.append(row["psnr"])
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    if curves:
        figure = plot_lines(curves, x="training views", y="PSNR of held-out views (dB)")
        figure.savefig(out / "curves.svg")
        page.section("By number of views")
        page.figure(figure)
    pictures = [(path, json.loads(path.with_suffix(".json").read_text())) for path in (out / "runs").glob("**/*.png")]
    pictures = [(p, r) for p, r in sorted(pictures, key=lambda pair: str(pair[0])) if r["seed"] == 0][:24]
    if pictures:
        titles = [
            f"{r['arm'].replace(CHANGE, ' ' + CHANGE)}, {r['views']} views: {r['scores']['psnr']:.2f} dB"
            for _, r in pictures
        ]
        sheet = contact_sheet([Image.open(p) for p, _ in pictures], titles, columns=6, size=200)
        sheet.save(out / "views.png")
        page.section("Pictures", "Held-out photographs to the left, renders to the right; seed 0.")
        page.image(sheet, alt="held-out views")
    page.write(out / "index.html")
    return rows


def _with_spread(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    digits = 2 if name.startswith("psnr") else 4
    spread = row.get(f"{name}_spread")
    return f"{row[name]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def main(config: Config) -> None:
    require_fields_at_least(config, 0, "budget", "steps", "rays")
    silence_nerfstudio()
    start(config.runtime)
    begun = time.process_time()
    numbers = (len(config.view_ids),) if config.view_ids else config.views
    todo = [
        (scene, size, arm, views, seed)
        for scene in config.scenes
        for size in config.sizes
        for seed in config.seeds
        for views in numbers
        for arm in config.arms
    ]
    for number, (scene, size, arm, views, seed) in enumerate(todo, start=1):
        name = f"{arm}_v{views}_s{seed}"
        path = config.out / "runs" / scene.name / str(size) / f"{name}.json"
        work = config.out / "work" / scene.name / str(size) / name
        settings = training_config(config, scene, size, arm, views, seed, work)
        if path.exists():
            require_same_run(path, config, settings)
            continue
        if config.budget and time.process_time() - begun > 60 * config.budget:
            print(f"the budget of {config.budget:g} CPU minutes is spent: {len(todo) - number + 1} runs are left.")
            break
        labels = {"scene": scene.name, "size": size, "arm": arm, "views": views, "seed": seed}
        record = run_one(config, replace(settings, resume=True), path, labels)
        scores = record["scores"]
        print(
            f"[{number}/{len(todo)}] {scene.name} {size} {name}: {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}, "
            f"{record['cpu_seconds']:.0f} CPU s",
            flush=True,
        )
    write_tables(config.out)
    print(f"page: {config.out / 'index.html'}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
