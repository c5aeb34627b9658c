"""Camera poses around a scene: sampled on a sphere, interpolated between training views, along an orbit.

A pose is a camera-to-world matrix in nerfstudio's axes: the camera looks along its -z, y is up, the world's up is +z.
Angles are in degrees, lengths in the scene's units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError

POINTS_TOWARDS_EACH_OTHER = 1e-3


@dataclass(frozen=True)
class PoseRanges:
    """The part of a spherical shell where cameras may stand, all looking at its centre."""

    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Point that the cameras look at."""
    radius: tuple[float, float] = (3.5, 4.5)
    """Nearest and farthest distance from the centre."""
    elevation: tuple[float, float] = (0.0, 90.0)
    """Lowest and highest angle above the horizontal plane, in degrees (the original's -phi)."""
    azimuth: tuple[float, float] = (-180.0, 180.0)
    """Angles around the vertical axis, in degrees: (low, high) with high at most low + 360."""


PUBLISHED_RANGES = PoseRanges()
"""Jain et al. 2021: theta in [-180, 180], phi in [-90, 0], radius in [3.5, 4.5]."""


def pose_spherical(theta_degrees: float, phi_degrees: float, radius: float) -> Float[Tensor, "4 4"]:
    """The original's pose on a sphere around the origin, looking at it.

    Args:
        theta_degrees: angle around the vertical axis.
        phi_degrees: tilt; -90 is straight above, 0 at the horizon.
        radius: distance from the origin.
    """
    theta, phi = math.radians(theta_degrees), math.radians(phi_degrees)
    backward = (math.cos(phi) * math.sin(theta), -math.cos(phi) * math.cos(theta), -math.sin(phi))
    right = (-math.cos(theta), -math.sin(theta), 0.0)
    raise NotImplementedError((backward, right))


def interpolate_poses(
    p1: Float[Tensor, "r 4"], p2: Float[Tensor, "r 4"], p3: Float[Tensor, "r 4"], s12: float, s3: float
) -> Float[Tensor, "3 4"]:
    """Between p1 and p2 at s12, then between that and p3 at s3: rotations by slerp, positions linearly.

    The slerp always takes the short way and is exact for equal rotations, where the original divides by zero.

    Args:
        p1, p2, p3: poses, (3, 4) or (4, 4).
        s12, s3: in [0, 1].
    """
    raise NotImplementedError


def look_at(
    position: Float[Tensor, "3"], target: Float[Tensor, "3"], up: tuple[float, float, float] = (0.0, 0.0, 1.0)
) -> Float[Tensor, "3 4"]:
    """The pose of a camera at `position` that looks at `target`; any roll when that is straight up or down."""
    raise NotImplementedError


def sample_sphere(ranges: PoseRanges, generator: torch.Generator | None = None) -> Float[Tensor, "3 4"]:
    """A random pose, uniform over the area of the sphere within `ranges` (and uniform in radius).

    The original draws the elevation uniformly, which crowds the pole: there a degree holds less area.
    """
    raise NotImplementedError


def sample_interpolated(
    camera_to_worlds: Float[Tensor, "n r 4"], generator: torch.Generator | None = None
) -> Float[Tensor, "3 4"]:
    """A random pose between three random training poses (`interpolate_poses`, Jain et al. 2021, section 4.2).

    With two training poses it lies between these; one alone is a UserError.
    """
    raise NotImplementedError


def estimate_ranges(camera_to_worlds: Float[Tensor, "n r 4"]) -> PoseRanges:
    """Ranges that the training cameras span: centre of attention, distance, elevation and azimuth, with a margin.

    Raises:
        UserError: fewer than two cameras, or values that are not finite.
    """
    raise NotImplementedError


def orbit_path(ranges: PoseRanges, num_frames: int, elevation: float | None = None) -> Float[Tensor, "n 3 4"]:
    """Poses once around the centre (to and fro when the azimuth does not close), at the middle radius.

    Args:
        elevation: degrees above the horizon; None is the middle of the range.
    """
    raise NotImplementedError
