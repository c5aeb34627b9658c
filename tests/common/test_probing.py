"""`clip-probe` on small folders of images: every subcommand, and what it refuses before any work."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.probing import embed
from common.probing.cli import main
from common.probing.data import Shares, read_captions, read_classes, read_labels, read_templates, train_val_test
from common.probing.page import plot_confusion

COLOURS = {"dark_red": (150, 20, 20), "green": (20, 160, 20), "blue": (30, 30, 170)}


class Colours:
    """An encoder of red, green and blue: unit axes, as texts that name them."""

    name, image_size, has_text = "colours", 8, True
    device = torch.device("cpu")

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), np.float32)).permute(2, 0, 1)[None] / 255

    def encode_image_features(self, pixels, *, packed):
        means = pixels.mean((2, 3))
        return type("Found", (), {"embedding": means, "class_token": torch.cat([means, means], 1)})

    def encode_texts(self, texts):
        return torch.tensor([[float(name in text) for name in ("red", "green", "blue")] for text in texts]) + 0.01

    def require_text(self, wanted):
        pass


@pytest.fixture
def colours(monkeypatch):
    """`clip-probe` with an encoder of colours."""
    monkeypatch.setattr("common.clip.load_clip", lambda name, device: Colours())


@pytest.fixture
def folder(tmp_path):
    """Eight images of each of three colours, with one file that is none."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (9, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "green" / "8.png").write_bytes(b"no image")
    (tmp_path / "photos" / "empty").mkdir()
    return tmp_path / "photos"


def results(out):
    assert "<h2" in (out / "index.html").read_text()
    return json.loads((out / "results.json").read_text())


