"""How a scene lies on disk: Blender's, nerfstudio's, COLMAP's or LLFF's files, and the poses in them."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.checks import UserError, require_file

FARTHEST = 1e12
"""No camera is farther from the origin, whatever the unit."""
Kind = Literal["blender", "nerfstudio", "colmap", "llff"]
MODELS = ("colmap/sparse", "sparse")
"""Where COLMAP's reconstructions lie within a scene, each in a numbered folder or, in the last one, on their own."""


def scene_kind(path: Path) -> Kind:
    """The layout of a scene's directory (or of a nerfstudio transforms file).

    Raises:
        UserError: nothing there, or no layout that is known.
    """
    return find_scene(path)[0]


def find_scene(path: Path) -> tuple[Kind, Path]:
    """The layout of a scene and its directory; of nerfstudio's the transforms file, of COLMAP's the model's folder.

    Args:
        path: the scene's directory, or one of the files or folders in it by which its layout is known.

    Raises:
        UserError: nothing there, or no layout that is known.
    """
    if not path.exists():
        raise UserError(f"scene {str(path)!r} does not exist: check the path.")
    if path.is_file():
        if path.name in ("transforms_train.json", "transforms_val.json", "transforms_test.json"):
            if (path.parent / "transforms_train.json").is_file():
                return "blender", path.parent
        if path.suffix == ".json":
            return "nerfstudio", path
        if path.name == "poses_bounds.npy":
            return "llff", path.parent
        if path.stem in ("cameras", "images", "points3D") and path.suffix in (".bin", ".txt"):
            return find_scene(path.parent)
        raise UserError(f"scene {str(path)!r} is a {path.suffix or 'plain'} file: give a directory or a .json file.")
    if (path / "transforms_train.json").is_file():
        return "blender", path
    if (path / "transforms.json").is_file():
        return "nerfstudio", path / "transforms.json"
    if is_model(path):
        return "colmap", path
    if (model := colmap_model(path) or largest_model(path)) is not None:
        return "colmap", path / model
    if (path / "poses_bounds.npy").is_file():
        return "llff", path
    raise UserError(
        f"scene {str(path)!r} has no transforms_train.json (Blender), transforms.json (nerfstudio), sparse/0 (COLMAP) "
        f"or poses_bounds.npy (LLFF): check the path; dietnerf pose finds the poses of photographs."
    )


def is_model(path: Path) -> bool:
    """Whether a folder holds a reconstruction of COLMAP."""
    return any((path / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt"))


def colmap_model(path: Path) -> Path | None:
    """Where COLMAP's reconstruction lies within a scene; of several, the one with the most images."""
    for place in MODELS:
        if is_model(path / place):
            return Path(place)
        if (model := largest_model(path / place)) is not None:
            return place / model
    return None


def largest_model(path: Path) -> Path | None:
    """Of the reconstructions in a folder, the one with the most images: the first such one."""
    inside = sorted(path.glob("*"), key=lambda found: natural_order(found.name))
    models = [found for found in inside if is_model(found)]
    if len(models) > 1:
        models = [max(models, key=model_images)]
    return models[0].relative_to(path) if models else None


def model_images(model: Path) -> int:
    """How many images a reconstruction of COLMAP has posed; 0 where that cannot be read."""
    if (text := model / "images.txt").is_file():
        lines = [line for line in text.read_text("utf-8", errors="replace").splitlines() if line[:1] != "#"]
        return (len(lines) + 1) // 2  # a line for the pose, one for the points
    try:
        with (model / "images.bin").open("rb") as file:
            return int(struct.unpack("<Q", file.read(8))[0])
    except (OSError, struct.error):
        return 0


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts f_2 before f_10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def read_frames(path: Path) -> dict[str, Any]:
    """A transforms file whose frames have been checked.

    Raises:
        UserError: not JSON, no frames, or a frame without an image's path or a proper camera matrix.
    """
    require_file(path, "transforms file")
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise UserError(f"transforms file {str(path)!r} is not JSON ({error}): write it again.") from error
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f"transforms file {str(path)!r} has no frames: give it at least one.")
    for number, frame in enumerate(frames):
        named = isinstance(frame, dict) and isinstance(frame.get("file_path"), str)
        if not named or "transform_matrix" not in frame:
            raise UserError(f"frame {number} of {str(path)!r} lacks file_path or transform_matrix: add them.")
        check_pose(frame["transform_matrix"], f"frame {number} of {str(path)!r}")
    return meta


def check_pose(matrix: Any, what: str) -> np.ndarray:
    """The (4, 4) or (3, 4) camera-to-world matrix as an array (3, 4).

    Raises:
        UserError: another shape, NaN, or a left part that is not a rotation.
    """
    try:
        pose = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        pose = np.zeros(0)
    if pose.shape not in ((4, 4), (3, 4)):
        raise UserError(f"{what}: transform_matrix has shape {pose.shape}: give 4 rows of 4 numbers.")
    if not np.isfinite(pose).all():
        raise UserError(f"{what}: transform_matrix holds NaN or infinity: estimate this camera again or remove it.")
    if np.abs(pose).max() > FARTHEST:
        raise UserError(
            f"{what}: transform_matrix holds {np.abs(pose).max():.2g}: give positions below {FARTHEST:.0e}."
        )
    rotation = pose[:3, :3]
    error = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
    if error > 1e-2 or np.linalg.det(rotation) < 0:
        kind = f"is {error:.2g} from a rotation" if error > 1e-2 else "mirrors (determinant -1)"
        raise UserError(f"{what}: transform_matrix {kind}: give a camera-to-world matrix without scale or mirror.")
    return pose[:3]
