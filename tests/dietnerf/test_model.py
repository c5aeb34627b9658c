from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import Frustums, RayBundle, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.model_components.ray_samplers import PDFSampler
from nerfstudio.model_components.renderers import AccumulationRenderer, DepthRenderer, RGBRenderer
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError
from dietnerf.grid import DietGridModelConfig
from dietnerf.mlp import SKIP_LAYER, DietNeRFModelConfig, PublishedField, encode, simplified_nerf_config
from dietnerf.model import FewViewModel
from dietnerf.poses import pose_spherical
from dietnerf.regularizers import RegularizerConfig
from tests.dietnerf.fields import CONFIGS


def make(config) -> FewViewModel:
    torch.manual_seed(0)
    return config.setup(scene_box=SceneBox(torch.tensor([[-1.5] * 3, [1.5] * 3])), num_train_data=3)


def camera(size=6) -> Cameras:
    pose = pose_spherical(30, -30, 4)[None, :3]
    return Cameras(pose, fx=1.2 * size, fy=1.2 * size, cx=size / 2, cy=size / 2, width=size, height=size)


def rays(size=6) -> RayBundle:
    return camera(size).generate_rays(camera_indices=0, keep_shape=True)


# The original's numbers, with nerfstudio's parts


def test_rays_are_the_originals_without_the_half_pixel(golden):
    pose = golden["pose_spherical.c2w"][0, :3]
    view = Cameras(
        pose[None],
        fx=555.555,
        fy=555.555,
        cx=200.0,
        cy=200.0,
        width=400,
        height=400,
        camera_type=CameraType.PERSPECTIVE,
    )
    corners = view.get_image_coords(pixel_offset=0.0)
    bundle = view.generate_rays(camera_indices=0, coords=corners)
    directions = bundle.directions * bundle.metadata["directions_norm"]  # nerfstudio's have unit length
    torch.testing.assert_close(
        directions[[0, 199, 399]], golden["get_rays.directions_rows0_199_399"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        bundle.origins[0, 0], golden["get_rays.400x400_f555.555.origins_first"], atol=1e-4, rtol=0
    )
    spread = torch.linspace(0, 399, 168)
    coords = torch.stack(torch.meshgrid(spread, spread, indexing="ij"), dim=-1)
    bundle = view.generate_rays(camera_indices=0, coords=coords)
    directions = bundle.directions * bundle.metadata["directions_norm"]
    torch.testing.assert_close(directions, golden["get_rays.168x168.directions"], atol=1e-4, rtol=0)


def original_encoding_order(num_bands: int) -> Tensor:
    """Which column of `encode` each column of the original's encoding is.

    The original's layout is x, then for each band sin of the three axes and cos of the three axes.
    """
    index = torch.arange(6 * num_bands).view(2, 3, num_bands)  # sine or cosine, axis, band
    return torch.cat([6 * num_bands + torch.arange(3), index.permute(2, 0, 1).flatten()])


def load_original_mlp(field: PublishedField, state: dict[str, Tensor]) -> None:
    """Put an original `NeRF` module's state dict into the field, its columns brought into our layout."""
    position = original_encoding_order(field.position_encoding.num_frequencies)
    own = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        value = value.clone()
        if name.startswith("pts_linears."):
            layer = int(name.rpartition(".")[2])
            name = f"mlp_base.layers.{layer}"
            if kind == "weight" and layer in (0, SKIP_LAYER):  # the encoded position comes first
                value[:, position] = state[key][:, : len(position)]
        elif name == "views_linears.0":
            name = "mlp_head.layers.0"
            if kind == "weight" and field.direction_encoding is not None:
                direction = original_encoding_order(field.direction_encoding.num_frequencies)
                width = value.shape[1] - len(direction)
                value[:, width + direction] = state[key][:, width:]
        else:
            renamed = {"rgb_linear": "mlp_head.layers.1", "alpha_linear": "density", "feature_linear": "feature"}
            name = renamed[name]
        own[f"{name}.{kind}"] = value
    field.load_state_dict(own, strict=True)


def test_positional_encoding_is_the_originals_but_for_the_order_of_its_columns(golden):
    field = PublishedField()
    found = encode(field.position_encoding, golden["positional_encoding.x"])
    torch.testing.assert_close(
        found[:, original_encoding_order(10)], golden["positional_encoding.L10"], atol=1e-4, rtol=0
    )


def test_mlp_is_the_originals(golden):
    field = PublishedField(layer_width=32)
    state = {key.removeprefix("nerf_mlp.state_dict."): value for key, value in golden.items() if "state_dict" in key}
    load_original_mlp(field, state)
    position, direction = golden["nerf_mlp.input"].split([63, 27], dim=-1)
    ours = torch.empty_like(position), torch.empty_like(direction)
    ours[0][:, original_encoding_order(10)] = position
    ours[1][:, original_encoding_order(4)] = direction
    field.activate = lambda raw: raw
    density, hidden = field.raw_density(ours[0])
    found = torch.cat([field.raw_colour(hidden, ours[1]), density], dim=-1)
    torch.testing.assert_close(found, golden["nerf_mlp.output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("background", ["black", "white"])
def test_compositing_is_the_originals(golden, background):
    raw, z, directions = (golden[f"volume_render.{name}"] for name in ("raw", "z_vals", "rays_d"))
    expected = {
        key.rpartition(".")[2]: value
        for key, value in golden.items()
        if key.startswith(f"volume_render.white{int(background == 'white')}.")
    }
    steps = torch.cat([z[:, 1:] - z[:, :-1], torch.full_like(z[:, :1], 1e10)], dim=1)
    deltas = (steps * directions.norm(dim=-1, keepdim=True))[..., None]
    points = z[..., None]
    frustums = Frustums(
        origins=points.expand(-1, -1, 3),
        directions=points.expand(-1, -1, 3),
        starts=points,
        ends=points,
        pixel_area=points,
    )
    samples = RaySamples(frustums=frustums, deltas=deltas)
    weights = samples.get_weights(F.relu(raw[..., 3:]))
    torch.testing.assert_close(weights[..., 0], expected["weights"], atol=1e-4, rtol=0)
    rgb = RGBRenderer(background_color=background)(rgb=torch.sigmoid(raw[..., :3]), weights=weights)
    torch.testing.assert_close(rgb, expected["rgb"], atol=1e-4, rtol=0)
    accumulation = AccumulationRenderer()(weights=weights)[:, 0]
    torch.testing.assert_close(accumulation, expected["accumulation"], atol=1e-4, rtol=0)
    seen = accumulation > 0
    depth = DepthRenderer("expected")(weights=weights, ray_samples=samples)[:, 0]  # the original's is not divided
    torch.testing.assert_close((depth * accumulation)[seen], expected["depth"][seen], atol=1e-4, rtol=0)
    torch.testing.assert_close(1 / depth[seen], expected["disparity"][seen], atol=1e-4, rtol=0)


def naive_sample_pdf(bins, weights, u):
    """Inverse transform sampling, one number at a time."""
    probability = (weights + 1e-5) / (weights + 1e-5).sum(dim=-1, keepdim=True)
    found = torch.empty(len(bins), len(u))
    for row in range(len(bins)):
        edges = [0.0, *probability[row].cumsum(0).tolist()]
        for column, value in enumerate(u.tolist()):
            bin_index = max(i for i in range(len(edges)) if edges[i] <= value)
            low, high = min(bin_index, len(edges) - 1), min(bin_index + 1, len(edges) - 1)
            width = edges[high] - edges[low]
            share = (value - edges[low]) / (width if width > 1e-5 else 1.0)
            found[row, column] = bins[row, low] + share * (bins[row, high] - bins[row, low])
    return found


def test_pdf_sampling_is_the_originals_but_for_where_its_numbers_lie(golden):
    """The original's are spread over [0, 1] with both ends, nerfstudio's are middles of equal parts."""
    bins, weights = golden["sample_pdf.bins"], golden["sample_pdf.weights"]
    torch.testing.assert_close(
        naive_sample_pdf(bins, weights, torch.linspace(0, 1, 24)),
        golden["sample_pdf.samples_det_24"],
        atol=1e-4,
        rtol=0,
    )
    bundle = RayBundle(torch.zeros(32, 3), torch.zeros(32, 3), torch.zeros(32, 1), nears=bins[:, :1], fars=bins[:, -1:])
    samples = bundle.get_ray_samples(
        bins[:, :-1, None], bins[:, 1:, None], bins[:, :-1, None], bins[:, 1:, None], lambda s: s
    )
    sampler = PDFSampler(num_samples=23, train_stratified=False, include_original=False, histogram_padding=1e-5)
    found = sampler(bundle, samples, weights[..., None])
    edges = torch.cat([found.frustums.starts[..., 0], found.frustums.ends[:, -1:, 0]], dim=1)
    torch.testing.assert_close(edges, naive_sample_pdf(bins, weights, (torch.arange(24) + 0.5) / 24), atol=1e-4, rtol=0)


# Our models


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_have_shapes_and_gradients_and_chunks_do_not_matter(name):
    model = make(CONFIGS[name]).train()
    model.before_step(0)
    bundle = rays()
    outputs = model(rays().flatten())
    assert outputs["rgb"].shape == (36, 3) and outputs["accumulation"].shape == outputs["depth"].shape == (36, 1)
    assert ("rgb_coarse" in outputs) == (name == "mlp")
    samples = outputs["samples"]
    assert samples.density.shape == samples.weights.shape == samples.starts.shape == samples.ends.shape
    assert (samples.weights.sum(dim=1) <= 1 + 1e-5).all() and (samples.ends >= samples.starts).all()
    outputs["rgb"].square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_param_groups()["fields"])
    model.eval()
    whole, parts = model.render_view(bundle, chunk=36), model.render_view(bundle, chunk=7)
    assert whole["rgb"].shape == (6, 6, 3)
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole["rgb"], model.get_outputs_for_camera(camera())["rgb"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_a_chunked_render_are_those_of_the_whole(name):
    model = make(CONFIGS[name]).eval()  # no jitter: chunks draw other numbers
    parameters = model.get_param_groups()["fields"]
    gradients = []
    for chunk in (36, 5):
        model.zero_grad()
        model.render_view(rays(), chunk)["rgb"].square().sum().backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    assert gradients[0]
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_render_with_jitter_survives_checkpointing(name):
    model = make(CONFIGS[name]).train()
    model.before_step(600)  # past the warm-up of proposals
    model.render_view(rays(), 10)["rgb"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_checkpointing_knows_the_device_whose_random_state_it_restores(monkeypatch):
    """Jitter that were redrawn in the backward pass would give other samples: torch looks at tensors alone."""
    from torch.utils.checkpoint import get_device_states

    seen = []

    def spy(function, *arguments, **options):
        seen.append([a.device for a in arguments if isinstance(a, torch.Tensor)])
        get_device_states(*arguments)
        return function(*arguments)

    monkeypatch.setattr("dietnerf.model.checkpoint", spy)
    make(CONFIGS["grid"]).train().render_view(rays(), 20)
    assert seen == [[torch.device("cpu")]] * 2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("background, value", [("white", 1.0), ("black", 0.0)])
def test_where_there_is_nothing_the_background_shows(name, background, value):
    model = make(replace(CONFIGS[name], background_color=background)).eval()
    away = camera().generate_rays(camera_indices=0, keep_shape=True).flatten()
    away.directions = -away.directions
    away.origins = away.origins * 3
    outputs = model(away)
    if name != "mlp":  # bounded by their box
        assert outputs["accumulation"].max() < 1e-4
        torch.testing.assert_close(outputs["rgb"], torch.full((36, 3), value), atol=1e-3, rtol=0)
    assert ((0 <= outputs["rgb"]) & (outputs["rgb"] <= 1)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_state_goes_through_a_checkpoint(name):
    model = make(CONFIGS[name]).train()
    for step in range(5):
        model.before_step(step)  # the grid grows at 3
        model(rays().flatten())["rgb"].mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= p.grad
                    p.grad = None
    other = make(CONFIGS[name]).eval()
    other.load_state_dict(model.state_dict())
    other.update_to_step(4)
    model.eval()
    torch.testing.assert_close(
        model.get_outputs_for_camera(camera())["rgb"], other.get_outputs_for_camera(camera())["rgb"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_learns_a_red_ball(name):
    torch.manual_seed(0)
    model = make(CONFIGS[name]).train()
    bundle = rays(16).flatten()
    along = -(bundle.origins * bundle.directions).sum(-1)
    inside = bundle.origins.square().sum(-1) - along**2 < 1.0
    target = torch.where(inside[:, None], torch.tensor([0.9, 0.1, 0.1]), torch.ones(3))
    rate = 5e-3 if name == "mlp" else 3e-2 if name == "nerfacto" else 0.1
    optimizer = torch.optim.Adam([p for group in model.get_param_groups().values() for p in group], lr=rate)
    errors = []
    for step in range(60):
        model.before_step(step)
        outputs = model(rays(16).flatten())
        loss = F.mse_loss(outputs["rgb"], target)
        total = loss + sum(model.field_losses(outputs).values())
        if "rgb_coarse" in outputs:
            total = total + F.mse_loss(outputs["rgb_coarse"], target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.2 * errors[0], (errors[0], errors[-1])


@pytest.mark.parametrize("name", ["mlp", "nerfacto"])
def test_the_frequency_mask_hides_detail_at_first(name):
    config = replace(CONFIGS[name], regularizers=RegularizerConfig(frequency_steps=100))
    model = make(config).eval()
    if name == "nerfacto":
        with torch.no_grad():
            model.field.mlp_base.model[0].hash_table.normal_()
    renders = []
    for step in (0, 50, 100):
        model.before_step(step)
        renders.append(model.get_outputs_for_camera(camera())["rgb"])
    assert (renders[0] - renders[2]).abs().max() > 1e-5 and (renders[1] - renders[2]).abs().max() > 1e-5
    plain = make(CONFIGS[name]).eval()
    plain.load_state_dict(model.state_dict())
    plain.before_step(100)
    torch.testing.assert_close(plain.get_outputs_for_camera(camera())["rgb"], renders[2])
    if name == "nerfacto":
        model.before_step(0)
        assert model.level_mask.tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_chosen_planes_hold_in_training_and_in_renders(name):
    outside = RayBundle(torch.tensor([[-4.0, 0.1, 0.1]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 1))
    model = make(replace(CONFIGS[name], near=3.0, far=4.5))
    for training in (True, False):
        found = model.train(training).collider(replace(outside))
        assert (float(found.nears), float(found.fars)) == (3.0, 4.5)
    behind = make(replace(CONFIGS[name], near=6.0, far=7.0)).eval().collider(replace(outside))
    assert float(behind.nears) == 6 and float(behind.fars) == pytest.approx(6 if name != "mlp" else 7, abs=1e-4)
    model = make(CONFIGS[name])
    assert (model.near, model.far) == (2.0, 6.0)
    for training, entry in ((True, 2.0), (False, 0.5)):  # a box is entered where it begins
        close = RayBundle(torch.tensor([[-2.0, 0.1, 0.1]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 1))
        found = model.train(training).collider(close)
        expected = (2.0, 6.0) if name == "mlp" else (entry, 3.5)
        assert (float(found.nears), float(found.fars)) == pytest.approx(expected, abs=1e-4)


def test_published_and_simplified_sizes():
    published = make(DietNeRFModelConfig())
    count = sum(p.numel() for p in published.field_fine.parameters())
    assert count == 595_844  # the original's with 63 and 27 inputs
    simple = make(simplified_nerf_config())
    assert simple.field_fine is None and simple.field.position_mask.numel() == 39
    assert make(replace(CONFIGS["mlp"], use_view_directions=False)).field.direction_encoding is None


def test_without_view_directions_colour_is_the_same_from_all_sides():
    model = make(replace(CONFIGS["mlp"], use_view_directions=False)).eval()
    from nerfstudio.field_components.field_heads import FieldHeadNames

    from dietnerf.model import point_samples

    points = torch.rand(5, 3)
    seen = [
        model.field(point_samples(points, F.normalize(torch.randn(5, 3), dim=-1)))[FieldHeadNames.RGB] for _ in range(2)
    ]
    assert torch.equal(*seen)


def test_metrics_need_nothing_downloaded():
    model = make(CONFIGS["grid"]).eval()
    outputs = model.get_outputs_for_camera(camera(16))
    metrics, images = model.get_image_metrics_and_images(outputs, {"image": outputs["rgb"]})
    assert metrics["psnr"] == math.inf and metrics["ssim"] == pytest.approx(1.0, abs=1e-4)
    assert images["img"].shape == (16, 32, 3)
    assert not any("lpips" in name.lower() for name, _ in model.named_modules())
    mask = torch.ones_like(outputs["accumulation"], dtype=torch.bool)
    mask[0] = False
    truth = torch.where(mask, outputs["rgb"], 1 - outputs["rgb"])
    masked, _ = model.get_image_metrics_and_images(outputs, {"image": truth, "mask": mask})
    assert masked == metrics != model.get_image_metrics_and_images(outputs, {"image": truth})[0]


@pytest.mark.parametrize(
    "config, message",
    [
        (DietGridModelConfig(resolutions=(8, 16), grow_at=()), "grow_at"),
        (DietGridModelConfig(regularizers=RegularizerConfig(frequency_steps=5)), "frequency_steps"),
        (DietGridModelConfig(regularizers=RegularizerConfig(occlusion=-1.0)), "occlusion is -1.0"),
        (DietNeRFModelConfig(near=3.0, far=2.0), "far is 2.0"),
        (DietNeRFModelConfig(position_bands=0), "position_bands is 0"),
        (DietNeRFModelConfig(background_color="green"), "background_color is 'green'"),
        (DietGridModelConfig(harmonics=7), "harmonics is 7"),
    ],
)
def test_bad_settings_are_named(config, message):
    with pytest.raises(UserError, match=message):
        make(config)


def test_no_memory_for_a_chunk_suggests_a_size(monkeypatch):
    model = make(CONFIGS["grid"])
    monkeypatch.setattr(
        model, "_visible_outputs", lambda *rays: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(UserError, match="no memory for a chunk of 8 rays: use 2"):
        model.render_view(rays(), 8)
