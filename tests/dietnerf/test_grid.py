from __future__ import annotations

import itertools

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox

from dietnerf.grid import CELLS, DietGridModelConfig, VoxelGrid, vertices_along, views_of
from dietnerf.interpolation import interpolate, refine, trilinear_weights
from dietnerf.poses import pose_spherical
from dietnerf.regularizers import total_variation

BOX = torch.tensor([[-1.0, -2.0, 0.0], [1.0, 2.0, 1.5]])


def random_grid(resolutions=(8, 12), harmonics=0) -> VoxelGrid:
    torch.manual_seed(0)
    grid = VoxelGrid(BOX, resolutions, harmonics)
    with torch.no_grad():
        for table in [*grid.density_tables, *grid.colour_tables]:
            table.normal_()
    return grid


def naive_lookup(grid, table, point):
    """Trilinear interpolation by its definition: each vertex weighs by how near it is along every axis."""
    x, y, z = grid.sizes.tolist()
    values = table.detach()[: x * y * z].view(x, y, z, -1)
    scaled = [float((point[a] - grid.aabb[0, a]) / grid.voxel[a]) for a in range(3)]
    total = 0
    for i, j, k in itertools.product(range(x), range(y), range(z)):
        weight = max(0.0, 1 - abs(scaled[0] - i)) * max(0.0, 1 - abs(scaled[1] - j)) * max(0.0, 1 - abs(scaled[2] - k))
        total = total + weight * values[i, j, k]
    return total


def test_look_up_is_trilinear(generator):
    grid = random_grid()
    points = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(6, 3, generator=generator)
    points = torch.cat([points, BOX])  # the corners of the box belong to it
    found = interpolate(grid.colour_tables[0], grid.locate(points))
    for row, point in zip(found, points, strict=True):
        torch.testing.assert_close(row, naive_lookup(grid, grid.colour_tables[0], point), atol=1e-4, rtol=0)


@pytest.mark.parametrize("harmonics", [0, 1])
def test_gradient_of_the_look_up_is_embedding_bags(generator, harmonics):
    grid = random_grid(harmonics=harmonics)
    corners = grid.locate(BOX[0] + (BOX[1] - BOX[0]) * torch.rand(40, 3, generator=generator))
    table = grid.colour_tables[0]
    target = torch.randn(40, table.shape[1], generator=generator)
    (fast,) = torch.autograd.grad((interpolate(table, corners) * target).sum(), table)
    naive = (table[corners.row.long()] * corners.weight[..., None]).sum(dim=1)
    (slow,) = torch.autograd.grad((naive * target).sum(), table)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert fast.dtype == table.dtype


def test_voxels_are_nearly_cubes_and_fit_their_table():
    for extent in ([1.0, 1.0, 1.0], [1.0, 2.0, 0.5], [10.0, 0.01, 0.01]):
        sizes = vertices_along(torch.tensor(extent), 20)
        assert sizes.prod() <= 20**3 and sizes.min() >= 2
    assert vertices_along(torch.tensor([1.0, 2.0, 0.5]), 20).tolist() == [20, 40, 10]


def test_weights_of_corners_are_exact_at_the_vertices_and_sum_to_one(generator):
    vertices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    assert torch.equal(trilinear_weights(vertices.T), torch.eye(8))  # no vertex far away gets a gradient
    weights = trilinear_weights(torch.rand(3, 50, generator=generator))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(50))


