"""What photographs bring beside their pixels: depths of sparse points, exposures, poses that are a little off."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("nerfstudio")

from common.runtime import RuntimeConfig
from dietnerf.appearance import Appearance
from dietnerf.evaluation import EvaluateConfig, evaluate
from dietnerf.metrics import overfitted
from dietnerf.regularizers import SMALLEST_WEIGHT, point_depth_loss
from dietnerf.scene import Scene
from dietnerf.settings import train_config
from dietnerf.training import train
from tests.dietnerf.posed import write_capture
from tests.dietnerf.test_data import nerfstudio_scene, read
from tests.dietnerf.test_pipeline import tiny_pipeline


def samples(generator, rays=5, number=40, first=1.0, last=5.0):
    edges = first + (last - first) * torch.rand(rays, number + 1, generator=generator).sort(dim=1).values
    weights = torch.rand(rays, number, generator=generator)
    return weights / weights.sum(dim=1, keepdim=True), edges[:, :-1], edges[:, 1:]


def test_the_depth_loss_is_the_papers_sum(generator):
    """Deng et al. 2022, equation 7, ray by ray and sample by sample."""
    weights, starts, ends = samples(generator)
    depth, confidence = 2 + torch.rand(5, generator=generator), torch.rand(5, generator=generator)
    total = 0.0
    for r in range(5):
        middles = (starts[r] + ends[r]) / 2
        nearest = int((middles - depth[r]).abs().argmin())
        spread = max(0.01 * float(depth[r]), float(ends[r][nearest] - starts[r][nearest]))
        for k in range(40):
            density = (
                math.exp(-0.5 * ((float(middles[k]) - float(depth[r])) / spread) ** 2) / spread / math.sqrt(2 * math.pi)
            )
            length = float(ends[r, k] - starts[r, k])
            total -= float(confidence[r]) * math.log(float(weights[r, k]) + SMALLEST_WEIGHT) * density * length
    assert float(point_depth_loss(weights, starts, ends, depth, confidence)) == pytest.approx(total / 5, rel=1e-4)


def test_the_depth_loss_is_least_where_rays_end_at_their_points():
    edges = torch.linspace(1, 5, 401)
    starts, ends = edges[None, :-1], edges[None, 1:]
    middles, depth, one = (starts + ends) / 2, torch.tensor([3.0]), torch.ones(1)

    def at(place: float) -> float:
        weights = torch.exp(-0.5 * ((middles - place) / 0.03) ** 2)
        return float(point_depth_loss(weights / weights.sum(), starts, ends, depth, one))

    assert at(3.0) < at(3.1) < at(3.3) and at(3.0) < at(2.9) < at(2.7)
    weights = torch.full_like(middles, 1 / 400)
    assert at(3.0) < float(point_depth_loss(weights, starts, ends, depth, one))
    assert float(point_depth_loss(weights, starts, ends, depth, 0 * one)) == 0
    skipped = torch.where((middles - 3).abs() < 0.5, 0.0, 1.0)  # space around the point that is not sampled
    assert float(point_depth_loss(weights, starts, starts + skipped * (ends - starts), depth, one)) < 1e-6


def test_rays_go_to_points_that_their_photographs_see(tmp_path):
    pipeline = tiny_pipeline(write_capture(tmp_path / "s"))
    dataset = pipeline.datamanager.train_dataset
    assert len(dataset) == 4 and len(dataset.observed) == 4
    found = pipeline.datamanager.draw_points(7, 0)
    assert len(found.rays) == 4 and found.depth.shape == (4,)
    for ray in range(4):
        view = int(found.rays.camera_indices[ray])
        target = found.rays.origins[ray] + found.depth[ray] * found.rays.directions[ray]
        positions, confidence = dataset.observed[view]
        nearest = (positions - target).norm(dim=1).argmin()
        assert torch.allclose(positions[nearest], target, atol=1e-5) and found.confidence[ray] == confidence[nearest]
        assert torch.equal(found.rays.origins[ray], dataset.cameras.camera_to_worlds[view, :, 3])
    again, other = pipeline.datamanager.draw_points(7, 0), pipeline.datamanager.draw_points(8, 0)
    assert torch.equal(found.depth, again.depth) and not torch.equal(found.depth, other.depth)


def test_depths_are_learnt_where_points_are_and_only_there(tmp_path, ball_scene):
    scene = write_capture(tmp_path / "s")
    assert tiny_pipeline(scene).get_train_loss_dict(0)[1]["depth"] > 0
    assert "depth" not in tiny_pipeline(scene, depth=0.0).get_train_loss_dict(0)[1]
    assert "depth" not in tiny_pipeline(write_capture(tmp_path / "t", tracks=False)).get_train_loss_dict(0)[1]
    assert "depth" not in tiny_pipeline(nerfstudio_scene(tmp_path / "u", 5)).get_train_loss_dict(0)[1]
    assert "depth" not in tiny_pipeline(ball_scene).get_train_loss_dict(0)[1]


def test_the_depth_loss_moves_what_is_rendered_to_the_points(tmp_path):
    wrong = {}
    scene = write_capture(tmp_path / "s")
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        pipeline = tiny_pipeline(scene, depth=weight)
        optimizer = torch.optim.Adam(pipeline.model.field.parameters(), lr=0.3)
        for step in range(40):
            pipeline.model.before_step(step)
            losses = pipeline.get_train_loss_dict(step)[1]
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        points = [pipeline.datamanager.draw_points(1000 + i, 0) for i in range(20)]
        with torch.no_grad():
            pipeline.model.eval()
            found = [(pipeline.model(one.rays)["depth"][:, 0] - one.depth).abs() for one in points]
        wrong[weight] = torch.cat(found).median()
    assert wrong[0.1] < 0.5 * wrong[0.0], wrong


def test_exposures_are_relative_to_the_mean():
    appearance = Appearance(3)
    rgb = torch.rand(6, 3)
    photographs = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.equal(appearance(rgb, photographs), rgb)
    with torch.no_grad():
        appearance.log_gain.copy_(torch.tensor([[0.3] * 3, [0.0] * 3, [0.6] * 3]))
        appearance.offset.copy_(torch.tensor([[0.1] * 3, [0.1] * 3, [0.1] * 3]))
    found = appearance(rgb, photographs)
    assert torch.allclose(found[:2], rgb[:2], atol=1e-6)  # that of the mean
    assert torch.allclose(found[2:4], rgb[2:4] * math.exp(-0.3), atol=1e-6)
    assert torch.allclose(found[4:], rgb[4:] * math.exp(0.3), atol=1e-6)


def test_exposures_are_learnt_from_photographs_that_differ(tmp_path, ball_scene):
    pipeline = tiny_pipeline(write_capture(tmp_path / "s", gains=True))
    assert tiny_pipeline(ball_scene).model.appearance is None
    assert tiny_pipeline(nerfstudio_scene(tmp_path / "t", 5), appearance="off").model.appearance is None
    model, ids = pipeline.model, list(pipeline.datamanager.train_dataset.view_ids)
    groups = model.get_param_groups()
    assert set(groups) == {"fields", "appearance"} and len(groups["appearance"]) == 2
    optimizer = torch.optim.Adam(
        [{"params": groups["fields"], "lr": 0.3}, {"params": groups["appearance"], "lr": 0.02}]
    )
    for step in range(60):
        model.before_step(step)
        losses = pipeline.get_train_loss_dict(step)[1]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    gain = model.appearance.log_gain.mean(dim=1) + 2 * model.appearance.offset.mean(dim=1)
    assert np.corrcoef(ids, gain.detach().numpy())[0, 1] < -0.8  # the later, the darker


@pytest.mark.slow
def test_poses_are_refined_towards_the_truth(tmp_path, ball_scene):
    """One camera of a capture is turned; the field is that of the true poses."""
    assert tiny_pipeline(ball_scene).model.camera_optimizer is None
    torch.manual_seed(0)
    pipeline = tiny_pipeline(write_capture(tmp_path / "s"), refine_poses=True, depth=0.0, appearance="off")
    pipeline.config.datamanager.train_num_rays_per_batch = 256
    model = pipeline.model
    optimizer = torch.optim.Adam(model.field.parameters(), lr=0.3)
    for step in range(150):
        model.before_step(step)
        loss = sum(pipeline.get_train_loss_dict(step)[1].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.camera_optimizer.pose_adjustment.grad.abs().sum() > 0
    pose = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[1]

    def target() -> torch.Tensor:
        """What camera 1 looks at, at the distance of the ball, where the optimizer has it."""
        found = model.camera_optimizer(torch.tensor([1]))[0].detach()
        return pose[:, 3] + found[:, 3] - found[:, :3] @ pose[:, 2]

    truth = target()
    with torch.no_grad():
        model.camera_optimizer.pose_adjustment[1] += torch.tensor([0.0, 0.0, 0.06, 0.0, 0.0, 0.1])
    before = (target() - truth).norm()
    optimizer = torch.optim.Adam(model.camera_optimizer.parameters(), lr=2e-3)
    for step in range(150, 230):
        loss = sum(pipeline.get_train_loss_dict(step)[1].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 0.1 and (target() - truth).norm() < 0.5 * before
    assert set(model.get_param_groups()) == {"fields", "camera_opt"}
    model.eval()
    camera = pipeline.datamanager.eval_dataset.cameras[:1]
    assert torch.isfinite(model.get_outputs_for_camera(camera)["rgb"]).all()


def test_a_wide_gap_is_said():
    assert overfitted(26.0, 20.5) is None and overfitted(20.0, 26.5) is None and overfitted(math.nan, 20.0) is None
    said = overfitted(26.54, 20.0)
    assert said.startswith("PSNR is 26.5 on training views but 20.0 on held-out ones: add photographs")


def test_a_run_scores_what_it_holds_out_and_says_a_wide_gap(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dietnerf.metrics.WIDEST_GAP", -100.0)
    scene, out = write_capture(tmp_path / "s", count=7), tmp_path / "run"
    options = dict(hold_out=3, steps=4, rays=32, resolutions=(8,), progress=False, refine_poses=True)
    train(train_config(scene, out=out, **options, runtime=RuntimeConfig(device="cpu")))
    said = capsys.readouterr().err
    assert said.count("on held-out ones: add photographs") == 1
    record = evaluate(EvaluateConfig(out, device="cpu"))
    assert record["scored"] == "held-out views" and record["held_out_from"] == "one photograph of 3"
    assert len(record["per_view"]) == 2 and 0 < record["training_psnr"] < 60
    assert "on held-out ones: add photographs" in capsys.readouterr().err
    opened = Scene.load(out, device="cpu")
    names = {path.stem for path in opened.held_out_views.image_filenames}
    assert names == {"f1", "f4"} and opened.holds_views_out
    assert set(opened.model.get_param_groups()) == {"fields", "appearance", "camera_opt"}


def test_photographs_whose_cameras_look_away_are_said(tmp_path, capsys):
    import json

    scene = write_capture(tmp_path / "s")
    assert read(scene) and "look away" not in capsys.readouterr().err
    meta = json.loads((scene / "transforms.json").read_text())
    for frame in meta["frames"]:
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1])).tolist()
    (scene / "transforms.json").write_text(json.dumps(meta))
    read(scene)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "multiply their second and third column by -1" in said
