"""The synthetic scenes: deterministic, split fairly, and captioned truthfully. Blender is not needed."""

import dataclasses
import io
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
from experiments.scenes import captions, graph
from experiments.scenes.dataset import load_split
from experiments.scenes.records import family_records, record_from_json, record_to_json

SAMPLES = Path(common.__file__).parent / "assets" / "samples"
LIGHT = graph.Light(azimuth=0.0, elevation=1.0, strength=3.0, sky=0.6)


def _thing(colour: str, shape: str, x: float = 0.0, y: float = 0.0, *, size: str = "large") -> graph.SceneObject:
    return graph.SceneObject(shape, colour, "rubber", size, x, y, 0.0)


def _scene(*objects: graph.SceneObject) -> graph.Scene:
    return graph.Scene(objects, (0.3, 0.3, 0.3), LIGHT)


def _camera(azimuth_degrees: float, elevation_degrees: float = 30.0) -> graph.Camera:
    return graph.Camera(math.radians(azimuth_degrees), math.radians(elevation_degrees), 4.0, (0.0, 0.0, 0.5))


def _families(split: str, count: int) -> list[graph.Family]:
    return [graph.sample_family(0, split, index) for index in range(count)]


def _differences(a: graph.Scene, b: graph.Scene) -> list[str]:
    """Names of the attributes in which objects of two scenes differ; the rest must be equal."""
    assert (a.ground, a.light, len(a.objects)) == (b.ground, b.light, len(b.objects))
    pairs = zip(a.objects, b.objects, strict=True)
    names = [field.name for field in dataclasses.fields(graph.SceneObject)]
    return [name for first, second in pairs for name in names if getattr(first, name) != getattr(second, name)]


def test_sampling_is_deterministic_and_seeded():
    assert graph.sample_family(0, "train", 7) == graph.sample_family(0, "train", 7)
    assert graph.sample_family(0, "train", 7) != graph.sample_family(1, "train", 7)
    assert graph.sample_family(0, "train", 7) != graph.sample_family(0, "val", 7)
    assert family_records(0, "test", 3) == family_records(0, "test", 3)


def test_sampling_rejects_unknown_split():
    with pytest.raises(ValueError, match="split is 'training': use one of train"):
        graph.sample_family(0, "training", 0)


@pytest.mark.slow
@pytest.mark.parametrize("split", graph.SPLITS)
def test_families_differ_in_exactly_one_thing(split):
    for family in _families(split, 100):
        assert len(family.scenes) == len(set(family.scenes)) == graph.SCENES_PER_FAMILY
        assert len(family.cameras) == graph.VIEWS_PER_SCENE
        for scene, change in zip(family.scenes[1:], family.changes[1:], strict=True):
            differences = _differences(family.scenes[0], scene)
            if change == "swap":
                assert Counter(differences) == {"x": 2, "y": 2}
            else:
                assert differences == [change]


@pytest.mark.slow
def test_held_out_pairs_are_a_permutation_and_only_in_their_split():
    assert sorted(colour for colour, _ in graph.HELD_OUT) == sorted(graph.COLOURS)
    assert sorted(shape for _, shape in graph.HELD_OUT) == sorted(graph.SHAPES)
    for split in graph.SPLITS:
        for family in _families(split, 100):
            assert all(graph.has_held_out(scene) == (split == "test_unseen") for scene in family.scenes)


@pytest.mark.slow
def test_attributes_and_counts_are_balanced():
    objects = [thing for family in _families("train", 300) for thing in family.scenes[0].objects]
    for attribute, values in graph.ATTRIBUTES.items():
        counts = Counter(getattr(thing, attribute) for thing in objects)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.6 * len(objects) / len(values)
    sizes = Counter(len(family.scenes[0].objects) for family in _families("train", 300))
    assert sizes[1] / 300 == pytest.approx(0.35, abs=0.08)
    assert sizes[3] / 300 == pytest.approx(0.30, abs=0.08)


def test_objects_do_not_overlap_nor_hide_one_another_much():
    for family in _families("train", 100):
        for scene in family.scenes:
            for i, a in enumerate(scene.objects):
                for b in scene.objects[:i]:
                    assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
            for camera in family.cameras:
                assert max(graph.hidden_shares(scene, camera)) <= 0.25
                assert math.radians(10) <= camera.elevation <= math.radians(70)


