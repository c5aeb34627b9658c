"""Writes the packaged samples: captioned images of held-out scenes, and one scene from many sides."""

import json
import math
import random
import re
import shutil
from pathlib import Path

from PIL import Image

from experiments.scenes.blender import Placement, Renderer
from experiments.scenes.graph import Camera, Light
from experiments.scenes.records import ViewRecord, family_records

SAMPLES = Path(__file__).resolve().parents[2] / "common" / "assets" / "samples"
CAPTIONED = {"test": 52, "test_unseen": 20, "train": 32, "val": 8}  # images, each of another family
VIEWS = {"train": 8, "val": 4, "test": 16}
VIEW_DISTANCE = 4.0
VIEW_ANGLE = 0.6911112070083618  # horizontal field of view in NeRF-synthetic

_STILL_LIFE_LIGHT = Light(azimuth=math.radians(-50), elevation=math.radians(52), strength=2.6, sky=0.6)


def write_samples(seed: int) -> None:
    """Render both sample sets into the package."""
    write_captioned(SAMPLES / "scenes", seed)
    write_multiview(SAMPLES / "multiview", seed)


def write_captioned(directory: Path, seed: int, *, resolution: int = 224, quality: int = 90) -> None:
    """JPEG images with five captions each, and `dataset.json` in Karpathy's layout."""
    _empty(directory)
    renderer = Renderer(resolution, 12, denoise=True)
    images: list[dict[str, object]] = []
    for split, count in CAPTIONED.items():
        for number in range(count):
            view = family_records(seed, split, number)[(3 * number) % 8]
            name = f"{split}_{number:03d}.jpg"
            Image.fromarray(renderer.render(view.scene, view.camera)).save(directory / name, quality=quality)
            images.append(_karpathy_entry(name, len(images), view))
    text = json.dumps({"dataset": "scenes", "images": images}, indent=1)
    (directory / "dataset.json").write_text(text + "\n", encoding="utf-8")


def write_multiview(directory: Path, seed: int, *, resolution: int = 128) -> None:
    """A still life in NeRF-synthetic's layout: RGBA images and their camera-to-world poses."""
    _empty(directory)
    placements = still_life()
    renderer = Renderer(resolution, 48, denoise=True, slots=len(placements), field_of_view=VIEW_ANGLE)
    renderer.arrange(placements, None, _STILL_LIFE_LIGHT)
    for split, count in VIEWS.items():
        (directory / split).mkdir()
        frames = []
        for i, camera in enumerate(hemisphere_cameras(count, random.Random(f"{seed}/multiview/{split}"))):
            pose = camera.pose()
            Image.fromarray(renderer.render_pose(pose)).save(directory / split / f"r_{i}.png", optimize=True)
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": pose})
        text = json.dumps({"camera_angle_x": VIEW_ANGLE, "frames": frames}, indent=1)
        (directory / f"transforms_{split}.json").write_text(text + "\n", encoding="utf-8")


def hemisphere_cameras(count: int, rng: random.Random) -> list[Camera]:
    """Cameras spread evenly over the upper hemisphere (a Fibonacci lattice, turned at random)."""
    turn = rng.uniform(0.0, 2.0 * math.pi)
    golden = math.pi * (3.0 - math.sqrt(5.0))
    low, high = math.sin(math.radians(8)), math.sin(math.radians(78))
    return [
        Camera(
            azimuth=(turn + golden * i) % (2.0 * math.pi),
            elevation=math.asin(low + (high - low) * (i + 0.5) / count),
            distance=VIEW_DISTANCE,
            target=(0.0, 0.0, 0.0),
        )
        for i in range(count)
    ]


def still_life() -> list[Placement]:
    """A monkey on a column, a star on a cube, a ball in a ring and a cone, on a plinth; within radius 1.3 of 0."""
    floor = -0.72
    return [
        _put("cylinder", "rubber", "grey", (0.0, 0.0, floor - 0.18), 0, (1.28, 1.28, 0.103)),
        _put("cylinder", "rubber", "purple", (-0.34, 0.36, floor), 0, (0.44, 0.44, 0.40)),
        _put("monkey", "rubber", "orange", (-0.34, 0.36, floor + 0.69), 20, (0.46, 0.46, 0.46)),
        _put("cube", "rubber", "blue", (0.42, 0.30, floor), 25, (0.36, 0.36, 0.36)),
        _put("star", "rubber", "yellow", (0.42, 0.30, floor + 0.52), 10, (0.36, 0.36, 0.36)),
        _put("ring", "metal", "red", (0.18, -0.46, floor), 0, (0.42, 0.42, 0.42)),
        _put("ball", "rubber", "green", (0.18, -0.46, floor + 0.06), 0, (0.25, 0.25, 0.25)),
        _put("cone", "rubber", "cyan", (-0.52, -0.32, floor), 0, (0.30, 0.30, 0.36)),
    ]


def _put(
    shape: str,
    material: str,
    colour: str,
    location: tuple[float, float, float],
    degrees: float,
    scale: tuple[float, float, float],
) -> Placement:
    return Placement(shape, material, colour, location, (0.0, 0.0, math.radians(degrees)), scale)


def _karpathy_entry(name: str, number: int, view: ViewRecord) -> dict[str, object]:
    first = number * len(view.captions)
    sentences = [
        {"raw": text, "tokens": re.findall(r"\w+", text.lower()), "imgid": number, "sentid": first + i}
        for i, text in enumerate(view.captions)
    ]
    return {
        "filename": name,
        "imgid": number,
        "split": view.split.removesuffix("_unseen"),
        "unseen": view.split == "test_unseen",
        "family": view.family,
        "scene_index": view.scene_index,
        "view": view.view,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "sentences": sentences,
    }


def _empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
