"""The sparse points of a posed capture: where they are, how well they are known, and which photographs see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from nerfstudio.data.utils import colmap_parsing_utils

from common.checks import UserError, reason_of, require_file
from dietnerf.captures import COLMAP_WORLD, Capture, read_model
from dietnerf.layouts import colmap_model, read_frames
from dietnerf.world import World

SAME_PLACE = 0.01
"""A model belongs to the poses of a capture when its cameras stand where theirs do, to this share of their spread."""


@dataclass(frozen=True)
class SparsePoints:
    """Points in the coordinates of a capture's poses."""

    positions: Float[np.ndarray, "p 3"]
    """float64."""
    errors: Float[np.ndarray, " p"] | None = None
    """Mean reprojection error in pixels of the photographs that were posed; None: not known."""
    seen: Sequence[Int[np.ndarray, " _"]] | None = None
    """For each of the capture's frames the points that its photograph sees; None: not known."""

    def placed(self, world: World) -> SparsePoints:
        """The same in the field's coordinates."""
        moved = (self.positions @ world.transform[:, :3].T + world.transform[:, 3]) * world.scale
        return replace(self, positions=moved)

    def observed(self, frame: int) -> tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, " k"]]:
        """What a frame's photograph sees: positions, and how much each counts, exp(-(error / mean error)²) (the weights
        of Deng et al. 2022's code)."""
        chosen = np.zeros(0, dtype=np.int64) if self.seen is None else self.seen[frame]
        if self.errors is None:
            return self.positions[chosen], np.ones(len(chosen))
        return self.positions[chosen], np.exp(-np.square(self.errors[chosen] / max(self.errors.mean(), 1e-9)))

    @property
    def votes(self) -> Float[np.ndarray, " p"]:
        """How many photographs see each point; 1 where that is not known."""
        if self.seen is None:
            return np.ones(len(self.positions))
        return np.bincount(np.concatenate(self.seen), minlength=len(self.positions)).astype(float)


def read_points(capture: Capture) -> SparsePoints | None:
    """The points of COLMAP's model, or of the ply file that a transforms.json names; None where there are none.

    Raises:
        UserError: a file that is named or there, but cannot be read.
    """
    if capture.kind == "colmap":
        return _of_model(capture.file, capture, COLMAP_WORLD)
    if capture.kind != "nerfstudio":
        return None
    applied = np.eye(4) if capture.applied is None else capture.applied
    scaled = np.diag([*[capture.applied_scale] * 3, 1.0]) @ applied
    place = colmap_model(capture.file.parent)
    if place and (found := _of_model(capture.file.parent / place, capture, scaled)) is not None:
        return found
    named = read_frames(capture.file).get("ply_file_path")
    return _of_ply(capture.file.parent / named) if isinstance(named, str) else None


def _of_model(model: Path, capture: Capture, transform: Float[np.ndarray, "4 4"]) -> SparsePoints | None:
    """Points and tracks of COLMAP's model; None where its cameras are not those of the capture.

    Args:
        transform: from the model's coordinates to those of the capture.
    """
    if not any((model / f"points3D{suffix}").is_file() for suffix in (".txt", ".bin")):
        return None
    points, images = read_model(model, "points3D", "images")
    if not points:
        return None
    places = {number: place for place, number in enumerate(points)}
    found = [image_of(frame.image, images) for frame in capture.frames]
    if not _stand_there(found, capture, transform):
        return None
    seen = [
        np.unique([places[number] for number in ([] if image is None else image.point3D_ids) if number in places])
        for image in found
    ]
    positions = np.stack([np.asarray(point.xyz, dtype=np.float64) for point in points.values()])
    return SparsePoints(
        positions @ transform[:3, :3].T + transform[:3, 3],
        np.array([float(point.error) for point in points.values()]),
        [ids.astype(np.int64) for ids in seen],
    )


def image_of(path: Path, images: Mapping[int, Any]) -> Any | None:
    """The image of a model whose name a photograph's path ends in; the longest name, where several do."""
    whole = f"/{path.as_posix()}"
    fitting = [image for image in images.values() if whole.endswith(f"/{image.name}")]
    return max(fitting, key=lambda image: len(image.name), default=None)


def _stand_there(found: Sequence[Any | None], capture: Capture, transform: Float[np.ndarray, "4 4"]) -> bool:
    """Whether the cameras of a model stand where those of the capture do."""
    pairs = [(image, frame.pose[:, 3]) for image, frame in zip(found, capture.frames, strict=True) if image is not None]
    if not pairs:
        return False
    theirs = [-colmap_parsing_utils.qvec2rotmat(image.qvec).T @ np.asarray(image.tvec) for image, _ in pairs]
    moved, own = np.stack(theirs) @ transform[:3, :3].T + transform[:3, 3], np.stack([place for _, place in pairs])
    spread = np.linalg.norm(own - own.mean(axis=0), axis=1).max()
    return bool(np.linalg.norm(moved - own, axis=1).max() <= SAME_PLACE * max(float(spread), 1e-9))


def _of_ply(path: Path) -> SparsePoints | None:
    """Points alone."""
    import trimesh

    require_file(path, "point cloud")
    try:
        cloud: Any = trimesh.load(path, process=False)
        positions: np.ndarray = np.asarray(cloud.vertices, dtype=np.float64).reshape(-1, 3)
    except Exception as error:  # whatever trimesh comes upon in a broken file
        raise UserError(f"point cloud {str(path)!r} cannot be read ({reason_of(error)}): write it again.") from error
    positions = positions[np.isfinite(positions).all(axis=1)]
    return SparsePoints(positions) if len(positions) else None
