"""A dense voxel grid of density and colour, coarse to fine, that skips empty space.

After plain voxel grids with post-activation (Sun et al. 2022, sections 4 and 5; Yu et al. 2022): values live on
vertices, are interpolated linearly and only then activated, so that surfaces may be sharper than a voxel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.utils.math import components_from_spherical_harmonics
from torch import Tensor, nn
from torch.nn import functional as F

from common.checks import UserError, require_above, require_at_least, require_between
from common.runtime import require_memory
from dietnerf.contraction import Contraction
from dietnerf.data import BLENDER_SIDE
from dietnerf.interpolation import Corners, interpolate, refine, trilinear_weights
from dietnerf.marching import CELLS, CurvedPath, March, Marched, Path, StraightPath, points_on, weights_of
from dietnerf.model import VISIBLE_WEIGHT, BoxCollider, FewViewModel, FewViewModelConfig
from dietnerf.regularizers import Samples, total_variation

START_OPACITY = 0.1
"""Optical depth of the box before training."""
EMPTY_OPACITY = 0.02
"""A cell is empty when its densest point absorbs less than this over a voxel's length."""
CHORDS = 96
"""Straight pieces by which a ray is followed through contracted space."""
SHORTEST = 1e-3
"""A ray's first sample there lies at least this share of a step behind the near plane: at the plane it would have no
length, and density is divided by that."""
CONTRACTED_DISTORTION = 3e-3
"""The distortion loss's own weight where the space outside the box is contracted, which leaves room for fog."""
WAVES = ((0, 1), (1, 2), (2, 4), (4, 8), (8, None))
"""Blocks of samples along each ray that are rendered at once; a ray goes on while light comes through."""
SLAB = 0.25
"""Share of the grid that one evaluation of the total variation looks at: a random slab, right on average."""


class Values(NamedTuple):
    """Before activation, at the vertices of the present level."""

    density: Float[Tensor, "v 1"]
    colour: Float[Tensor, "v c"]


