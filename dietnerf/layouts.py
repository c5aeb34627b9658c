"""How a scene lies on disk: Blender's, nerfstudio's, COLMAP's or LLFF's files, and the poses in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.checks import UserError, require_file


def scene_kind(path: Path) -> Literal["blender", "nerfstudio", "colmap", "llff"]:
    """The layout of a scene's directory (or of a nerfstudio transforms file).

    Raises:
        UserError: nothing there, or no layout that is known.
    """
    if not path.exists():
        raise UserError(f"scene {str(path)!r} does not exist: check the path.")
    if path.is_file():
        if path.suffix != ".json":
            raise UserError(
                f"scene {str(path)!r} is a {path.suffix or 'plain'} file: give a directory or a .json file."
            )
        return "nerfstudio"
    if (path / "transforms_train.json").is_file():
        return "blender"
    if (path / "transforms.json").is_file():
        return "nerfstudio"
    if colmap_model(path) is not None:
        return "colmap"
    if (path / "poses_bounds.npy").is_file():
        return "llff"
    raise UserError(
        f"scene {str(path)!r} has no transforms_train.json (Blender), transforms.json (nerfstudio), sparse/0 (COLMAP) "
        f"or poses_bounds.npy (LLFF): check the path."
    )


def colmap_model(path: Path) -> Path | None:
    """Where COLMAP's reconstruction lies within a scene."""
    for place in ("colmap/sparse/0", "sparse/0", "sparse"):
        if any((path / place / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return Path(place)
    return None


def read_frames(path: Path) -> dict[str, Any]:
    """A transforms file whose frames have been checked.

    Raises:
        UserError: not JSON, no frames, or a frame without an image's path or a proper camera matrix.
    """
    require_file(path, "transforms file")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
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
    rotation = pose[:3, :3]
    error = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
    if error > 1e-2 or np.linalg.det(rotation) < 0:
        kind = f"is {error:.2g} from a rotation" if error > 1e-2 else "mirrors (determinant -1)"
        raise UserError(f"{what}: transform_matrix {kind}: give a camera-to-world matrix without scale or mirror.")
    return pose[:3]
