"""The demo's scene: the packaged still life from eight photographs, trained on the spot and shown from all sides."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import write_json
from common.pretrained import ASSETS
from common.report import Page
from common.runtime import RuntimeConfig, resolve_device
from dietnerf.consistency import Similarities, embed_scene, pair_similarities, plot_similarities, summary
from dietnerf.evaluation import NAMES, Evaluation, score_scene
from dietnerf.images import load_image, read_size
from dietnerf.render import frames_of, path_poses, write_gif
from dietnerf.scene import Scene
from dietnerf.semantic import load_encoder
from dietnerf.settings import train_config
from dietnerf.training import train

SCENE = ASSETS / "samples" / "multiview"


def scene_section(
    page: Page, out: Path, *, device: str | torch.device = "auto", steps: int = 0, frames: int = 40, size: int = 128
) -> dict[str, Any]:
    """Train on the packaged scene, add its section to `page` and return its scores.

    Args:
        page: to which the section is added.
        out: directory for the run, the orbit and scene.json.
        device: "auto", "cpu", "cuda", ...
        steps: of training; 0 is the method's own number.
        frames: of the orbit.
        size: width of training images and pictures, in pixels.
    """
    target = resolve_device(device)
    begun = time.monotonic()
    run = train_grid(SCENE, out / "scene", target, num_views=8, image_size=size, steps=steps)
    trained = time.monotonic() - begun
    scene = Scene.load(run, device=target)
    orbit = [scene.render(pose, size=size) for pose in path_poses(scene, "orbit", frames)]
    gif = write_gif(out / "orbit.gif", frames_of(orbit), fps=12)
    found = score_scene(scene, progress=False)

    page.section(
        "Novel views from eight photographs",
        f"A still life that comes with the toolkit. A voxel grid with total variation was trained just now on the "
        f"eight photographs below, {scene.step + 1} steps in {trained:.0f} seconds. Depth is on the right: near is "
        "bright.",
    )
    page.command("dietnerf train common/assets/samples/multiview --num-views 8 --method grid")
    page.video(gif, "An orbit, colour and depth", alt="orbit around the scene, colour beside depth")
    page.text("The photographs used for training:")
    views = scene.training_views
    page.gallery([(views.load(i)[0].numpy(), f"view {view}", []) for i, view in enumerate(views.view_ids)], width=120)
    page.text("Views not used for training, with the photograph to the left of the render:")
    show_held_out(page, found, width=260, what="views")

    encoder = load_encoder("tiny", device=target)
    parts = {
        "this scene": embed_scene(SCENE, encoder, feature="class_token", split="train", views=8),
        "captioned scenes": embed_pictures(ASSETS / "samples" / "scenes", encoder),
    }
    pairs = pair_similarities(parts)
    within = pair_similarities({"this scene": parts["this scene"]}).within["this scene"]
    page.text(
        "The semantic loss asks an image encoder whether a render looks like the photographs. The encoder can tell "
        "only if it finds views of one scene more alike than views of different scenes:"
    )
    page.figure(
        plot_similarities(Similarities({"this scene": within}, pairs.across)),
        "Cosine similarity of the packaged tiny CLIP's embeddings: between two views of the scene above, and between "
        "one of them and a view of another scene",
    )
    record = {
        "scores": found.scores.values,
        "not_measured": found.scores.not_measured,
        "training_views": found.record["training_views"],
        "steps": scene.step + 1,
        "seconds_training": round(trained, 1),
        "seconds": round(time.monotonic() - begun, 1),
        "similarity_within": summary(within),
        "similarity_across": summary(pairs.across),
        "orbit": gif.name,
    }
    write_json(out / "scene.json", record)
    return record


def train_grid(data: Path, out: Path, device: torch.device, **settings: Any) -> Path:
    """Train the demo's field, a grid without the semantic loss, from the beginning; returns its run."""
    shared: dict[str, Any] = {"method": "grid", "val_views": 0, "semantic_weight": 0.0, "resume": False}
    return train(train_config(data, out=out, runtime=RuntimeConfig(device=str(device)), **shared, **settings))


def show_held_out(page: Page, found: Evaluation, *, width: int, what: str) -> None:
    """At most eight held-out views, each truth to the left of its render, and the mean scores of all.

    Args:
        page: to which they are added.
        found: from `score_scene`.
        width: of a pair, in pixels.
        what: the views are called.
    """
    shown = list(range(0, len(found.ids), max(1, len(found.ids) // 8)))[:8]
    page.gallery(
        [
            (
                np.concatenate((found.truths[i].numpy(), found.renderings[i].rgb.numpy()), axis=1),
                f"view {found.ids[i]}",
                [f"{found.scores.per_view[i]['psnr']:.2f} dB"],
            )
            for i in shown
        ],
        width=width,
        whole=True,
    )
    page.table(
        [{"score": NAMES[name], "value": value} for name, value in found.scores.values.items()],
        caption=f"Means over {len(found.ids)} held-out {what}. PSNR (decibels, of the squared error of pixels) and "
        "SSIM (of local structure, at most 1) say how close a render is to its photograph: higher is better.",
    )


def embed_pictures(directory: Path, encoder: Any, *, count: int = 24) -> torch.Tensor:
    """Embeddings (n, e) of pictures of other scenes."""
    paths = sorted(directory.glob("**/*.jpg"))[:: max(1, len(list(directory.glob("**/*.jpg"))) // count)][:count]
    size = read_size(paths[0])[1]
    with torch.no_grad():
        return torch.cat(
            [encoder(load_image(path, size, "image")[0].permute(2, 0, 1)[None])["class_token"].cpu() for path in paths]
        )
