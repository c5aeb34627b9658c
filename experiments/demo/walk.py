"""The demo's capture: packaged photographs of a room without poses, posed, trained on and shown from new places."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from common.files import require_own_directory, write_json
from common.pretrained import ASSETS
from common.report import Page
from common.runtime import resolve_device
from dietnerf.evaluation import score_scene
from dietnerf.posing import PoseConfig, pose
from dietnerf.render import frames_of, path_poses, write_gif
from dietnerf.scene import Scene
from experiments.demo.scene import show_held_out, train_grid

WALK = ASSETS / "samples" / "walk"
HOLD_OUT = 5
"""Every 5th photograph is scored, and not trained on."""


def walk_section(
    page: Page,
    out: Path,
    *,
    device: str | torch.device = "auto",
    image_size: int = 320,
    steps: int = 400,
    rays: int = 2048,
    frames: int = 30,
    size: int = 160,
) -> dict[str, Any]:
    """Pose the packaged photographs, train on them, add the section to `page` and return its scores.

    Args:
        page: to which the section is added.
        out: directory for the posed scene, the run, the path and walk.json.
        device: "auto", "cpu", "cuda", ...
        image_size: longest side of the photographs that poses are found on.
        steps: of training; 0 is the method's own number.
        rays: a step; 0 is the method's own number.
        frames: of the path.
        size: width of training images and pictures, in pixels.
    """
    target = resolve_device(device)
    directory = require_own_directory(out / "walk" / "scene", "scene")
    shutil.rmtree(directory, ignore_errors=True)  # an earlier demo's, whose poses would be taken as they are
    begun = time.monotonic()
    posed = pose(PoseConfig(WALK, directory, image_size=image_size))
    placed = time.monotonic() - begun
    training = dict(hold_out=HOLD_OUT, image_size=size, steps=steps, rays=rays)
    run = train_grid(posed.scene, out / "walk" / "run", target, **training)
    scene = Scene.load(run, device=target)
    path = [scene.render(place, size=size) for place in path_poses(scene, "interpolate", frames)]
    gif = write_gif(out / "walk.gif", frames_of(path), fps=8)
    found = score_scene(scene, progress=False)

    page.section(
        "A room from twenty photographs without poses",
        f"Photographs as a telephone takes them, with a background all around (rendered, so that their true poses are "
        f"known). COLMAP placed {len(posed.placed)} of {len(posed.placed) + len(posed.unplaced)} just now, in "
        f"{placed:.0f} seconds; then a voxel grid was trained for {scene.step + 1} steps, "
        f"{time.monotonic() - begun - placed:.0f} seconds with what is shown here.",
    )
    page.command("dietnerf pose common/assets/samples/walk out/walk --image-size 320")
    page.command(" ".join(["dietnerf train out/walk", *(f"--{k.replace('_', '-')} {v}" for k, v in training.items())]))
    page.video(gif, "From photograph to photograph, colour and depth", alt="a path through the room, colour and depth")
    page.text("Photographs that were held out, each to the left of its render:")
    show_held_out(page, found, width=2 * size, what="photographs")
    record = {
        "placed": list(posed.placed),
        "unplaced": list(posed.unplaced),
        "points": posed.points,
        "reprojection_error": posed.error,
        "scores": found.scores.values,
        "steps": scene.step + 1,
        "seconds": round(time.monotonic() - begun, 1),
        "path": gif.name,
    }
    write_json(out / "walk.json", record)
    return record
