"""Tiny scenes for tests: a ball coloured by its normals, drawn exactly, in Blender's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image


def look_at_origin(azimuth: float, elevation: float, radius: float = 4.0) -> np.ndarray:
    """Camera-to-world matrix (4, 4) of a camera that looks at the origin."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack((right, np.cross(back, right), back, radius * back), axis=1)
    return pose


def draw_ball(pose: np.ndarray, size: int, angle: float, radius: float = 1.0) -> np.ndarray:
    """RGBA picture (h, w, 4) of a ball whose colour is its normal's direction."""
    focal = 0.5 * size / math.tan(0.5 * angle)
    y, x = np.mgrid[:size, :size] + 0.5
    local = np.stack(((x - size / 2) / focal, -(y - size / 2) / focal, -np.ones_like(x)), axis=-1)
    directions = local @ pose[:3, :3].T
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    origin = pose[:3, 3]
    along = directions @ origin
    inside = along**2 - (origin @ origin - radius**2)
    hit = inside > 0
    points = origin + directions * (-along - np.sqrt(inside.clip(0)))[..., None]
    colour = np.where(hit[..., None], 0.5 + 0.45 * points / radius, 0.0)
    return (np.concatenate((colour, hit[..., None]), axis=-1).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def write_scene(
    directory: Path, *, splits: dict[str, int] | None = None, size: int = 16, angle: float = 0.7, mode: str = "RGBA"
) -> Path:
    """A scene in Blender's layout with so many views in each split."""
    for number, (split, count) in enumerate((splits or {"train": 6, "val": 2, "test": 3}).items()):
        frames = []
        (directory / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pose = look_at_origin(360 * i / count + 17 * number, 15 + 40 * ((i * 7) % 5) / 5)
            image = Image.fromarray(draw_ball(pose, size, angle))
            image.convert(mode).save(directory / split / f"r_{i}.png")
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": pose.tolist()})
        (directory / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    return directory