def refused(capsys, *arguments):
    """The one line with which a command ends."""
    assert main(list(map(str, arguments))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_zero_shot_by_class_folders(folder, tmp_path, colours, capsys):
    assert main(["zero-shot", str(folder), "--out", str(tmp_path / "out"), "--templates", "ensemble"]) == 0
    said = capsys.readouterr()
    assert "skipped 1 of 25 images" in said.err and "8.png" in said.err
    assert "accuracy 1.000" in said.out
    found = results(tmp_path / "out")
    assert found["classes"] == ["blue", "dark red", "green"] and len(found["templates"]) == 7
    assert found["scores"]["confusion"] == [[8, 0, 0], [0, 8, 0], [0, 0, 8]]
    assert found["scores"]["most_frequent"] == pytest.approx(1 / 3) and found["scores"]["top_5"] is None
    assert {row["guess"] for row in found["predictions"]} == set(found["classes"]) and len(found["skipped"]) == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('class="card"') == 24 and "Images by class" in page


def test_zero_shot_by_labels(folder, tmp_path, colours, capsys):
    arguments = ["zero-shot", str(folder / "green"), "--out", str(tmp_path / "out"), "--pictures", "3"]
    assert main([*arguments, "--labels", "a green thing, a red thing"]) == 0
    assert "a green thing: 8 of 8 images" in capsys.readouterr().out
    found = results(tmp_path / "out")
    assert "scores" not in found and all(row["guess"] == "a green thing" for row in found["predictions"])
    assert (tmp_path / "out" / "index.html").read_text().count('class="card"') == 3


def test_retrieve(folder, tmp_path, colours, capsys):
    (folder / "8.csv").write_text(
        "file_name,caption\ngreen/0.png,green\ngreen/0.png,it is green\nblue/1.png,blue\ndark_red/2.png,a red one\n"
    )
    asked = ["--queries", "green", "so red", "--top", "2", "--captions", str(folder / "8.csv")]
    (folder / "green" / "8.png").unlink()
    assert main(["retrieve", str(folder), "--out", str(tmp_path / "out"), *asked]) == 0
    found = results(tmp_path / "out")
    for query, place in zip(found["queries"], ("green", "dark_red"), strict=True):
        assert len(query["images"]) == 2 and all(place in row["image"] for row in query["images"])
    assert found["recall"]["image to text"]["recall@1"] == 1 and found["recall"]["captions"] == 4
    assert "text to image: recall@1 1.000" in capsys.readouterr().out


@pytest.mark.slow
def test_linear_and_few_shot(folder, tmp_path, colours, capsys):
    shares = ["--test-share", "0.25", "--val-share", "0.3"]
    assert main(["linear", str(folder), "--out", str(tmp_path / "a"), "--features", "class_token", *shares]) == 0
    found = results(tmp_path / "a")
    assert found["scores"]["accuracy"] == 1 and found["scores"]["images"] in (6, 7)
    assert sum(found["images"].values()) == 24 and str(found["strength"]) in found["tried"]
    assert main(["few-shot", str(folder), "--out", str(tmp_path / "b"), "--shots", "1", "2", "--repeats", "2"]) == 0
    found = results(tmp_path / "b")
    assert {shots: len(several) for shots, several in found["few_shot"].items()} == {"1": 2, "2": 2}
    assert found["few_shot"]["2"][0]["accuracy"] == 1 == found["zero_shot"]["accuracy"]
    assert "zero-shot: accuracy" in capsys.readouterr().out


def test_the_packaged_clip_and_one_without_text(root, tmp_path, capsys, monkeypatch):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for number in (1, 4):
        (scenes / f"{number}.jpg").symlink_to(root / f"common/assets/samples/scenes/test_00{number}.jpg")
    asked = ["--labels", "green stool,purple ring", "--out", str(tmp_path / "out"), "--clip", "tiny"]
    assert main(["zero-shot", str(scenes), *asked]) == 0
    assert [row["guess"] for row in results(tmp_path / "out")["predictions"]] == ["green stool", "purple ring"]
    from common.clip import load_clip

    mute = load_clip("tiny", device="cpu")
    mute.backbone.has_text = False
    monkeypatch.setattr("common.clip.load_clip", lambda name, device: mute)
    monkeypatch.setattr(embed, "decode_image", lambda *_, **__: pytest.fail("an image was read"))
    assert "has no text tower, which zero-shot classification needs" in refused(capsys, "zero-shot", scenes, *asked)
    asked = ["--queries", "a ring", "--clip", "tiny", "--out", tmp_path / "out"]
    assert "has no text tower, which retrieval by text needs" in refused(capsys, "retrieve", scenes, *asked)


def test_splits_of_folders(folder, tmp_path):
    (folder / "green" / "8.png").unlink()
    whole = read_classes(folder)["all"]
    parts = train_val_test(folder, Shares(), 0)
    assert sorted(path for part in parts for path in part.paths) == sorted(whole.paths)
    assert [len(part.paths) for part in parts] == [15, 3, 6]
    assert parts[2] == train_val_test(folder, Shares(), 0)[2] != train_val_test(folder, Shares(), 1)[2]
    for split in ("train", "valid", "test"):
        (tmp_path / "split" / split).mkdir(parents=True)
        for name in COLOURS:
            (tmp_path / "split" / split / name).symlink_to(folder / name)
    given = train_val_test(tmp_path / "split", Shares(), 0)
    assert [len(part.paths) for part in given] == [24, 24, 24]
    assert all(
        path.parts[-3] == name
        for part, name in zip(given, ("train", "valid", "test"), strict=True)
        for path in part.paths
    )


@pytest.mark.slow
def test_mistakes_are_named_before_the_encoder_is_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.clip.load_clip", lambda *_, **__: pytest.fail("the encoder was loaded"))
    out = ("--out", tmp_path / "out")
    assert "does not exist" in refused(capsys, "zero-shot", tmp_path / "nowhere", *out)
    assert "has 0 class folders" in refused(capsys, "zero-shot", folder / "green", *out)
    assert "at least 2" in refused(capsys, "zero-shot", folder, "--labels", "dog", *out)
    assert "'dog' 2 times" in refused(capsys, "zero-shot", folder, "--labels", "dog,cat,dog", *out)
    assert "pictures is -1" in refused(capsys, "zero-shot", folder, "--pictures", "-1", *out)
    assert "templates is 'nothing'" in refused(capsys, "zero-shot", folder, "--templates", "nothing", *out)
    assert "holds no image" in refused(capsys, "retrieve", folder / "empty", "--queries", "dog", *out)
    assert "give --queries" in refused(capsys, "retrieve", folder, *out)
    assert "give texts" in refused(capsys, "retrieve", folder, "--queries", " ", *out)
    assert "use fewer --shots" in refused(capsys, "few-shot", folder, *out)
    assert "test_share is 0" in refused(capsys, "linear", folder, "--test-share", "0", *out)
    assert "is a file" in refused(capsys, "linear", folder, "--out", folder / "green" / "1.png")
    (folder / "dark red").symlink_to(folder / "dark_red")
    assert "2 classes 'dark red'" in refused(capsys, "zero-shot", folder, *out)
    assert not (tmp_path / "out").exists()


def test_files_of_labels_templates_and_captions(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\ufeffhot dog, with mustard\n\ncat\n", encoding="utf-8")
    assert read_labels(str(file)) == ("hot dog, with mustard", "cat")
    file.write_text("a {}.\nthe {}!\n")
    assert read_templates(str(file)) == ("a {}.", "the {}!")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for text, message in {
        "name,caption\na.png,x": "give file_name and caption",
        "file_name,caption": "no rows",
        "file_name,caption\nb.png,x": "row 2: image .*does not exist",
        "file_name,caption\na.png,": "row 2: the file name or the caption is empty",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_captions(file, tmp_path)


def test_a_confusion_matrix_is_shown_by_rows():
    figure = plot_confusion([[3, 1], [0, 0]], ["cat", "dog"])
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.tolist() == [[0.75, 0.25], [0, 0]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1"]
