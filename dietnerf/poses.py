"""Camera poses around a scene: sampled on a sphere, interpolated between training views, along an orbit.

A pose is a camera-to-world matrix in nerfstudio's axes: the camera looks along its -z, y is up, the world's up is +z.
Angles are in degrees, lengths in the scene's units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, require_at_least

CLOSED_AZIMUTH = 240.0
"""Cameras that span more than this around the scene are taken to go all around it."""


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
    """Angles around the vertical axis from +x towards +y, in degrees: (low, high) with high at most low + 360."""


PUBLISHED_RANGES = PoseRanges()
"""Jain et al. 2021: theta in [-180, 180], phi in [-90, 0], radius in [3.5, 4.5]."""


def pose_spherical(theta_degrees: float, phi_degrees: float, radius: float) -> Float[Tensor, "4 4"]:
    """The original's pose on a sphere around the origin, looking at it.

    Args:
        theta_degrees: angle around the vertical axis, from +y towards +x.
        phi_degrees: tilt; -90 is straight above, 0 at the horizon.
        radius: distance from the origin.
    """
    theta, phi = math.radians(theta_degrees), math.radians(phi_degrees)
    right = (-math.cos(theta), math.sin(theta), 0.0)
    up = (math.sin(phi) * math.sin(theta), math.sin(phi) * math.cos(theta), math.cos(phi))
    backward = (math.cos(phi) * math.sin(theta), math.cos(phi) * math.cos(theta), -math.sin(phi))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.tensor([right, up, backward], dtype=torch.float64).T
    pose[:3, 3] = radius * pose[:3, 2]
    return pose.float()


def interpolate_poses(
    p1: Float[Tensor, "r 4"], p2: Float[Tensor, "r 4"], p3: Float[Tensor, "r 4"], s12: float, s3: float
) -> Float[Tensor, "3 4"]:
    """Between p1 and p2 at s12, then between that and p3 at s3: rotations by slerp, positions linearly.

    The slerp always takes the short way and is exact for equal rotations, where the original divides by zero.

    Args:
        p1, p2, p3: poses, (3, 4) or (4, 4).
        s12, s3: in [0, 1].
    """
    p12 = _interpolate_pair(p1[:3], p2[:3], s12)
    return _interpolate_pair(p12, p3[:3], s3)


def sample_sphere(ranges: PoseRanges, generator: torch.Generator | None = None) -> Float[Tensor, "3 4"]:
    """A random pose, uniform over the area of the sphere within `ranges` (and uniform in radius).

    The original draws the elevation uniformly, which crowds the pole, where a degree holds less area; here its sine is
    uniform (Archimedes).
    """
    u = torch.rand(3, generator=generator).tolist()
    low, high = (math.sin(math.radians(angle)) for angle in ranges.elevation)
    elevation = math.degrees(math.asin(low + u[0] * (high - low)))
    azimuth = ranges.azimuth[0] + u[1] * (ranges.azimuth[1] - ranges.azimuth[0])
    return _on_sphere(ranges, azimuth, elevation, ranges.radius[0] + u[2] * (ranges.radius[1] - ranges.radius[0]))


def sample_interpolated(
    camera_to_worlds: Float[Tensor, "n r 4"], generator: torch.Generator | None = None
) -> Float[Tensor, "3 4"]:
    """A random pose between three random training poses (`interpolate_poses`; Jain et al. 2021, section 4.2).

    With two training poses it lies between these; one alone is a UserError.
    """
    count = len(camera_to_worlds)
    if count < 2:
        raise UserError(f"{count} training pose: interpolated poses need at least 2; use poses from a sphere.")
    chosen = torch.randperm(count, generator=generator)[:3].tolist()
    s12, s3 = torch.rand(2, generator=generator).tolist()
    first, second = camera_to_worlds[chosen[0]].cpu(), camera_to_worlds[chosen[1]].cpu()
    third = camera_to_worlds[chosen[2]].cpu() if count > 2 else second
    return interpolate_poses(first, second, third, s12, s3 if count > 2 else 0.0)


def estimate_ranges(camera_to_worlds: Float[Tensor, "n r 4"]) -> PoseRanges:
    """The ranges that the training cameras span: centre of attention, distance, elevation and azimuth.

    The centre is that of `centre_of_attention`. Elevations reach half of their span beyond the cameras (at least 10
    degrees, within -90 and 90, and not below the horizon when no camera is), distances 10 percent, azimuths a tenth of
    their span, or all around once the cameras span 240 degrees.

    Raises:
        UserError: no camera, or values that are not finite.
    """
    poses = camera_to_worlds[:, :3].detach().cpu().double()
    if not len(poses):
        raise UserError("0 training poses: ranges need at least 1.")
    if not torch.isfinite(poses).all():
        raise UserError("camera poses hold NaN or infinity: check the transforms file.")
    positions, forward = poses[:, :, 3], -poses[:, :, 2]
    centre = centre_of_attention(positions, forward)
    offsets = positions - centre
    radius = offsets.norm(dim=1).clamp(min=1e-6)
    elevation = torch.rad2deg(torch.asin((offsets[:, 2] / radius).clamp(-1, 1)))
    low, high = elevation.min().item(), elevation.max().item()
    margin = max(10.0, 0.5 * (high - low))
    floor = 0.0 if low >= 0 else -90.0
    return PoseRanges(
        centre=tuple(centre.tolist()),
        radius=(0.9 * radius.min().item(), 1.1 * radius.max().item()),
        elevation=(max(floor, low - margin), min(90.0, high + margin)),
        azimuth=_arc(torch.rad2deg(torch.atan2(offsets[:, 1], offsets[:, 0]))),
    )


def orbit_path(ranges: PoseRanges, num_frames: int, elevation: float | None = None) -> Float[Tensor, "n 3 4"]:
    """Poses once around the centre (to and fro when the azimuth does not close), at the middle radius.

    Args:
        elevation: degrees above the horizon; None is the middle of the range.
    """
    require_at_least("num_frames", num_frames, 1)
    low, high = ranges.azimuth
    height = sum(ranges.elevation) / 2 if elevation is None else elevation
    fractions = [index / num_frames for index in range(num_frames)]
    if high - low < 359.9:
        fractions = [(1 - math.cos(2 * math.pi * fraction)) / 2 for fraction in fractions]
    radius = sum(ranges.radius) / 2
    return torch.stack([_on_sphere(ranges, low + fraction * (high - low), height, radius) for fraction in fractions])


def _on_sphere(ranges: PoseRanges, azimuth: float, elevation: float, radius: float) -> Float[Tensor, "3 4"]:
    """The pose at these angles (degrees) that looks at the centre."""
    pose = pose_spherical(90 - azimuth, -elevation, radius)[:3]
    pose[:, 3] += torch.tensor(ranges.centre)
    return pose


def _interpolate_pair(first: Float[Tensor, "3 4"], second: Float[Tensor, "3 4"], s: float) -> Float[Tensor, "3 4"]:
    from scipy.spatial.transform import Rotation, Slerp

    ends = torch.stack([first, second]).detach().double()
    rotation = Slerp([0, 1], Rotation.from_matrix(ends[:, :, :3].numpy()))(s).as_matrix()
    position = (1 - s) * ends[0, :, 3] + s * ends[1, :, 3]
    return torch.cat([torch.from_numpy(rotation), position[:, None]], dim=1).float()


def axes_meet(forward: Float[Tensor, "n 3"]) -> bool:
    """Whether optical axes have a point nearest to all of them: those that are parallel have none."""
    projections = torch.eye(3, dtype=forward.dtype) - forward[:, :, None] * forward[:, None, :]  # (n, 3, 3)
    return bool(torch.linalg.eigvalsh(projections.sum(dim=0))[0] >= 1e-3 * len(forward))


def centre_of_attention(positions: Float[Tensor, "n 3"], forward: Float[Tensor, "n 3"]) -> Float[Tensor, " 3"]:
    """The point nearest to all optical axes (nerfstudio's `focus_of_attention`), if it is in front of all cameras.

    Else, the point in front of their mean at twice their spread; of one camera, the point of its axis that is nearest
    to the origin, if that is in front of it, or one unit ahead.
    """
    from nerfstudio.cameras.camera_utils import focus_of_attention

    if len(positions) == 1:
        along = -(positions[0] @ forward[0])
        return positions[0] + forward[0] * (along if along > 1e-6 else 1.0)
    spread = (positions - positions.mean(dim=0)).norm(dim=1).max().clamp(min=1e-6)
    ahead = positions.mean(dim=0) + 2 * spread * torch.nn.functional.normalize(forward.mean(dim=0), dim=0)
    if not axes_meet(forward):
        return ahead
    poses = torch.zeros(len(positions), 3, 4, dtype=positions.dtype)
    poses[:, :, 2], poses[:, :, 3] = -forward, positions
    try:
        centre = focus_of_attention(poses, ahead)
    except torch.linalg.LinAlgError:  # of those that it keeps, the axes are parallel
        return ahead
    in_front = ((centre - positions) * forward).sum(dim=1) > 0
    return centre if in_front.all() else ahead


def _arc(azimuth: Float[Tensor, " n"]) -> tuple[float, float]:
    """The smallest arc (degrees) that holds all angles, a tenth wider, or the full circle."""
    ordered = azimuth.sort().values
    gaps = torch.cat([ordered[1:] - ordered[:-1], ordered[:1] + 360 - ordered[-1:]])
    widest = int(gaps.argmax())
    span = 360 - gaps[widest].item()
    if span >= CLOSED_AZIMUTH:
        return (-180.0, 180.0)
    start = ordered[(widest + 1) % len(ordered)].item()
    margin = max(5.0, 0.1 * span)
    return (start - margin, start + span + margin)
