"""Lightning's front door: exact resume, both directions of checkpoint exchange, DDP, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from common import checks
from common.checks import UserError
from common.files import claimed
from common.runtime import RuntimeConfig
from dietnerf.evaluation import score_scene
from dietnerf.methods import method_config
from dietnerf.scene import Scene
from dietnerf.settings import TrainConfig, changed, train_config
from dietnerf.training import train
from tests.dietnerf.ball import write_scene
from tests.dietnerf.fields import CONFIGS
from tests.dietnerf.test_pipeline import nerfstudio_run, run_command  # noqa: F401
from tests.kills import kill_everywhere


@pytest.fixture
def small_grid(monkeypatch):
    """The grid method with 8³ and 12³ voxels."""

    def small(method):
        config = method_config(method)
        if method == "dietnerf-grid":
            config.pipeline.model.resolutions, config.pipeline.model.grow_at = (8, 12), (1000,)
            config.pipeline.model.occupancy_every = 4
        return config

    monkeypatch.setattr("dietnerf.settings.method_config", small)


def settings(scene: Path, out: Path, **changes) -> TrainConfig:
    base = train_config(
        scene=scene, out=out, num_views=4, rays=64, steps=12, semantic_weight=0.01, semantic_resolution=6,
        semantic_every=5, val_views=1, val_every=6, progress=False, runtime=RuntimeConfig(device="cpu", seed=3),
    )  # fmt: skip
    return changed(base, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "nerfstudio_models").glob("step-*.ckpt")
    return torch.load(path, weights_only=True)["pipeline"]


@pytest.mark.slow
def test_a_run_and_what_it_leaves(ball_scene, tmp_path, small_grid):
    run = train(settings(ball_scene, tmp_path / "run"))
    record = json.loads((run / "training.json").read_text())
    assert record["steps"] == 12 and len(record["view_ids"]) == 4 and record["restarts"] == 0
    assert record["images"] == [f"r_{i}.png" for i in record["view_ids"]]
    assert {path.name for path in run.iterdir()} >= {"config.yml", "last.ckpt", "metrics.csv", "nerfstudio_models"}
    scene = Scene.load(run, device="cpu")
    assert scene.step == 11 and scene.training_views.view_ids == tuple(record["view_ids"])
    pose = scene.held_out_views.cameras.camera_to_worlds[0]
    picture = scene.render(pose)
    assert picture.rgb.shape == (16, 16, 3) and picture.depth.shape == (16, 16, 1)
    assert torch.allclose(scene.render(pose, chunk=7).rgb, picture.rgb, atol=1e-5)
    assert scene.render(pose, size=8).rgb.shape == (8, 8, 3)


@pytest.mark.slow
def test_resume_is_exact(ball_scene, tmp_path, small_grid, monkeypatch):
    """After a signal in the eighth of 15 steps, on all that is in the files: weights, and the rows of metrics."""
    from dietnerf.training import FewViewTraining

    options = {"steps": 15, "semantic_every": 3, "val_every": 4}
    whole = train(settings(ball_scene, tmp_path / "whole", **options))
    before = FewViewTraining.training_step

    def stop(module, *arguments):
        if module.global_step == 7:
            signal.raise_signal(signal.SIGTERM)
        return before(module, *arguments)

    cut = settings(ball_scene, tmp_path / "cut", **options)
    with monkeypatch.context() as patch:
        patch.setattr(FewViewTraining, "training_step", stop)
        assert checks.run_command(lambda: train(cut) and 0) == 143
    assert [path.name for path in cut.out.glob("nerfstudio_models/*")] == ["step-000000006.ckpt"]
    train(cut)
    first, second = weights(whole), weights(cut.out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "metrics.csv").read_text() == (cut.out / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_row_of_metrics_is_of_its_step(ball_scene, tmp_path, small_grid, monkeypatch):
    from dietnerf.pipeline import FewViewPipeline

    seen, compute = {}, FewViewPipeline.get_train_loss_dict

    def noted(pipeline, step):
        found = compute(pipeline, step)
        seen[step] = {name: float(value.detach()) for name, value in found[1].items()}
        return found

    monkeypatch.setattr(FewViewPipeline, "get_train_loss_dict", noted)
    run = train(settings(ball_scene, tmp_path / "run", steps=35, semantic_every=7, val_views=0))
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 10, 14, 20, 21, 30]  # and of 28, after 21, none
    for row in rows:
        parts = seen[int(row["step"])]
        assert {name: float(row[f"train/{name}"]) for name in parts} == pytest.approx(parts, rel=1e-6)
        assert float(row["train/loss"]) == pytest.approx(sum(parts.values()), rel=1e-5) and row["train/psnr"]
        assert bool(row["train/semantic"]) == ("semantic" in parts) == (int(row["step"]) % 7 == 0)


def test_one_run_at_a_time_in_a_directory(ball_scene, tmp_path):
    with claimed(tmp_path / "run"), pytest.raises(UserError, match="is in use by process"):
        train(settings(ball_scene, tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == []


def small_field(directory: Path) -> str:
    """A scenario of `tests.kills`."""
    torch.set_num_threads(1)
    scene = directory.parent / "scene"
    if not scene.exists():
        write_scene(scene)
    run = train(settings(scene, directory, method="mlp-small", steps=4, rays=16, semantic_weight=0.0, val_every=2))
    values = [*weights(run).values(), *torch.load(run / "last.ckpt", weights_only=True)["state_dict"].values()]
    return str([float(value.double().sum()) for value in values]) + (run / "metrics.csv").read_text()


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_training_killed_at_any_of_its_writes_ends_the_same(forks, tmp_path, exhaustive):
    points = 20 if exhaustive else 6
    kill_everywhere(forks, "tests.dietnerf.test_training:small_field", tmp_path, points=points)


@pytest.mark.slow
def test_another_run_does_not_go_on_from_this_one(ball_scene, tmp_path, small_grid, monkeypatch):
    base = settings(ball_scene, tmp_path / "run", val_views=0)
    run = train(base)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = write_scene(tmp_path / "other")
    for change, message in [
        (dict(scene=other), "was begun with scene .*ball', now it is .*other'"),
        (dict(method="mlp-small"), "was begun with method 'grid', now it is 'mlp-small'"),
        (dict(num_views=5), "was begun with num_views 4, now it is 5"),
        (dict(semantic_weight=0.5), "was begun with semantic_weight"),
    ]:
        with pytest.raises(UserError, match=message):
            train(changed(base, **change))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.chdir(ball_scene.parent)
    train(changed(base, scene=Path(ball_scene.name)))  # the same one, and all steps were made
    assert (run / "training.json").read_bytes() == before[run / "training.json"]
    further = train(changed(base, steps=14, chunk=100, val_every=3))
    assert json.loads((further / "training.json").read_text())["steps"] == 14
    anew = train(changed(base, scene=other, resume=False, steps=4))
    assert Scene.load(anew, device="cpu").step == 3


def test_a_run_that_version_0_1_began_goes_on(ball_scene, tmp_path, small_grid):
    """It recorded None for what it left to the method, and knew no text_weight."""
    base = settings(ball_scene, tmp_path / "run", steps=4, val_views=0, semantic_weight=0.0)
    last = train(base) / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    older = {"semantic_poses": "sphere", "occlusion": None, "silhouette": None, "semantic_every": 5}
    new = ("semantic_text_weight", "occlusion_distance", "depth_patches")
    checkpoint["settings"] = {n: v for n, v in checkpoint["settings"].items() if n not in new} | older
    torch.save(checkpoint, last)
    assert Scene.load(train(changed(base, steps=6)), device="cpu").step == 5
    torch.save(checkpoint, last)
    with pytest.raises(UserError, match=r"was begun with density_variation 0.0012, now it is 0.1: use the same again"):
        train(changed(base, density_variation=0.1))


def test_what_a_run_left_to_the_method_is_not_changed_later(ball_scene, tmp_path, small_grid):
    base = settings(ball_scene, tmp_path / "run", steps=2, val_views=0, semantic_weight=0.0)
    train(base)
    with pytest.raises(UserError, match=r"was begun with distortion None, now it is 0.1: use the same again"):
        train(changed(base, steps=4, distortion=0.1))


@pytest.mark.slow
def test_lightning_run_opens_with_nerfstudio_and_trains_on(ball_scene, tmp_path, small_grid):
    run = train(settings(ball_scene, tmp_path / "run", semantic_weight=0.0))
    from nerfstudio.utils.eval_utils import eval_setup

    config, pipeline, path, step = eval_setup(run / "config.yml")
    assert step == 11 and path == run.resolve() / "nerfstudio_models/step-000000011.ckpt"
    scene = Scene.load(run, device="cpu")
    for name, value in pipeline.state_dict().items():
        assert torch.equal(value.cpu(), scene.pipeline.state_dict()[name])
    metrics = pipeline.get_average_eval_image_metrics()
    assert 3 < metrics["psnr"] < 60

    # nerfstudio's trainer goes on from it, with the optimizer's moments
    config.load_dir, config.vis, config.max_num_iterations = config.get_checkpoint_dir(), "tensorboard", 2
    config.run_directory = tmp_path / "further"
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    moments = trainer.optimizers.optimizers["fields"].state
    assert trainer._start_step == 12 and any(float(s["exp_avg_sq"].sum()) > 0 for s in moments.values())
    assert trainer.optimizers.schedulers["fields"].last_epoch == 12
    trainer.train_iteration(12)


@pytest.mark.slow
def test_nerfstudio_run_opens_with_ours(nerfstudio_run, tmp_path):  # noqa: F811
    from dietnerf.cli import main

    scene = Scene.load(nerfstudio_run.parent.parent, device="cpu")  # found below its output directory
    assert scene.directory == nerfstudio_run and scene.step == 11 and len(scene.training_views) == 4
    out = tmp_path / "orbit.gif"
    assert main(["render", str(nerfstudio_run), "--frames", "2", "--out", str(out), "--device", "cpu"]) == 0
    assert out.is_file()
    assert main(["evaluate", str(nerfstudio_run), "--every", "8", "--out", str(tmp_path / "e"), "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "e/results.json").read_text())["scores"]["psnr"] > 3


@pytest.mark.slow
def test_lightning_run_opens_with_the_ns_commands(ball_scene, tmp_path, small_grid):
    run = train(settings(ball_scene, tmp_path / "run", semantic_weight=0.0, val_views=0))
    run_command("ns-eval", "--load-config", str(run / "config.yml"), "--output-path", "s.json", cwd=tmp_path)
    assert json.loads((tmp_path / "s.json").read_text())["results"]["psnr"] > 3


def test_nerfacto_has_two_groups(ball_scene, tmp_path):
    run = train(settings(ball_scene, tmp_path / "run", method="nerfacto", steps=3, semantic_weight=0.0, val_views=0))
    state = torch.load(run / "nerfstudio_models/step-000000002.ckpt", weights_only=True)
    assert set(state["optimizers"]) == {"fields", "proposal_networks"}
    assert Scene.load(run, device="cpu").step == 2


def test_broken_runs(ball_scene, tmp_path, small_grid):
    with pytest.raises(UserError, match="does not exist"):
        Scene.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no config.yml"):
        Scene.load(tmp_path)
    run = train(settings(ball_scene, tmp_path / "run", steps=2, semantic_weight=0.0, val_views=0))
    path = next((run / "nerfstudio_models").glob("*.ckpt"))
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    config.pipeline.model.resolutions = (6, 10)
    whole = (run / "config.yml").read_text()
    (run / "config.yml").write_text(yaml.dump(config))
    with pytest.raises(UserError, match="of another field than config.yml says"):
        Scene.load(run, device="cpu")
    for model in (CONFIGS["mlp"], CONFIGS["nerfacto"]):  # nothing in common with the grid's weights
        config.pipeline.model = model
        (run / "config.yml").write_text(yaml.dump(config))
        with pytest.raises(UserError, match=r"of another field than config.yml says \(.*Missing key"):
            Scene.load(run, device="cpu")
    (run / "config.yml").write_text(whole)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        Scene.load(run, device="cpu")
    path.unlink()
    with pytest.raises(UserError, match="has no step-"):
        Scene.load(run, device="cpu")


def test_no_memory_names_a_chunk(ball_scene, tmp_path, small_grid, monkeypatch):
    run = train(settings(ball_scene, tmp_path / "run", steps=2, semantic_weight=0.0, val_views=0))
    scene = Scene.load(run, device="cpu")

    def fail(camera):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(scene.model, "get_outputs_for_camera", fail)
    with pytest.raises(UserError, match="no memory for 4096 rays at once: use --chunk 1024"):
        scene.render(scene.training_views.cameras.camera_to_worlds[0])
    with pytest.raises(UserError, match="pose: transform_matrix"):
        scene.render(torch.zeros(4, 4))


@pytest.mark.slow
def test_two_processes(forks, tmp_path):
    data = write_scene(tmp_path / "scene", splits={"train": 4, "test": 3})
    arguments = [
        "train", str(data), "--out", str(tmp_path / "run"), "--steps", "3",
        "--rays", "32", "--devices", "2", "--strategy", "ddp", "--device", "cpu", "--no-progress", "--val-views", "3",
        "--semantic-weight", "0",
    ]  # fmt: skip
    code = "from dietnerf.cli import main\nraise SystemExit(main())"
    first, second = forks.run_ranks(code, *arguments, preload=("dietnerf.training",))
    scene = Scene.load(tmp_path / "run", device="cpu")
    assert scene.step == 2 and "run written to" in first.stdout and "run written to" not in second.stdout
    # Three views of two processes: the mean is over views.
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["metrics"]["val/psnr"] == pytest.approx(score_scene(scene).scores.values["psnr"], abs=1e-3)
