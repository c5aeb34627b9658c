"""Scenes as they really come: each fault that was met once, by its name."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

pytest.importorskip("nerfstudio")

from common.checks import UserError
from dietnerf.data import FewViewDataset, FewViewParserConfig
from dietnerf.layouts import colmap_model, find_scene
from dietnerf.lenses import distortion
from dietnerf.rays import FewViewDataManagerConfig
from dietnerf.views import select_views
from dietnerf.world import other_convention
from tests.dietnerf.ball import draw_ball, look_at_origin, write_scene
from tests.dietnerf.test_data import nerfstudio_scene

TURN_LEFT = 6
"""EXIF: the picture lies on its left side, as from a phone held upright."""


def read(path: Path, split: str = "train", **settings) -> FewViewDataset:
    return FewViewDataset(FewViewParserConfig(data=path, **settings).setup().get_dataparser_outputs(split))


def edit(path: Path, change) -> None:
    """Change a transforms file; what `change` returns is written, if it returns anything."""
    meta = json.loads(path.read_text())
    found = change(meta)
    path.write_text(json.dumps(meta if found is None else found))


def lay_on_its_side(path: Path) -> None:
    """Write an image as a camera held sideways does: turned, with the tag that turns it back."""
    with Image.open(path) as image:
        upright = image.copy()
    exif = Image.Exif()
    exif[0x0112] = TURN_LEFT
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def rays_of(views: FewViewDataset, index: int = 0) -> torch.Tensor:
    return views.cameras.generate_rays(camera_indices=index, keep_shape=True).directions


# Silently wrong


def test_grey_of_sixteen_bits_is_not_white(tmp_path):
    scene = write_scene(tmp_path, mode="L")
    plain = read(scene).images
    for path in (scene / "train").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
        assert Image.open(path).mode.startswith("I")
    views = read(scene)
    assert views.background == "image" and torch.allclose(views.images, plain, atol=1e-6)
    assert np.allclose(views.get_numpy_image(0) / 255, plain[0].numpy(), atol=1e-6)  # what nerfstudio asks for


def test_one_image_of_eight_without_alpha_is_named(tmp_path):
    scene = write_scene(tmp_path, splits={"train": 8})
    Image.open(scene / "train/r_5.png").convert("RGB").save(scene / "train/r_5.png")
    with pytest.raises(UserError, match="r_5.png' has no alpha but .*r_0.png' has: cut it out as well") as caught:
        read(scene)
    assert "\n" not in str(caught.value)
    assert read(scene, background="image").background == "image"
    assert read(scene, view_ids=(0, 1, 2)).background == "white"


@pytest.mark.parametrize("layout", ["square images", "Blender's layout"])
def test_images_are_turned_upright_by_their_exif_tag(tmp_path, layout):
    scene = nerfstudio_scene(tmp_path) if layout == "square images" else write_scene(tmp_path)
    before = read(scene)
    for path in before.image_filenames:
        lay_on_its_side(path)
    views = read(scene)
    assert torch.equal(views.images, before.images) and torch.equal(rays_of(views), rays_of(before))


def test_images_are_turned_where_their_camera_is_upright_and_left_where_it_is_not(tmp_path):
    scene = nerfstudio_scene(tmp_path)
    for i in range(4):
        Image.fromarray(np.arange(16 * 12 * 3, dtype=np.uint8).reshape(16, 12, 3)).save(scene / f"f{i}.png")
    sizes = {"upright": dict(w=12, h=16, cx=6.0, cy=8.0), "as it lies": dict(w=16, h=12, cx=8.0, cy=6.0)}
    upright = np.asarray(Image.open(scene / "f0.png")) / 255
    for i in range(4):
        lay_on_its_side(scene / f"f{i}.png")
    for name, size in sizes.items():
        edit(scene / "transforms.json", lambda meta, size=size: meta.update(size))
        found = read(scene).load(0)[0].numpy()
        assert np.allclose(found, upright if name == "upright" else np.rot90(upright), atol=1e-6)


def test_lenses_of_blenders_layout_are_read(tmp_path):
    scene = write_scene(tmp_path)
    lens = dict(fl_x=30.0, fl_y=31.0, cx=7.0, cy=9.0, k1=0.1)
    edit(scene / "transforms_train.json", lambda meta: meta.update(lens))
    cameras = read(scene).cameras
    found = [float(value[1]) for value in (cameras.fx, cameras.fy, cameras.cx, cameras.cy)]
    assert found == pytest.approx([30, 31, 7, 9]) and float(cameras.distortion_params[1, 0]) == pytest.approx(0.1)
    edit(scene / "transforms_train.json", lambda meta: meta["frames"][2].update(fl_x=40.0))
    assert read(scene).cameras.fx[:4, 0].tolist() == [30, 30, 40, 30]


def test_a_frames_own_k1_is_read_beside_that_of_the_file(tmp_path):
    scene = nerfstudio_scene(tmp_path)
    edit(scene / "transforms.json", lambda meta: meta.update(k1=0.05) or meta["frames"][2].update(k1=0.2))
    found = read(scene).cameras.distortion_params[:, 0]
    assert found.tolist() == pytest.approx([0.05, 0.05, 0.2, 0.05])


def convention(name: str, pose: np.ndarray) -> np.ndarray:
    turned = np.diag([1.0, -1, -1, 1])
    return {
        "OpenCV's axes": pose @ turned,
        "world-to-camera matrices:": np.linalg.inv(pose),
        "world-to-camera matrices with OpenCV's axes": np.linalg.inv(pose @ turned),
    }[name]


@pytest.mark.parametrize("name", ["OpenCV's axes", "world-to-camera matrices:", "world-to-camera matrices with OpenCV"])
@pytest.mark.parametrize("centre", [0.0, 7.0])
def test_poses_of_another_convention_are_not_taken_in_silence(tmp_path, capsys, name, centre):
    full = name + "'s axes" if name.endswith("OpenCV") else name

    def spoil(meta):
        for frame in meta["frames"]:
            pose = np.array(frame["transform_matrix"])
            pose[:3, 3] += centre
            frame["transform_matrix"] = convention(full, pose).tolist()

    cut_out = write_scene(tmp_path / "blender")
    edit(cut_out / "transforms_train.json", spoil)
    with pytest.raises(UserError, match="look away from the point that they have in common") as caught:
        read(cut_out)
    assert full.rstrip(":") in str(caught.value) and "\n" not in str(caught.value)
    photographs = nerfstudio_scene(tmp_path / "nerfstudio", 5)
    edit(photographs / "transforms.json", lambda meta: [*map(spoil, [meta])] and meta)
    if name.startswith("world-to-camera") and not centre:  # then they all stand at one place
        with pytest.raises(UserError, match="all stand at one place, as world-to-camera matrices"):
            read(photographs)
    else:
        read(photographs)
        said = capsys.readouterr().err
        assert said.startswith("warning: the cameras of") and full in said and len(said.splitlines()) == 1


def test_proper_poses_are_taken_without_a_word(tmp_path, capsys):
    read(write_scene(tmp_path / "blender"))
    read(nerfstudio_scene(tmp_path / "nerfstudio", 6))
    assert capsys.readouterr().err == ""
    generator = np.random.default_rng(0)
    ahead = np.tile(np.eye(4)[:3], (12, 1, 1))  # side by side, as LLFF's
    ahead[:, :2, 3] = generator.normal(size=(12, 2))
    around = np.stack([look_at_origin(40 * i, 10 + 5 * i)[:3] for i in range(9)])
    around[:, :, 3] += [30.0, -20.0, 3.0]
    for poses in (ahead, around, around[:4]):
        assert other_convention(poses) is None


@pytest.mark.parametrize("times, shift", [(3.0, 0.0), (0.1, 0.0), (3.0, 1000.0), (1.0, 5e6)])
def test_a_scene_of_another_size_or_place_is_brought_to_the_box(tmp_path, times, shift):
    scene = write_scene(tmp_path)
    before, held_out = read(scene), read(scene, "test")

    def move(meta):
        for frame in meta["frames"]:
            pose = np.array(frame["transform_matrix"])
            pose[:3, 3] = times * pose[:3, 3] + shift
            frame["transform_matrix"] = pose.tolist()

    for split in ("train", "val", "test"):
        edit(scene / f"transforms_{split}.json", move)
    for old, new in ((before, read(scene)), (held_out, read(scene, "test"))):
        assert torch.allclose(new.cameras.camera_to_worlds, old.cameras.camera_to_worlds, atol=1e-4)
    world = read(scene).metadata["world"]
    assert world.scale == pytest.approx(1 / times, rel=1e-4)
    assert np.allclose(world.transform[:, 3], -shift, atol=1e-3 * max(1, times))
    kept = read(scene, scale_factor=2.0).cameras.camera_to_worlds[0, :, 3]  # who asks for a factor gets it alone
    assert torch.allclose(kept, 2 * (times * before.cameras.camera_to_worlds[0, :, 3] + shift), rtol=1e-5)


def test_scenes_of_the_usual_size_stay_where_they_are(ball_scene):
    world = read(ball_scene).metadata["world"]
    assert world.scale == 1 and np.array_equal(world.transform, np.eye(4)[:3])


def test_coordinates_of_a_map_lose_nothing(tmp_path):
    scene = nerfstudio_scene(tmp_path, 5)
    before = read(scene)
    shift = np.array([448251.25, 5411932.5, 240.0])

    def move(meta):
        for frame in meta["frames"]:
            pose = np.array(frame["transform_matrix"])
            pose[:3, 3] += shift
            frame["transform_matrix"] = pose.tolist()

    edit(scene / "transforms.json", move)
    views = read(scene)
    assert torch.allclose(views.cameras.camera_to_worlds, before.cameras.camera_to_worlds, atol=1e-6)
    given = np.array(json.loads((scene / "transforms.json").read_text())["frames"][3]["transform_matrix"])[None, :3]
    assert np.allclose(views.metadata["world"].place(given)[0], views.cameras.camera_to_worlds[3], atol=1e-6)


def opencv_rays(lens: dict, size: int) -> np.ndarray:
    """Where pixels look, (size^2, 2) at depth 1, by OpenCV's own undistortion."""
    matrix = np.array([[lens["fl_x"], 0, lens["cx"]], [0, lens["fl_y"], lens["cy"]], [0, 0, 1]])
    params = np.array([lens.get(key, 0.0) for key in ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")])
    y, x = np.mgrid[:size, :size] + 0.5
    pixels = np.stack((x, y), axis=-1).reshape(-1, 1, 2)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 200, 1e-12)
    return cv2.undistortPointsIter(pixels, matrix, params, np.eye(3), np.eye(3), criteria)[:, 0]


RATIONAL = dict(k1=0.32, k2=-0.11, k3=0.01, k4=0.25, k5=-0.08, k6=0.005, p1=1e-3, p2=-2e-3)


@pytest.mark.parametrize("model", ["OPENCV", "FULL_OPENCV"])
def test_opencv_with_k4_and_k5_looks_where_opencv_does(tmp_path, model):
    scene = nerfstudio_scene(tmp_path)
    lens = dict(fl_x=12.0, fl_y=12.0, cx=8.0, cy=8.0, camera_model=model, **RATIONAL)
    edit(scene / "transforms.json", lambda meta: meta.update(lens))
    views = read(scene)
    local = rays_of(views).reshape(-1, 3).double() @ views.cameras.camera_to_worlds[0, :, :3].double()
    found = torch.stack((local[:, 0], -local[:, 1]), dim=-1) / -local[:, 2:]
    assert np.abs(found.numpy() - opencv_rays(lens, 16)).max() < 5e-4  # 0.03 degrees


def test_distortion_that_no_polynomial_has_is_refused():
    lens = dict(fl_x=8.0, fl_y=8.0, k4=-1.0)
    with pytest.raises(UserError, match="k4, k5 and k6 of scene"):
        distortion(lens, (16, 16), "scene")
    fisheye = distortion(lens | dict(camera_model="OPENCV_FISHEYE"), (16, 16), "scene")
    assert fisheye.tolist() == [0, 0, 0, -1, 0, 0]


# Refused or poorly worded


def test_separators_of_windows(tmp_path):
    photographs, cut_out = nerfstudio_scene(tmp_path / "a"), write_scene(tmp_path / "b")
    (photographs / "images").mkdir()
    for i in range(4):
        (photographs / f"f{i}.png").rename(photographs / f"images/f{i}.png")

    def spell(meta, folder):
        for frame in meta["frames"]:
            frame["file_path"] = ".\\" + folder + "\\" + Path(frame["file_path"]).name

    edit(photographs / "transforms.json", lambda meta: spell(meta, "images"))
    edit(cut_out / "transforms_train.json", lambda meta: spell(meta, "train"))
    assert len(read(photographs).images) == 4 and len(read(cut_out).images) == 6


def test_names_without_suffix_are_found_and_kept(tmp_path):
    scene = nerfstudio_scene(tmp_path, 5)

    def cut(meta):
        for frame in meta["frames"]:
            frame["file_path"] = frame["file_path"].removesuffix(".png")
        return meta | {"train_filenames": ["f0", "f1", "f4"], "test_filenames": ["f2.png", "f3"]}

    edit(scene / "transforms.json", cut)
    assert [path.name for path in read(scene).image_filenames] == ["f0.png", "f1.png", "f4.png"]
    assert [path.name for path in read(scene, "test").image_filenames] == ["f2.png", "f3.png"]
    assert read(scene).images.shape == (3, 16, 16, 3)
    (scene / "f0.png").rename(scene / "f0")  # a file that has none either
    assert read(scene).image_filenames[0].name == "f0"


def test_camera_angle_x_alone_in_transforms_json(tmp_path):
    scene = nerfstudio_scene(tmp_path)
    edit(scene / "transforms.json", lambda meta: {"camera_angle_x": 0.7, "frames": meta["frames"]})
    camera = read(scene).cameras[0]
    assert float(camera.fx) == float(camera.fy) == pytest.approx(8 / np.tan(0.35))
    assert (float(camera.cx), float(camera.cy), int(camera.width)) == (8, 8, 16)
    edit(scene / "transforms.json", lambda meta: {"frames": meta["frames"]})
    with pytest.raises(UserError, match="camera_angle_x of .* is None: give the horizontal angle in radians, or fl_x"):
        read(scene)


def colmap_scene(path: Path, count: int, camera: str = "1 PINHOLE 16 16 20 20 8 8", model: str = "0") -> Path:
    """A COLMAP scene of cameras around the ball; images f0.png, f1.png, ..., which COLMAP numbers the other way."""
    sparse = path / "sparse" / model
    sparse.mkdir(parents=True)
    (path / "images").mkdir(exist_ok=True)
    (sparse / "cameras.txt").write_text(f"# cameras\n{camera}\n")
    lines = []
    for i in range(count):
        pose = look_at_origin(36 * i, 20)
        Image.fromarray(draw_ball(pose, 16, 0.7)).convert("RGB").save(path / f"images/f{i}.png")
        view = np.linalg.inv(pose @ np.diag([1, -1, -1, 1]))
        x, y, z, w = Rotation.from_matrix(view[:3, :3]).as_quat()
        lines += [f"{count - i} {w} {x} {y} {z} {' '.join(map(str, view[:3, 3]))} 1 f{i}.png", ""]
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    return path


def test_a_file_instead_of_its_folder(tmp_path):
    cut_out, photographs = write_scene(tmp_path / "a"), nerfstudio_scene(tmp_path / "b")
    posed = colmap_scene(tmp_path / "c", 10)
    for given, kind, scene in [
        (cut_out / "transforms_train.json", "blender", cut_out),
        (cut_out / "transforms_test.json", "blender", cut_out),
        (photographs / "transforms.json", "nerfstudio", photographs),
        (posed / "sparse/0/images.txt", "colmap", posed),
        (posed / "sparse/0", "colmap", posed),
        (posed / "sparse", "colmap", posed),
    ]:
        assert find_scene(given)[0] == kind
        assert read(given).image_filenames == read(scene).image_filenames
    assert len(read(colmap_scene(posed, 9, model="1") / "sparse/1")) == 7  # not the largest, but the one that is named
    with pytest.raises(UserError, match="is a .png file: give a directory"):
        read(photographs / "f0.png")


def test_full_opencv_of_colmap(tmp_path):
    order = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")
    values = " ".join(str(RATIONAL[key]) for key in order)
    views = read(colmap_scene(tmp_path, 10, f"1 FULL_OPENCV 16 16 12 12 8 8 {values}"))
    lens = dict(fl_x=12.0, fl_y=12.0, cx=8.0, cy=8.0, **RATIONAL)
    local = rays_of(views).reshape(-1, 3).double() @ views.cameras.camera_to_worlds[0, :, :3].double()
    found = torch.stack((local[:, 0], -local[:, 1]), dim=-1) / -local[:, 2:]
    assert np.abs(found.numpy() - opencv_rays(lens, 16)).max() < 5e-4


def test_of_several_colmap_models_the_largest(tmp_path):
    for count, model in ((9, "0"), (20, "1"), (11, "2")):
        colmap_scene(tmp_path, count, model=model)
    assert colmap_model(tmp_path) == Path("sparse/1")
    assert len(read(tmp_path)) + len(read(tmp_path, "test")) == 20
    binary = tmp_path / "sparse/10"
    binary.mkdir()
    (binary / "cameras.bin").write_bytes(b"")
    (binary / "images.bin").write_bytes((21).to_bytes(8, "little"))
    assert colmap_model(tmp_path) == Path("sparse/10")


def test_a_byte_order_mark(tmp_path):
    scene = write_scene(tmp_path)
    path = scene / "transforms_train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(scene)) == 6


def test_missing_images_may_be_left_out(tmp_path):
    photographs, cut_out, posed = nerfstudio_scene(tmp_path / "a", 5), write_scene(tmp_path / "b"), tmp_path / "c"
    listed = {"train_filenames": [f"f{i}.png" for i in range(4)], "test_filenames": ["f4.png"]}
    edit(photographs / "transforms.json", lambda meta: meta | listed)
    colmap_scene(posed, 10)
    for path in (photographs / "f2.png", cut_out / "train/r_3.png", posed / "images/f3.png"):
        path.unlink()
    for scene, left in ((photographs, 3), (cut_out, 5), (posed, 7)):
        with pytest.raises(UserError, match=r"does not exist: .*or leave out what is missing \(--skip-missing\)"):
            read(scene)
        assert len(read(scene, skip_missing=True).images) == left


def test_natural_order(tmp_path):
    scene = nerfstudio_scene(tmp_path / "a", 12)
    assert [path.name for path in read(scene).image_filenames] == [
        f"f{i}.png" for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11)
    ]
    posed = colmap_scene(tmp_path / "b", 12)
    assert [path.name for path in read(posed, "test").image_filenames] == ["f0.png", "f8.png"]


