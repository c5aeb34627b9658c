"""All of space in a cube: the law, its inverse, and fields that march through it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("nerfstudio")

from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.spatial_distortions import SceneContraction

from dietnerf.contraction import Contraction
from dietnerf.grid import VoxelGrid
from dietnerf.regularizers import RegularizerConfig
from tests.dietnerf.fields import CONFIGS

BOX = torch.tensor([[-1.0, 2.0, 0.0], [3.0, 4.0, 1.0]])
META = {"planes": (0.1, 100.0), "unbounded": True, "background": "image"}


def test_it_is_nerfstudios_around_the_box(generator):
    """Inside as it is; outside 2 - 1 / |y|, which ends at 2: mip-NeRF 360, equation 10, in the maximum norm."""
    contraction, theirs = Contraction(BOX), SceneContraction(order=float("inf"))
    points = torch.randn(500, 3, generator=generator) * torch.logspace(-1, 3, 500)[:, None]
    assert torch.allclose(contraction(points), theirs((points - BOX.mean(0)) / ((BOX[1] - BOX[0]) / 2)), atol=1e-5)
    inside = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(100, 3, generator=generator)
    assert contraction(inside).abs().max() <= 1 + 1e-5
    assert torch.allclose(contraction(BOX), torch.tensor([[-1.0] * 3, [1.0] * 3]), atol=1e-6)
    assert contraction(1e9 * points).abs().max() == pytest.approx(2, abs=1e-4)
    assert torch.equal(contraction(BOX.mean(0)[None]), torch.zeros(1, 3))


def test_it_can_be_undone(generator):
    contraction = Contraction(BOX)
    points = torch.randn(500, 3, generator=generator) * torch.logspace(-1, 1.5, 500)[:, None]
    assert torch.allclose(contraction.inverse(contraction(points)), points, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(contraction.inverse(torch.tensor([[2.0, 2.0, -2.0]]))).all()


def grid_and_rays(number: int = 20):
    grid = VoxelGrid(BOX, (8,), 0, Contraction(BOX))
    origins = torch.tensor([[8.0, 3.0, 0.5]]).repeat(number, 1)
    targets = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(number, 3, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    return grid, origins, directions, torch.full((number, 1), 0.5), torch.full((number, 1), 200.0)


def test_the_grids_box_is_twice_the_scenes_and_its_voxels_are_cubes_inside():
    grid, *_ = grid_and_rays()
    assert torch.allclose(grid.aabb[1] / grid.unit, torch.tensor(2.0)) and torch.equal(grid.aabb[0], -grid.aabb[1])
    assert grid.unit.mean() == pytest.approx(1.5)
    step = 1e-2 * torch.eye(3)
    moved = grid.place(BOX.mean(0) + step) - grid.place(BOX.mean(0)[None])
    assert torch.allclose(moved, step * moved[0, 0] / 1e-2, atol=1e-6)


def test_samples_are_a_step_apart_in_the_grids_coordinates():
    grid, origins, directions, near, far = grid_and_rays()
    for step in (0.05, 0.2):
        found = grid.march(origins, directions, near, far, step, jitter=False).samples()
        places = grid.place(origins[found.ray] + found.middle[:, None] * directions[found.ray])
        same = found.ray[1:] == found.ray[:-1]
        apart = (places[1:] - places[:-1]).norm(dim=-1)[same]
        assert (apart <= 1.3 * step).all() and apart.mean() == pytest.approx(step, rel=0.05)
        assert (found.middle[1:] > found.middle[:-1])[same].all()
        assert (found.middle >= 0.5).all() and (found.middle <= 200).all()
        assert (found.slot[1:][same] - found.slot[:-1][same] == 1).all()
    inner = (places / grid.unit).abs().amax(dim=-1) < 0.9
    longest, shortest = 1 / (grid.unit / grid.contraction.reach).amin(), 1 / (grid.unit / grid.contraction.reach).amax()
    assert (found.stretch[inner] <= 1.05 * longest).all() and (found.stretch[inner] >= 0.95 * shortest).all()


def test_only_occupied_cells_have_samples():
    grid, origins, directions, near, far = grid_and_rays()
    every = grid.march(origins, directions, near, far, 0.1, jitter=False).samples()
    grid.occupied[32:] = False
    some = grid.march(origins, directions, near, far, 0.1, jitter=False).samples()
    places = grid.place(origins[some.ray] + some.middle[:, None] * directions[some.ray])
    assert 0 < len(some.ray) < len(every.ray) and (places[:, 0] < 0.1).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_reach_beyond_the_box(name):
    """A field with a contraction renders, with gradients, what a bounded one cannot see."""
    torch.manual_seed(0)
    box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    away = torch.nn.functional.normalize(torch.tensor([[0.0, 1.0, 0.0], [0.1, 1.0, 0.2]]), dim=-1)

    def rays() -> RayBundle:
        return RayBundle(
            origins=torch.tensor([[5.0, 3.0, 0.0]] * 2),
            directions=away,
            pixel_area=torch.ones(2, 1),
            camera_indices=torch.zeros(2, 1, dtype=torch.long),
        )

    model = CONFIGS[name].setup(scene_box=box, num_train_data=3, metadata=META).train()
    model.before_step(0)
    found = model(rays())
    assert (found["accumulation"] > 1e-4).all() and torch.isfinite(found["depth"]).all()
    used = found["samples"].ends > found["samples"].starts
    assert used.any() and (found["samples"].starts[used] >= 0.1 - 1e-3).all()
    found["rgb"].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.field.parameters())
    if name != "mlp":  # which has no box
        bounded = CONFIGS[name].setup(scene_box=box, num_train_data=3, metadata=META | {"unbounded": False}).eval()
        assert (bounded(rays())["accumulation"] < 1e-4).all()


def test_a_sample_on_the_near_plane_gives_no_nan(monkeypatch):
    """A ray's random offset may be 0, about once in 10 million rays: its first sample would have no length."""
    for drawn in (0.0, 1e-12, 1e-7):
        monkeypatch.setattr(torch, "rand_like", lambda like, drawn=drawn: torch.full_like(like, drawn))
        grid, origins, directions, near, far = grid_and_rays()
        found = grid.march(origins, directions, near, far, 0.1, jitter=True).samples()
        assert (found.slot == 0).sum() == len(origins) and found.stretch.min() > 1e-4 and (found.middle > 0.5).all()
        rays = RayBundle(origins, directions, torch.ones(20, 1), torch.zeros(20, 1, dtype=torch.long))
        model = CONFIGS["grid"].setup(scene_box=SceneBox(BOX), num_train_data=3, metadata=META).train()
        outputs = model(rays)
        outputs["rgb"].sum().backward()
        assert all(torch.isfinite(outputs[name]).all() for name in ("rgb", "depth", "accumulation"))
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_gradient_for_positions_is_that_of_autograd(generator):
    """The grid's own look-up, where poses are refined."""
    grid, *_ = grid_and_rays()
    with torch.no_grad():
        grid.colour_tables[0].copy_(torch.randn(grid.colour_tables[0].shape, generator=generator))
    points = (torch.rand(30, 3, generator=generator) - 0.5).requires_grad_()
    corners = grid.locate(points)
    grid.colour(corners, points).sum().backward()
    fast = points.grad.clone()
    points.grad = None
    corners = grid.locate(points)
    naive = (grid.colour_tables[0][corners.row] * corners.weight[..., None]).sum(dim=1)
    torch.sigmoid(naive).sum().backward()
    assert torch.allclose(fast, points.grad, atol=1e-5) and fast.abs().sum() > 0


def test_the_grid_of_a_capture_has_directions_and_compact_density():
    """Left to the method; what is asked for stands."""
    box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    own = replace(CONFIGS["grid"], harmonics=None, regularizers=RegularizerConfig(distortion=None))
    asked = replace(CONFIGS["grid"], harmonics=0, regularizers=RegularizerConfig(distortion=0.0))
    for unbounded, config, wanted in ((True, own, (1, 3e-3)), (False, own, (0, 0.0)), (True, asked, (0, 0.0))):
        config = replace(config)
        model = config.setup(scene_box=box, num_train_data=3, metadata=META | {"unbounded": unbounded})
        assert (model.field.harmonics, model.config.regularizers.distortion) == wanted
