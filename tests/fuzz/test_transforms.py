"""Camera files, broken: a UserError and no hang."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

pytest.importorskip("nerfstudio")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

from common.checks import UserError  # noqa: E402
from dietnerf.data import FewViewDataset, FewViewParserConfig  # noqa: E402
from dietnerf.layouts import read_frames  # noqa: E402
from tests.fuzz.mutations import FUZZ, bad_json, break_file, damaged, only_user_errors  # noqa: E402

POSE = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]
FRAMES = [
    {"file_path": f"./train/r_{number}", "transform_matrix": [[1, 0, 0, number], *POSE[1:]]} for number in range(3)
]
SCENES = {
    "transforms_train.json": {"camera_angle_x": 0.7, "cx": 2.0, "k1": 0.01, "frames": FRAMES},
    "transforms.json": {
        "fl_x": 6.0, "fl_y": 6.0, "cx": 2.0, "cy": 2.0, "w": 4, "h": 4, "camera_model": "OPENCV",
        "k1": 0.1, "k4": 0.1, "k5": 0.01, "p1": 1e-3, "applied_transform": POSE, "applied_scale": 2.0,
        "orientation_override": "up", "train_filenames": ["train/r_0.png", "train/r_1"], "val_filenames": ["train/r_2"],
        "frames": [frame | {"file_path": f"{frame['file_path']}.png"} for frame in FRAMES],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_transforms(name, tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(3):
        Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "train" / f"r_{number}.png")

    @FUZZ
    @given(bad_json(SCENES[name]), st.integers(0, 4))
    def check(data, views):
        (tmp_path / name).write_bytes(data)
        with only_user_errors():
            parser = FewViewParserConfig(data=tmp_path, num_views=views).setup()
            for split in ("train", "val"):
                found = FewViewDataset(parser.get_dataparser_outputs(split))
                assert found.load(0)[0].shape[-1] == 3

    check()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"frames": ' + "9" * 5000 + "}"])
def test_found_by_this(tmp_path, text):
    (tmp_path / "transforms.json").write_text(text)
    with pytest.raises(UserError, match="is not JSON"):
        read_frames(tmp_path / "transforms.json")


def test_file_path_that_is_no_text_is_named(tmp_path):
    (tmp_path / "transforms_train.json").write_bytes(
        b'{"camera_angle_x": 0.7, "frames": [{"file_path": 5, "transform_matrix": %s}]}' % str(POSE).encode()
    )
    with pytest.raises(UserError, match="file_path"):
        FewViewParserConfig(data=tmp_path).setup().get_dataparser_outputs("train")


def test_cameras_at_one_place_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / f"r_{number}.png")
    frames = [frame | {"transform_matrix": POSE} for frame in SCENES["transforms.json"]["frames"]]
    (tmp_path / "transforms.json").write_text(json.dumps(SCENES["transforms.json"] | {"frames": frames}))
    with pytest.raises(UserError, match="all stand at one place"):
        FewViewParserConfig(data=tmp_path).setup().get_dataparser_outputs("train")


def poses_file(count=3):
    """LLFF's poses_bounds.npy: cameras side by side that look along -z, the image's size and the focal length."""
    rows = []
    for number in range(count):
        pose = np.array([[0, 1, 0, number, 4], [-1, 0, 0, 0, 4], [0, 0, 1, 0, 6]], dtype=np.float64)
        rows.append([*pose.ravel(), 1.0, 5.0])
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows))
    return buffer.getvalue()


def test_poses_bounds(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{number}.png")

    def read():
        found = FewViewDataset(FewViewParserConfig(data=tmp_path).setup().get_dataparser_outputs("train"))
        assert found.load(0)[0].shape == (4, 4, 3)

    (tmp_path / "poses_bounds.npy").write_bytes(poses_file())
    read()
    break_file(tmp_path / "poses_bounds.npy", damaged(poses_file()), read)