class VoxelGrid(nn.Module):
    """Tables of every level; values are the sum of those up to `level`, the coarser ones interpolated linearly.

    Growing puts the sum into the next table and sets the coarser ones to zero, which from then on learn what changes
    over many voxels at once. All levels are parameters from the start, so that checkpoints, optimizers and processes
    never meet another shape. A level has at most resolution³ vertices; how many lie along each axis follows the box,
    which growing crops to what is occupied.
    """

    aabb: Tensor
    level: Tensor
    sizes: Tensor
    occupied: Tensor

    def __init__(
        self,
        aabb: Float[Tensor, "2 3"],
        resolutions: tuple[int, ...],
        harmonics: int = 0,
        contraction: Contraction | None = None,
    ) -> None:
        """Args:
        aabb: the scene's box; with a contraction, the grid holds all of space, and the box is half as wide as it.
        """
        super().__init__()
        self.contraction = contraction
        if contraction is not None:  # in units in which the mean side of the box is that of Blender's
            half = BLENDER_SIDE * contraction.reach / contraction.reach.mean()
            self.unit: Tensor
            self.register_buffer("unit", half)
            aabb = 2 * torch.stack((-half, half))
        self.resolutions, self.harmonics = resolutions, harmonics
        channels = 3 * (harmonics + 1) ** 2
        self.density_tables = nn.ParameterList([torch.zeros(n**3, 1) for n in resolutions])
        self.colour_tables = nn.ParameterList([torch.zeros(n**3, channels) for n in resolutions])
        self.register_buffer("aabb", aabb.detach().clone().float())
        self.register_buffer("level", torch.tensor(0))
        self.register_buffer("sizes", vertices_along(aabb[1] - aabb[0], resolutions[0]))
        self.register_buffer("occupied", torch.ones(CELLS, CELLS, CELLS, dtype=torch.bool))
        self.density_scale: Tensor
        self.register_buffer("density_scale", 64 / (aabb[1] - aabb[0]).mean())
        self.density_shift = math.log(math.expm1(START_OPACITY / 64))
        self.summed: Tensor
        self.register_buffer("summed", torch.tensor(True))
        self._held: tuple[Any, Values] | None = None
        self.register_load_state_dict_pre_hook(_take)
        self._cameras: Cameras | None = None
        self._min_views = 1

    @property
    def voxel(self) -> Float[Tensor, " 3"]:
        """Size of a voxel of the present level, in the scene's units."""
        return (self.aabb[1] - self.aabb[0]) / (self.sizes - 1)

    def place(self, positions: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
        """From the scene's coordinates to the grid's."""
        return positions if self.contraction is None else self.unit * self.contraction(positions)

    def locate(self, positions: Float[Tensor, "n 3"]) -> Corners:
        """Vertices around points in the box; points outside are moved to its surface."""
        scaled = (positions - self.aabb[0]) / self.voxel
        lower = torch.minimum(scaled.clamp(min=0).floor(), self.sizes - 2)
        weight = trilinear_weights((scaled - lower).clamp(0, 1).T.contiguous())
        _, y, z = self.sizes.tolist()
        x_row, y_row, z_row = lower.T.int()
        corner = [(i * y + j) * z + k for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        row = ((x_row * y + y_row) * z + z_row)[:, None] + torch.tensor(corner, dtype=torch.int32, device=lower.device)
        return Corners(row, weight)

    def train(self, mode: bool = True) -> VoxelGrid:
        self._held = None
        return super().train(mode)

    def values(self) -> Values:
        """Sums of the levels. They are kept until the grid changes; with gradients also until those are taken, so that
        a step computes them once for all its renders."""
        tables = [*self.density_tables, *self.colour_tables]
        # What writes to a table raises its version.
        state = torch.is_grad_enabled(), self.aabb.device, sum(table._version for table in tables)
        if self._held is not None and self._held[0] == state:
            return self._held[1]
        values = Values(self._sum(self.density_tables), self._sum(self.colour_tables))
        if values.density.requires_grad:
            values.density.register_hook(self._forget)
        self._held = state, values
        return values

    def _forget(self, *_: Any) -> None:
        self._held = None

    def density(self, corners: Corners, values: Values | None = None) -> Float[Tensor, " n"]:
        """Density per unit of length."""
        raw = interpolate((values or self.values()).density, corners)[:, 0]
        return self.density_scale * F.softplus(raw + self.density_shift)

    def colour(
        self, corners: Corners, directions: Float[Tensor, "n 3"], values: Values | None = None
    ) -> Float[Tensor, "n 3"]:
        """Colour in [0, 1], seen along unit directions."""
        raw = interpolate((values or self.values()).colour, corners)
        if self.harmonics:
            basis = components_from_spherical_harmonics(self.harmonics + 1, directions)  # (n, h)
            raw = (raw.unflatten(-1, (3, -1)) * basis[:, None]).sum(dim=-1)
        return torch.sigmoid(raw)

    def _sum(self, tables: nn.ParameterList) -> Float[Tensor, "v c"]:
        """Values at the vertices of the present level."""
        level, extent = int(self.level), self.aabb[1] - self.aabb[0]
        found: Tensor | None = None
        for number in range(level + 1):
            sizes = self.sizes if number == level else vertices_along(extent, self.resolutions[number])
            used, whole = int(sizes.prod()), tables[number]
            own = (whole if used == len(whole) else whole[:used]).view(*sizes.tolist(), -1)
            found = own if found is None else refine(found, sizes.tolist(), own)
        assert found is not None
        return found.flatten(0, 2)

    @torch.no_grad()
    def march(
        self,
        origins: Float[Tensor, "r 3"],
        directions: Float[Tensor, "r 3"],
        near: Float[Tensor, "r 1"],
        far: Float[Tensor, "r 1"],
        step: float,
        *,
        jitter: bool,
    ) -> March:
        """Samples every `step`, in the grid's coordinates, between near and far, in occupied cells only; with jitter,
        each ray begins anywhere within the first step."""
        path: Path
        if self.contraction is None:
            path = StraightPath(origins, directions, near, far, step, self.aabb, jitter=jitter)
        else:
            marks = near * (far / near) ** torch.linspace(0, 1, CHORDS + 1, device=near.device)  # (r, m)
            places = self.place(origins[:, None] + marks[..., None] * directions[:, None])
            offset = torch.rand_like(near).clamp(min=SHORTEST) if jitter else torch.full_like(near, 0.5)
            path = CurvedPath(marks, places, step, self.aabb, offset[:, 0])
        cell = float((self.aabb[1] - self.aabb[0]).min()) / CELLS
        return March(path, self.occupied, step, cell)

    def variation(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Total variation of density's and colour's values before activation, in a random slab of the grid."""
        x, y, z = self.sizes.tolist()
        width = min(x, max(2, round(SLAB * x)))
        first = int(torch.randint(x - width + 1, ()))
        rows = slice(first * y * z, (first + width) * y * z)
        density, colour = (total_variation(v[rows].view(width, y, z, -1), self.voxel) for v in self.values())
        return density, colour

    @torch.no_grad()
    def grow(self, crop: bool = True) -> None:
        """Go on from the same values in the next level, with the box cropped to what is occupied.

        Args:
            crop: False keeps the box and takes nothing for empty yet.
        """
        box = self._occupied_box() if crop else self.aabb.clone()
        level, values = int(self.level), self.values()
        sizes = vertices_along(box[1] - box[0], self.resolutions[level + 1])
        counts = sizes.tolist()
        axes = [
            torch.linspace(low, high, count, device=box.device)
            for low, high, count in zip(*box.tolist(), counts, strict=True)
        ]
        for plane, x in enumerate(axes[0]):  # one plane at a time bounds the memory
            points = torch.cartesian_prod(x[None], axes[1], axes[2])
            corners = self.locate(points)
            part = slice(plane * counts[1] * counts[2], (plane + 1) * counts[1] * counts[2])
            for tables, whole in zip((self.density_tables, self.colour_tables), values, strict=True):
                tables[level + 1].data[part] = interpolate(whole, corners)
        for number in range(level + 1):
            self.density_tables[number].data.zero_()
            self.colour_tables[number].data.zero_()
        self.aabb.copy_(box)
        self.sizes.copy_(sizes)
        self.level += 1
        self._held = None
        if crop:
            self.update_occupancy()

    def keep_to(self, cameras: Cameras, min_views: int) -> None:
        """From the next look at what is occupied on, leave empty what fewer than `min_views` cameras see.

        Nothing says how far away a thing is that one camera alone sees, so that paint close to that camera explains
        its picture as well as the thing itself.
        """
        self._cameras, self._min_views = cameras, min(min_views, len(cameras))

    @torch.no_grad()
    def update_occupancy(self, *, settled: bool = True) -> None:
        """Look again which cells hold something.

        Args:
            settled: False takes everything that cameras see for occupied, as densities say nothing yet.
        """
        self.occupied.copy_(self._find_occupied() if settled else self._seen())

    def _middles(self) -> list[Float[Tensor, " c"]]:
        """Where the middles of the cells lie along each axis."""
        lines = [torch.linspace(low, high, CELLS + 1, device=low.device) for low, high in self.aabb.T]
        return [(line[1:] + line[:-1]) / 2 for line in lines]

    def _seen(self) -> Bool[Tensor, "c c c"]:
        """Cells that enough cameras see; all, where there is no such cell."""
        if self._cameras is None or self._min_views < 2:
            return torch.ones_like(self.occupied)
        points = torch.cartesian_prod(*self._middles())
        if self.contraction is not None:
            points = self.contraction.inverse(points / self.unit)
        seen = (views_of(points, self._cameras) >= self._min_views).view(self.occupied.shape)
        return seen if seen.any() else torch.ones_like(seen)

    def _find_occupied(self) -> Bool[Tensor, "c c c"]:
        """Cells that enough cameras see and whose density, or a neighbour's, is not negligible; where none is left, all
        that are seen, as rays without a sample would teach nothing."""
        middles, values = self._middles(), self.values()
        found = [
            self.density(self.locate(torch.cartesian_prod(x[None], middles[1], middles[2])), values).view(CELLS, CELLS)
            for x in middles[0]
        ]
        opacity = 1 - torch.exp(-torch.stack(found) * self.voxel.max())
        seen = self._seen()
        occupied = (F.max_pool3d(opacity[None], 3, stride=1, padding=1)[0] > EMPTY_OPACITY) & seen
        return occupied if occupied.any() else seen

    def _occupied_box(self) -> Float[Tensor, "2 3"]:
        """The box around the occupied cells."""
        cells = self._find_occupied().nonzero()
        cell = (self.aabb[1] - self.aabb[0]) / CELLS
        return torch.stack([self.aabb[0] + cells.amin(0) * cell, self.aabb[0] + (cells.amax(0) + 1) * cell])


def _take(grid: VoxelGrid, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: one of a version whose levels were not summed has, in the coarser ones, what they were
    when the grid grew out of them."""
    grid._held = None
    if f"{prefix}summed" not in state and f"{prefix}level" in state:
        state[f"{prefix}summed"] = torch.tensor(True)
        for number in range(int(state[f"{prefix}level"])):
            for name in ("density_tables", "colour_tables"):
                key = f"{prefix}{name}.{number}"
                state[key] = torch.zeros_like(state[key])


def laid_out(
    marched: Marched,
    density: Float[Tensor, " k"],
    weights: Float[Tensor, " k"],
    step: float,
    near: Float[Tensor, "r 1"],
    entry: Float[Tensor, "r 1"],
) -> Samples:
    """Samples in a table with a row for each ray; slots that are not used have no length."""
    slot, length = marched.slot, step * marched.stretch
    width = int(slot.max()) + 1 if len(slot) else 1
    place = marched.ray * width + slot

    def table(values: Float[Tensor, " k"], unused: Float[Tensor, "r 1"]) -> Float[Tensor, "r s"]:
        whole = unused.expand(-1, width).flatten()
        return whole.scatter(0, place, values).view(-1, width)

    none = torch.zeros_like(near)
    return Samples(
        table(density, none),
        table(weights, none),
        table(marched.middle - length / 2, near),
        table(marched.middle + length / 2, near),
        entry,
    )


def bytes_of(resolutions: tuple[int, ...], harmonics: int) -> int:
    """Memory of a grid's tables, of all levels, in training: with the gradient and Adam's two moments in float32, and
    of the sum of the levels with its own gradient."""
    channels = 1 + 3 * (harmonics + 1) ** 2
    return 4 * channels * (4 * sum(resolution**3 for resolution in resolutions) + 2 * max(resolutions) ** 3)


def views_of(points: Float[Tensor, "n 3"], cameras: Cameras) -> Int[Tensor, " n"]:
    """How many cameras have each point in their frame (lens distortion left out)."""
    count = torch.zeros(len(points), dtype=torch.int32, device=points.device)
    cameras = cameras.to(points.device)
    for number in range(len(cameras)):
        camera = cameras[number]
        rotation, position = camera.camera_to_worlds[:, :3], camera.camera_to_worlds[:, 3]
        right, up, back = ((points - position) @ rotation).unbind(-1)
        depth = -back  # cameras look along -z
        column = camera.fx * right / depth + camera.cx
        row = camera.cy - camera.fy * up / depth
        inside = (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
        count += inside & (depth > 0)
    return count


def vertices_along(extent: Float[Tensor, " 3"], resolution: int) -> Int[Tensor, " 3"]:
    """How many vertices along each axis give nearly cubic voxels and at most resolution³ vertices."""
    sizes = (extent * (resolution**3 / extent.prod()) ** (1 / 3) + 1e-3).floor().long().clamp(min=2)
    while int(sizes.prod()) > resolution**3:  # a flat box, one side of which was raised to 2
        sizes[sizes.argmax()] -= 1
    return sizes


@dataclass
class DietGridModelConfig(FewViewModelConfig):
    """A dense voxel grid, coarse to fine."""

    _target: type = field(default_factory=lambda: DietGridModel)
    resolutions: tuple[int, ...] = (32, 64, 128)
    """Cube root of the number of voxels, level by level."""
    grow_at: tuple[int, ...] = (300, 900)
    """Steps at which the next level starts; one fewer than the levels."""
    harmonics: int | None = None
    """Degree of the spherical harmonics of colour, 0 for plain colour; None is 1 where the space outside the box is
    contracted, as what photographs show shines, and else 0."""
    steps_per_voxel: float = 1.5
    """Samples along a ray for each voxel that it crosses."""
    occupancy_every: int = 100
    """Steps between two looks at which cells are empty."""
    prune: bool = True
    """Leave what is empty out of the march, and crop the box to the rest; without, anything may still grow anywhere,
    and training takes longer."""
    min_views: int = 2
    """What fewer training cameras see stays empty, where images have alpha; 1 lets one camera suffice."""


class DietGridModel(FewViewModel):
    """Density and colour by trilinear look-up; empty space is skipped."""

    config: DietGridModelConfig
    behind_all = "black"  # to which the colour at the far plane is added

    def populate_modules(self) -> None:
        super().populate_modules()
        config = self.config
        if len(config.grow_at) != len(config.resolutions) - 1 or list(config.grow_at) != sorted(set(config.grow_at)):
            raise UserError(
                f"grow_at is {config.grow_at}: give {len(config.resolutions) - 1} rising steps, one fewer than the "
                f"resolutions."
            )
        for resolution in config.resolutions:
            require_at_least("resolutions", resolution, 4)
        contracted = self.contraction is not None
        harmonics = int(contracted) if config.harmonics is None else config.harmonics
        if config.regularizers.distortion is None:
            config.regularizers = replace(config.regularizers, distortion=CONTRACTED_DISTORTION * contracted)
        require_between("harmonics", harmonics, 0, 4)
        require_at_least("occupancy_every", config.occupancy_every, 1)
        require_at_least("min_views", config.min_views, 1)
        require_above("steps_per_voxel", config.steps_per_voxel, 0)
        size = bytes_of(config.resolutions, harmonics)
        require_memory(f"resolutions is {config.resolutions}", size, torch.device("cpu"), "use smaller ones")
        if config.regularizers.frequency_steps:
            raise UserError("regularizers.frequency_steps: a grid has none; its levels (grow_at) do the same.")
        self.field = VoxelGrid(self.scene_box.aabb, config.resolutions, harmonics, self.contraction)
        chosen = config.near, config.far
        if self.contraction is None:
            self.collider = BoxCollider(SceneBox(self.field.aabb), self.near, chosen, self.field)

    def before_step(self, step: int) -> None:
        """Grow into the next level when its step has come, and look now and then which cells are empty."""
        level = sum(start <= step for start in self.config.grow_at)
        # Before, what is thin may only be unlearnt.
        settled = self.config.prune and step - self.began >= 2 * self.config.occupancy_every
        while int(self.field.level) < level:
            self.field.grow(crop=settled)
        if step % self.config.occupancy_every == 0:
            self.field.update_occupancy(settled=settled)

    def set_cameras(self, cameras: Cameras) -> None:
        self.field.keep_to(cameras, self.config.min_views)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:  # type: ignore[override]
        grid, origins, directions = self.field, ray_bundle.origins, ray_bundle.directions
        near, far = ray_bundle.nears, ray_bundle.fars
        assert near is not None and far is not None
        step, number = grid.voxel.mean().item() / self.config.steps_per_voxel, len(origins)
        march = grid.march(origins, directions, near, far, step, jitter=self.training)
        values = grid.values()
        colour, opacity, behind = origins.new_zeros(number, 3), origins.new_zeros(number), origins.new_zeros(number)
        clear = origins.new_ones(number)  # what the samples so far let through
        for first, last in ((0, None),) if self.training else WAVES:
            marched = march.samples(first, last, clear > VISIBLE_WEIGHT)
            ray, middle, stretch = marched
            corners = grid.locate(grid.place(points_on(origins, directions, ray, middle)))
            density = grid.density(corners, values)
            weights, clear = weights_of(density * step, ray, clear)
            seen = (weights.detach() > VISIBLE_WEIGHT).nonzero()[:, 0]
            seen_ray = ray.index_select(0, seen)
            shade = grid.colour(corners.of(seen), directions.index_select(0, seen_ray), values)
            colour = colour.index_add(0, seen_ray, weights.index_select(0, seen)[:, None] * shade)
            opacity = opacity.index_add(0, ray, weights)
            behind = behind.index_add(0, ray, weights * (middle - self.far))
        accumulation = opacity[:, None]
        rendered = self._over_background(colour, accumulation)
        if (
            grid.contraction is not None and self.renderer_rgb.background_color == "black"
        ):  # what is farther than the last sample, such as the sky
            sky = grid.colour(grid.locate(grid.place(origins + far * directions)), directions, values)
            rendered = rendered + (1 - accumulation) * sky
        outputs: dict[str, Any] = {
            "rgb": rendered,
            "accumulation": accumulation,
            "depth": self.far + behind[:, None],  # as `_depth`
        }
        if self.training:
            outputs["samples"] = laid_out(marched, density / stretch, weights, step, near, self.entry(ray_bundle))
        return outputs

    def _over_background(self, rgb: Float[Tensor, "r 3"], accumulation: Float[Tensor, "r 1"]) -> Float[Tensor, "r 3"]:
        """As nerfstudio's renderer does, which wants samples of all rays in one table."""
        renderer = self.renderer_rgb
        background = renderer.get_background_color(renderer.background_color, shape=rgb.shape, device=rgb.device)
        rgb = rgb + (1 - accumulation) * background
        return rgb if self.training else torch.nan_to_num(rgb).clamp(0, 1)

    def variation(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        return self.field.variation()
