"""Paths, depth pictures, and the files that render writes."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from PIL import Image

from common.checks import UserError
from dietnerf.poses import pose_spherical
from dietnerf.render import (
    depth_picture,
    depth_range,
    frames_of,
    path_cameras,
    round_trip,
    write_gif,
    write_mp4,
    write_pngs,
)
from dietnerf.scene import Rendering


def rendering(depth: float, opaque: float = 1.0) -> Rendering:
    full = torch.ones(4, 6, 1)
    half = full.clone()
    half[:, :3] = 0
    return Rendering(torch.full((4, 6, 3), 0.25), depth * full, opaque * half)


@pytest.fixture
def frames() -> list[np.ndarray]:
    return [np.full((9, 13, 3), value, dtype=np.uint8) for value in (20, 120, 220)]


def test_depth_beside_colour_on_one_scale():
    near, far = depth_range([rendering(2.0), rendering(4.0)])
    assert (near, far) == (2.0, 4.0)
    first, second = frames_of([rendering(2.0), rendering(4.0)])
    assert first.shape == (4, 12, 3) and (first[:, :6] == 64).all()
    assert (first[:, 6:9] == 255).all()  # nothing there: white
    assert first[0, 11].sum() > second[0, 11].sum()  # near is brighter
    assert frames_of([rendering(2.0)], depth=False)[0].shape == (4, 6, 3)
    assert depth_range([rendering(2.0, opaque=0.0)]) == (0.0, 1.0)
    assert depth_picture(rendering(3.0), 3.0, 3.0).shape == (4, 6, 3)


def test_held_out_views_are_shown_by_their_own_cameras():
    pose = pose_spherical(30, -30, 4)[None, :3]
    views = Cameras(pose, fx=12.0, fy=13.0, cx=7.0, cy=5.0, width=16, height=10)
    scene = SimpleNamespace(held_out_views=SimpleNamespace(cameras=views))
    (own,), (half,) = path_cameras(scene, "test", 1), path_cameras(scene, "test", 1, size=8)
    for camera, scale in ((own, 1), (half, 0.5)):
        found = [float(v) for v in (camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height)]
        assert found == [v * scale for v in (12, 13, 7, 5, 16, 10)]


def test_frames_are_made_one_by_one():
    """Of a rendering that is done, nothing is kept at full precision."""
    gone = []

    def renderings():
        for depth in (2.0, 4.0, 3.0):
            gone.append(weakref.ref(made := rendering(depth)))
            yield made
            del made
            assert [one() for one in gone[:-1]] == [None] * (len(gone) - 1)

    found = frames_of(renderings())
    for shown, expected in zip(found, frames_of([rendering(depth) for depth in (2.0, 4.0, 3.0)]), strict=True):
        assert np.array_equal(shown, expected)


def test_round_trip_visits_each_camera_once():
    positions = torch.tensor([[0.0, 0, 0], [10, 0, 0], [1, 0, 0], [9, 0, 0]])
    assert round_trip(positions) == [0, 2, 3, 1]


def test_gif(tmp_path, frames):
    path = write_gif(tmp_path / "new" / "a.gif", frames, fps=10)
    with Image.open(path) as image:
        assert image.n_frames == 3 and image.info["duration"] == 100 and image.info["loop"] == 0
        image.seek(2)
        assert image.convert("RGB").getpixel((5, 5)) == (220, 220, 220)
    assert [p.name for p in path.parent.iterdir()] == ["a.gif"]


def test_mp4_of_odd_size(tmp_path, frames):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_mp4(tmp_path / "a.mp4", frames, fps=10)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["size"] == (14, 10) and meta["fps"] == 10
    shown = [np.frombuffer(frame, np.uint8).reshape(10, 14, 3) for frame in reader]
    assert len(shown) == 3 and abs(int(shown[1][4, 4, 0]) - 120) < 8


def test_mp4_names_what_fails(tmp_path, frames, monkeypatch):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "false")
    with pytest.raises(UserError, match="ffmpeg failed"):
        write_mp4(tmp_path / "a.mp4", frames, fps=10)


def test_pngs(tmp_path, frames):
    directory = write_pngs(tmp_path / "p", frames)
    assert sorted(p.name for p in Path(directory).iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert np.array_equal(np.asarray(Image.open(directory / "0001.png")), frames[1])


def test_a_place_that_is_taken_leaves_no_half_file_behind(tmp_path, frames):
    (tmp_path / "taken").mkdir()
    for write in (write_gif, write_mp4):
        with pytest.raises(OSError):
            write(tmp_path / "taken", frames, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
