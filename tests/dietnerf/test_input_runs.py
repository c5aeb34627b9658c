"""Scenes as they really come, through the commands: several sizes, one view, and the way back to their coordinates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nerfstudio")

from common.checks import UserError
from dietnerf.cli import main
from dietnerf.data import FewViewDataset, FewViewParserConfig
from dietnerf.poses import estimate_ranges, orbit_path
from dietnerf.rays import FewViewDataManagerConfig
from dietnerf.scene import Scene
from tests.dietnerf.ball import look_at_origin, write_scene
from tests.dietnerf.test_data import nerfstudio_scene
from tests.dietnerf.test_input import colmap_scene, edit, mixed_scene

__all__ = ["mixed_scene"]


def train(scene: Path, out: Path, *more: str) -> Path:
    arguments = ["--out", str(out), "--steps", "2", "--rays", "64", "--resolutions", "8", "--no-progress"]
    assert main(["train", str(scene), *arguments, "--val-views", "1", "--device", "cpu", *more]) == 0
    return out


def test_photographs_of_several_sizes_are_trained_rendered_and_scored(mixed_scene, tmp_path, capsys):
    run = train(mixed_scene, tmp_path / "run", "--view-ids", "0", "3", "4")
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert "2 held-out views" in capsys.readouterr().out
    assert len(json.loads((run / "evaluation/results.json").read_text())["per_view"]) == 2
    assert main(["render", str(run), "--path", "test", "--format", "png", "--device", "cpu"]) == 0
    scene = Scene.load(run, device="cpu")
    cameras = scene.held_out_views.cameras
    largest = int(cameras.height.max()), int(cameras.width.max())
    shapes = [np.asarray(Image.open(path)).shape for path in sorted((run / "test").glob("*.png"))]
    assert shapes == [(largest[0], 2 * largest[1], 3)] * 2 and not scene.held_out_views.same_size
    assert len(json.loads((run / "training.json").read_text())["images"]) == 3


@pytest.mark.parametrize("layout", ["blender", "nerfstudio"])
def test_one_view(tmp_path, layout):
    scene = tmp_path / "scene"
    (write_scene(scene, splits={"train": 1, "test": 2}) if layout == "blender" else nerfstudio_scene(scene, 1))
    run = train(scene, tmp_path / "run")
    assert main(["render", str(run), "--frames", "2", "--size", "8", "--device", "cpu"]) == 0
    camera = Scene.load(run, device="cpu").training_views.cameras.camera_to_worlds
    assert len(camera) == 1
    centre = torch.tensor(estimate_ranges(camera).centre)
    assert centre.norm() < 1e-4  # what it looks at is in the middle of the box
    for pose in orbit_path(estimate_ranges(camera), 3):
        assert torch.allclose(torch.linalg.cross(pose[:, 2], pose[:, 3]), torch.zeros(3), atol=1e-4)
    with pytest.raises(UserError, match="0 training poses"):
        estimate_ranges(camera[:0])


@pytest.mark.slow
def test_one_of_many_views(tmp_path):
    run = train(write_scene(tmp_path / "scene"), tmp_path / "run", "--view-ids", "r_2")
    assert Scene.load(run, device="cpu").training_views.view_ids == (2,)


def test_poses_in_the_coordinates_of_the_input(tmp_path):
    scene = write_scene(tmp_path / "scene", splits={"train": 4})

    def grow(meta):
        for frame in meta["frames"]:
            pose = np.array(frame["transform_matrix"])
            pose[:3, 3] = 3 * pose[:3, 3] + [100, 200, -50]
            frame["transform_matrix"] = pose.tolist()

    edit(scene / "transforms_train.json", grow)
    run = train(scene, tmp_path / "run")
    opened = Scene.load(run, device="cpu")
    given = json.loads((scene / "transforms_train.json").read_text())["frames"][1]["transform_matrix"]
    own = opened.training_views.cameras.camera_to_worlds[1]
    assert torch.allclose(opened.pose_from_input(torch.tensor(given, dtype=torch.float64)), own, atol=1e-5)
    there = opened.render(torch.tensor(given, dtype=torch.float64), frame="input", size=8)
    assert torch.allclose(there.rgb, opened.render(own, size=8).rgb, atol=1e-3)
    with pytest.raises(UserError, match="frame is 'world'"):
        opened.render(own, frame="world")  # type: ignore[arg-type]
    written = json.loads((run / "dataparser_transforms.json").read_text())
    transform = np.array(written["transform"])
    place = written["scale"] * (transform[:, :3] @ np.array(given)[:3, 3] + transform[:, 3])
    assert np.allclose(place, own[:, 3], atol=1e-5) and written["scale"] == pytest.approx(1 / 3)


def test_the_way_back_through_nerfstudio(tmp_path):
    shift = np.array([448251.25, 5411932.5, 240.0])
    scene = nerfstudio_scene(tmp_path / "a", 5)
    given = []

    def move(meta):
        for frame in meta["frames"]:
            pose = np.array(frame["transform_matrix"])
            pose[:3, 3] += shift
            given.append(pose)
            frame["transform_matrix"] = pose.tolist()

    edit(scene / "transforms.json", move)
    found = FewViewParserConfig(data=scene).setup().get_dataparser_outputs("train")
    back = found.transform_poses_to_original_space(found.cameras.camera_to_worlds, "opengl")
    assert np.allclose(back.numpy(), np.stack(given)[:, :3], atol=1e-5)
    posed = FewViewParserConfig(data=colmap_scene(tmp_path / "b", 10)).setup().get_dataparser_outputs("train")
    back = posed.transform_poses_to_original_space(posed.cameras.camera_to_worlds, "opengl")
    assert np.allclose(back[0].numpy(), look_at_origin(36, 20)[:3], atol=1e-5)  # f1: f0 is held out
    place = posed.metadata["world"].place(look_at_origin(36, 20)[None, :3])
    assert np.allclose(place[0], posed.cameras.camera_to_worlds[0], atol=1e-5)


def test_images_stay_8_bit_in_memory(tmp_path):
    scene = write_scene(tmp_path)
    views = FewViewDataset(FewViewParserConfig(data=scene).setup().get_dataparser_outputs("train"))
    assert views.pixels.dtype == torch.uint8 and views.pixels.shape == (6, 16, 16, 4)
    assert torch.allclose(views.images[3], views.load(3)[0], atol=0.51 / 255)
    assert torch.allclose(views.alphas[3], views.load(3)[1], atol=1e-6)
    for alpha in (False, True):
        manager = FewViewDataManagerConfig(dataparser=FewViewParserConfig(data=scene), crop_steps=0).setup(device="cpu")
        manager.with_alpha = alpha
        batch = manager.next_train(0)[1]
        assert manager._stage(1)[0].dtype == torch.uint8 and batch["image"].dtype == torch.float32
        assert ("alpha" in batch) == alpha


def test_twelve_megapixel_photographs_get_a_sensible_size(tmp_path):
    scene = nerfstudio_scene(tmp_path, 2)
    for i in range(2):
        Image.new("RGB", (4000, 3000)).save(scene / f"f{i}.png", compress_level=1)
    edit(
        scene / "transforms.json",
        lambda meta: meta.update(w=4000, h=3000, fl_x=3000.0, fl_y=3000.0, cx=2000.0, cy=1500.0),
    )

    def size(**settings) -> tuple[int, int, float]:
        found = FewViewParserConfig(data=scene, **settings).setup().get_dataparser_outputs("train").cameras
        return int(found.width[0]), int(found.height[0]), float(found.fx[0])

    assert size() == (1600, 1200, 1200.0)
    assert size(image_size=4000) == (4000, 3000, 3000.0)  # who asks for more gets it
