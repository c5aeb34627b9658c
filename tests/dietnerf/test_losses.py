from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox

from common.checks import UserError
from dietnerf.losses import balance, compute_losses, reconstruction_losses
from dietnerf.poses import pose_spherical
from dietnerf.rays import PATCH, patch_rays
from dietnerf.regularizers import RegularizerConfig
from dietnerf.semantic import SemanticConfig, ViewSampler
from tests.dietnerf.fields import CONFIGS

POSES = torch.stack([pose_spherical(theta, -30, 4)[:3] for theta in (0, 60, 120)])
CAMERAS = Cameras(POSES, fx=10.0, fy=10.0, cx=4.0, cy=4.0, width=8, height=8)


def make(name, **changes):
    torch.manual_seed(0)
    config = replace(CONFIGS[name], **changes)
    return config.setup(scene_box=SceneBox(torch.tensor([[-1.5] * 3, [1.5] * 3])), num_train_data=3).train()


def batch(channels=3):
    rays = CAMERAS.generate_rays(camera_indices=1, keep_shape=True).flatten()
    return {"ray_bundle": rays, "rgb": torch.rand(64, channels, generator=torch.Generator().manual_seed(1))}


BASE = {"mlp": {"rgb", "rgb_coarse"}, "nerfacto": {"rgb", "interlevel"}, "grid": {"rgb"}}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "regularizer, term",
    [
        ("occlusion", "occlusion"),
        ("density_variation", "density_variation"),
        ("colour_variation", "colour_variation"),
        ("distortion", "distortion"),
    ],
)
def test_every_regularizer_acts_alone_on_every_field_and_scales_with_its_weight(name, regularizer, term):
    values = []
    for weight in (1e-2, 2e-2):
        model = make(name, regularizers=RegularizerConfig(**{regularizer: weight}, occlusion_distance=3.0))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))  # a flat field has no variation
        torch.manual_seed(5)
        losses = compute_losses(model, batch(), 0)
        assert set(losses) == BASE[name] | {term}
        values.append(float(losses[term].detach()))
    losses[term].backward()
    gradients = [p.grad for group in model.get_param_groups().values() for p in group if p.grad is not None]
    assert any(g.abs().sum() > 0 for g in gradients)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert values[1] == pytest.approx(2 * values[0], rel=1e-4)
    assert values[0] > 0


