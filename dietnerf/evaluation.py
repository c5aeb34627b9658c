"""Score a trained scene on its held-out views: results.json, a contact sheet and a page."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from common.checks import UserError, require_fields_at_least, require_file, require_place
from common.files import write_json
from common.progress import Progress
from common.report import Page, contact_sheet
from common.runtime import provenance
from dietnerf.metrics import MetricsConfig, Scores, overfitted, psnr, score_views
from dietnerf.scene import Rendering, Scene
from dietnerf.views import PROTOCOLS

TRAINING_VIEWS = 2
"""So many training views are scored beside the held-out ones."""
NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "psnr_foreground": "PSNR of the foreground",
    "psnr_farthest": "PSNR of the quarter of the views that is farthest from the training cameras",
    "lpips": "LPIPS (VGG)",
    "fid": "FID",
    "kid": "KID",
    "similarity": "similarity by a second encoder",
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a trained scene on its held-out views; where it has none, on its training views, and the output says so."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a run of dietnerf train or ns-train."""
    protocol: Literal["paper", "standard"] = "standard"
    """paper: every 8th held-out view, SSIM and LPIPS as the original computes them; standard: all views, the usual
    SSIM (Gaussian window) and LPIPS."""
    every: int = 0
    """Score every Nth held-out view; 0 is the protocol's number."""
    first: int = 0
    """Place of the first one that is scored: choose settings on some views, report scores of others."""
    out: Path | None = None
    """Directory of the results; RUN/evaluation when not given."""
    chunk: int = 0
    """Rays at once; 0 is the run's own number. Less needs less memory."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    data: Path | None = None
    """Where the scene's images lie now, when they have moved since training."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run, with the pictures that they are of."""

    scores: Scores
    ids: list[int]
    """Places of the scored views in their split."""
    renderings: list[Rendering]
    truths: list[Any]
    record: dict[str, Any]
    """What results.json holds."""
    warning: str | None = None
    """That the field knows its training views far better."""