def test_hidden_share_of_one_ball_behind_another():
    near, far = _thing("red", "ball", x=1.0), _thing("blue", "ball", x=-1.0)
    level = graph.Camera(0.0, 0.0, 6.0, (0.0, 0.0, 0.9 * near.radius))
    assert graph.hidden_shares(_scene(near, far), level) == [0.0, 1.0]
    from_the_side = dataclasses.replace(level, azimuth=math.pi / 2)
    assert graph.hidden_shares(_scene(near, far), from_the_side) == [0.0, 0.0]


def test_camera_poses_are_rotations_that_look_at_the_target():
    camera = _camera(40.0)
    pose = np.array(camera.pose())
    assert np.allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3))
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0)
    assert np.allclose(pose[:3, 3] - camera.distance * pose[:3, 2], camera.target)
    assert pose[2, 1] > 0  # the image's top is up
    assert np.allclose(camera.see(camera.target), (0.0, 0.0, camera.distance))


@pytest.mark.parametrize(
    ("azimuth", "expected"),
    [(0.0, "behind"), (90.0, "right"), (180.0, "front"), (270.0, "left")],
)
def test_relations_are_those_the_camera_sees(azimuth, expected):
    # At azimuth 0 the camera stands on the x axis, so a smaller x is farther away; at 90 it stands on the y axis
    # and looks back along it, so that a smaller x is on its right.
    first, second = _thing("red", "cube", x=-1.0), _thing("blue", "ball", x=1.0)
    opposite = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
    assert captions.relations(first, second, _camera(azimuth)) == [expected]
    assert captions.relations(second, first, _camera(azimuth)) == [opposite[expected]]


def test_relations_agree_with_the_image():
    for family in _families("train", 100):
        scene = family.scenes[0]
        for camera in family.cameras:
            for a in scene.objects:
                for b in scene.objects:
                    if a is b:
                        continue
                    found = captions.relations(a, b, camera)
                    (u, _, depth), (u2, _, depth2) = camera.see((a.x, a.y, 0.0)), camera.see((b.x, b.y, 0.0))
                    assert 1 <= len(found) <= 2
                    assert found[0] != "left" or u < u2
                    assert found[0] != "right" or u > u2
                    assert found[0] != "front" or depth < depth2
                    assert found[0] != "behind" or depth > depth2


@pytest.mark.slow
def test_captions_parse_back_to_the_scene():
    checked = 0
    for split in graph.SPLITS:
        for index in range(40):
            for view in family_records(0, split, index):
                objects = view.scene.objects
                assert len(set(view.captions)) == captions.CAPTIONS_PER_VIEW
                for text in view.captions:
                    assert captions.names_all(text, view.scene), text
                    for named in captions.parse(text):
                        assert any(_fits(named, thing) for thing in objects), text
                    checked += 1
                full = Counter(captions.parse(view.full_caption))
                assert full == Counter(
                    captions.Named(thing.colour, thing.shape, thing.material, thing.size) for thing in objects
                ), view.full_caption
    assert checked > 5000


def _fits(named: captions.Named, thing: graph.SceneObject) -> bool:
    """Whether an object is as a caption says, where the caption says anything."""
    pairs = [(named.material, thing.material), (named.size, thing.size)]
    return (named.colour, named.shape) == thing.look and all(said in (None, true) for said, true in pairs)


def test_captions_are_varied():
    views = [view for index in range(60) for view in family_records(0, "train", index)]
    texts = {text for view in views for text in view.captions}
    assert len(texts) > 0.7 * len(views) * captions.CAPTIONS_PER_VIEW


def test_alike_objects_are_counted_together():
    scene = _scene(_thing("red", "cube", x=-1.0), _thing("red", "cube", x=1.0))
    texts = [captions.caption(scene, _camera(0.0), random.Random(i)) for i in range(20)]
    assert all("two" in text and ("cubes" in text or "blocks" in text) for text in texts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red cube", [("red", "cube")]),
        ("A photo of an orange metal ball.", [("orange", "ball")]),
        ("two small red cubes and a star made of metal", [("red", "cube"), ("red", "cube"), (None, "star")]),
        ("a red cube left of a pink ring; a cone is behind the red cube",
         [("red", "cube"), ("pink", "ring"), (None, "cone")]),
        ("there are three objects: a blue monkey head, one green cone and a cyan block",
         [("blue", "monkey"), ("green", "cone"), ("cyan", "cube")]),
        ("a dog runs over the grass", []),
        ("", []),
    ],
)  # fmt: skip
def test_parse_reads_what_a_caption_names(text, expected):
    assert [(named.colour, named.shape) for named in captions.parse(text)] == expected


