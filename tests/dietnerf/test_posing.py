"""From photographs to poses: the packaged walk against its true cameras, what cannot be placed, and interruptions."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

pytest.importorskip("nerfstudio")

from common.checks import UserError
from dietnerf import posing
from dietnerf.cli import main
from dietnerf.images import load_image
from dietnerf.photographs import cameras_of, find_photographs, focal_length, names_of, prepare, read_tags
from dietnerf.posing import PoseConfig, pose
from dietnerf.structure import ALL_PAIRS, NEIGHBOURS, STRIDE, pairs_of
from tests.dietnerf.conftest import TURNED, WALKED

NAMES = [f"walk_{number}.jpg" for number in WALKED]


def poses_in(file: Path) -> dict[str, np.ndarray]:
    frames = json.loads(file.read_text())["frames"]
    return {Path(frame["file_path"]).name: np.array(frame["transform_matrix"]) for frame in frames}


def errors(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of poses (n, 4, 4): rotations in degrees and positions in mean distances from their middle, after the similarity
    that brings the positions nearest to the true ones (Umeyama 1991)."""
    here, there = (poses[:, :3, 3] - poses[:, :3, 3].mean(axis=0) for poses in (found, true))
    left, values, right = np.linalg.svd(there.T @ here)
    signs = np.array([1, 1, np.sign(np.linalg.det(left @ right))])
    turn, scale = (left * signs) @ right, (values * signs).sum() / (here**2).sum()
    off = np.linalg.norm(scale * here @ turn.T - there, axis=1) / np.linalg.norm(there, axis=1).mean()
    cosines = (np.einsum("nij,nij->n", turn @ found[:, :3, :3], true[:, :3, :3]) - 1) / 2
    return np.degrees(np.arccos(cosines.clip(-1, 1))), off


def test_the_packaged_photographs_have_no_poses_but_their_truth(root):
    place = root / "common/assets/samples/walk"
    photographs = find_photographs(place)
    assert len(photographs) == 20 and sum(path.stat().st_size for path in place.iterdir()) < 1.5e6
    assert {Image.open(path).size for path in photographs} == {(480, 360)}
    assert posing.has_photographs_only(place) and not posing.has_photographs_only(place.parent / "multiview")
    assert not posing.has_photographs_only(photographs[0])
    true = json.loads((place / "true_cameras.json").read_text())
    assert [frame["file_path"] for frame in true["frames"]] == [path.name for path in photographs]
    assert focal_length(read_tags(photographs[0]), (480, 360)) == pytest.approx(true["fl_x"])


@pytest.mark.slow
def test_poses_are_the_true_ones(posed, root):
    found, true = (
        poses_in(posed.scene / "transforms.json"),
        poses_in(root / "common/assets/samples/walk/true_cameras.json"),
    )
    assert sorted(found) == sorted(NAMES)  # the photograph that lies on its side, too
    degrees, off = errors(np.stack([found[name] for name in NAMES]), np.stack([true[name] for name in NAMES]))
    assert degrees.max() < 1 and off.max() < 0.02, (degrees, off)
    written = json.loads((posed.scene / "transforms.json").read_text())
    focal = json.loads((root / "common/assets/samples/walk/true_cameras.json").read_text())["fl_x"] * 320 / 480
    for lens in [written, *written["frames"]]:
        assert lens.get("fl_x", focal) == pytest.approx(focal, rel=0.02)
        assert abs(lens.get("k1", 0)) < 0.02
    assert json.loads((posed.scene / "posing.json").read_text())["error"] < 1


