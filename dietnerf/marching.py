"""Samples along rays, a step apart, in the occupied cells of a box alone: first by blocks, then one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

CELLS = 64
"""The occupancy mask has so many cells along each side of the box."""
COARSE = 4
"""Cells along each side of what a block of samples is looked up in first."""
LONGEST = 16
"""A block has at most so many samples."""
CHORDS = 96
"""Straight pieces by which a ray is followed through contracted space."""


class Marched(NamedTuple):
    """Samples in occupied cells, ray by ray, in order along each."""

    ray: Int[Tensor, " k"]
    """Which ray."""
    middle: Float[Tensor, " k"]
    """Distance along the ray."""
    stretch: Float[Tensor, " k"] | float = 1.0
    """How much longer a step is in the scene's units than in the grid's."""

    @property
    def slot(self) -> Int[Tensor, " k"]:
        """How many samples of the same ray come before."""
        return order_within(self.ray)


class Places(NamedTuple):
    """Of b samples on each of m rays."""

    middle: Float[Tensor, "m b"]
    stretch: Float[Tensor, "m b"] | None
    cell: Sequence[Float[Tensor, "m b"]]
    """Along each axis, in cells from the box's lowest corner."""
    inside: Bool[Tensor, "m b"]
    """Not behind the ray's end."""


class Path(Protocol):
    """Places at which samples may lie on h rays."""

    number: Int[Tensor, " h"]
    """Of each ray, in its bundle."""
    count: int
    """A ray has at most so many."""

    def at(self, ray: Int[Tensor, " m"], place: Float[Tensor, "#m b"]) -> Places:
        """Where they are, by the row of their ray and their number (or between two) along it."""
        ...


class StraightPath:
    """Rays as they are, through those that meet the box."""

    def __init__(
        self,
        origins: Float[Tensor, "r 3"],
        directions: Float[Tensor, "r 3"],
        near: Float[Tensor, "r 1"],
        far: Float[Tensor, "r 1"],
        step: float,
        aabb: Float[Tensor, "2 3"],
        *,
        jitter: bool,
    ) -> None:
        """With jitter, each ray begins anywhere within the first step."""
        self.number = hit = (far > near + 1e-4)[:, 0].nonzero()[:, 0]
        self.step, self.near, self.far = step, near[hit], far[hit]
        self.count = int(((self.far - self.near).max() / step).ceil()) if len(hit) else 0
        self.offset = torch.rand_like(self.near) if jitter else torch.full_like(self.near, 0.5)
        scale = CELLS / (aabb[1] - aabb[0])
        self.start, self.slope = (origins[hit] - aabb[0]) * scale, directions[hit] * scale

    def at(self, ray: Int[Tensor, " m"], place: Float[Tensor, "#m b"]) -> Places:
        middle = self.near[ray] + (place + self.offset[ray]) * self.step
        start, slope = self.start[ray], self.slope[ray]
        cell = [torch.addcmul(start[:, axis, None], middle, slope[:, axis, None]) for axis in range(3)]
        return Places(middle, None, cell, middle < self.far[ray])


