"""Samples along rays, a step apart, in the occupied cells of a box alone: first by blocks, then one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

CELLS = 64
"""The occupancy mask has so many cells along each side of the box."""
COARSE = 2
"""Cells along each side of what a block of samples is looked up in first."""
LONGEST = 12
"""A block has at most so many samples."""


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
    """Of b samples on each of m rays. (Rays come last, as what differs by the ray alone is then read in long rows.)"""

    middle: Float[Tensor, "b m"]
    stretch: Float[Tensor, "b m"] | None
    cell: Sequence[Float[Tensor, "b m"]]
    """Along each axis, in cells from the box's lowest corner."""
    inside: Bool[Tensor, "b m"]
    """Not behind the ray's end."""


class Path(Protocol):
    """Places at which samples may lie on h rays."""

    number: Int[Tensor, " h"]
    """Of each ray, in its bundle."""
    count: int
    """A ray has at most so many."""

    def at(self, ray: Int[Tensor, " m"], place: Num[Tensor, "#b #m"]) -> Places:
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
        self.step, self.near, self.far = step, near[hit, 0], far[hit, 0]
        self.count = int(((self.far - self.near).max() / step).ceil()) if len(hit) else 0
        self.offset = torch.rand_like(self.near) if jitter else torch.full_like(self.near, 0.5)
        scale = CELLS / (aabb[1] - aabb[0])
        self.starts, self.slopes = ((origins[hit] - aabb[0]) * scale).T, (directions[hit] * scale).T

    def at(self, ray: Int[Tensor, " m"], place: Num[Tensor, "#b #m"]) -> Places:
        def of(values: Float[Tensor, " h"]) -> Float[Tensor, " m"]:
            """The ray's."""
            return values.index_select(0, ray)

        middle = of(self.near) + (place + of(self.offset)) * self.step
        axes = zip(self.starts, self.slopes, strict=True)
        cell = [torch.addcmul(of(start), middle, of(slope)) for start, slope in axes]
        return Places(middle, None, cell, middle < of(self.far))


class CurvedPath:
    """Rays through contracted space, where they are curved: each is followed along a chain of chords, and samples are a
    step apart in the grid's coordinates."""

    def __init__(
        self,
        marks: Float[Tensor, "r m"],
        places: Float[Tensor, "r m 3"],
        step: float,
        aabb: Float[Tensor, "2 3"],
        offset: Float[Tensor, " r"],
    ) -> None:
        """Args:
        marks: distances along the ray of the ends of its chords.
        places: where they are in the grid.
        offset: of the first sample from the near plane, in steps.
        """
        self.number = torch.arange(len(marks), device=marks.device)
        self.step, self.offset = step, offset
        sides = places[:, 1:] - places[:, :-1]
        chords = sides.norm(dim=-1).clamp(min=1e-9)
        self.along = F.pad(chords.cumsum(dim=-1), (1, 0))
        self.count = int((self.along[:, -1].max() / step).ceil())
        self.passed, self.total = self.along[:, :-1].flatten(), self.along[:, -1]
        self.near, self.begins = marks[:, 0], marks[:, :-1].flatten()
        self.stretch = ((marks[:, 1:] - marks[:, :-1]) / chords).flatten()
        scale = CELLS / (aabb[1] - aabb[0])
        self.starts = ((places[:, :-1] - aabb[0]) * scale).flatten(0, 1).T.contiguous()
        self.slopes = (sides / chords[..., None] * scale).flatten(0, 1).T.contiguous()

    def at(self, ray: Int[Tensor, " m"], place: Num[Tensor, "#b #m"]) -> Places:
        wanted = (place + self.offset[ray]) * self.step
        chord = torch.searchsorted(self.along[ray], wanted.T.contiguous(), right=True).T - 1
        pieces = self.along.shape[1] - 1
        flat = (chord.clamp_(max=pieces - 1) + ray * pieces).contiguous()

        def of(values: Float[Tensor, " k"]) -> Float[Tensor, "b m"]:
            """The chord's."""
            return values.index_select(0, flat.view(-1)).view(flat.shape)

        after, stretch = wanted - of(self.passed), of(self.stretch)
        middle = of(self.begins) + after * stretch
        stretch = torch.minimum(stretch, 2 * (middle - self.near[ray]) / self.step)  # none begins before the near plane
        axes = zip(self.starts, self.slopes, strict=True)
        cell = [torch.addcmul(of(start), after, of(slope)) for start, slope in axes]
        inside = wanted < self.total[ray]
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
        middles = path.at(rays, (starts + (self.block - 1) / 2)[:, None])
        around = F.max_pool3d(occupied[None].float(), COARSE)
        around = F.max_pool3d(around, 3, stride=1, padding=1)[0] > 0
        found = _look_up(around, [cell / COARSE for cell in middles.cell])
        self.row, column = found.T.nonzero(as_tuple=True)
        self.start, self.order = starts[column], order_within(self.row)

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
        places = self.path.at(row, start + torch.arange(self.block, device=start.device)[:, None])
        kept = _look_up(self.occupied, places.cell) & places.inside
        which = kept.T.reshape(-1).nonzero()[:, 0]  # ray by ray
        block = which // self.block
        where = which % self.block * len(row) + block

        def of(values: Float[Tensor, "b m"]) -> Float[Tensor, " k"]:
            return values.view(-1).index_select(0, where)

        ray = self.path.number[row].index_select(0, block)
        return Marched(ray, of(places.middle), 1.0 if places.stretch is None else of(places.stretch))


