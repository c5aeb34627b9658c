"""The table of runs: what is there is not run again; means, spreads and gains are as computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nerfstudio")

from common.checks import UserError
from common.files import write_json
from common.report import Page
from common.runtime import RuntimeConfig
from experiments.demo import scene as demo_scene
from experiments.fields import headroom, synthetic
from experiments.fields.synthetic import ARMS, Config, far_side, gains, main, read_runs, tabulate, training_config
from tests.dietnerf.ball import look_at_origin, write_scene


@pytest.fixture
def few_voxels(monkeypatch):
    from dietnerf.methods import method_config

    def small(method):
        config = method_config(method)
        if method == "dietnerf-grid":
            config.pipeline.model.resolutions, config.pipeline.model.grow_at = (8, 12), (2,)
        return config

    monkeypatch.setattr("dietnerf.settings.method_config", small)


def record(arm: str, seed: int, psnr: float, views: int = 3) -> dict:
    return dict(scene="s", size=8, arm=arm, views=views, seed=seed, scores={"psnr": psnr, "ssim": 0.5}, cpu_seconds=2.0)


def test_tables():
    runs = [
        record("grid", 0, 20.0),
        record("grid", 1, 22.0),
        record("grid-clip", 0, 21.0),
        record("grid-clip", 1, 22.0),
    ]
    runs.append(record("grid-clip", 7, 99.0))  # has no partner
    rows = tabulate(runs)
    assert [row["arm"] for row in rows] == ["grid", "grid-clip"]
    assert rows[0]["psnr"] == 21 and rows[0]["psnr_spread"] == pytest.approx(2**0.5) and rows[0]["seeds"] == 2
    runs += [record("mlp-small", 0, 15.0, views=4), record("mlp-small-clip", 0, 16.0, views=4)]  # its own baseline
    # Changed alike, so it is compared with the changed one.
    runs += [record("grid+lr=0.3", 0, 23.0), record("grid-clip+lr=0.3", 0, 26.0)]
    gain, changed, small = gains(runs)
    assert changed["arm"] == "grid-clip+lr=0.3" and changed["psnr_gain"] == 3.0
    assert [row["arm"] for row in tabulate(runs)][:2] == ["grid", "grid+lr=0.3"]
    assert small["arm"] == "mlp-small-clip" and small["psnr_gain"] == 1.0 and small["psnr_error"] is None
    assert gain["psnr_gain"] == 0.5 and gain["pairs"] == 2 and gain["psnr_error"] == pytest.approx(0.5)


def test_arms_are_compared_with_their_control_and_on_the_far_side():
    scores = {"bare": (20.0, 10.0), "bare-tiny": (21.0, 12.0), "bare-tiny-random": (20.5, 13.0)}
    runs = []
    for seed in (0, 1):
        for arm, (psnr, behind) in scores.items():
            loss = "" if arm == "bare" else "+semantic_weight=0.3"
            run = record(f"{arm}+lr=0.3{loss}", seed, psnr + seed * (arm == "bare-tiny"))
            run["scores"]["psnr_far_side"] = behind
            runs.append(run)
    rows = {(row["arm"].split("+")[0], row["against"].split("+")[0]): row for row in gains(runs)}
    assert set(rows) == {("bare-tiny", "bare"), ("bare-tiny", "bare-tiny-random"), ("bare-tiny-random", "bare")}
    row = rows["bare-tiny", "bare-tiny-random"]
    assert (row["psnr_gain"], row["psnr_error"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert (row["psnr_far_side_gain"], row["psnr_far_side_error"]) == (-1.0, 0.0) and "similarity_gain" not in row


def test_the_far_side_is_what_cameras_on_one_side_do_not_face():
    def views(*azimuths):
        poses = torch.tensor(np.stack([look_at_origin(a, 20)[:3] for a in azimuths]), dtype=torch.float32)
        return SimpleNamespace(
            cameras=SimpleNamespace(camera_to_worlds=poses), view_ids=[10 * i for i in range(len(azimuths))]
        )

    held_out = views(0, 80, 100, 180, 250, 290)
    one_side = SimpleNamespace(training_views=views(-20, 0, 20), held_out_views=held_out)
    assert far_side(one_side, held_out.view_ids) == [2, 3, 4]
    assert far_side(one_side, [30, 0, 20]) == [0, 2]
    assert far_side(SimpleNamespace(training_views=views(0, 120, 240), held_out_views=held_out), [0, 30]) == []


def test_arms_are_settings(tmp_path):
    for arm in ARMS:
        settings = training_config(Config(text="a still life"), tmp_path, 8, arm, 3, 5, tmp_path)
        assert settings.runtime.seed == 5 and settings.views.num_views == 3
        assert bool(settings.semantic.text) == arm.endswith("-text")
    with pytest.raises(UserError, match="give --text"):
        training_config(Config(), tmp_path, 8, "grid-text", 3, 5, tmp_path)
    tuned = training_config(Config(steps=100), tmp_path, 8, "dietnerf-tuned", 3, 0, tmp_path)
    assert tuned.semantic.end == 80 and tuned.semantic.weight == 0.1
    changed = training_config(Config(), tmp_path, 8, "grid-clip+lr=0.2+resolutions=[8, 12]", 3, 0, tmp_path)
    assert (changed.lr, changed.resolutions, changed.semantic.weight) == (0.2, (8, 12), 0.01)
    for arm in ("grid+speed=3", "grid+lr"):
        with pytest.raises(UserError, match="is no setting of dietnerf train"):
            training_config(Config(), tmp_path, 8, arm, 3, 0, tmp_path)
    with pytest.raises(UserError, match="arm is 'best'"):
        training_config(Config(), tmp_path, 8, "best", 3, 0, tmp_path)


def test_runs_are_made_once(tmp_path, few_voxels, monkeypatch, capsys):
    scene = write_scene(tmp_path / "scene", splits={"train": 4, "test": 3})
    config = Config(
        scenes=(scene,), arms=("grid", "grid-clip"), views=(3,), sizes=(0,), seeds=(0,), steps=4, rays=32, resolution=6,
        out=tmp_path / "out", runtime=RuntimeConfig(device="cpu"),
    )  # fmt: skip
    main(config)
    runs = read_runs(tmp_path / "out")
    assert {run["arm"] for run in runs} == {"grid", "grid-clip"} and all(run["steps"] == 4 for run in runs)
    assert len((tmp_path / "out/table.md").read_text().splitlines()) == 4
    assert (tmp_path / "out/views.png").is_file()
    monkeypatch.setattr(synthetic, "train", lambda settings: pytest.fail("was run again"))
    main(config)
    for name, changed in (("steps 4, now it is 6", {"steps": 6}), ("eval_every 1, now it is 2", {"eval_every": 2})):
        with pytest.raises(UserError, match=f"was begun with {name}"):
            main(replace(config, **changed))
    monkeypatch.undo()
    main(replace(config, seeds=(0, 1), budget=1e-9))
    assert "budget" in capsys.readouterr().out and len(read_runs(tmp_path / "out")) == 2


@pytest.mark.slow
def test_headroom_is_run_once_and_tabulated(tmp_path, few_voxels, monkeypatch):
    scene = write_scene(tmp_path / "scene", splits={"train": 6, "test": 8})
    monkeypatch.setitem(headroom.CASES, "8", (0, 2, 4))
    monkeypatch.setitem(headroom.CASES, "side-3", (0, 1))
    monkeypatch.setattr(headroom, "STAGES", {"report": ((1,), 0)})
    config = headroom.Config(
        scene, cases=("8", "side-3"), fields=("bare",), encoders=("tiny", "photo-text"), weights=(0.5,), size=0, steps=20, rays=32,
        resolutions="[8,12]", every=8, out=tmp_path / "out",
    )  # fmt: skip
    headroom.main(config)
    runs = read_runs(tmp_path / "out" / "report" / "8")
    assert len(runs) == 4
    loss = next(run["config"] for run in runs if run["arm"].startswith("bare-photo-text"))
    assert loss["semantic_start"] == 4 and loss["semantic_balance"] and loss["semantic_text"] and not loss["prune"]
    assert loss["silhouette"] == 0 and loss["min_views"] == 1
    table = (tmp_path / "out" / "report" / "gains.md").read_text()
    assert table.count("| bare-tiny-random | 1 |") == 2 and table.count("| bare | 1 |") == 2 * 3
    with Image.open(tmp_path / "out" / "report" / "side-3.jpg") as sheet:
        assert sheet.width > 4 * 150  # photographs and three fields side by side
    monkeypatch.setattr(synthetic, "train", lambda settings: pytest.fail("was run again"))
    headroom.main(config)
    for wrong, message in (
        (dict(cases=("9",)), "cases"),
        (dict(encoders=("blip",)), "encoders"),
        (dict(fields=("mlp",)), "fields"),
    ):
        with pytest.raises(UserError, match=message):
            headroom.main(replace(config, **wrong))


def test_another_judge_is_refused(tmp_path):
    torch.save({"conv": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"EfficientNet-Lite2's weights .*: conv_stem.weight has shape \(3,\) but"):
        headroom.judge_of(tmp_path / "other.pth", tmp_path / "judge.pth")


@pytest.mark.slow
def test_demo_section(tmp_path, few_voxels):
    page = Page("t")
    found = demo_scene.scene_section(page, tmp_path, device="cpu", steps=4, frames=2, size=16)
    assert found["scores"]["psnr"] > 0 and len(found["training_views"]) == 8
    assert json.loads((tmp_path / "scene.json").read_text())["steps"] == 4
    text = page.html()
    assert "data:image/gif" in text and text.count("<article") == 8 + 8 and "Cosine similarity" in text
    write_json(tmp_path / "again.json", found)