def test_view_ids_by_file_name(tmp_path):
    scene = write_scene(tmp_path)
    for ids in (("r_4", "r_1"), ("r_4.png", 1), ("train/r_4", "./train/r_1.png"), ("train\\r_4", "r_1")):
        assert read(scene, view_ids=ids).view_ids == (4, 1)
    with pytest.raises(
        UserError, match="view id 'r_9' is no training view's file: this scene has 6, such as 'r_0.png'"
    ):
        read(scene, view_ids=("r_9",))
    with pytest.raises(UserError, match="name a view twice"):
        read(scene, view_ids=("r_1", 1))
    (scene / "more").mkdir()
    (scene / "train/r_5.png").rename(scene / "more/r_4.png")
    edit(scene / "transforms_train.json", lambda meta: meta["frames"][5].update(file_path="more/r_4"))
    with pytest.raises(UserError, match="view id 'r_4' is the name of 2 images: give the folder"):
        read(scene, view_ids=("r_4",))
    assert read(scene, view_ids=("more/r_4",)).view_ids == (5,)


def test_views_are_never_chosen_twice(tmp_path):
    """Four positions with two directions each: every camera once, positions first."""
    poses = torch.from_numpy(np.stack([look_at_origin(90 * (i // 2), 20)[:3] for i in range(8)]))
    poses[1::2, :, :3] = poses[1::2, :, :3] @ torch.diag(torch.tensor([-1.0, 1, -1], dtype=torch.float64))
    chosen = select_views(poses, number=6)
    assert len(set(chosen)) == 6 and len({i // 2 for i in select_views(poses, number=4)}) >= 3
    assert set(select_views(poses, number=8)) == set(range(8))
    turning = torch.from_numpy(np.stack([look_at_origin(45 * i, 0)[:3] for i in range(8)]))
    turning[:, :, 3] = 0  # on a tripod: the directions decide
    assert set(select_views(turning, number=4)) == {0, 2, 4, 6}
    assert len(set(select_views(torch.eye(4)[:3].repeat(3, 1, 1), number=3))) == 3


def test_views_on_a_sphere_are_those_farthest_from_each_other():
    poses = torch.from_numpy(np.stack([look_at_origin(77 * i, (31 * i) % 80)[:3] for i in range(20)]))
    places = poses[:, :, 3]
    chosen = [0]
    while len(chosen) < 8:  # by position alone
        nearest = torch.cdist(places, places[chosen]).amin(dim=1)
        chosen.append(int(nearest.argmax()))
    assert select_views(poses, number=8) == tuple(chosen)


@pytest.fixture
def mixed_scene(tmp_path) -> Path:
    """Photographs of three sizes, one of them upright, each with its own lens."""
    scene, sizes = nerfstudio_scene(tmp_path / "mixed", 5), [(16, 12), (12, 16), (16, 12), (8, 6), (16, 12)]

    def give(meta):
        for i, (frame, (width, height)) in enumerate(zip(meta["frames"], sizes, strict=True)):
            values = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(values).save(scene / f"f{i}.png")
            frame.update(w=width, h=height, fl_x=20.0, fl_y=20.0, cx=width / 2, cy=height / 2)

    edit(scene / "transforms.json", give)
    return scene


def test_landscape_and_portrait_mixed(mixed_scene):
    views = read(mixed_scene)
    assert views.cameras.width[:, 0].tolist() == [16, 12, 16, 8, 16] and not views.same_size
    assert views.images.shape == (5, 16, 16, 3) and views.masks.sum(dim=(1, 2, 3)).tolist() == [192, 192, 192, 48, 192]
    for i, path in enumerate(views.image_filenames):
        pixels = np.asarray(Image.open(path)) / 255
        assert np.allclose(views.load(i)[0].numpy(), pixels, atol=1e-6)
        assert np.allclose(views.images[i, : pixels.shape[0], : pixels.shape[1]].numpy(), pixels, atol=1e-6)
    assert views.squeezed.shape == (5, 3, 12, 16)
    small = read(mixed_scene, image_size=8)  # the longer side of each; what is smaller stays
    assert list(zip(small.cameras.width[:, 0].tolist(), small.cameras.height[:, 0].tolist(), strict=True)) == [
        (8, 6), (6, 8), (8, 6), (8, 6), (8, 6),
    ]  # fmt: skip
    assert small.cameras.fx[:, 0].tolist() == [10, 10, 10, 20, 10]
    with pytest.raises(UserError, match="image_size is 17 but the images are 16"):
        read(mixed_scene, image_size=17)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("step", [0, 1])
def test_rays_of_mixed_sizes(mixed_scene, monkeypatch, cached, step):
    if not cached:
        monkeypatch.setattr("dietnerf.rays.CACHED_PIXELS", 0)
    config = FewViewDataManagerConfig(
        train_num_rays_per_batch=20_000, crop_steps=0, rays_from="all", pyramid=(2,), pyramid_steps=(1,)
    )
    config.dataparser = FewViewParserConfig(data=mixed_scene)
    manager = config.setup(device="cpu")
    rays, batch = manager.next_train(step)
    factor, views = 2 - step, manager.train_dataset
    drawn = set(map(tuple, batch["indices"].tolist()))
    sizes = zip(views.cameras.width[:, 0].tolist(), views.cameras.height[:, 0].tolist(), strict=True)
    assert drawn == {
        (i, y, x) for i, (w, h) in enumerate(sizes) for y in range(h // factor) for x in range(w // factor)
    }
    for number in range(0, 2000, 97):
        view, row, column = batch["indices"][number].tolist()
        block = views.load(view)[0][factor * row :, factor * column :][:factor, :factor]
        assert torch.allclose(batch["image"][number], block.mean(dim=(0, 1)), atol=1e-5)
        middle = torch.tensor([[factor * (row + 0.5), factor * (column + 0.5)]])
        expected = views.cameras.generate_rays(camera_indices=torch.tensor([[view]]), coords=middle)
        assert torch.allclose(rays.directions[number], expected.directions[0], atol=1e-5)