def test_names_all_is_strict():
    scene = _scene(_thing("red", "cube", y=-1.0), _thing("green", "ball", y=1.0))
    assert captions.names_all("a green ball and a red cube", scene)
    assert not captions.names_all("a red ball and a green cube", scene)
    assert not captions.names_all("a red cube", scene)
    assert not captions.names_all("a red cube, a green ball and a green ball", scene)


def test_counterfactual_changes_one_attribute_and_avoids_held_out_pairs():
    rng = random.Random(0)
    for family in _families("train", 100):
        changed = captions.counterfactual(family.scenes[0], rng)
        (difference,) = _differences(family.scenes[0], changed)
        assert difference in graph.ATTRIBUTES
        assert not graph.has_held_out(changed)


def test_caption_rejects_unknown_detail():
    with pytest.raises(ValueError, match="detail is 'all'"):
        captions.caption(_scene(_thing("red", "cube")), _camera(0.0), random.Random(0), detail="all")


def test_reader_takes_complete_shards_only(tmp_path):
    records = family_records(0, "train", 0)
    for shard in range(2):
        lines = "".join(json.dumps(record_to_json(record)) + "\n" for record in records)
        (tmp_path / f"train-{shard:05d}.jsonl").write_text(lines)
    images = np.random.default_rng(0).integers(0, 256, (len(records), 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "train-00000.npy", images)
    (tmp_path / "train-00001.npy.part").write_bytes(b"half")
    read, read_records = load_split(tmp_path, "train")
    assert np.array_equal(read, images)
    assert read_records == records
    assert record_from_json(json.loads(json.dumps(record_to_json(records[0])))) == records[0]
    with pytest.raises(FileNotFoundError, match="scenes/render"):
        load_split(tmp_path, "val")


def test_packaged_scenes_are_readable_and_described():
    data = json.loads((SAMPLES / "scenes" / "dataset.json").read_text())
    images = data["images"]
    splits = Counter(image["split"] for image in images)
    assert splits["test"] >= 64 and splits["train"] >= 32 and splits["val"] >= 8
    assert sum(image["unseen"] for image in images) >= 16
    assert [image["imgid"] for image in images] == list(range(len(images)))
    ids = [sentence["sentid"] for image in images for sentence in image["sentences"]]
    assert ids == list(range(len(ids)))
    for image in images:
        with Image.open(SAMPLES / "scenes" / image["filename"]) as picture:
            assert (picture.size, picture.mode) == ((224, 224), "RGB")
            assert np.asarray(picture).std() > 3
        split = "test_unseen" if image["unseen"] else image["split"]
        views = family_records(0, split, image["family"])
        view = views[image["scene_index"] * graph.VIEWS_PER_SCENE + image["view"]]
        assert [sentence["raw"] for sentence in image["sentences"]] == list(view.captions)
    assert sum(path.stat().st_size for path in (SAMPLES / "scenes").iterdir()) < 1.2e6


@pytest.mark.parametrize(("split", "count"), [("train", 8), ("val", 4), ("test", 16)])
def test_packaged_multiview_scene_is_nerf_synthetic(split, count):
    data = json.loads((SAMPLES / "multiview" / f"transforms_{split}.json").read_text())
    assert 0 < data["camera_angle_x"] < math.pi
    assert len(data["frames"]) == count
    for frame in data["frames"]:
        pose = np.array(frame["transform_matrix"])
        assert np.allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3))
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0)
        assert np.allclose(pose[:3, 3], 4.0 * pose[:3, 2])  # looks at the origin from radius 4
        file = io.BytesIO((SAMPLES / "multiview" / f"{frame['file_path']}.png").read_bytes())
        with Image.open(file) as picture:
            assert (picture.size, picture.mode) == ((128, 128), "RGBA")
            alpha = np.asarray(picture)[..., 3]
        assert alpha[:, [0, -1]].max() == alpha[[0, -1]].max() == 0  # the object lies inside every frame
        assert (alpha > 0).mean() > 0.1