@pytest.mark.slow
def test_what_a_scene_holds(posed, walk):
    scene = posed.scene
    assert sorted(path.name for path in scene.iterdir() if path.name[0] != ".") == [
        "colmap", "images", "posing.json", "sparse_pc.ply", "transforms.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (scene / "images").iterdir()) == sorted(NAMES)
    assert {Image.open(scene / "images" / name).size for name in NAMES} == {(320, 240)}
    with Image.open(walk / TURNED) as image:
        assert image.size == (360, 480)
    upright = load_image(walk / TURNED, (320, 240), "white")[0]
    assert float((load_image(scene / "images" / TURNED, (320, 240), "white")[0] - upright).abs().mean()) < 0.02
    written = json.loads((scene / "transforms.json").read_text())
    assert written["ply_file_path"] == "sparse_pc.ply"
    assert written["applied_transform"] == [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
    from nerfstudio.data.utils.colmap_parsing_utils import read_images_binary, read_points3D_binary

    images = read_images_binary(scene / "colmap/sparse/0/images.bin")
    points = read_points3D_binary(scene / "colmap/sparse/0/points3D.bin")
    assert {image.name for image in images.values()} == set(NAMES) and len(points) > 200
    lines = (scene / "sparse_pc.ply").read_text().split("end_header\n")[1].splitlines()
    assert len(lines) == len(points)
    point = next(iter(points.values()))
    moved = np.array(written["applied_transform"])[:, :3] @ point.xyz
    assert np.allclose(np.array(lines[0].split()[:3], float), moved, atol=1e-4)
    stock = NerfstudioDataParserConfig(data=scene).setup().get_dataparser_outputs("train")
    assert len(stock.image_filenames) == 8 and torch.allclose(stock.cameras.fx, stock.cameras.fx[0])
    assert all(len(set(point.image_ids)) >= 2 for point in points.values())  # tracks are kept


@pytest.mark.slow
def test_what_is_left_out_is_named(posed):
    assert "left out 'walk_99.jpg': image" in posed.err and "not an image" in posed.err
    assert "warning: 1 of 9 photographs could not be placed: some where else.jpg. " in posed.err
    assert "8 of 9 photographs" in posed.out and "next: dietnerf train" in posed.out
    for stage in posing.STAGES.values():
        assert stage in posed.err


@pytest.mark.slow
def test_a_scene_of_the_same_photographs_is_kept(posed, walk, capsys):
    before = (posed.scene / "transforms.json").stat()
    assert main(["pose", str(walk), str(posed.scene), *posed.options]) == 0
    assert "was posed before: 8 of 9 photographs" in capsys.readouterr().out
    assert (posed.scene / "transforms.json").stat() == before
    assert not posed.scene.with_name(".scene.posing").exists()


@pytest.mark.slow
def test_an_interrupted_call_goes_on_to_the_same_scene(posed, walk, tmp_path, monkeypatch):
    told = []

    @contextlib.contextmanager
    def stopping():
        def tell(stage: str, done: int, of: int) -> None:
            told.append(stage)
            if stage == "matches" and done:
                raise KeyboardInterrupt

        yield tell

    config = PoseConfig(walk, tmp_path / "scene", image_size=320, features=1500)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(posing, "_bars", stopping)
        pose(config)
    work = tmp_path / ".scene.posing"
    assert "poses" not in told and not (tmp_path / "scene").exists() and (work / "database.db").is_file()
    made = {path.name: path.stat().st_mtime_ns for path in (work / "images").iterdir()}
    assert len(made) == 9
    monkeypatch.setattr(posing, "_write_scene", lambda scene, work, *more: kept(made, work))
    pose(config)
    monkeypatch.undo()
    pose(config)
    assert not work.exists()
    for name in ("transforms.json", "sparse_pc.ply", "colmap/sparse/0/points3D.bin", "colmap/sparse/0/images.bin"):
        assert (tmp_path / "scene" / name).read_bytes() == (posed.scene / name).read_bytes()


def kept(made: dict[str, int], work: Path) -> None:
    assert made == {path.name: path.stat().st_mtime_ns for path in (work / "images").iterdir()}


@pytest.mark.slow
def test_bare_photographs_are_posed_before_training(posed, walk, tmp_path, monkeypatch, capsys):
    asked = []

    def pose_already(config: PoseConfig) -> posing.Posed:
        asked.append(config)
        if not config.scene.exists():
            shutil.copytree(posed.scene, config.scene)
            record = json.loads((posed.scene / "posing.json").read_text())
            record["begun"] = posing._begun(config, find_photographs(config.photographs))
            (config.scene / "posing.json").write_text(json.dumps(record))
        return pose(config)

    monkeypatch.setattr(posing, "pose", pose_already)
    photographs = shutil.copytree(walk, tmp_path / "photographs")
    arguments = ["train", str(photographs), "--out", str(tmp_path / "run"), "--rays", "64", "--resolutions", "8"]
    arguments += ["--image-size", "16", "--num-views", "6", "--val-views", "0", "--no-progress", "--device", "cpu"]
    assert main([*arguments, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "has photographs without poses: dietnerf pose finds them" in said and "8 of 9 photographs" in said
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert set(record["images"]) < set(NAMES) and len(record["images"]) == 6
    assert record["config"]["scene"] == str(tmp_path / "run/scene")
    assert asked[0].image_size == PoseConfig(walk, walk).image_size
    assert main([*arguments, "--steps", "3"]) == 0  # goes on
    assert json.loads((tmp_path / "run/training.json").read_text())["steps"] == 3
    (photographs / "walk_3.jpg").unlink()
    assert main([*arguments, "--steps", "4"]) == 2
    assert "was posed from other photographs than" in capsys.readouterr().err


@pytest.mark.slow
def test_photographs_of_nothing_are_refused_in_one_line(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")
    assert main(["pose", str(tmp_path / "photos"), str(tmp_path / "scene")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said[0].startswith("error: of 3 photographs 0 could be placed (0 pairs of them show the same things): walk")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_what_cannot_work_is_refused_before_long_work(tmp_path, walk, monkeypatch):
    def refuse(match: str, **changes) -> None:
        given = {"photographs": walk, "scene": tmp_path / "scene"} | changes
        with pytest.raises(UserError, match=match):
            pose(PoseConfig(**given))

    monkeypatch.setattr(posing, "_structure", lambda *_: pytest.fail("too late"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    (tmp_path / "two").mkdir()
    for name in NAMES[:2]:
        shutil.copy(walk / name, tmp_path / "two")
    refuse("folder .*nowhere' does not exist", photographs=tmp_path / "nowhere")
    refuse("is a file: give the path of a directory", photographs=walk / NAMES[0])
    refuse("empty' has no photographs: give one with JPEG or PNG", photographs=tmp_path / "empty")
    refuse("two' has 2 photographs that can be read: take at least 3", photographs=tmp_path / "two")
    refuse("would take the place of 'thesis.txt'", scene=tmp_path / "mine")
    refuse("is a file: give the path of a directory", scene=walk / NAMES[0])
    refuse("image_size is 10: use at least 64", image_size=10)
    refuse("features is 0: use at least 64", features=0)
    refuse("seed is -1: use at least 0", seed=-1)
    refuse("threads is -1: use at least 0", threads=-1)
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    refuse(r"pycolmap is missing, which finds poses: pip install 'clip-gpt-toolkit\[dietnerf\]'")
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine" and not (tmp_path / "scene").exists()


def test_all_pairs_or_neighbours_and_every_tenth():
    assert pairs_of(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert len(pairs_of(ALL_PAIRS)) == ALL_PAIRS * (ALL_PAIRS - 1) // 2
    count = 3 * ALL_PAIRS
    pairs = pairs_of(count)
    assert all(i < j for i, j in pairs) and len(set(pairs)) == len(pairs)
    near = {j - i for i, j in pairs if i % STRIDE and j % STRIDE}
    assert near == set(range(1, NEIGHBOURS + 1))
    assert {(0, j) for j in range(1, count)} <= set(pairs) and {(i, STRIDE) for i in range(STRIDE)} <= set(pairs)
    assert len(pairs) < count * (NEIGHBOURS + count / STRIDE)


def test_focal_lengths_by_exif():
    base = ExifTags.Base
    film = {base.FocalLengthIn35mmFilm: 36, "width": 3600}
    assert focal_length(film, (360, 240)) == pytest.approx(360)  # an image as wide as film is 36 mm
    assert focal_length(film, (240, 360)) == pytest.approx(360)
    sensor = {base.FocalLength: 10.0, base.FocalPlaneXResolution: 2540.0, "width": 4000}
    assert focal_length(sensor, (400, 300)) == pytest.approx(100)  # 100 pixels a mm, scaled down by 10
    assert focal_length(sensor | {base.FocalPlaneResolutionUnit: 3}, (400, 300)) == pytest.approx(254)
    assert focal_length(sensor | {base.Orientation: 6}, (300, 400)) == pytest.approx(100)
    assert focal_length(sensor | {base.ExifImageWidth: 2000}, (400, 300)) == pytest.approx(200)
    for broken in (0, -5, "none", float("nan"), (1, 2), 10**9):
        assert focal_length({base.FocalLengthIn35mmFilm: broken, "width": 400}, (400, 300)) is None
    assert focal_length({base.FocalLength: 4.2, "width": 400}, (400, 300)) is None


def test_photographs_by_one_lens_share_their_intrinsics(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()

    def shoot(name: str, focal: int, *, size: tuple[int, int] = (80, 60), orientation: int = 1) -> None:
        exif = Image.Exif()
        exif[ExifTags.Base.Model], exif[ExifTags.Base.Orientation] = "phone", orientation
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal
        Image.new("RGB", size).save(photos / name, exif=exif)

    shoot("f_10.jpg", 26)
    shoot("f_2.jpg", 26)
    shoot("f_3.jpg", 13)  # the wide lens
    shoot("f_4.jpg", 26, orientation=6)  # portrait
    Image.new("RGB", (80, 60)).save(photos / "sent by mail.jpg")
    sources = find_photographs(photos)
    assert [path.name for path in sources] == ["f_2.jpg", "f_3.jpg", "f_4.jpg", "f_10.jpg", "sent by mail.jpg"]
    (tmp_path / "ready").mkdir()
    ready, skipped = prepare(sources, tmp_path / "ready", image_size=40)
    assert not skipped and ready[2].size == (30, 40) and ready[0].size == (40, 30)
    assert ready[0].focal == pytest.approx(26 / 43.267 * 50, rel=1e-4)

    def shared(sharing: str) -> list[list[str]]:
        return [list(camera.names) for camera in cameras_of(ready, sharing)]

    mail = "sent_by_mail.jpg"
    assert shared("auto") == [["f_2.jpg", "f_10.jpg"], ["f_3.jpg"], ["f_4.jpg"], [mail]]
    assert shared("shared") == [["f_2.jpg", "f_3.jpg", "f_10.jpg", mail], ["f_4.jpg"]]
    assert shared("each") == [["f_2.jpg"], ["f_3.jpg"], ["f_4.jpg"], ["f_10.jpg"], [mail]]
    assert [camera.focal is None for camera in cameras_of(ready)] == [False, False, False, True]


def test_what_is_transparent_stays_so_and_names_differ(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    cut_out = Image.new("RGBA", (100, 50), (255, 0, 0, 255))
    cut_out.paste((0, 255, 0, 0), (0, 0, 50, 50))
    cut_out.save(photos / "a.png")
    Image.new("RGBA", (100, 50), (9, 9, 9, 255)).save(photos / "a b.png")
    Image.new("L", (100, 50), 77).save(photos / "a,b.jpg")
    Image.fromarray(np.full((50, 100), 30000, np.uint16)).save(photos / "grey.png")
    (tmp_path / "ready").mkdir()
    sources = find_photographs(photos)
    ready, skipped = prepare(sources, tmp_path / "ready", image_size=50)
    assert not skipped and len({one.name for one in ready}) == 4
    assert {one.source.name: one.name for one in ready}["a.png"] == "a.png"
    assert sorted(one.name for one in ready if one.name.startswith("a_b")) == ["a_b.jpg", "a_b_2.jpg"]
    with Image.open(tmp_path / "ready/a.png") as image:
        assert image.size == (50, 25) and image.getpixel((5, 5))[3] == 0 and image.getpixel((45, 5)) == (255, 0, 0, 255)
    with Image.open(tmp_path / "ready/grey.jpg") as image:
        assert image.mode == "RGB" and abs(image.getpixel((5, 5))[0] - 117) <= 1
    assert names_of([Path("x y.jpg"), Path("x_y.png"), Path("x_y_2.png")]) == ["x_y", "x_y_2", "x_y_2_2"]
