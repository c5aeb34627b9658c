"""Where a capture is: its sparse points, the box around them, and the planes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("nerfstudio")

from common.checks import UserError
from dietnerf.bounds import Bounds, BoxConfig, chosen_box, distances, few_inside, find_bounds, percentile, within
from dietnerf.captures import read_capture
from dietnerf.sparse import SparsePoints, read_points
from tests.dietnerf.ball import look_at_origin, write_scene
from tests.dietnerf.posed import ball_points, write_capture
from tests.dietnerf.test_data import nerfstudio_scene, read

POSES = np.stack([look_at_origin(60 * i, 20)[:3] for i in range(6)])


def test_points_and_tracks_are_in_the_coordinates_of_the_poses(tmp_path):
    capture = read_capture(write_capture(tmp_path / "s", outliers=6), "train")
    points = read_points(capture)
    assert np.allclose(points.positions[:200], ball_points(), atol=1e-6) and len(points.positions) == 206
    assert set(points.errors) == {0.5, 1.5} and points.votes[-6:].tolist() == [1.0] * 6
    for frame, pose in enumerate(capture.frames):
        seen = points.positions[points.seen[frame]][:-1]  # the last one is far away
        assert 60 < len(seen) < 110 and ((seen * (pose.pose[:, 3] - seen)).sum(axis=1) > 0).all()
    positions, confidence = points.observed(0)
    assert len(positions) == len(points.seen[0])
    assert np.allclose(np.unique(confidence), np.exp(-np.square([1.5, 0.5])), atol=1e-6)


def test_a_ply_alone_has_positions_but_no_tracks(tmp_path):
    scene = write_capture(tmp_path / "s", tracks=False)
    points = read_points(read_capture(scene, "train"))
    assert np.allclose(points.positions, ball_points(), atol=1e-5)
    assert points.seen is None and read(scene).metadata["observed"] is None and read(scene).observed is None
    (scene / "sparse_pc.ply").write_text("ply")
    with pytest.raises(UserError, match=r"point cloud .* cannot be read"):
        read(scene)
    (scene / "sparse_pc.ply").unlink()
    with pytest.raises(UserError, match=r"point cloud .* does not exist"):
        read(scene)


def test_a_colmap_scene_has_its_own_points(tmp_path):
    scene = write_capture(tmp_path / "s")
    (scene / "transforms.json").unlink()
    capture = read_capture(scene, "train")
    assert capture.kind == "colmap"
    points = read_points(capture)
    assert np.allclose(points.positions, ball_points(), atol=1e-6) and len(points.seen) == 6
    (scene / "colmap/sparse/0/points3D.txt").write_text("1 2 3\n")
    with pytest.raises(UserError, match=r"COLMAP's .*points3D.txt' cannot be read"):
        read(scene)


def test_a_model_of_other_cameras_is_not_used(tmp_path):
    scene = write_capture(tmp_path / "s")
    meta = json.loads((scene / "transforms.json").read_text())
    for frame in meta["frames"]:
        frame["transform_matrix"][0][3] += 1.0
    (scene / "transforms.json").write_text(json.dumps(meta))
    assert read_points(read_capture(scene, "train")).seen is None  # the ply's


def test_scenes_without_points(tmp_path, ball_scene):
    assert read_points(read_capture(nerfstudio_scene(tmp_path / "s"), "train")) is None
    assert read_points(read_capture(ball_scene, "train")) is None


def test_percentiles_count_votes():
    values = np.array([[3.0], [1.0], [2.0], [10.0]])
    assert percentile(values, 50, np.ones(4)) == [2.0]
    assert percentile(values, 50, np.array([1.0, 1, 1, 9])) == [10.0]
    repeated = np.repeat(values, [2, 5, 1, 3], axis=0)
    for share in (0, 10, 37, 64, 90, 100):
        assert percentile(values, share, np.array([2.0, 5, 1, 3])) == percentile(repeated, share, np.ones(11))


def test_the_box_is_around_what_is_seen_however_far_the_outliers():
    points = SparsePoints(ball_points())
    box = find_bounds(POSES, points, unbounded=True).box
    assert np.allclose(box.mean(axis=0), 0, atol=0.05)
    assert within(box, points.positions).mean() > 0.95 and (box[1] < 1.3).all()
    far = np.random.default_rng(0).normal(size=(18, 3)) * 1000
    noisy = find_bounds(POSES, SparsePoints(np.concatenate((ball_points(), far))), unbounded=True)
    assert np.abs(noisy.box - box).max() < 0.3 and 0.85 < noisy.inside < 200 / 218 + 1e-9
    whole = find_bounds(POSES, SparsePoints(np.concatenate((ball_points(), 2 * ball_points()))), unbounded=False)
    assert whole.inside > 0.99  # of a field that has nothing outside


def test_the_box_and_planes_scale_with_the_scene():
    one = find_bounds(POSES, SparsePoints(ball_points()), unbounded=True)
    scaled = POSES.copy()
    scaled[:, :, 3] *= 7
    seven = find_bounds(scaled, SparsePoints(7 * ball_points()), unbounded=True)
    assert np.allclose(seven.box, 7 * one.box) and np.allclose(seven.planes, 7 * np.array(one.planes))


def test_planes_hold_what_photographs_see():
    near, far = find_bounds(POSES, SparsePoints(ball_points()), unbounded=True).planes
    assert 1.0 < near < 3.0 and far > 5.0  # the ball is 3 to 5 from the cameras
    seen = [np.array([0])] * 6
    near, far = find_bounds(POSES, SparsePoints(ball_points(), np.ones(200), seen), unbounded=True).planes
    lengths = np.linalg.norm(ball_points()[0] - POSES[:, :, 3], axis=1)
    assert near == pytest.approx(0.5 * np.percentile(lengths, 1)) and far == pytest.approx(
        8 * np.percentile(lengths, 99)
    )
    assert len(distances(POSES, SparsePoints(ball_points() + [0, 0, 1000.0]))) == 1200  # none before a camera


def test_a_flat_scene_has_a_box_with_depth():
    wall = ball_points() * [1, 1, 0.001]
    sides = np.diff(find_bounds(POSES, SparsePoints(wall), unbounded=True).box, axis=0)[0]
    assert sides.min() == pytest.approx(0.4 * sides.max())


def test_without_points_the_box_is_where_the_cameras_look(tmp_path):
    shifted = POSES + np.concatenate((np.zeros((3, 3)), [[5.0], [0], [0]]), axis=1)
    box = find_bounds(shifted, None, unbounded=True).box
    assert np.allclose(box.mean(axis=0), [5, 0, 0], atol=1e-4) and np.allclose(box[1] - box[0], 8, atol=1e-3)
    outwards = POSES * [1, 1, 1, 1.0]
    outwards[:, :, [0, 2]] *= -1
    assert np.allclose(find_bounds(outwards, None, unbounded=True).box.mean(axis=0), POSES[:, :, 3].mean(axis=0))
    alone = find_bounds(POSES[:1] / [1, 1, 1, 4], None, unbounded=True).box
    assert np.allclose(alone.mean(axis=0), 0, atol=1e-6)


def test_a_box_of_the_users_own(tmp_path, capsys):
    scene = write_capture(tmp_path / "s")
    own = read(scene)
    assert "warning" not in capsys.readouterr().err
    moved = read(scene, box_center=(5.0, 0.0, 0.0), box_size=(1.0, 2.0, 3.0)).scene_box.aabb
    assert torch.allclose(moved, torch.tensor([[4.5, -1.0, -1.5], [5.5, 1.0, 1.5]]))
    said = capsys.readouterr().err
    assert "0% of the scene's points lie in the box (--box-center 5 0 0 --box-size 1 2 3): leave both out" in said
    sized = read(scene, box_size=(1.0, 1.0, 1.0)).scene_box.aabb
    assert torch.allclose(sized.mean(dim=0), own.scene_box.aabb.mean(dim=0), atol=1e-6)
    with pytest.raises(UserError, match=r"box_size is \(0\.0, 1\.0, 1\.0\): give three sides above 0"):
        read(scene, box_size=(0.0, 1.0, 1.0))


def test_few_points_inside_are_said():
    box = np.array([[-1.0] * 3, [1.0] * 3])
    assert few_inside(Bounds(box, (1, 2), 0.5)) is None and few_inside(Bounds(box, (1, 2))) is None
    assert few_inside(Bounds(box, (1, 2), 0.3)).startswith("30% of the scene's points lie in the box")
    found = chosen_box(Bounds(box, (1, 2)), BoxConfig(box_size=(0.2, 0.2, 0.2)), SparsePoints(ball_points()))
    assert found.inside == 0.0 and found.planes == (1, 2)


def test_objects_on_white_keep_their_box(tmp_path, ball_scene):
    views = read(ball_scene)
    assert torch.equal(views.scene_box.aabb, torch.tensor([[-1.5] * 3, [1.5] * 3]))
    assert views.metadata["planes"] == (2.0, 6.0) and not views.metadata["unbounded"]
    opaque = read(write_scene(tmp_path / "rgb", mode="RGB"))
    assert not opaque.metadata["unbounded"]
    assert read(nerfstudio_scene(tmp_path / "s")).metadata["unbounded"]
    assert not read(nerfstudio_scene(tmp_path / "t"), contraction="off").metadata["unbounded"]
    assert read(ball_scene, contraction="on").metadata["unbounded"]


def test_every_nth_photograph_is_held_out(tmp_path, ball_scene):
    scene = write_capture(tmp_path / "s", count=11)
    training, held_out = read(scene, hold_out=5), read(scene, "test", hold_out=5)
    assert [path.stem for path in held_out.image_filenames] == ["f2", "f7"]
    assert len(training) == 9 and set(training.image_filenames).isdisjoint(held_out.image_filenames)
    assert held_out.source == "one photograph of 5"
    assert len(read(scene, hold_out=5, num_views=4)) == 4
    for every, message in ((1, "hold_out"), (40, "hold_out is 40 but the scene has 11 photographs: use at most 21")):
        with pytest.raises(UserError, match=message):
            read(scene, hold_out=every)
    with pytest.raises(UserError, match="has a file for each split: leave it out"):
        read(ball_scene, hold_out=4)
