from __future__ import annotations

import math

import pytest
import torch

from common.checks import UserError
from dietnerf.poses import (
    PUBLISHED_RANGES,
    PoseRanges,
    estimate_ranges,
    interpolate_poses,
    orbit_path,
    pose_spherical,
    sample_interpolated,
    sample_sphere,
)


def assert_is_rotation(pose):
    rotation = pose[:3, :3].double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert torch.linalg.det(rotation) > 0.999


def elevation_of(pose):
    return math.degrees(math.asin(float(pose[2, 3] / pose[:3, 3].norm())))


def test_pose_spherical_is_the_originals(golden):
    for (theta, phi, radius), expected in zip(
        golden["pose_spherical.theta_phi_radius"].tolist(), golden["pose_spherical.c2w"], strict=True
    ):
        torch.testing.assert_close(pose_spherical(theta, phi, radius), expected, atol=1e-5, rtol=0)


def test_interpolation_is_the_originals_where_that_took_the_short_way(golden):
    poses, index = golden["pose_spherical.c2w"], golden["interp3.pose_index"]
    short = golden["interp3.short_path"]
    assert short.any() and not short.all()
    for i, (s12, s3) in enumerate(golden["interp3.s12_s3"].tolist()):
        found = interpolate_poses(*poses[index[i]], s12, s3)
        torch.testing.assert_close(found[:, 3], golden["interp3.c2w"][i, :, 3], atol=1e-4, rtol=0)
        difference = (found - golden["interp3.c2w"][i]).abs().max()
        assert difference < 1e-4 if short[i] else difference > 1e-2
        assert_is_rotation(found)


