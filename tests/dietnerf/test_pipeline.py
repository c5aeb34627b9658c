"""nerfstudio's front door: entry points, the pipeline's random view and restart, and ns-train, ns-eval, ns-render."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from common.checks import UserError
from common.runtime import RuntimeConfig
from dietnerf.methods import Decay, DecayConfig, method_config
from dietnerf.plugin import load_specification
from dietnerf.settings import changed, nerfstudio_config, train_config
from dietnerf.training import train

PYTHON = Path(sys.executable).parent


def tiny_pipeline(scene: Path, **settings):
    config = nerfstudio_config(train_config(scene=scene, num_views=4, rays=32, **settings))
    if config.method_name == "dietnerf-grid":
        config.pipeline.model.resolutions, config.pipeline.model.grow_at = (8, 12), (300,)
    if config.method_name == "dietnerf":
        config.pipeline.model.num_coarse_samples, config.pipeline.model.num_importance_samples = 16, 16
    pipeline = config.pipeline.setup(device="cpu", test_mode="val")
    pipeline.train()
    return pipeline


def test_entry_points_are_specifications():
    from nerfstudio.plugins.types import MethodSpecification

    found = {point.name: point for point in entry_points(group="nerfstudio.method_configs")}
    for name in ("dietnerf", "dietnerf-nerfacto", "dietnerf-grid"):
        specification = found[name].load()
        assert isinstance(specification, MethodSpecification) and specification.config.method_name == name


def test_what_is_broken_breaks_no_other_method(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dietnerf.methods", None)  # makes its import fail
    assert load_specification("dietnerf") is None
    assert "method 'dietnerf' is not available" in capsys.readouterr().err


def test_published_schedule():
    factor = Decay(DecayConfig()).factor
    assert factor(0) == 1 and factor(500_000) == pytest.approx(0.1) and factor(250_000) == pytest.approx(0.1**0.5)
    config = method_config("dietnerf")
    assert config.optimizers["fields"]["optimizer"].lr == 5e-4
    data, model = config.pipeline.datamanager, config.pipeline.model
    assert (data.train_num_rays_per_batch, data.rays_from, data.crop_steps, data.crop_fraction) == (
        1024,
        "one",
        500,
        0.5,
    )
    assert (model.semantic.weight, model.semantic.every, model.semantic.resolution) == (0.1, 10, 168)
    assert model.semantic.feature == "class_token" and model.semantic.poses == "published"
    assert (model.num_coarse_samples, model.num_importance_samples) == (64, 128)


def test_random_view_on_semantic_steps_alone(ball_scene, monkeypatch):
    pipeline = tiny_pipeline(ball_scene, semantic_weight=0.1, semantic_resolution=6, semantic_every=4)
    seen = []
    monkeypatch.setattr(
        "dietnerf.pipeline.compute_losses",
        lambda model, batch, step, generator: seen.append(batch) or {"rgb": torch.tensor(0.01)},
    )
    for step in range(6):
        _, _, metrics = pipeline.get_train_loss_dict(step)
    views = [batch["semantic_view"] for batch in seen]
    assert [view is not None for view in views] == [pipeline.model.needs_semantic_view(step) for step in range(6)]
    assert [view is not None for view in views].count(True) == 2
    shown = [view for view in views if view is not None]
    assert shown[0].origins.shape == (6, 6, 3) and not torch.equal(shown[0].origins, shown[1].origins)
    assert metrics["psnr"] == pytest.approx(20)
    again = tiny_pipeline(ball_scene, semantic_weight=0.1, semantic_resolution=6, semantic_every=4)
    again.get_train_loss_dict(4)
    assert torch.equal(seen[-1]["semantic_view"].origins, shown[1].origins)  # a function of seed and step alone


def test_random_background_and_patches_reach_the_losses(ball_scene, monkeypatch):
    pipeline = tiny_pipeline(ball_scene, background="random", depth_smoothness=0.1)
    seen = []
    monkeypatch.setattr(
        "dietnerf.pipeline.compute_losses",
        lambda model, batch, step, generator: seen.append(batch) or {"rgb": torch.tensor(0.01)},
    )
    for step in (3, 4, 3):
        pipeline.get_train_loss_dict(step)
    data = pipeline.datamanager
    view, row, column = data.next_train(3)[1]["indices"].unbind(-1)
    torch.testing.assert_close(seen[0]["alpha"], data.train_dataset.alphas[view, row, column])
    torch.testing.assert_close(seen[0]["rgb"], data.train_dataset.images[view, row, column])
    first, other, again = (batch["patches"].origins for batch in seen)
    assert first.shape == (8, 8, 8, 3) and torch.equal(first, again) and not torch.equal(first, other)
    assert pipeline.model.renderer_rgb.background_color == "white"
    with pytest.raises(UserError, match="no alpha"):
        photographs = nerfstudio_config(train_config(scene=ball_scene, num_views=4))
        photographs.pipeline.datamanager.dataparser.background = "image"
        photographs.pipeline.model.background_color = "random"
        photographs.pipeline.setup(device="cpu", test_mode="val")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lr"), [("grid", 0.1), ("nerfacto", 1e-2), ("mlp", 5e-4), ("mlp-small", 3e-3)])
def test_every_field_learns_given_rays(ball_scene, method, lr):
    pipeline = tiny_pipeline(ball_scene, method=method, semantic_weight=1e-3, semantic_resolution=4, semantic_every=5)
    groups = pipeline.model.get_param_groups()
    optimizer = torch.optim.Adam([p for group in groups.values() for p in group], lr=lr)
    same = pipeline.datamanager.next_train(0)
    pipeline.datamanager.next_train = lambda step: same
    errors = []
    for step in range(12):
        pipeline.model.before_step(step)
        _, losses, _ = pipeline.get_train_loss_dict(step)
        assert ("semantic" in losses) == pipeline.model.needs_semantic_view(step)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        errors.append(float(losses["rgb"]))
    assert sum(errors[-3:]) < sum(errors[:3])


def test_blank_field_starts_over_and_says_so(ball_scene, capsys):
    pipeline = tiny_pipeline(ball_scene)
    pipeline.config.blank_check = 2
    forgotten = []
    pipeline.on_restart = [lambda: forgotten.append(True)]
    with torch.no_grad():
        for table in pipeline.model.field.density_tables:
            table.fill_(-100)  # nothing anywhere
    assert pipeline.is_blank(2)
    before = [table.clone() for table in pipeline.model.field.density_tables]
    pipeline.get_train_loss_dict(1)
    assert pipeline.restarts == 0
    pipeline.get_train_loss_dict(2)
    assert pipeline.restarts == 1 and forgotten == [True]
    assert "the render is blank at step 2: starting over from seed 1" in capsys.readouterr().err
    assert not any(torch.equal(a, b) for a, b in zip(before, pipeline.model.field.density_tables, strict=True))
    pipeline.config.max_restarts = 1
    with torch.no_grad():
        for table in pipeline.model.field.density_tables:
            table.fill_(-100)
    with pytest.raises(UserError, match="still blank at step 4 after 1 restarts"):
        pipeline.get_train_loss_dict(4)


@pytest.mark.slow
def test_a_field_that_starts_over_late_learns(ball_scene, capsys):
    """At the default check the old field would count as settled, and a fresh one as empty."""
    pipeline = tiny_pipeline(ball_scene)
    model = pipeline.model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    with torch.no_grad():
        for table in model.field.density_tables:
            table.fill_(-100)
    for step in range(pipeline.config.blank_check, pipeline.config.blank_check + 60):
        model.before_step(step)
        losses = pipeline.get_train_loss_dict(step)[1]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if step == pipeline.config.blank_check:
            assert pipeline.restarts == 1 and model.began == step
            seen = model.field._seen()
            assert torch.equal(model.field.occupied, seen) and seen.float().mean() > 0.1
    assert not pipeline.is_blank(step) and pipeline.restarts == 1
    model.before_step(700)
    assert 0 < model.field.occupied.float().mean() < seen.float().mean()


def test_every_process_looks_at_the_same_rays_for_a_blank_render(ball_scene):
    pipeline, drawn = tiny_pipeline(ball_scene), []
    draw = pipeline.datamanager.draw
    pipeline.datamanager.draw = lambda step, rank: drawn.append(draw(step, rank)[1]["indices"]) or draw(step, rank)
    for rank in (0, 1):
        pipeline.local_rank = pipeline.datamanager.local_rank = rank
        pipeline.is_blank(7)
        pipeline.datamanager.next_train(7)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[1], drawn[3])


def test_the_published_sphere_is_for_blenders_layout(ball_scene, tmp_path):
    from tests.dietnerf.test_data import nerfstudio_scene

    for scene, poses in ((ball_scene, "published"), (nerfstudio_scene(tmp_path / "s", 5), "sphere")):
        pipeline = tiny_pipeline(
            scene, method="mlp", semantic_weight=0.1, semantic_resolution=4, semantic_poses="published"
        )
        pipeline.prepare()
        assert pipeline._sampler.config.poses == poses


def test_background_and_planes_follow_the_scene(ball_scene, tmp_path):
    from tests.dietnerf.test_data import nerfstudio_scene

    assert tiny_pipeline(ball_scene).model.config.background_color == "white"
    assert tiny_pipeline(ball_scene, background="black").model.config.background_color == "black"
    cut_out = tiny_pipeline(ball_scene, min_views=4)
    cut_out.model.before_step(0)
    assert not cut_out.model.field.occupied.all()  # corners of the box that not all four cameras see
    real = tiny_pipeline(nerfstudio_scene(tmp_path / "s", 5))
    real.model.before_step(0)
    assert real.model.field.occupied.all()  # a photograph has a background, which one camera may see alone
    assert real.model.config.background_color == "black" and real.model.near == 0.05
    assert tiny_pipeline(nerfstudio_scene(tmp_path / "s", 5), near=2.0, far=6.0).model.near == 2.0
    with pytest.raises(UserError, match="num_devices is 2"):
        config = nerfstudio_config(train_config(scene=ball_scene))
        config.pipeline.setup(device="cpu", test_mode="val", world_size=2)


@pytest.mark.slow
def test_the_silhouette_is_learnt_where_images_have_alpha(ball_scene, tmp_path):
    """On by default for the grid; photographs have none, and asking for it there is an error."""
    from tests.dietnerf.test_data import nerfstudio_scene

    scene = nerfstudio_scene(tmp_path / "s", 5)
    assert "silhouette" not in tiny_pipeline(scene).get_train_loss_dict(0)[1]
    with pytest.raises(UserError, match=r"silhouette is 0\.5 but the images have no alpha: leave it out"):
        train(train_config(scene=scene, out=tmp_path / "run", silhouette=0.5, runtime=RuntimeConfig(device="cpu")))
    wrong = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        pipeline = tiny_pipeline(ball_scene, silhouette=weight)
        optimizer = torch.optim.Adam(pipeline.model.parameters(), lr=0.3)
        for step in range(100):
            pipeline.model.before_step(step)
            losses = pipeline.get_train_loss_dict(step)[1]
            assert ("silhouette" in losses) == bool(weight)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        held_out = pipeline.datamanager.eval_dataset
        with torch.no_grad():
            found = pipeline.model.eval().get_outputs_for_camera(held_out.cameras[:1])["accumulation"]
        wrong[weight] = (found - held_out.load(0)[1]).abs().mean()
    assert wrong[1.0] < 0.8 * wrong[0.0], wrong


def run_command(name: str, *arguments: str, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [str(PYTHON / name), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def nerfstudio_run(tmp_path_factory, posed) -> Path:
    """Directory of a few steps of `ns-train dietnerf-grid` on photographs that `dietnerf pose` has posed."""
    if not (PYTHON / "ns-train").exists():
        pytest.skip("ns-train is not installed")
    place = tmp_path_factory.mktemp("ns")
    model = "--pipeline.model"
    run_command(
        "ns-train", "dietnerf-grid", "--data", str(posed.scene), "--output-dir", str(place), "--vis", "tensorboard",
        "--machine.device-type", "cpu", "--max-num-iterations", "12", "--pipeline.datamanager.dataparser.image-size", "16",
        "--pipeline.datamanager.dataparser.num-views", "4", "--pipeline.datamanager.train-num-rays-per-batch", "128",
        f"{model}.resolutions", "8", "12", f"{model}.grow-at", "5", f"{model}.semantic.weight", "0.01",
        f"{model}.semantic.resolution", "8", "--timestamp", "now", cwd=place,
    )  # fmt: skip
    return place / "scene/dietnerf-grid/now"


@pytest.mark.slow
def test_ns_train_eval_and_render(nerfstudio_run, tmp_path):
    assert [path.name for path in (nerfstudio_run / "nerfstudio_models").iterdir()] == ["step-000000011.ckpt"]
    config = str(nerfstudio_run / "config.yml")
    run_command("ns-eval", "--load-config", config, "--output-path", str(tmp_path / "scores.json"), cwd=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert 3 < scores["psnr"] < 40 and 0 < scores["ssim"] <= 1
    run_command(
        "ns-render", "dataset", "--load-config", config, "--output-path", str(tmp_path / "frames"),
        "--rendered-output-names", "rgb", "--image-format", "png", cwd=tmp_path,
    )  # fmt: skip
    assert len(list((tmp_path / "frames").rglob("*.png"))) == 4


def test_semantic_text_and_priors_reach_the_model(ball_scene):
    config = nerfstudio_config(
        train_config(scene=ball_scene, semantic_text="a ball", occlusion=0.5, semantic_hinge=True, near=1.0, far=9.0)
    )
    model = config.pipeline.model
    assert model.semantic.text == "a ball" and model.regularizers.occlusion == 0.5 and model.semantic.hinge
    assert (
        model.regularizers.density_variation
        == method_config("dietnerf-grid").pipeline.model.regularizers.density_variation
    )
    assert (model.near, model.far) == (1.0, 9.0)
    with pytest.raises(UserError, match="near is 3.0 and far is 2.0"):
        nerfstudio_config(changed(train_config(scene=ball_scene), near=3.0, far=2.0))


def test_the_crop_stretches_with_the_steps(ball_scene):
    for steps, crop in ((200_000, 500), (20_000, 50), (0, 500)):
        run = nerfstudio_config(train_config(scene=ball_scene, method="mlp", steps=steps))
        assert run.pipeline.datamanager.crop_steps == crop


def test_levels_of_the_grid_are_spread_over_the_same_steps(ball_scene):
    model = nerfstudio_config(
        train_config(scene=ball_scene, steps=2000, resolutions=(8, 12, 16, 24), harmonics=2)
    ).pipeline.model
    assert model.resolutions == (8, 12, 16, 24) and model.harmonics == 2
    usual = nerfstudio_config(train_config(scene=ball_scene, steps=2000)).pipeline.model
    assert (
        model.grow_at[-1] == usual.grow_at[-1]
        and len(model.grow_at) == 3
        and list(model.grow_at) == sorted(model.grow_at)
    )
    assert nerfstudio_config(train_config(scene=ball_scene, resolutions=(20,))).pipeline.model.grow_at == ()
    with pytest.raises(UserError, match=r"^resolutions: of the grid only, but method is 'nerfacto'; leave it out\.$"):
        nerfstudio_config(train_config(scene=ball_scene, method="nerfacto", resolutions=(8, 12)))


def test_bands_and_activation_are_the_mlps(ball_scene):
    asked = dict(position_bands=3, density_activation="relu")
    model = nerfstudio_config(train_config(scene=ball_scene, method="mlp-small", **asked)).pipeline.model
    assert (model.position_bands, model.density_activation) == (3, "relu")
    own = nerfstudio_config(train_config(scene=ball_scene, method="mlp-small")).pipeline.model
    assert (own.position_bands, own.density_activation) == (5, "softplus")
    with pytest.raises(UserError, match="^position_bands and density_activation: of the MLPs only"):
        nerfstudio_config(train_config(scene=ball_scene, method="grid", **asked))