def _look_up(mask: Bool[Tensor, "c c c"], cell: Sequence[Float[Tensor, "b m"]]) -> Bool[Tensor, "b m"]:
    """What holds of the cells that points are in; those outside are moved to the nearest."""
    side = len(mask)
    flat = torch.zeros_like(cell[0], dtype=torch.int32)
    for one in cell:
        flat.mul_(side).add_(one.int().clamp_(0, side - 1))
    return mask.view(-1).index_select(0, flat.view(-1)).view(flat.shape)  # indexing takes seven times as long


def order_within(group: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
    """How many entries before each belong to the same group, where groups follow one another in rising order."""
    number = torch.bincount(group)
    first = (number.cumsum(0) - number).index_select(0, group)
    return torch.arange(len(group), device=group.device) - first


def points_on(
    origins: Float[Tensor, "r 3"],
    directions: Float[Tensor, "r 3"],
    ray: Int[Tensor, " k"],
    distance: Float[Tensor, " k"],
) -> Float[Tensor, "k 3"]:
    """Points on rays. (In memory each axis lies apart, which makes what follows four times as fast.)"""
    axes = zip(origins.unbind(1), directions.unbind(1), strict=True)
    return torch.stack(
        [torch.addcmul(start.index_select(0, ray), distance, slope.index_select(0, ray)) for start, slope in axes]
    ).T


def weights_of(
    optical: Float[Tensor, " k"], ray: Int[Tensor, " k"], clear: Float[Tensor, " r"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " r"]]:
    """What each sample adds to its ray's colour, and what the ray's samples let through of the light behind.

    T_i (1 - exp(-o_i)), T_i = clear exp(-sum_{j < i} o_j), o the density times the length (Mildenhall et al. 2020,
    equation 3), for samples ray by ray, in order along each.

    Args:
        clear: what the samples before these let through.
    """
    precise = torch.float32 if optical.device.type == "mps" else torch.float64  # which Metal lacks
    total = optical.to(precise).cumsum(0)  # of all rays: in single precision those of the last would be lost
    number = torch.bincount(ray, minlength=len(clear))
    ends = F.pad(total, (1, 0))[F.pad(number.cumsum(0), (1, 0))]
    before = (total - optical - ends.index_select(0, ray)).float()
    weights = clear.index_select(0, ray) * torch.exp(-before) * -torch.expm1(-optical)
    return weights, clear * torch.exp(-(ends[1:] - ends[:-1]).float())
