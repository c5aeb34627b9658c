"""A tiny capture for tests: photographs of a ball before a wall, posed, with sparse points and their tracks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from dietnerf.captures import COLMAP_WORLD
from tests.dietnerf.ball import draw_ball, look_at_origin

SIZE, FOCAL = 16, 20.0


def write_capture(path: Path, count: int = 6, outliers: int = 0, *, tracks: bool = True, gains: bool = False) -> Path:
    """A transforms.json with sparse_pc.ply and, with tracks, colmap/sparse/0 beside it.

    The points are 200 on the ball of radius 1 around the origin; each photograph sees those that face it. Outliers are
    far away and seen by one photograph each. The coordinates of the transforms.json are COLMAP's turned by COLMAP_WORLD.

    Args:
        gains: photographs are the darker, the later they were taken.
    """
    images = path / "images"
    images.mkdir(parents=True)
    model = path / "colmap/sparse/0"
    points = ball_points()
    far = np.random.default_rng(1).normal(size=(outliers, 3)) * 300
    positions = np.concatenate((points, far))
    poses = [look_at_origin(300 * i / count, 20 + 5 * (i % 3)) for i in range(count)]
    lines, tracks_of = [], [[] for _ in positions]
    for i, pose in enumerate(poses):
        picture = draw_ball(pose, SIZE, 2 * np.arctan(SIZE / 2 / FOCAL)).astype(float)
        colour = picture[..., :3] + (picture[..., 3:] == 0) * 90.0
        colour = colour * (1 - 0.5 * i / count) if gains else colour
        Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(images / f"f{i}.png")
        facing = [k for k, point in enumerate(points) if point @ (pose[:3, 3] - point) > 0]
        facing += [len(points) + k for k in range(outliers) if k % count == i]
        view = np.linalg.inv(np.linalg.inv(COLMAP_WORLD) @ pose @ np.diag([1, -1, -1, 1]))
        x, y, z, w = Rotation.from_matrix(view[:3, :3]).as_quat()
        lines.append(f"{i + 1} {w} {x} {y} {z} {' '.join(map(str, view[:3, 3]))} 1 f{i}.png")
        lines.append(" ".join(f"0 0 {k + 1}" for k in facing))
        for place, k in enumerate(facing):
            tracks_of[k].append(f"{i + 1} {place}")
    if tracks:
        model.mkdir(parents=True)
        (model / "cameras.txt").write_text(f"1 PINHOLE {SIZE} {SIZE} {FOCAL} {FOCAL} {SIZE / 2} {SIZE / 2}\n")
        (model / "images.txt").write_text("\n".join(lines) + "\n")
        inverse = np.linalg.inv(COLMAP_WORLD)[:3, :3]
        rows = [
            f"{k + 1} {' '.join(map(str, inverse @ position))} 255 0 0 {0.5 + (k % 2)} {' '.join(track)}"
            for k, (position, track) in enumerate(zip(positions, tracks_of, strict=True))
        ]
        (model / "points3D.txt").write_text("\n".join(rows) + "\n")
    head = ["ply", "format ascii 1.0", f"element vertex {len(positions)}"]
    head += [f"property float {axis}" for axis in "xyz"] + ["end_header"]
    (path / "sparse_pc.ply").write_text("\n".join(head + [" ".join(map(str, p)) for p in positions]) + "\n")
    frames = [{"file_path": f"images/f{i}.png", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
    meta = dict(w=SIZE, h=SIZE, fl_x=FOCAL, fl_y=FOCAL, cx=SIZE / 2, cy=SIZE / 2, camera_model="OPENCV", frames=frames)
    meta |= dict(applied_transform=COLMAP_WORLD[:3].tolist(), ply_file_path="sparse_pc.ply")
    (path / "transforms.json").write_text(json.dumps(meta))
    return path


def ball_points(count: int = 200) -> np.ndarray:
    """Points (count, 3) all over the ball, evenly (a Fibonacci lattice)."""
    k = np.arange(count) + 0.5
    height, angle = 1 - 2 * k / count, np.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - height**2)
    return np.stack((ring * np.cos(angle), ring * np.sin(angle), height), axis=1)