def test_interpolation_takes_the_short_way_and_meets_its_ends():
    first, second = pose_spherical(-170, -30, 4), pose_spherical(170, -30, 4)  # 20 degrees apart across the seam
    torch.testing.assert_close(interpolate_poses(first, second, second, 0.0, 0.0), first[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(interpolate_poses(first, second, first, 1.0, 0.0), second[:3], atol=1e-6, rtol=0)
    middle = interpolate_poses(first, second, second, 0.5, 0.0)
    expected = pose_spherical(180, -30, 4)[:3, :3]
    turned = torch.trace(middle[:, :3].T @ expected)
    assert turned > 2.99  # a slerp between them is the horizontal turn but for a hair of tilt


def test_interpolation_of_equal_and_opposite_rotations_is_finite():
    pose = pose_spherical(20, -40, 4)
    torch.testing.assert_close(interpolate_poses(pose, pose, pose, 0.3, 0.7), pose[:3], atol=1e-6, rtol=0)
    opposite = interpolate_poses(pose_spherical(0, 0, 4), pose_spherical(180, 0, 4), pose, 0.5, 0.0)
    assert torch.isfinite(opposite).all()
    assert_is_rotation(opposite)


def test_samples_are_uniform_on_the_spheres_area(generator):
    poses = torch.stack([sample_sphere(PUBLISHED_RANGES, generator) for _ in range(4000)])
    radius = poses[:, :, 3].norm(dim=1)
    assert radius.min() >= 3.5 - 1e-4 and radius.max() <= 4.5 + 1e-4
    sine = poses[:, 2, 3] / radius  # area of a zone is proportional to its height: uniform in [0, 1]
    for fraction in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs((sine < fraction).float().mean() - fraction) < 0.03
    crowded = torch.sin(torch.deg2rad(90 * torch.rand(4000, generator=generator)))  # the original's: uniform in angle
    assert abs((crowded < 0.5).float().mean() - 0.5) > 0.1
    azimuth = torch.atan2(poses[:, 1, 3], poses[:, 0, 3])
    for quarter in range(4):
        low = -math.pi + quarter * math.pi / 2
        assert abs(((azimuth >= low) & (azimuth < low + math.pi / 2)).float().mean() - 0.25) < 0.03
    for pose in poses[:20]:
        assert_is_rotation(pose)
        torch.testing.assert_close(pose[:, 2], pose[:, 3] / pose[:, 3].norm(), atol=1e-5, rtol=0)  # looks at 0


def test_samples_stay_in_their_ranges_around_their_centre(generator):
    ranges = PoseRanges(centre=(1.0, -2.0, 0.5), radius=(2.0, 3.0), elevation=(10.0, 40.0), azimuth=(80.0, 100.0))
    for _ in range(200):
        offset = sample_sphere(ranges, generator)[:, 3] - torch.tensor(ranges.centre)
        assert 2.0 - 1e-4 <= offset.norm() <= 3.0 + 1e-4
        assert 10 - 1e-2 <= math.degrees(math.asin(offset[2] / offset.norm())) <= 40 + 1e-2
        assert 80 - 1e-2 <= math.degrees(math.atan2(offset[1], offset[0])) <= 100 + 1e-2


def test_the_same_generator_gives_the_same_pose():
    first, second = (sample_sphere(PUBLISHED_RANGES, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_interpolated_samples_lie_between_training_cameras(generator):
    poses = torch.stack([pose_spherical(theta, -30, 4) for theta in (0, 30, 60, 90)])
    for _ in range(50):
        pose = sample_interpolated(poses, generator)
        assert_is_rotation(pose)
        assert pose[:, 3].norm() <= 4 + 1e-5  # inside the hull of the positions
        assert pose[2, 3] == pytest.approx(2, abs=1e-4)
    pair = sample_interpolated(poses[:2], generator)
    assert_is_rotation(pair)
    with pytest.raises(UserError, match="1 training pose"):
        sample_interpolated(poses[:1], generator)


def test_ranges_are_those_of_cameras_around_a_point(generator):
    true = PoseRanges(centre=(0.3, -0.2, 0.1), radius=(3.0, 4.0), elevation=(20.0, 50.0))
    poses = torch.stack([sample_sphere(true, generator) for _ in range(40)])
    found = estimate_ranges(poses)
    assert found.centre == pytest.approx(true.centre, abs=1e-3)
    assert found.azimuth == (-180.0, 180.0)
    assert 2.6 < found.radius[0] < 3.0 and 4.0 < found.radius[1] < 4.5
    assert 0 <= found.elevation[0] < 20 and 50 < found.elevation[1] <= 90


def test_ranges_of_half_a_circle_do_not_reach_round_the_back():
    poses = torch.stack([pose_spherical(theta, -10, 4) for theta in (150, 170, 190, 210)])  # across the seam
    low, high = estimate_ranges(poses).azimuth
    assert high - low == pytest.approx(60 * 1.2, abs=1)
    directions = {round(90 - theta) for theta in (150, 170, 190, 210)}
    assert all(any(low <= direction + turn <= high for turn in (-360, 0, 360)) for direction in directions)


def test_ranges_of_parallel_cameras_have_a_centre_in_front():
    straight = torch.eye(4).repeat(3, 1, 1)
    straight[:, 0, 3] = torch.tensor([-1.0, 0.0, 1.0])
    ranges = estimate_ranges(straight)
    assert ranges.centre[2] < -0.5  # they look along -z
    for pose in orbit_path(ranges, 4):
        assert torch.isfinite(pose).all()


def test_bad_cameras_are_named():
    with pytest.raises(UserError, match="0 training poses"):
        estimate_ranges(torch.eye(4)[None][:0])
    broken = torch.eye(4).repeat(2, 1, 1)
    broken[0, 0, 3] = math.nan
    with pytest.raises(UserError, match="NaN"):
        estimate_ranges(broken)


def test_orbit_goes_once_around_without_repeating_its_first_frame():
    path = orbit_path(PUBLISHED_RANGES, 8, elevation=30)
    assert path.shape == (8, 3, 4)
    steps = (path[:, :, 3] - path.roll(-1, 0)[:, :, 3]).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(8), atol=1e-4, rtol=0)
    assert all(elevation_of(pose) == pytest.approx(30, abs=1e-3) for pose in path)
    swing = orbit_path(PoseRanges(azimuth=(0.0, 90.0)), 8)
    assert (swing[1] - swing[-1]).abs().max() < 1e-4  # to and fro
