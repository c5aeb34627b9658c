"""Scenes: every layout, the choice of views, scaling by area, rays, and every mistake as one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checks import UserError
from dietnerf.data import FewViewDataset, FewViewParserConfig
from dietnerf.images import load_image, load_mask
from dietnerf.layouts import scene_kind
from dietnerf.views import PAPER_VIEWS, PROTOCOLS, select_views
from tests.dietnerf.ball import draw_ball, look_at_origin, write_scene


def read(path: Path, split: str = "train", **settings) -> FewViewDataset:
    return FewViewDataset(FewViewParserConfig(data=path, **settings).setup().get_dataparser_outputs(split))


def edit(path: Path, change) -> Path:
    meta = json.loads((path / "transforms_train.json").read_text())
    change(meta)
    (path / "transforms_train.json").write_text(json.dumps(meta))
    return path


def test_blender_cameras_and_colours(ball_scene):
    views = read(ball_scene)
    assert (
        views.view_ids == (0, 1, 2, 3, 4, 5) and views.background == "white" and views.source == "transforms_train.json"
    )
    meta = json.loads((ball_scene / "transforms_train.json").read_text())
    pose = torch.tensor(meta["frames"][2]["transform_matrix"])[:3]
    assert torch.allclose(views.cameras.camera_to_worlds[2], pose.float())
    assert float(views.cameras.fx[0]) == pytest.approx(8 / np.tan(0.35), rel=1e-5)
    colour, alpha = views.load(2)
    raw = np.asarray(Image.open(ball_scene / "train/r_2.png")).astype(np.float32) / 255
    expected = raw[..., :3] * raw[..., 3:] + 1 - raw[..., 3:]
    assert np.allclose(colour.numpy(), expected, atol=1e-6) and np.allclose(alpha.numpy(), raw[..., 3:])
    black = read(ball_scene, background="black").load(2)[0]
    assert np.allclose(black.numpy(), raw[..., :3] * raw[..., 3:], atol=1e-6)
    # a ray through the ball's centre pixel meets the ball where the colour says
    rays = views.cameras.generate_rays(camera_indices=2, keep_shape=True)
    origin, direction = rays.origins[8, 8], rays.directions[8, 8]
    along = float(direction @ origin)
    point = origin + direction * (-along - (along**2 - float(origin @ origin) + 1) ** 0.5)
    assert torch.allclose(colour[8, 8], 0.5 + 0.45 * point, atol=3e-3)


def test_scaling_is_the_mean_over_the_area(ball_scene):
    full, half = read(ball_scene), read(ball_scene, image_size=8)
    whole = full.load(0)[0]
    naive = torch.stack(
        [whole[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(0, 1)) for y in range(8) for x in range(8)]
    )
    assert torch.allclose(half.load(0)[0].reshape(-1, 3), naive, atol=1e-5)
    assert float(half.cameras.fx[0]) == pytest.approx(float(full.cameras.fx[0]) / 2)
    assert float(half.cameras.cx[0]) == 4 and int(half.cameras.width[0]) == 8
    uneven = read(ball_scene, image_size=5).load(0)[0]  # 3.2 pixels each: every pixel counts by its share
    assert torch.allclose(uneven.mean(dim=(0, 1)), whole.mean(dim=(0, 1)), atol=1e-5)


def test_select_views():
    positions = torch.eye(4)[:3].repeat(4, 1, 1)
    positions[:, 0, 3] = torch.tensor([0.0, 1, 10, 5])
    assert select_views(positions, number=3) == (0, 2, 3)
    assert select_views(positions, number=2, order="first") == (0, 1)
    assert select_views(positions, ids=(3, 1)) == (3, 1)
    assert select_views(positions) == (0, 1, 2, 3)
    drawn = select_views(positions, number=3, order="random", seed=1)
    assert drawn == select_views(positions, number=3, order="random", seed=1) and len(set(drawn)) == 3
    for settings, message in [
        (dict(ids=(0, 4)), "view id 4 is out of range"),
        (dict(ids=(0, -1)), "view id -1 is out of range"),
        (dict(ids=(1, 1)), "name a view twice"),
        (dict(ids=(0, 1), number=3), "num_views is 3 but 2 view ids"),
        (dict(number=5), "num_views is 5"),
        (dict(number=2, order="best"), "view_order is 'best'"),
    ]:
        with pytest.raises(UserError, match=message):
            select_views(positions, **settings)


def test_protocols():
    assert PAPER_VIEWS == (26, 86, 2, 55, 75, 93, 16, 73)
    assert PROTOCOLS["paper"].image_size == 400 and PROTOCOLS["paper"].eval_every == 8


def test_held_out_split_falls_back_and_says_so(tmp_path):
    scene = write_scene(tmp_path, splits={"train": 2, "val": 4})
    assert read(scene, "test").source == "transforms_val.json"
    assert read(scene, "test", eval_every=2).view_ids == (0, 2)
    (scene / "transforms_val.json").unlink()
    assert read(scene, "test").source == "transforms_train.json"


def test_chosen_views_are_held_out_only_where_there_are_no_others(tmp_path):
    photographs = nerfstudio_scene(tmp_path / "s", 8)  # nerfstudio holds none of so few out
    cut_out = write_scene(tmp_path / "b", splits={"train": 8})
    for scene in (photographs, cut_out):
        chosen = read(scene, num_views=5).view_ids
        rest = read(scene, "test", num_views=5)
        assert set(rest.view_ids) == set(range(8)) - set(chosen) and len(rest) == 3
        assert read(scene, "val", view_ids=(0, 1, 2), eval_every=2).view_ids == (3, 5, 7)
        assert read(scene, "test").view_ids == tuple(range(8)) and len(read(scene)) == 8


@pytest.mark.parametrize("known", ["val", "test"])
def test_one_held_out_list_stands_in_for_the_other(tmp_path, known):
    scene = nerfstudio_scene(tmp_path, 6)
    names = [f"f{i}.png" for i in range(6)]
    meta = json.loads((scene / "transforms.json").read_text())
    meta |= {"train_filenames": names[:4], f"{known}_filenames": names[4:]}
    (scene / "transforms.json").write_text(json.dumps(meta))
    for split in ("val", "test"):
        views = read(scene, split)
        assert [path.name for path in views.image_filenames] == names[4:] and views.source == known
    del meta[f"{known}_filenames"]
    (scene / "transforms.json").write_text(json.dumps(meta))
    assert [path.name for path in read(scene, "test", view_ids=(0, 2)).image_filenames] == ["f1.png", "f3.png"]
    (scene / "transforms.json").write_text(json.dumps(meta | {"train_filenames": ["nothing.png"]}))
    with pytest.raises(UserError, match="nothing.png"):
        read(scene)


def nerfstudio_scene(path: Path, count: int = 4) -> Path:
    poses = [look_at_origin(90 * i, 20) for i in range(count)]
    path.mkdir(parents=True, exist_ok=True)
    for i, pose in enumerate(poses):
        Image.fromarray(draw_ball(pose, 16, 0.7)).convert("RGB").save(path / f"f{i}.png")
    frames = [{"file_path": f"f{i}.png", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
    meta = dict(w=16, h=16, fl_x=20.0, fl_y=20.0, cx=8.0, cy=8.0, camera_model="OPENCV", frames=frames)
    (path / "transforms.json").write_text(json.dumps(meta))
    return path


def test_nerfstudio_layout(tmp_path):
    scene = nerfstudio_scene(tmp_path / "s")
    assert scene_kind(scene) == "nerfstudio"
    views = read(scene, num_views=2)
    assert views.background == "image" and len(views) == 2
    assert float(views.cameras.camera_to_worlds[:, :, 3].abs().max()) == pytest.approx(1, abs=1e-5)
    assert len(read(scene, "test")) >= 1
    (scene / "transforms.json").write_text('{"frames": []}')
    with pytest.raises(UserError, match="has no frames"):
        read(scene)


def test_intrinsics_are_those_of_other_sizes_of_the_same_images(tmp_path):
    scene = nerfstudio_scene(tmp_path)  # images of 16 x 16
    meta = json.loads((scene / "transforms.json").read_text())
    meta |= dict(w=64, h=65, fl_x=80.0, fl_y=81.25, cx=32.0, cy=32.5)  # one row was lost in making them smaller
    (scene / "transforms.json").write_text(json.dumps(meta))
    for size, scale in ((0, 1), (8, 0.5)):
        cameras = read(scene, image_size=size).cameras[0]
        assert [float(v) for v in (cameras.fx, cameras.fy, cameras.cx, cameras.cy)] == [
            20 * scale,
            20 * scale,
            8 * scale,
            8 * scale,
        ]
        assert (int(cameras.width), int(cameras.height)) == (16 * scale, 16 * scale)
    (scene / "transforms.json").write_text(json.dumps(meta | dict(h=128)))
    with pytest.raises(UserError, match="f0.png' is 16x16 but its camera's w and h are 64x128"):
        read(scene)


def masked_scene(tmp_path, mask):
    """A nerfstudio scene of 16x16 images, all with this mask."""
    scene = nerfstudio_scene(tmp_path / "masked")
    meta = json.loads((scene / "transforms.json").read_text())
    Image.fromarray(mask).save(scene / "mask.png")
    for frame in meta["frames"]:
        frame["mask_path"] = "mask.png"
    (scene / "transforms.json").write_text(json.dumps(meta))
    return scene


def test_masks_are_read_with_their_images(tmp_path):
    mask = np.full((16, 16), 255, np.uint8)
    mask[:5, :8] = 0
    data = read(masked_scene(tmp_path, mask))
    assert data.masks.shape == (len(data), 16, 16, 1) and torch.equal(data.get_data(0)["mask"], data.masks[0])
    assert torch.equal(data.masks[1][..., 0], torch.from_numpy(mask > 0))
    half = read(tmp_path / "masked", image_size=8).mask(0)
    assert not half[:3, :4].any() and half[3:].all() and half[:, 4:].all()  # of the third row only a part is hidden
    assert read(nerfstudio_scene(tmp_path / "plain")).masks is None


@pytest.mark.parametrize("shape, value, said", [((16, 15), 255, "another size"), ((16, 16), 0, "is black all over")])
def test_masks_that_cannot_be_used(tmp_path, shape, value, said):
    with pytest.raises(UserError, match=said):
        read(masked_scene(tmp_path, np.full(shape, value, np.uint8))).mask(0)


def test_fisheye_circles_are_not_passed_over_in_silence(tmp_path):
    scene = nerfstudio_scene(tmp_path)
    meta = json.loads((scene / "transforms.json").read_text())
    (scene / "transforms.json").write_text(
        json.dumps(meta | dict(camera_model="OPENCV_FISHEYE", fisheye_crop_radius=8))
    )
    with pytest.raises(UserError, match="fisheye_crop_radius 8, which cannot be used: undistort"):
        read(scene)


def test_colmap_layout(tmp_path):
    sparse = tmp_path / "sparse/0"
    sparse.mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (sparse / "cameras.txt").write_text("1 PINHOLE 16 16 20 20 8 8\n")
    (sparse / "points3D.txt").write_text("")
    lines = []
    for i in range(10):
        pose = look_at_origin(36 * i, 20)
        Image.fromarray(draw_ball(pose, 16, 0.7)).convert("RGB").save(tmp_path / f"images/f{i}.png")
        opencv = pose @ np.diag([1, -1, -1, 1])
        view = np.linalg.inv(opencv)
        w = 0.5 * np.sqrt(max(1e-9, 1 + np.trace(view[:3, :3])))
        r = view[:3, :3]
        q = (w, (r[2, 1] - r[1, 2]) / (4 * w), (r[0, 2] - r[2, 0]) / (4 * w), (r[1, 0] - r[0, 1]) / (4 * w))
        lines += [f"{i + 1} {' '.join(map(str, q))} {' '.join(map(str, view[:3, 3]))} 1 f{i}.png", ""]
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    assert scene_kind(tmp_path) == "colmap"
    views = read(tmp_path, num_views=3)
    assert len(views) == 3 and views.load(0)[0].shape == (16, 16, 3)
    assert len(read(tmp_path, "test")) == 2  # every 8th of 10
    (sparse / "cameras.txt").rename(sparse / "cameras.bin")
    (sparse / "cameras.bin").write_bytes(b"\1\0\0")
    with pytest.raises(UserError, match=r"cameras.bin' cannot be read \(unpack requires"):
        read(tmp_path)


def test_llff_layout(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(9):
        pose = look_at_origin(10 * i, 20)
        Image.fromarray(draw_ball(pose, 16, 0.7)).convert("RGB").save(tmp_path / f"images/{i}.png")
        right, up, back, place = pose[:3].T
        matrix = np.stack((-up, right, back, place, [16, 16, 20]), axis=1)
        rows.append(np.concatenate((matrix.ravel(), [2, 6])))
    np.save(tmp_path / "poses_bounds.npy", np.stack(rows))
    views = read(tmp_path)
    assert scene_kind(tmp_path) == "llff" and len(views) == 7 and len(read(tmp_path, "test")) == 2
    near, far = views.metadata["planes"]
    assert far / near == pytest.approx(6 * 1.1 / (2 * 0.9)) and float(views.scene_box.aabb[1, 0]) == pytest.approx(
        max(1.0, far)
    )
    cameras = views.cameras.camera_to_worlds
    assert torch.allclose(torch.linalg.det(cameras[:, :, :3]), torch.ones(7), atol=1e-4)
    # all cameras look at one point: the ball's centre
    origins, directions = cameras[:, :, 3], -cameras[:, :, 2]
    a = (torch.eye(3) - directions[:, :, None] * directions[:, None]).double()
    centre = torch.linalg.solve(a.sum(0), (a @ origins[..., None].double()).sum(0))[:, 0]
    for origin, direction in zip(origins.double(), directions.double(), strict=True):
        off = centre - origin
        assert float((off - (off @ direction) * direction).norm()) < 1e-3 and float(off @ direction) > 0
    for broken in (b"no array", b"", (tmp_path / "poses_bounds.npy").read_bytes()[:200]):
        (tmp_path / "poses_bounds.npy").write_bytes(broken)
        with pytest.raises(UserError, match="poses_bounds.npy' (cannot be read|is empty)"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(frames=[]), "has no frames"),
        (lambda m: m.pop("frames"), "has no frames"),
        (lambda m: m["frames"][1].pop("file_path"), "frame 1 of .* lacks file_path"),
        (lambda m: m["frames"][1].update(transform_matrix=[[1, 0], [0, 1]]), "has shape \\(2, 2\\)"),
        (lambda m: m["frames"][1]["transform_matrix"][0].__setitem__(0, float("nan")), "holds NaN"),
        (lambda m: m["frames"][1].update(transform_matrix=np.diag([2.0, 2, 2, 1]).tolist()), "from a rotation"),
        (lambda m: m["frames"][1].update(transform_matrix=np.diag([-1.0, 1, 1, 1]).tolist()), "mirrors"),
        (lambda m: m["frames"][1].update(file_path="./train/nothing"), "does not exist"),
        (lambda m: m.pop("camera_angle_x"), "camera_angle_x of .* is None"),
    ],
)
def test_broken_transforms(tmp_path, change, message):
    scene = edit(write_scene(tmp_path), change)
    with pytest.raises(UserError, match=message) as caught:
        read(scene)
    assert "\n" not in str(caught.value)


def test_broken_images(tmp_path):
    scene = write_scene(tmp_path)
    path = scene / "train/r_1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="r_1.png' is damaged or cut short"):
        read(scene).images  # noqa: B018
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read(scene)
    path.write_bytes(b"no picture at all")
    with pytest.raises(UserError, match="is not an image"):
        read(scene)
    Image.new("RGBA", (8, 16)).save(path)
    with pytest.raises(UserError, match="is 8x16 but .* is 16x16, with one camera_angle_x: give each"):
        read(scene)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        read(scene)


def test_background_needs_alpha(tmp_path):
    scene = write_scene(tmp_path, mode="RGB")
    assert read(scene).background == "image" and read(scene).load(0)[1] is None
    with pytest.raises(UserError, match="background is 'white' but image .* has no alpha"):
        read(scene, background="white")


def test_alpha_that_hides_nothing_is_none(tmp_path):
    scene = write_scene(tmp_path, splits={"train": 3})
    for path in (scene / "train").glob("*.png"):
        Image.open(path).convert("RGB").convert("RGBA").save(path)
    views = read(scene)
    assert views.background == "image" and not views.has_alpha and views.load(0)[1] is None
    with pytest.raises(UserError, match="nothing transparent"):
        read(scene, background="white")
    image = Image.open(scene / "train/r_2.png")
    image.putpixel((3, 3), (0, 0, 0, 254))
    image.save(scene / "train/r_2.png")
    assert read(scene).background == "white" and read(scene).has_alpha


def test_images_are_exact_where_a_step_is_in_bfloat16(ball_scene):
    exact = read(ball_scene, image_size=5).images
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read(ball_scene, image_size=5).images
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_other_mistakes(tmp_path, ball_scene):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no transforms_train.json"):
        read(tmp_path)
    with pytest.raises(UserError, match="image_size is 32 but the images are 16"):
        read(ball_scene, image_size=32)
    (tmp_path / "transforms_train.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read(tmp_path)


def test_sixteen_by_nine_image_keeps_its_shape(tmp_path):
    Image.new("L", (32, 18), 128).save(tmp_path / "a.png")
    colour, alpha = load_image(tmp_path / "a.png", (16, 9), "image")
    assert colour.shape == (9, 16, 3) and alpha is None and torch.allclose(colour, torch.full((9, 16, 3), 128 / 255))


@pytest.mark.parametrize("opaque", ["train", "test"])
def test_the_training_views_decide_what_is_behind_all_views(tmp_path, opaque):
    """Views that fill the frame in one split alone: field and truth must not lie over different backgrounds."""
    scene = write_scene(tmp_path / "scene", splits={"train": 3, "test": 2})
    for path in (scene / opaque).glob("*.png"):
        image = Image.open(path).convert("RGBA")
        image.putalpha(255)
        image.save(path)
    expected = "image" if opaque == "train" else "white"
    for order in (("train", "test"), ("test", "train")):
        parser = FewViewParserConfig(data=scene).setup()
        assert {parser.get_dataparser_outputs(split).metadata["background"] for split in order} == {expected}


def test_images_and_masks_are_no_larger_than_the_limit(tmp_path):
    scene = write_scene(tmp_path / "blender")
    assert len(read(scene, max_megapixels=256e-6).images)
    masked = masked_scene(tmp_path / "other", np.full((16, 16), 255, np.uint8))
    assert read(masked, max_megapixels=256e-6).mask(0).all()
    for path in (scene, masked):
        with pytest.raises(UserError, match="16x16 pixels") as caught:
            read(path, max_megapixels=255e-6)
        assert "scale it down" in str(caught.value)
    path = tmp_path / "large.png"
    Image.new("L", (16, 16), 9).save(path)
    for refused in (load_image, load_mask):
        options = ("image",) if refused is load_image else ()
        with pytest.raises(UserError, match="too large"):
            refused(path, (16, 16), *options, max_pixels=255)
    with pytest.raises(UserError, match="max_megapixels is 0"):
        read(scene, max_megapixels=0)


def test_grey_of_sixteen_bits_and_palettes(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    colour, alpha = load_image(tmp_path / "deep.png", (8, 8), "image")
    assert alpha is None and np.allclose(colour.numpy(), (values / 65535)[..., None], atol=0.5 / 255)
    Image.fromarray((values > 30000).astype(np.uint16)).save(tmp_path / "mask.png")  # 1 of 65535 is not black
    assert np.array_equal(load_mask(tmp_path / "mask.png", (8, 8)).numpy()[..., 0], values > 30000)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    colour, alpha = load_image(tmp_path / "palette.png", (8, 8), "white")
    assert (colour == 1).all() and (alpha == 0).all()


def area_weights(old: int, new: int) -> np.ndarray:
    """How much of each of `old` pixels lies in each of `new` larger ones, in rows that sum to 1."""
    edges = np.arange(new + 1) * (old / new)
    overlap = np.minimum(np.arange(1, old + 1), edges[1:, None]) - np.maximum(np.arange(old), edges[:-1, None])
    return overlap.clip(0) * (new / old)


@pytest.mark.parametrize("size", [(40, 30), (13, 7), (20, 15), (40, 15), (1, 1)])
def test_images_are_averaged_by_area_over_their_background(tmp_path, size):
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    rows, columns = area_weights(30, size[1]), area_weights(40, size[0])
    alpha = values[..., 3:] / 255
    for background, behind in (("white", 1.0), ("black", 0.0)):
        found = load_image(tmp_path / "a.png", size, background)
        over = values[..., :3] / 255 * alpha + behind * (1 - alpha)
        for part, whole in zip(found, (over, alpha), strict=True):
            assert part.dtype == torch.float32
            assert np.allclose(part.numpy(), np.einsum("yh,hwc,xw->yxc", rows, whole, columns), atol=1e-4)
    plain = load_image(tmp_path / "a.png", size, "image")[0].numpy()
    assert np.allclose(plain, np.einsum("yh,hwc,xw->yxc", rows, values[..., :3] / 255, columns), atol=1e-4)