def score_scene(
    scene: Scene,
    *,
    protocol: str = "standard",
    every: int = 0,
    first: int = 0,
    chunk: int = 0,
    metrics: MetricsConfig | None = None,
    progress: bool = True,
) -> Evaluation:
    """Render and score the held-out views of an open scene, or its training views where it has no others.

    Raises:
        UserError: under the protocol `paper`, a run trained on other views or at another size.
    """
    views, chosen = scene.held_out_views, PROTOCOLS[protocol]
    stride = max(1, (every or chosen.eval_every) // scene.config.pipeline.datamanager.dataparser.eval_every)
    if protocol == "paper":
        trained, width = tuple(scene.training_views.view_ids), scene.training_views.metadata["size"][0]
        if set(trained) != set(chosen.view_ids) or width != chosen.image_size:
            raise UserError(
                f"this run was trained on views {trained} at width {width}, not as the protocol paper says "
                f"({chosen.view_ids} at {chosen.image_size}): train with --protocol paper, or use standard."
            )
    ids = list(range(first, len(views), stride))
    if not ids:
        raise UserError(f"first is {first}, but there are {len(views)} {kind_of(scene)}: use less.")
    renderings, truths, alphas, masks = [], [], [], []
    for i in Progress(ids, desc=f"rendering {kind_of(scene)}", unit=" views", disable=not progress):
        renderings.append(scene.render_camera(views.cameras[i : i + 1], chunk=chunk))
        colour, alpha = views.load(i)
        truths.append(colour)
        alphas.append(alpha)
        masks.append(views.mask(i))
    positions = views.cameras.camera_to_worlds[ids, :, 3]
    scores = score_views(
        [r.rgb for r in renderings],
        truths,
        alphas,
        positions,
        scene.training_views.cameras.camera_to_worlds[:, :, 3],
        convention=protocol,
        masks=masks,
        config=metrics,
        loss_encoder=scene.model.config.semantic.encoder if scene.model.config.semantic.weight else "",
    )
    split_ids = [views.view_ids[i] for i in ids]
    for row, view in zip(scores.per_view, split_ids, strict=True):
        row["view"] = view
    record = {
        "protocol": protocol,
        "method": scene.config.method_name,
        "step": scene.step,
        "training_views": scene.training_views.view_ids,
        "held_out_views": split_ids,
        "held_out_from": views.source,
        "size": scene.training_views.metadata["size"],
        "scores": scores.values,
        "not_measured": scores.not_measured,
        "per_view": scores.per_view,
        **provenance(),
    }
    warning = None
    if scene.holds_views_out:
        record["training_psnr"] = training_psnr(scene, chunk=chunk)
        warning = overfitted(record["training_psnr"], scores.values["psnr"])
    return Evaluation(scores, split_ids, renderings, truths, record, warning)


def training_psnr(scene: Scene, *, chunk: int = 0) -> float:
    """Mean PSNR of a few training views, without the exposures that were learnt for them."""
    views, found = scene.training_views, []
    for i in range(0, len(views), -(-len(views) // TRAINING_VIEWS)):
        rgb = scene.render_camera(views.cameras[i : i + 1], chunk=chunk).rgb
        found.append(psnr(rgb, views.load(i)[0], views.mask(i)))
    return float(np.mean(found))


def kind_of(scene: Scene) -> str:
    """What the views are that are scored."""
    return "held-out views" if scene.holds_views_out else "training views"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a run and write results.json, views.png and index.html; returns what results.json holds."""
    require_fields_at_least(config, 0, "every", "first", "chunk")
    if config.out:
        require_place(config.out, directory=True)
    for path, what in ((config.metrics.vgg, "VGG weights"), (config.metrics.inception, "Inception weights")):
        if path:
            require_file(path, what)
    scene = Scene.load(config.run, device=config.device, data=config.data)
    found = score_scene(
        scene,
        protocol=config.protocol,
        every=config.every,
        first=config.first,
        chunk=config.chunk,
        metrics=config.metrics,
    )
    out = config.out or scene.directory / "evaluation"
    kind = kind_of(scene)
    record = {"config": asdict(config), "scored": kind, **found.record}
    write_json(out / "results.json", record)
    shown = list(range(0, len(found.ids), max(1, len(found.ids) // 8)))[:8]
    pairs = [np.concatenate((found.truths[i].numpy(), found.renderings[i].rgb.numpy()), axis=1) for i in shown]
    titles = [f"view {found.ids[i]}: {found.scores.per_view[i]['psnr']:.2f} dB" for i in shown]
    sheet = contact_sheet(pairs, titles, columns=4, size=256)
    sheet.save(out / "views.png")
    page = Page(kind.capitalize(), f"{scene.config.method_name}, {len(scene.training_views)} training views")
    seen = "" if scene.holds_views_out else " The field has seen them: there are no others, so new views may be worse."
    page.section("Scores", f"Means over {len(found.ids)} {kind}, protocol `{config.protocol}`.{seen}")
    page.table([{"metric": NAMES[name], "value": value} for name, value in found.scores.values.items()])
    if found.scores.not_measured:
        page.table([{"not measured": NAMES[k], "why": v} for k, v in found.scores.not_measured.items()])
    if found.warning:
        page.section("Warning", found.warning)
        print(f"warning: {found.warning}", file=sys.stderr, flush=True)
    page.section("Views", "The photograph to the left, the render to the right.")
    page.image(sheet, alt=f"{kind} beside their renders")
    page.section("Each view")
    page.table(found.scores.per_view)
    page.details("configuration, hardware and versions", {k: v for k, v in record.items() if k != "per_view"})
    page.write(out / "index.html")
    return record


def run(config: EvaluateConfig) -> int:
    """`dietnerf evaluate`: score a run and print the scores."""
    record = evaluate(config)
    seen = "" if record["scored"] == "held-out views" else ": there are no others, so new views may be worse"
    print(f"{len(record['per_view'])} {record['scored']}{seen}")
    for name, value in record["scores"].items():
        print(f"{NAMES[name]}: {value:.4f}")
    for name, why in record["not_measured"].items():
        print(f"{NAMES[name]}: not measured ({why})")
    return 0