@pytest.mark.parametrize("channels", [1, 2, 12])
def test_refining_is_trilinear_from_end_to_end(generator, channels):
    coarse = torch.randn(4, 3, 5, channels, generator=generator, dtype=torch.float64, requires_grad=True)
    sizes = (9, 7, 6)
    found = refine(coarse, sizes)
    whole = torch.nn.functional.interpolate(
        coarse.permute(3, 0, 1, 2)[None], sizes, mode="trilinear", align_corners=True
    )[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(found, whole)
    target = torch.randn(*sizes, channels, generator=generator, dtype=torch.float64)
    slopes = [torch.autograd.grad((values * target).sum(), coarse)[0] for values in (refine(coarse, sizes), whole)]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(refine(coarse, (4, 3, 5)), coarse)  # the same vertices
    own = torch.randn(*sizes, channels, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(refine(coarse, sizes, own), own + whole)
    assert torch.equal(torch.autograd.grad((refine(coarse, sizes, own) * target).sum(), own)[0], target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(refine(coarse.float(), sizes), found.float())


def test_values_are_the_sum_of_the_levels(generator):
    grid = random_grid((5, 7, 9))
    grid.level.fill_(2)
    grid.sizes.copy_(vertices_along(BOX[1] - BOX[0], 9))
    vertices = torch.cartesian_prod(
        *(torch.linspace(*ends, n) for ends, n in zip(BOX.T, grid.sizes.tolist(), strict=True))
    )
    values = grid.values()
    assert len(values.density) == len(values.colour) == len(vertices)

    def naive(tables, number, point):
        """The level's own value, and below it that of the vertices of the level before, which surround the point."""
        sizes = vertices_along(BOX[1] - BOX[0], grid.resolutions[number])
        x, y, z = sizes.tolist()
        scaled = (point - BOX[0]) / (BOX[1] - BOX[0]) * (sizes - 1)
        total = 0
        for i, j, k in itertools.product(range(x), range(y), range(z)):
            weight = (1 - (scaled - torch.tensor([i, j, k])).abs()).clamp(min=0).prod()
            if weight > 1e-6:
                vertex = BOX[0] + torch.tensor([i, j, k]) / (sizes - 1) * (BOX[1] - BOX[0])
                below = naive(tables, number - 1, vertex) if number else 0
                total = total + weight * (tables[number][(i * y + j) * z + k].detach() + below)
        return total

    for place in torch.randint(len(vertices), (12,), generator=generator).tolist():
        for found, tables in zip(values, (grid.density_tables, grid.colour_tables), strict=True):
            torch.testing.assert_close(found[place].detach(), naive(tables, 2, vertices[place]), atol=1e-4, rtol=0)


def test_values_are_kept_without_gradients_until_the_grid_changes():
    grid = random_grid((6, 8, 10))
    with torch.no_grad():
        grid.density_tables[0].abs_()
    grid.grow(crop=False)
    assert grid.values().density.requires_grad
    grid.eval()
    with torch.no_grad():
        kept = grid.values()
        assert grid.values() is kept
        assert grid.density(grid.locate(BOX)).shape == (2,)
    assert grid.values().density.requires_grad
    grid.train()
    with torch.no_grad():
        grid.density_tables[1] += 1
        grid.eval()
        torch.testing.assert_close(grid.values().density, kept.density + 1)
        other = VoxelGrid(BOX, (6, 8, 10)).eval()
        assert other.values().density.abs().max() == 0
        other.load_state_dict(grid.state_dict())
        assert torch.equal(other.values().density, grid.values().density)
        before = grid.density(grid.locate(BOX))
        grid.grow(crop=False)
        torch.testing.assert_close(grid.density(grid.locate(BOX)), before, atol=1e-3, rtol=1e-4)


def test_a_state_from_before_levels_were_summed_is_the_same_field():
    grid = random_grid((6, 8))
    grid.grow(crop=False)
    with torch.no_grad():
        own = grid.density_tables[1].clone()
        state = {name: value.clone() for name, value in grid.state_dict().items() if name != "summed"}
        state["density_tables.0"].normal_()  # what the first level was when the grid grew out of it
        other = VoxelGrid(BOX, (6, 8))
        other.load_state_dict(state)
        assert torch.equal(other.values().density, own[: len(other.values().density)])
        other.load_state_dict(grid.state_dict() | {"density_tables.0": torch.ones(6**3, 1)})
        torch.testing.assert_close(other.values().density, own[: len(other.values().density)] + 1)


def test_every_level_up_to_the_present_one_learns():
    grid = random_grid((5, 7, 9))
    grid.grow(crop=False)
    corners = grid.locate(BOX.mean(dim=0)[None])
    (grid.density(corners).sum() + grid.colour(corners, BOX[:1]).sum()).backward()
    for tables in (grid.density_tables, grid.colour_tables):
        assert [table.grad is not None and bool(table.grad.any()) for table in tables] == [True, True, False]


def test_growing_keeps_the_field():
    """A field that is linear in space survives exactly; every finer vertex lies on it."""
    grid = VoxelGrid(BOX, (8, 12), 0)
    lines = [torch.linspace(*ends, count) for ends, count in zip(BOX.T, grid.sizes.tolist(), strict=True)]
    vertices = torch.cartesian_prod(*lines)
    slope = torch.tensor([1.0, -0.5, 0.7])
    with torch.no_grad():
        grid.density_tables[0][: len(vertices), 0] = vertices @ slope + 8  # dense everywhere, so the box stays
        grid.colour_tables[0][: len(vertices)] = (vertices @ slope)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    points = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(30, 3)
    corners, coarse = grid.locate(points), grid.voxel.clone()
    before = grid.density(corners).detach(), grid.colour(corners, points).detach()
    grid.grow()
    assert grid.level == 1 and (grid.voxel < coarse).all()
    torch.testing.assert_close(grid.aabb, BOX)
    corners = grid.locate(points)
    torch.testing.assert_close(grid.density(corners), before[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(grid.colour(corners, points), before[1], atol=1e-4, rtol=0)


def test_growing_crops_the_box_to_what_is_occupied_and_marching_skips_the_rest():
    grid = VoxelGrid(torch.tensor([[-1.0] * 3, [1.0] * 3]), (32, 40))
    with torch.no_grad():
        line = torch.linspace(-1, 1, 32)
        distance = torch.cartesian_prod(line, line, line).norm(dim=1, keepdim=True)
        grid.density_tables[0].copy_(torch.where(distance < 0.4, 8.0, -8.0))
    grid.grow()
    assert grid.aabb.abs().max() < 0.6 and grid.aabb.abs().min() > 0.35
    assert 0.2 < grid.occupied.float().mean() < 0.95
    origins, directions = torch.tensor([[-4.0, 0.0, 0.0], [-4.0, 3.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]] * 2)
    near, far = torch.tensor([[3.4], [3.4]]), torch.tensor([[4.6], [3.4]])  # the second misses
    marched = grid.march(origins, directions, near, far, 0.01, jitter=False).samples()
    assert (marched.ray == 0).all() and marched.slot.tolist() == list(range(len(marched.slot)))
    assert marched.middle.min() < 3.65 and marched.middle.max() > 4.35
    assert (marched.middle.diff() > 0).all()
    inside = origins[0] + marched.middle[:, None] * directions[0]
    cell = ((inside - grid.aabb[0]) / (grid.aabb[1] - grid.aabb[0]) * CELLS).long().clamp(0, CELLS - 1)
    assert grid.occupied[cell[:, 0], cell[:, 1], cell[:, 2]].all()


def test_an_empty_grid_keeps_its_box():
    grid = VoxelGrid(BOX, (8, 12))
    with torch.no_grad():
        grid.density_tables[0].fill_(-20.0)
    grid.grow()
    torch.testing.assert_close(grid.aabb, BOX)
    ray = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 1), torch.ones(1, 1)
    grid.update_occupancy()
    assert grid.occupied.all() and len(
        grid.march(*ray, 0.1, jitter=True).samples().ray
    )  # or it could never learn again
    grid.occupied.fill_(False)
    nothing = grid.march(*ray, 0.1, jitter=True).samples()
    assert len(nothing.ray) == 0


def test_where_no_two_cameras_see_the_same_all_may_be_occupied():
    cameras, grid = two_cameras(), random_grid()
    poses = cameras.camera_to_worlds.clone()
    poses[1] = poses[0]
    poses[1, :, :3] *= torch.tensor([-1.0, 1.0, -1.0])  # the other way
    grid.keep_to(Cameras(poses, fx=30.0, fy=24.0, cx=11.0, cy=5.0, width=20, height=12), 2)
    for settled in (False, True):
        grid.update_occupancy(settled=settled)
        assert grid.occupied.any()


def test_variation_is_that_of_the_whole_grid_on_average():
    grid = random_grid((16, 20))
    x, y, z = grid.sizes.tolist()
    whole = total_variation(grid.density_tables[0].detach()[: x * y * z].view(x, y, z, 1), grid.voxel)
    found = torch.stack([grid.variation()[0].detach() for _ in range(60)]).mean()
    assert found == pytest.approx(whole.item(), rel=0.05)


def test_harmonics_make_colour_depend_on_the_direction():
    points = torch.zeros(2, 3) + 0.5
    directions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    plain, harmonic = random_grid(), random_grid(harmonics=2)
    colours = plain.colour(plain.locate(points), directions)
    assert torch.equal(colours[0], colours[1])
    colours = harmonic.colour(harmonic.locate(points), directions)
    assert (colours[0] - colours[1]).abs().max() > 1e-3
    assert harmonic.colour_tables[0].shape[1] == 27


def two_cameras() -> Cameras:
    """From the side and from above, 20 x 12 pixels."""
    poses = torch.stack([pose_spherical(30, 0, 4)[:3], pose_spherical(120, -80, 3)[:3]])
    return Cameras(poses, fx=30.0, fy=24.0, cx=11.0, cy=5.0, width=20, height=12)


@pytest.mark.parametrize("number", [0, 1])
def test_a_camera_sees_what_lies_on_its_rays(number):
    cameras = two_cameras()
    own = cameras[number : number + 1]
    rays = cameras.generate_rays(camera_indices=number, keep_shape=True).flatten()
    assert (views_of(rays.origins + 2.5 * rays.directions, own) == 1).all()
    assert (views_of(rays.origins - 2.5 * rays.directions, own) == 0).all()
    for corner, seen in (
        ((0.1, 0.1), 1),
        ((11.9, 19.9), 1),
        ((-0.1, 5.0), 0),
        ((12.1, 5.0), 0),
        ((5.0, 20.1), 0),
        ((5.0, -0.1), 0),
    ):
        ray = cameras.generate_rays(camera_indices=number, coords=torch.tensor(corner))  # row, column
        assert views_of((ray.origins + 3 * ray.directions)[None].view(1, 3), own).tolist() == [seen], corner


def test_what_one_camera_sees_stays_empty():
    cameras, grid = two_cameras(), random_grid()
    with torch.no_grad():
        for table in grid.density_tables:
            table.fill_(50.0)
    grid.update_occupancy()
    assert grid.occupied.all()  # no cameras are known
    for wanted in (2, 5):  # there are only two
        grid.keep_to(cameras, wanted)
        grid.update_occupancy(settled=False)
        cell = (BOX[1] - BOX[0]) / CELLS
        middles = [BOX[0, a] + cell[a] * (torch.arange(CELLS) + 0.5) for a in range(3)]
        expected = (views_of(torch.cartesian_prod(*middles), cameras) == 2).view(CELLS, CELLS, CELLS)
        assert torch.equal(grid.occupied, expected) and 0.02 < expected.float().mean() < 0.9
        grid.update_occupancy()
        assert torch.equal(grid.occupied, expected)
    grid.grow()
    cells = expected.nonzero()
    torch.testing.assert_close(grid.aabb[0], BOX[0] + cells.amin(0) * cell)
    grid.keep_to(cameras, 1)
    grid.update_occupancy()
    assert grid.occupied.all()


@pytest.mark.parametrize("prune", [True, False])
def test_without_pruning_anything_may_still_grow_anywhere(prune):
    cube = torch.tensor([[-1.5] * 3, [1.5] * 3])
    config = DietGridModelConfig(resolutions=(8, 12), grow_at=(300,), prune=prune)
    model = config.setup(scene_box=SceneBox(cube.clone()), num_train_data=3)
    with torch.no_grad():
        model.field.density_tables[0].fill_(-9.0)
        model.field.density_tables[0].view(8, 8, 8)[3:5, 3:5, 3:5] = 50.0
    for step in (0, 200, 300, 400):
        model.before_step(step)
        assert model.field.occupied.all() == (not prune or step == 0)
    assert torch.equal(model.field.aabb, cube) == (not prune) and int(model.field.level) == 1
