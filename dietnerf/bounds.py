"""Where a scene is: the box that its field gives most room, and the planes between which its rays run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float

from common.checks import UserError
from dietnerf.poses import centre_of_attention
from dietnerf.sparse import SparsePoints
from dietnerf.world import facing

UNBOUNDED_PLANES = (0.05, 50.0)
"""Near and far of photographs without points, whose cameras are scaled into [-1, 1]."""
MOST = (10.0, 90.0)
"""Percentiles of the points, along each axis, by which the box is found, ..."""
MARGIN = 1.25
"""... and the factor on what lies between them: points that are spread evenly fill the box."""
ALL = (1.0, 99.0)
"""The same for a field that has nothing outside its box."""
FLATTEST = 0.4
"""No side of the box is shorter than this share of the longest."""
NEAREST = (1.0, 0.5)
"""The near plane: a percentile of the distances at which photographs see points, and a factor on it."""
FARTHEST = (99.0, 8.0)
"""The far plane, likewise. What is farther stands still as one moves between the cameras."""
CONE = 0.87
"""Where nothing says which photograph sees a point, one within 30 degrees of its optical axis does."""
FEW = 0.5
"""A smaller share of the points in the box is worth a warning."""


@dataclass
class BoxConfig:
    """Where the scene is."""

    contraction: Literal["auto", "on", "off"] = "auto"
    """Hold all that is outside the box as well, in less detail the farther it is (mip-NeRF 360's contraction of space);
    auto: for photographs that show their background."""
    box_center: tuple[float, float, float] | None = None
    """Centre of the box that gets most of the field's detail, in the field's units; left out, that of the scene's
    points or, where there are none, of what the cameras look at."""
    box_size: tuple[float, float, float] | None = None
    """Its three sides; left out, as far as most of the points reach."""


@dataclass(frozen=True)
class Bounds:
    """Where a scene is, in the field's units."""

    box: Float[np.ndarray, "2 3"]
    planes: tuple[float, float]
    """Near and far."""
    inside: float | None = None
    """Share of the points in the box; None: there are no points."""


def find_bounds(poses: Float[np.ndarray, "n 3 4"], points: SparsePoints | None, *, unbounded: bool) -> Bounds:
    """The box around most of the points, and planes from how far the photographs see them.

    A point counts as often as it is seen, so that what many photographs show decides. Without points, the box is around
    what the cameras look at and reaches to them; cameras that look away from each other are in its middle.

    Args:
        poses: of all frames, in the field's units.
        points: in the same.
        unbounded: the field also holds what is outside its box.
    """
    if points is None:
        return Bounds(_box_of_cameras(poses), UNBOUNDED_PLANES)
    lowest, highest = (percentile(points.positions, share, points.votes) for share in (MOST if unbounded else ALL))
    half = MARGIN * (highest - lowest) / 2
    half = np.maximum(half, FLATTEST * max(float(half.max()), 1e-6))
    box = (lowest + highest) / 2 + np.stack((-half, half))
    seen = distances(poses, points)
    near, far = (factor * float(np.percentile(seen, share)) for share, factor in (NEAREST, FARTHEST))
    return Bounds(box, (max(near, 1e-3), far), float(within(box, points.positions).mean()))


def chosen_box(found: Bounds, config: BoxConfig, points: SparsePoints | None) -> Bounds:
    """The bounds with the user's own centre and size.

    Raises:
        UserError: a side that is not above 0.
    """
    if config.box_size is not None and not min(config.box_size) > 0:
        raise UserError(f"box_size is {config.box_size}: give three sides above 0.")
    centre, half = found.box.mean(axis=0), (found.box[1] - found.box[0]) / 2
    centre = centre if config.box_center is None else np.asarray(config.box_center, dtype=np.float64)
    half = half if config.box_size is None else np.asarray(config.box_size, dtype=np.float64) / 2
    box = centre + np.stack((-half, half))
    return Bounds(box, found.planes, None if points is None else float(within(box, points.positions).mean()))


def few_inside(bounds: Bounds) -> str | None:
    """What is wrong with a box that holds few of the points, and the cure; None: nothing."""
    if bounds.inside is None or bounds.inside >= FEW:
        return None
    centre, size = bounds.box.mean(axis=0), bounds.box[1] - bounds.box[0]
    shown = [" ".join(f"{value:.3g}" for value in values) for values in (centre, size)]
    return (
        f"{bounds.inside:.0%} of the scene's points lie in the box (--box-center {shown[0]} --box-size {shown[1]}): "
        f"leave both out, or give a box around what matters."
    )


def percentile(values: Float[np.ndarray, "p c"], share: float, votes: Float[np.ndarray, " p"]) -> np.ndarray:
    """The weighted percentile of each column: the smallest value up to which `share` percent of the votes lie."""
    found = []
    for column in values.T:
        order = np.argsort(column)
        total = np.cumsum(votes[order])
        found.append(column[order[min(int(np.searchsorted(total, share / 100 * total[-1])), len(order) - 1)]])
    return np.array(found)


def within(box: Float[np.ndarray, "2 3"], positions: Float[np.ndarray, "p 3"]) -> Bool[np.ndarray, " p"]:
    """Which points a box holds."""
    return ((positions >= box[0]) & (positions <= box[1])).all(axis=1)


def distances(poses: Float[np.ndarray, "n 3 4"], points: SparsePoints) -> Float[np.ndarray, " k"]:
    """How far the points are from the cameras that see them."""
    found = []
    for number, pose in enumerate(poses):
        chosen = points.positions if points.seen is None else points.positions[points.seen[number]]
        offsets = chosen - pose[:, 3]
        lengths = np.linalg.norm(offsets, axis=1)
        if points.seen is None:
            lengths = lengths[-offsets @ pose[:, 2] > CONE * lengths]
        found.append(lengths)
    together = np.concatenate(found)
    if not len(together):  # a cloud of other coordinates
        together = np.linalg.norm(points.positions[:, None] - poses[None, :, :, 3], axis=-1).ravel()
    return together


def _box_of_cameras(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "2 3"]:
    positions, forward = poses[:, :, 3], -poses[:, :, 2]
    cosine = facing(poses)
    centre = positions.mean(axis=0)
    if len(poses) == 1 or cosine is None or cosine > 0.3:
        centre = centre_of_attention(torch.from_numpy(positions), torch.from_numpy(forward)).numpy()
    half = max(1.0, float(np.median(np.linalg.norm(positions - centre, axis=1))))
    return centre + half * np.array([[-1.0] * 3, [1.0] * 3])