def test_total_variation_weighs_less_the_more_views_there_are():
    losses = []
    for views in (3, 12):
        torch.manual_seed(0)
        config = replace(CONFIGS["grid"], regularizers=RegularizerConfig(density_variation=1.0, colour_variation=1.0))
        model = config.setup(scene_box=SceneBox(torch.tensor([[-1.5] * 3, [1.5] * 3])), num_train_data=views).train()
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        losses.append(compute_losses(model, batch(), 0))
    for name in ("density_variation", "colour_variation"):
        assert float(losses[0][name].detach()) == pytest.approx(4 * float(losses[1][name].detach()), rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_rgb_is_the_mean_squared_error(name):
    model = make(name)
    torch.manual_seed(5)
    losses = compute_losses(model, batch(), 1)
    assert set(losses) == BASE[name]
    torch.manual_seed(5)
    expected = (model(batch()["ray_bundle"])["rgb"] - batch()["rgb"]).square().mean()
    torch.testing.assert_close(losses["rgb"], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_depth_smoothness_acts_alone_on_every_field_and_scales_with_its_weight(name):
    poses = torch.stack([pose_spherical(theta, -50, 4)[:3] for theta in (20, 80)])
    patches, values = patch_rays(CAMERAS, poses, torch.Generator().manual_seed(0)), []
    for weight in (1e-2, 2e-2):
        model = make(name, regularizers=RegularizerConfig(depth_smoothness=weight))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        torch.manual_seed(5)
        losses = compute_losses(model, {**batch(), "patches": patches}, 0)
        assert set(losses) == BASE[name] | {"depth_smoothness"}
        values.append(float(losses["depth_smoothness"]))
    losses["depth_smoothness"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_param_groups()["fields"])
    assert values[1] == pytest.approx(2 * values[0], rel=1e-4) and values[0] > 0
    with pytest.raises(UserError, match="no patches"):
        compute_losses(model, batch(), 0)


def test_patches_are_neighbouring_pixels_of_the_cameras_frame():
    poses = POSES[:2]
    rays = patch_rays(CAMERAS, poses, torch.Generator().manual_seed(0))
    assert rays.origins.shape == (2, PATCH, PATCH, 3)
    for number in range(2):  # the frame is as large as the patch, so all of it is seen
        frame = CAMERAS.generate_rays(camera_indices=number, keep_shape=True)
        torch.testing.assert_close(rays.directions[number], frame.directions)
        torch.testing.assert_close(rays.origins[number], frame.origins)


def test_a_random_background_teaches_opacity():
    """Alpha is right and the colour too, whatever the background: only then is the loss zero for all draws."""
    model = make("grid", background_color="random")
    outputs = {"rgb": torch.rand(9, 3), "accumulation": torch.rand(9, 1)}
    found = reconstruction_losses(model, outputs, outputs["rgb"], outputs["accumulation"])
    assert found["rgb"] < 1e-12
    white = reconstruction_losses(
        model, {**outputs, "accumulation": torch.ones(9, 1)}, outputs["rgb"], torch.zeros(9, 1)
    )
    assert white["rgb"] > 0.05  # an opaque white wall in place of nothing
    with pytest.raises(UserError, match="no alpha"):
        reconstruction_losses(model, outputs, outputs["rgb"])
    empty = torch.zeros(1, 2, 1)
    assert (model.renderer_rgb(rgb=torch.zeros(1, 2, 3), weights=empty) == 1).all()  # renders stay white


@pytest.mark.parametrize("name", CONFIGS)
def test_the_silhouette_is_the_squared_difference_of_opacity_and_alpha(name):
    model, given = make(name, regularizers=RegularizerConfig(silhouette=0.5)), batch(4)
    torch.manual_seed(5)
    losses = compute_losses(model, given, 0)
    terms = {"silhouette", "silhouette_coarse"} if name == "mlp" else {"silhouette"}
    assert {term for term in losses if term.startswith("silhouette")} == terms
    torch.manual_seed(5)
    opacity = model(given["ray_bundle"])["accumulation"]
    torch.testing.assert_close(losses["silhouette"], 0.5 * (opacity - given["rgb"][:, 3:]).square().mean())
    apart = given | {"rgb": given["rgb"][:, :3], "alpha": given["rgb"][:, 3:]}
    torch.manual_seed(5)
    torch.testing.assert_close(compute_losses(model, apart, 0)["silhouette"], losses["silhouette"])
    assert not any(n.startswith("silhouette") for n in compute_losses(model, batch(), 0))  # no alpha, no truth


def test_alpha_is_blended_over_the_background():
    model, given = make("grid"), batch(4)
    torch.manual_seed(5)
    losses = compute_losses(model, given, 1)
    blended = given["rgb"][:, :3] * given["rgb"][:, 3:] + 1 - given["rgb"][:, 3:]
    torch.manual_seed(5)
    expected = (model(batch()["ray_bundle"])["rgb"] - blended).square().mean()
    torch.testing.assert_close(losses["rgb"], expected)
    random = make("grid", background_color="random")
    assert torch.isfinite(compute_losses(random, given, 1)["rgb"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_semantic_loss_comes_on_its_steps_for_coarse_and_fine(name):
    semantic = SemanticConfig(weight=0.1, every=5, end=10, resolution=8, chunk=20)
    model = make(name, semantic=semantic)
    model.set_semantic_targets(torch.rand(3, 3, 8, 8))
    view = ViewSampler(semantic, CAMERAS)(torch.Generator().manual_seed(0))
    assert [model.needs_semantic_view(step) for step in (0, 1, 5, 10)] == [True, False, True, False]
    losses = compute_losses(model, {**batch(), "semantic_view": view}, 5)
    terms = {"semantic", "semantic_coarse"} if name == "mlp" else {"semantic"}
    assert set(losses) == BASE[name] | terms
    assert all(abs(float(losses[term])) <= 0.1 + 1e-5 for term in terms)
    sum(losses[term] for term in terms).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_param_groups()["fields"])
    assert not any("semantic" in key for key in model.state_dict())
    assert set(compute_losses(model, batch(), 10)) == BASE[name]


def gradient_norm(model, losses):
    found = torch.autograd.grad(sum(losses), model.get_param_groups()["fields"], retain_graph=True, allow_unused=True)
    return float(torch.cat([gradient.flatten() for gradient in found if gradient is not None]).norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_balanced_semantic_weight_is_the_ratio_of_gradients_whatever_the_feature(name):
    found = []
    for weight, feature in ((0.5, "embedding"), (2.0, "class_token")):
        semantic = SemanticConfig(weight=weight, balance=True, resolution=8, chunk=20, feature=feature)
        model = make(name, semantic=semantic)
        model.set_semantic_targets(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)))
        view = ViewSampler(semantic, CAMERAS)(torch.Generator().manual_seed(0))
        torch.manual_seed(5)
        losses = compute_losses(model, {**batch(), "semantic_view": view}, 0)
        images = [losses[term] for term in ("rgb", "rgb_coarse") if term in losses]
        terms = [losses[term] for term in ("semantic", "semantic_coarse") if term in losses]
        found.append(gradient_norm(model, images))
        assert gradient_norm(model, terms) == pytest.approx(weight * found[-1], rel=1e-3)
        sum(losses.values()).backward()  # the graph is still whole
    assert found[0] == found[1] > 0


def test_balance_scales_nothing_where_the_hinge_is_reached():
    semantic = SemanticConfig(weight=1.0, balance=True, resolution=8)
    model = make("grid", semantic=semantic)
    parameter = model.get_param_groups()["fields"][0]
    flat = {"semantic": (0 * parameter).sum()}
    assert balance(model, [parameter.sum()], flat) == 0


def test_a_semantic_step_without_view_or_targets_is_named():
    model = make("grid", semantic=SemanticConfig(weight=0.1, resolution=8))
    with pytest.raises(UserError, match="semantic_view"):
        compute_losses(model, batch(), 0)
    view = ViewSampler(model.config.semantic, CAMERAS)()
    with pytest.raises(UserError, match="set_semantic_targets"):
        compute_losses(model, {**batch(), "semantic_view": view}, 0)


def test_distortion_and_occlusion_of_the_grid_know_where_samples_are():
    """Packed samples: unused slots have no weight and no length."""
    model = make("grid")
    samples = model(batch()["ray_bundle"])["samples"]
    unused = samples.ends == samples.starts
    assert (samples.weights[unused] == 0).all() and (samples.density[unused] == 0).all()
    used = ~unused
    assert (samples.starts[used] >= model.near - 0.2).all()


@pytest.mark.parametrize("name", ["nerfacto", "grid"])
def test_occlusion_is_of_what_is_first_in_the_box_however_far_the_near_plane(name):
    losses = {}
    for near in (0.1, 1.0):
        torch.manual_seed(0)
        model = make(name, near=near, regularizers=RegularizerConfig(occlusion=1.0, occlusion_distance=0.5))
        torch.manual_seed(0)
        losses[near] = float(compute_losses(model, batch(), 0)["occlusion"])
    assert losses[0.1] == losses[1.0] > 0


def test_occlusion_spares_the_surface_in_a_cropped_box():
    """A box that is cropped to the thing begins at its surface, which is not near the camera."""
    losses = []
    for side in (1.0, 0.3):
        model = make("grid", regularizers=RegularizerConfig(occlusion=1.0, occlusion_distance=0.5))
        model.field.aabb.mul_(side)
        losses.append(float(compute_losses(model, batch(), 0)["occlusion"]))
    assert losses[0] > 0 and losses[1] == 0


def test_nerfstudios_own_loss_dict_has_the_same_terms():
    model = make("mlp", regularizers=RegularizerConfig(distortion=1e-3))
    given = batch()
    torch.manual_seed(5)
    ours = compute_losses(model, given, 1)
    torch.manual_seed(5)
    theirs = model.get_loss_dict(model(batch()["ray_bundle"]), {"image": given["rgb"]})
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])
