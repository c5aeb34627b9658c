"""The command: train, render and evaluate in one go, help, and mistakes as one line with exit code 2."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from dietnerf.cli import main
from dietnerf.scene import Scene
from tests.dietnerf.ball import write_scene
from tests.dietnerf.test_data import nerfstudio_scene


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A grid trained for a few steps through the command."""
    place = tmp_path_factory.mktemp("cli")
    scene = write_scene(place / "scene")
    arguments = ["train", str(scene), "--out", str(place / "run"), "--num-views", "4", "--steps", "4", "--rays", "64"]
    arguments += ["--no-progress", "--device", "cpu", "--val-views", "0", "--semantic-weight", "0"]
    assert main(arguments) == 0
    return place / "run"


def test_render_every_path(run, capsys):
    for path in ("orbit", "interpolate", "test"):
        assert main(["render", str(run), "--path", path, "--frames", "3", "--size", "8", "--device", "cpu"]) == 0
        with Image.open(run / f"{path}.gif") as image:
            lasts = []
            for number in range(image.n_frames):  # frames that look the same are one that lasts longer
                image.seek(number)
                lasts.append(image.info["duration"])
            assert sum(lasts) == 150 and image.size == (16, 8)
    assert main(["render", str(run), "--format", "png", "--frames", "2", "--no-depth", "--device", "cpu"]) == 0
    assert len(list((run / "orbit").glob("*.png"))) == 2
    assert main(["render", str(run), "--path", "test", "--format", "png", "--no-depth", "--device", "cpu"]) == 0
    scene = Scene.load(run, device="cpu")
    views = scene.held_out_views.cameras
    own = [(scene.render_camera(views[i : i + 1]).rgb.numpy() * 255 + 0.5).astype(np.uint8) for i in range(len(views))]
    for number, expected in enumerate(own):
        assert np.array_equal(np.asarray(Image.open(run / f"test/{number:04d}.png")), expected)
    assert "written to" in capsys.readouterr().out


def test_evaluate(run, capsys):
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    record = json.loads((run / "evaluation/results.json").read_text())
    assert len(record["per_view"]) == 3 and record["held_out_from"] == "transforms_test.json"
    assert record["scores"]["psnr"] == pytest.approx(sum(row["psnr"] for row in record["per_view"]) / 3)
    assert (run / "evaluation/views.png").is_file() and "not_measured" in record
    assert "<table>" in (run / "evaluation/index.html").read_text()
    said = capsys.readouterr().out
    assert "3 held-out views\n" in said and "PSNR: " in said


def test_scores_of_training_views_are_called_so(tmp_path, capsys):
    """Eight photographs, all trained on: there are no others to score."""
    scene, out = nerfstudio_scene(tmp_path / "scene", 8), tmp_path / "run"
    arguments = ["--steps", "2", "--rays", "32", "--resolutions", "8", "--no-progress", "--device", "cpu"]
    for views, said in (("8", "8 training views: there are no others"), ("5", "3 held-out views")):
        assert main(["train", str(scene), "--num-views", views, "--out", str(out), "--no-resume", *arguments]) == 0
        assert main(["evaluate", str(out), "--device", "cpu"]) == 0
        shown, page = capsys.readouterr().out, (out / "evaluation/index.html").read_text()
        record = json.loads((out / "evaluation/results.json").read_text())
        assert said in shown and record["held_out_from"] == "train" and record["scored"] in said
        kinds = ("training", "held-out") if views == "8" else ("held-out", "training")
        assert f"Means over {said.partition(':')[0]}" in page and f"<h1>{kinds[0].capitalize()} views" in page
        assert f"{kinds[1]} views beside" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["render", "nothing"], "run 'nothing' does not exist"),
        (["evaluate", "RUN", "--protocol", "paper"], "not as the protocol paper says"),
        (["render", "RUN", "--frames", "0"], "frames is 0: use at least 1"),
        (["train", "nothing"], "nothing' does not exist"),
        (["train", "SCENE", "--num-views", "9"], "num_views is 9: this scene has 6"),
        (["train", "SCENE", "--view-ids", "0", "99"], "view id 99 is out of range"),
        (["train", "SCENE", "--steps", "-1"], "steps is -1"),
        (["train", "SCENE", "--protocol", "paper"], "out of range"),
        (["train", "SCENE", "--resolutions", "100000"], "GB are free"),
        (["train", "SCENE", "--resolutions", "1000000000000"], "GB are free"),
        (["train", "SCENE", "--steps", "1000000000000"], "steps is 1000000000000: use at most"),
        (["train", "SCENE", "--devices", "1000000000000"], "devices is 1000000000000: use at most"),
        (["train", "SCENE", "--strategy", "rocket"], "strategy is 'rocket': choose one of auto, ddp"),
        (["render", "RUN", "--frames", "1000000000000"], "GB are free"),
        (["render", "RUN", "--size", "10000000"], "GB are free"),
        (["render", "RUN", "--out", "."], "is a directory"),
        (["render", "RUN", "--out", "RUN/" + 256 * "n"], "name of 256 characters"),
        (["evaluate", "RUN", "--chunk", "-1"], "chunk is -1"),
        (["evaluate", "RUN", "--out", "RUN/config.yml"], "is a file"),
        (["evaluate", "RUN", "--vgg", "RUN/config.yml"], "cannot be read: give torchvision's"),
        (["evaluate", "RUN", "--inception", "RUN/config.yml"], "cannot be read: give"),
        (["consistency", "SCENE", "--out", "RUN/config.yml"], "is a file"),
        (["paint"], "dietnerf has no command 'paint'"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message, capsys, tmp_path):
    places = {"RUN": str(run), "SCENE": str(run.parent / "scene")}
    for name, place in places.items():
        arguments = [re.sub(f"^{name}(?=/|$)", place, argument) for argument in arguments]
    if arguments[0] == "train":
        arguments += ["--out", str(tmp_path / "run"), "--device", "cpu", "--no-progress"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_help(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("pose", "train", "render", "evaluate", "consistency"))
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--num-views" in shown and "--semantic-text" in shown and "SCENE" in shown.upper()


def test_without_nerfstudio(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "scene"]) == 2
    assert "dietnerf needs nerfstudio" in capsys.readouterr().err
