"""Paths, depth pictures, and the files that render writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checks import UserError
from dietnerf.render import depth_picture, depth_range, frames_of, round_trip, write_gif, write_mp4, write_pngs
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
