"""From the coordinates that a scene comes in to those of its field, in float64, and poses of another convention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_utils import auto_orient_and_center_poses

from common.checks import UserError
from dietnerf.poses import axes_meet, centre_of_attention

OBJECT_DISTANCE = 4.0
"""How far the cameras of NeRF's synthetic scenes are from the object, for which Blender's box and planes are made."""
USUAL_DISTANCES = (3.2, 5.0)
"""Cameras of Blender's layout at these distances are left where they are."""
TURNED = np.diag([1.0, -1.0, -1.0, 1.0])
"""From OpenCV's camera axes (x right, y down, z ahead) to nerfstudio's."""


@dataclass(frozen=True)
class World:
    """Where a scene's field has its coordinates: x = scale * transform (x_input, 1)."""

    transform: Float[np.ndarray, "3 4"]
    """float64, a rotation and a shift."""
    scale: float

    def place(self, poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3 4"]:
        """Camera-to-world poses in the field's coordinates, for those in the input's."""
        rotation, shift = self.transform[:, :3], self.transform[:, 3]
        places = (poses[..., 3] @ rotation.T + shift) * self.scale
        return np.concatenate((rotation @ poses[..., :3], places[..., None]), axis=-1)

    def after(self, applied: Float[np.ndarray, "4 4"] | None, scale: float = 1.0) -> World:
        """The world of the coordinates in which the input was found, before `applied` and `scale` made it what it is
        (nerfstudio's applied_transform and applied_scale)."""
        transform = self.transform if applied is None else self.transform @ applied
        return World(transform, self.scale * scale)


def photographs_world(poses: Float[np.ndarray, "n 3 4"], orientation: str = "up") -> World:
    """Upright, centred on the cameras, which reach to 1 from the centre along an axis: nerfstudio's own choice.

    The centre is taken off in float64, since float32 has no room for it where coordinates are those of a map. One
    camera alone looks at the centre from a distance of 1.

    Raises:
        UserError: several cameras, all at one place.
    """
    centre = poses[:, :, 3].mean(axis=0) - (poses[0, :, 2] if len(poses) == 1 else 0.0)
    moved = np.tile(np.eye(4), (len(poses), 1, 1))
    moved[:, :3] = poses
    moved[:, :3, 3] -= centre
    reach = float(np.abs(moved[:, :3, 3]).max())
    if reach <= 1e-9 * max(1.0, float(np.abs(centre).max())):
        raise UserError(
            "its cameras all stand at one place, as world-to-camera matrices of cameras around a thing do: check the "
            "camera matrices, or photograph it from more places."
        )
    unit = moved.copy()
    unit[:, :3, 3] /= reach
    method: str = orientation if len(poses) > 1 else "up"
    _, found = auto_orient_and_center_poses(torch.from_numpy(unit).float(), method=method, center_method="none")  # type: ignore[arg-type]
    rotation = found[:, :3].double().numpy()
    transform = np.concatenate((rotation, -(rotation @ centre)[:, None]), axis=1)
    return World(transform, 1 / float(np.abs(moved[:, :3, 3] @ rotation.T).max()))


def object_world(poses: Float[np.ndarray, "n 3 4"]) -> World:
    """As the scene is, where its cameras are about 4 from the origin and look at what is near it, as those of NeRF's
    synthetic scenes; else moved and scaled to be so."""
    positions, forward = poses[:, :, 3], -poses[:, :, 2]
    centre = np.zeros(3)
    middle = positions.mean(axis=0)
    if axes_meet(torch.from_numpy(forward)):
        seen = centre_of_attention(torch.from_numpy(positions - middle), torch.from_numpy(forward)).numpy() + middle
        if np.linalg.norm(seen) > 0.25 * np.linalg.norm(positions - seen, axis=1).mean():
            centre = seen
    distance = float(np.median(np.linalg.norm(positions - centre, axis=1)))
    usual = USUAL_DISTANCES[0] <= distance <= USUAL_DISTANCES[1] or distance < 1e-9
    transform = np.concatenate((np.eye(3), -centre[:, None]), axis=1)
    return World(transform, 1.0 if usual else OBJECT_DISTANCE / distance)


def facing(poses: Float[np.ndarray, "n 3 4"]) -> float | None:
    """How far cameras look at the point where their optical axes come nearest to each other: the mean cosine.

    None: the axes are parallel, and meet nowhere.
    """
    positions, forward = poses[:, :, 3], -poses[:, :, 2]
    if not axes_meet(torch.from_numpy(forward)):
        return None
    projections = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    local = positions - positions.mean(axis=0)
    offsets = np.linalg.solve(projections.sum(axis=0), (projections @ local[..., None]).sum(axis=0))[:, 0] - local
    lengths = np.linalg.norm(offsets, axis=1)
    if lengths.max() < 1e-6:
        return 0.0  # all stand at that point
    return float(((offsets * forward).sum(axis=1) / lengths.clip(1e-9)).mean())


def other_convention(poses: Float[np.ndarray, "n 3 4"]) -> str | None:
    """What is wrong with poses whose cameras look at one point once they are read in another convention; else None.

    At least three cameras are needed. Cameras that look outwards from one place, as in a panorama, look the same as
    those with OpenCV's axes.
    """
    if len(poses) < 3:
        return None
    own = facing(poses)
    if own is not None and own > 0.3:
        return None
    whole = np.tile(np.eye(4), (len(poses), 1, 1))
    whole[:, :3] = poses
    inverse = np.linalg.inv(whole)
    others = {
        "they have OpenCV's axes: multiply their second and third column by -1": whole @ TURNED,
        "they are world-to-camera matrices: invert them": inverse,
        "they are world-to-camera matrices with OpenCV's axes: invert them, then multiply their second and third "
        "column by -1": inverse @ TURNED,
    }
    scores = {cure: facing(other[:, :3]) for cure, other in others.items()}
    found = max(scores, key=lambda cure: scores[cure] or 0.0)
    return found if (scores[found] or 0.0) > 0.9 else None
