"""Samples along rays: block by block as one by one, and what is rendered of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("nerfstudio")

from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox

from dietnerf.contraction import Contraction
from dietnerf.grid import DietGridModelConfig, VoxelGrid
from dietnerf.marching import CELLS, order_within, weights_of
from dietnerf.model import BoxCollider

BOX = torch.tensor([[-1.0, -2.0, 0.0], [1.0, 2.0, 1.5]])
FLAT = torch.tensor([[-5.0, -5.0, 0.0], [5.0, 5.0, 0.05]])
META = {"planes": (0.1, 100.0), "unbounded": True, "background": "image"}


def rays_at(box: torch.Tensor, number: int = 40) -> RayBundle:
    """Half of them through the box, half anywhere."""
    generator = torch.Generator().manual_seed(0)
    origins = 4 * torch.randn(number, 3, generator=generator)
    ways = torch.randn(number, 3, generator=generator)
    half = number // 2
    ways[:half] = box[0] + (box[1] - box[0]) * torch.rand(half, 3, generator=generator) - origins[:half]
    directions = torch.nn.functional.normalize(ways, dim=-1)
    return RayBundle(origins, directions, torch.ones(number, 1), torch.zeros(number, 1, dtype=torch.long))


def cell_of(grid: VoxelGrid, points: torch.Tensor) -> torch.Tensor:
    return (points - grid.aabb[0]) * (CELLS / (grid.aabb[1] - grid.aabb[0]))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 1.0])
@pytest.mark.parametrize("box", [BOX, FLAT], ids=["box", "flat"])
def test_by_blocks_no_sample_is_lost_and_none_is_added(box, share, generator):
    grid = VoxelGrid(box, (8,))
    grid.occupied.copy_(torch.rand(CELLS, CELLS, CELLS, generator=generator) < share)
    rays = BoxCollider(SceneBox(box), 0.0, (None, None))(rays_at(box))
    some = False
    for step in (0.01, 0.3):
        found = grid.march(rays.origins, rays.directions, rays.nears, rays.fars, step, jitter=False).samples()
        expected = []
        for ray, (near, far) in enumerate(zip(rays.nears[:, 0], rays.fars[:, 0], strict=True)):
            if far > near + 1e-4:
                middle = near + (torch.arange(int((far - near) / step) + 2) + 0.5) * step
                start, slope = cell_of(grid, rays.origins[ray]), cell_of(grid, grid.aabb[0] + rays.directions[ray])
                places = torch.addcmul(start, middle[:, None], slope)
                x, y, z = places.int().clamp(0, CELLS - 1).long().unbind(-1)
                kept = grid.occupied[x, y, z] & (middle < far)
                expected += [(ray, distance) for distance in middle[kept].tolist()]
        assert found.ray.tolist() == [ray for ray, _ in expected]
        torch.testing.assert_close(found.middle, torch.tensor([distance for _, distance in expected]))
        some |= bool(expected)
    assert some if share > 0.01 else some <= (share > 0)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_by_blocks_no_sample_of_a_curved_ray_is_lost(share, generator):
    grid = VoxelGrid(BOX, (8,), 0, Contraction(BOX))
    rays, near, far = rays_at(BOX), torch.full((40, 1), 0.1), torch.full((40, 1), 50.0)
    every = grid.march(rays.origins, rays.directions, near, far, 0.05, jitter=False).samples()
    places = cell_of(grid, grid.place(rays.origins[every.ray] + every.middle[:, None] * rays.directions[every.ray]))
    grid.occupied.copy_(torch.rand(CELLS, CELLS, CELLS, generator=generator) < share)
    some = grid.march(rays.origins, rays.directions, near, far, 0.05, jitter=False).samples()
    x, y, z = places.long().clamp(0, CELLS - 1).unbind(-1)
    kept = grid.occupied[x, y, z]
    # Chords are nearly the curve: a cell's border may lie between.
    names = [set(zip(m.ray.tolist(), m.middle.tolist(), strict=True)) for m in (every, some)]
    assert names[1] <= names[0]
    assert abs(len(names[1]) - int(kept.sum())) <= 0.05 * len(names[0])
    assert (len(names[1]) == len(names[0])) == (share == 1)


def test_blocks_in_turn_are_all_samples():
    grid = VoxelGrid(BOX, (8,))
    rays = BoxCollider(SceneBox(BOX), 0.0, (None, None))(rays_at(BOX))
    march = grid.march(rays.origins, rays.directions, rays.nears, rays.fars, 0.02, jitter=False)
    parts = [march.samples(first, last) for first, last in ((0, 1), (1, 4), (4, None))]
    pairs = sorted((r, m) for part in parts for r, m in zip(part.ray.tolist(), part.middle.tolist(), strict=True))
    whole = march.samples()
    assert pairs == list(zip(whole.ray.tolist(), whole.middle.tolist(), strict=True))
    wanted = torch.arange(40) % 2 == 0
    assert set(march.samples(0, 1, wanted).ray.tolist()) == {r for r in parts[0].ray.tolist() if r % 2 == 0}


def test_order_within_groups():
    assert order_within(torch.tensor([0, 0, 3, 3, 3, 7])).tolist() == [0, 1, 0, 1, 2, 0]
    assert order_within(torch.zeros(0, dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("scale", [0.0, 0.3, 50.0])
def test_weights_are_light_times_opacity(scale, generator):
    """Also where rays have no sample, and behind a million times what a ray lets through."""
    ray = torch.tensor([0, 0, 0, 2, 2, 4])
    optical = (scale * torch.rand(6, generator=generator)).requires_grad_()
    clear = torch.tensor([1.0, 0.5, 0.25, 1.0, 1.0])
    weights, left = weights_of(optical, ray, clear)
    light, naive = clear.clone(), []
    for number, thickness in zip(ray.tolist(), optical, strict=True):
        naive.append(light[number] * (1 - torch.exp(-thickness)))
        light = torch.cat([light[:number], (light[number] * torch.exp(-thickness))[None], light[number + 1 :]])
    torch.testing.assert_close(weights, torch.stack(naive), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(left, light)
    target = torch.randn(6, generator=generator)
    slopes = [
        torch.autograd.grad((w * target).sum(), optical, retain_graph=True)[0] for w in (weights, torch.stack(naive))
    ]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("metadata", "harmonics"), [({}, 0), ({}, 1), (META, 2)], ids=["box", "harmonics", "contracted"]
)
@pytest.mark.parametrize("density", [-50.0, 0.0, 6.0, 60.0])
def test_a_render_is_the_naive_sum_along_each_ray(metadata, harmonics, density, generator):
    """Whether rays stop early or not, in empty space, in fog and behind walls, with rays that miss the box."""
    config = DietGridModelConfig(resolutions=(8, 12), grow_at=(3,), harmonics=harmonics)
    model = config.setup(scene_box=SceneBox(BOX), num_train_data=3, metadata=metadata).eval()
    grid = model.field
    with torch.no_grad():
        for table in grid.colour_tables:
            table.normal_(generator=generator)
        grid.density_tables[0].fill_(density).add_(torch.randn(8**3, 1, generator=generator))
        found = model(rays_at(BOX))
        rays = model.collider(rays_at(BOX))
        step = grid.voxel.mean().item() / config.steps_per_voxel
        marched = grid.march(rays.origins, rays.directions, rays.nears, rays.fars, step, jitter=False).samples()
        points = rays.origins[marched.ray] + marched.middle[:, None] * rays.directions[marched.ray]
        corners = grid.locate(grid.place(points))
        thickness = step * grid.density(corners)
        colour = grid.colour(corners, rays.directions[marched.ray])
        background = 0.0 if metadata else 1.0
        for ray in range(len(rays)):
            own = (marched.ray == ray).nonzero()[:, 0]
            through = torch.cat([torch.zeros(1), thickness[own].cumsum(0)])
            weights = torch.exp(-through[:-1]) * (1 - torch.exp(-thickness[own]))
            opacity, sky = weights.sum(), torch.full((3,), background)
            if metadata:
                end = grid.place((rays.origins + rays.fars * rays.directions)[ray, None])
                sky = grid.colour(grid.locate(end), rays.directions[ray, None])[0]
            rgb = (weights[:, None] * colour[own]).sum(0) + (1 - opacity) * sky
            assert (found["rgb"][ray] - rgb).abs().max() < 5e-4
            assert abs(found["accumulation"][ray, 0] - opacity) < 2e-4
            depth = (weights * marched.middle[own]).sum() + (1 - opacity) * model.far
            assert abs(found["depth"][ray, 0] - depth) < 2e-4 * model.far
    if not metadata:
        assert (found["accumulation"] == 0).any()


def test_in_training_samples_lie_in_a_table_as_the_rays_have_them():
    config = DietGridModelConfig(resolutions=(8, 12), grow_at=(3,))
    model = config.setup(scene_box=SceneBox(BOX), num_train_data=3).train()
    outputs = model(rays_at(BOX))
    samples = outputs["samples"]
    torch.testing.assert_close(samples.weights.sum(dim=1, keepdim=True), outputs["accumulation"])
    used = samples.ends > samples.starts
    assert (used.int().diff(dim=1) <= 0).all() and used.any() and not used.all()  # what is used comes first
    assert (samples.density[~used] == 0).all() and (samples.weights[~used] == 0).all()
    middles = (samples.starts + samples.ends) / 2
    torch.testing.assert_close(
        model.far + (samples.weights * (middles - model.far)).sum(dim=1, keepdim=True), outputs["depth"]
    )


def test_a_step_sums_the_levels_once_for_all_its_renders():
    config = DietGridModelConfig(resolutions=(6, 8), grow_at=(3,))
    model = config.setup(scene_box=SceneBox(BOX), num_train_data=3).train()
    grid = model.field
    values = grid.values()
    assert grid.values() is values
    model(rays_at(BOX))["rgb"].sum().backward()
    assert grid.values() is not values  # a graph is walked once
    values = grid.values()
    with torch.no_grad():
        assert grid.values() is not values
    before = grid.values().density.detach().clone()
    torch.optim.Adam(model.parameters(), fused=True).step()  # of the gradient above
    assert not torch.equal(grid.values().density, before)