class CurvedPath:
    """Rays through contracted space, where they are curved: each is followed along a chain of chords, and samples are a
    step apart in the grid's coordinates."""

    def __init__(
        self,
        marks: Float[Tensor, "r m"],
        places: Float[Tensor, "r m 3"],
        step: float,
        aabb: Float[Tensor, "2 3"],
        offset: Float[Tensor, "r 1"],
    ) -> None:
        """Args:
        marks: distances along the ray of the ends of its chords.
        places: where they are in the grid.
        offset: of the first sample from the near plane, in steps.
        """
        self.number = torch.arange(len(marks), device=marks.device)
        self.step, self.offset, self.marks = step, offset, marks
        sides = places[:, 1:] - places[:, :-1]
        chords = sides.norm(dim=-1).clamp(min=1e-9)
        self.along = F.pad(chords.cumsum(dim=-1), (1, 0))
        self.count = int((self.along[:, -1].max() / step).ceil())
        self.stretch = (marks[:, 1:] - marks[:, :-1]) / chords
        scale = CELLS / (aabb[1] - aabb[0])
        self.starts, self.slopes = (places[:, :-1] - aabb[0]) * scale, sides / chords[..., None] * scale

    def at(self, ray: Int[Tensor, " m"], place: Float[Tensor, "#m b"]) -> Places:
        along, wanted = self.along[ray], (place + self.offset[ray]) * self.step  # (m, marks), (m, b)
        chord = (torch.searchsorted(along, wanted, right=True) - 1).clamp_(max=CHORDS - 1)
        after = wanted - along.gather(1, chord)
        flat = ray[:, None] * CHORDS + chord

        def of(values: Float[Tensor, "r c"]) -> Float[Tensor, "m b"]:
            """The chord's."""
            return values.reshape(-1).index_select(0, flat.view(-1)).view(flat.shape)

        stretch = of(self.stretch)
        middle = of(self.marks[:, :-1]) + after * stretch
        stretch = torch.minimum(stretch, 2 * (middle - self.marks[ray, :1]) / self.step)  # none before the near plane
        cell = [torch.addcmul(of(self.starts[..., axis]), after, of(self.slopes[..., axis])) for axis in range(3)]
        inside = wanted < along[:, -1:]
        for one in cell:
            inside &= (one >= 0) & (one < CELLS)
        return Places(middle, stretch, cell, inside)


class March:
    """Samples of rays in occupied cells.

    A block of samples is left out where no cell is occupied around its middle, so that rays through empty space cost
    little. Blocks may be asked for in turn, from the first along each ray to the last.
    """

    @torch.no_grad()
    def __init__(self, path: Path, occupied: Bool[Tensor, "c c c"], step: float, cell: float) -> None:
        """Args:
        step: between samples, in the grid's units.
        cell: the shortest side of a cell, likewise.
        """
        self.path, self.occupied = path, occupied
        # So short that all samples lie within a coarse cell of the middle, along each axis.
        self.block = max(1, min(LONGEST, 1 + int(2 * COARSE * cell / step)))
        device = occupied.device
        starts = torch.arange(0, path.count, self.block, device=device)
        rays = torch.arange(len(path.number), device=device)
        middles = path.at(rays, (starts + (self.block - 1) / 2)[None])
        around = F.max_pool3d(occupied[None].float(), COARSE)
        around = F.max_pool3d(around, 3, stride=1, padding=1)[0] > 0
        row, column = _look_up(around, [cell / COARSE for cell in middles.cell]).nonzero(as_tuple=True)
        self.row, self.start = row, starts[column]
        self.order = order_within(row)

    @torch.no_grad()
    def samples(self, first: int = 0, last: int | None = None, wanted: Bool[Tensor, " r"] | None = None) -> Marched:
        """Those of blocks `first` to `last` of each ray, or of each that is wanted."""
        row, start = self.row, self.start
        if first or last is not None:
            chosen = self.order >= first
            if last is not None:
                chosen &= self.order < last
            if wanted is not None:
                chosen &= wanted[self.path.number[row]]
            row, start = row[chosen], start[chosen]
        places = self.path.at(row, start[:, None] + torch.arange(self.block, device=start.device))
        kept = (_look_up(self.occupied, places.cell) & places.inside).view(-1).nonzero()[:, 0]
        stretch = 1.0 if places.stretch is None else places.stretch.view(-1)[kept]
        return Marched(self.path.number[row[kept // self.block]], places.middle.view(-1)[kept], stretch)


def _look_up(mask: Bool[Tensor, "c c c"], cell: Sequence[Float[Tensor, "m b"]]) -> Bool[Tensor, "m b"]:
    """What holds of the cells that points are in; those outside are moved to the nearest."""
    side = len(mask)
    flat = torch.zeros_like(cell[0], dtype=torch.int32)
    for one in cell:
        flat.mul_(side).add_(one.int().clamp_(0, side - 1))
    return mask.view(-1).index_select(0, flat.view(-1)).view(flat.shape)  # indexing takes seven times as long


def order_within(group: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
    """How many entries before each belong to the same group, where groups follow one another in rising order."""
    number = torch.bincount(group)
    return torch.arange(len(group), device=group.device) - (number.cumsum(0) - number)[group]
