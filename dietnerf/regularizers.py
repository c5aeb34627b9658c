"""Priors for few views: frequency mask, occlusion, total variation, distortion, depth, silhouette. Each acts alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DEPTH_SPREAD = 0.01
"""Standard deviation of the depth of a sparse point, as a share of it; at least a sample's length."""
SMALLEST_WEIGHT = 1e-5
"""Added to a sample's weight before its logarithm is taken."""
PLANES = 4
"""Planes of a grid whose total variation is taken at once."""
SMOOTHING = 1e-8
"""Under the root of a total variation, so that its gradient is finite where a field is flat."""


@dataclass(frozen=True)
class RegularizerConfig:
    """Weights of the priors; 0 switches one off.

    Those of total variation are divided by the number of training views: a prior says less, the more is seen.
    """

    frequency_steps: int = 0
    """Steps over which the positional encoding's bands appear, lowest first (FreeNeRF); 0: all from the start."""
    occlusion: float = 0.0
    """Weight of density near the camera (FreeNeRF)."""
    occlusion_distance: float = 0.5
    """How far behind the near plane, or where a ray enters a bounded field, density counts as near, in the scene's
    units."""
    density_variation: float = 0.0
    """Weight of the total variation of density."""
    colour_variation: float = 0.0
    """Weight of the total variation of colour."""
    distortion: float | None = 0.0
    """Weight of the distortion loss (mip-NeRF 360): compact density along a ray. None, of the grid, is 0.003 where the
    space outside the box is contracted, else 0."""
    depth_smoothness: float = 0.0
    """Weight of the differences of depth within small patches seen from random poses (RegNeRF)."""
    depth: float = 0.0
    """Weight of the depths of a capture's sparse points, where it is known which photographs see them (DS-NeRF)."""
    silhouette: float = 0.0
    """Weight of the squared difference between opacity and the images' alpha, where images have it (the mask loss of
    Yariv et al. 2020)."""
    depth_patches: int = 8
    """Such patches a step, of 8 x 8 rays each."""


class Samples(NamedTuple):
    """What regularizers need of the samples along r rays; distances in the scene's units."""

    density: Float[Tensor, "r s"]
    weights: Float[Tensor, "r s"]
    starts: Float[Tensor, "r s"]
    ends: Float[Tensor, "r s"]
    entry: Float[Tensor, "r 1"]
    """Where the ray comes to what may be filled."""


def frequency_mask(
    num_frequencies: int, step: int, total_steps: int, in_dim: int = 3, include_input: bool = True
) -> Float[Tensor, " d"]:
    """FreeNeRF's mask (Yang et al. 2023, section 3.2) in the layout of nerfstudio's NeRFEncoding.

    That layout is axis-major: sin of x's bands, of y's, of z's; the same for cos; the input last. Of L bands, band k
    has weight clip(L step / total_steps - k, 0, 1), sine and cosine alike; the input always 1. All ones from
    `total_steps` on. (The paper's code reveals its own layout from front to back, so all sines before all cosines.)
    """
    visible = num_frequencies * step / total_steps if step < total_steps else num_frequencies
    bands = (visible - torch.arange(num_frequencies, dtype=torch.float32)).clamp(0, 1)
    mask = bands.repeat(2 * in_dim)
    return torch.cat([mask, torch.ones(in_dim)]) if include_input else mask


def occlusion_loss(
    density: Float[Tensor, "r s"], starts: Float[Tensor, "r s"], near: Float[Tensor, "r 1"], distance: float
) -> Float[Tensor, ""]:
    """Mean over rays and samples of the density within `distance` of `near` (Yang et al. 2023, section 3.3).

    Args:
        density: per unit of length.
        starts, near: distances along the ray, in the scene's units.
    """
    return (density * (starts - near < distance)).mean()


def total_variation(grid: Float[Tensor, "x y z c"], voxel: Float[Tensor, " 3"]) -> Float[Tensor, ""]:
    """Mean over voxels and channels of the gradient's length: sqrt(sum over axes of (difference / voxel)²).

    Forward differences; each voxel that has a next one along all three axes counts.

    Args:
        voxel: its size along each axis, in the scene's units, so that the value does not change with the resolution.
    """
    return _TotalVariation.apply(grid, voxel.tolist())


class _TotalVariation(torch.autograd.Function):
    """The formula and its gradient in one walk, a few planes at a time, which stay in the cache."""

    @staticmethod
    def forward(context, grid: Tensor, voxel: list[float]) -> Tensor:
        found = torch.zeros_like(grid)
        total = grid.new_zeros(())
        for first in range(0, len(grid) - 1, PLANES):
            planes = slice(first, first + PLANES + 1)
            core, *following = _with_next(grid[planes])
            slopes = [value - core for value in following]
            squares = torch.full_like(core, SMOOTHING)
            for slope, size in zip(slopes, voxel, strict=True):
                squares.addcmul_(slope, slope, value=size**-2)
            share = squares.rsqrt()
            total += squares.mul_(share).sum()
            core, *following = _with_next(found[planes])
            for slope, value, size in zip(slopes, following, voxel, strict=True):
                slope.mul_(share)
                value.add_(slope, alpha=size**-2)
                core.sub_(slope, alpha=size**-2)
        context.number = _with_next(grid)[0].numel()
        context.save_for_backward(found)
        return total / context.number

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        (found,) = context.saved_tensors
        return found * (gradient / context.number), None


def _with_next(grid: Float[Tensor, "x y z c"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of the voxels that have a next one along all axes, and of that next one along each."""
    return grid[:-1, :-1, :-1], grid[1:, :-1, :-1], grid[:-1, 1:, :-1], grid[:-1, :-1, 1:]


def field_variation(
    values: Callable[[Tensor], Tensor], positions: Float[Tensor, "n 3"], distance: float
) -> Float[Tensor, " c"]:
    """The same of each channel of any field, by forward differences over `distance` at the given points.

    Args:
        values: maps points (m, 3) to (m, c).
    """
    steps = torch.cat([torch.zeros(1, 3), distance * torch.eye(3)]).to(positions)
    found = values((positions + steps[:, None]).flatten(0, 1)).unflatten(0, (4, len(positions)))  # (4, n, c)
    return torch.sqrt((((found[1:] - found[0]) / distance) ** 2).sum(dim=0) + SMOOTHING).mean(dim=0)


def depth_smoothness(
    depth: Float[Tensor, "n p p"], accumulation: Float[Tensor, "n p p"], background: float
) -> Float[Tensor, ""]:
    """Mean over neighbouring rays of a_i a_j |z_i - z_j| (after Niemeyer et al. 2022, equation 5).

    z is the depth of what is there: (depth - (1 - a) background) / a, a the accumulation. Unlike the original's squares
    of the rendered depth, pairs count by how opaque both rays are (without a gradient) and edges by their height, so
    that silhouettes are not worn down.

    Args:
        depth: with the background at the distance `background`.
    """
    opaque = accumulation.detach()
    surface = (depth - (1 - accumulation) * background) / accumulation.clamp(min=1e-3)
    down = opaque[:, 1:] * opaque[:, :-1] * (surface[:, 1:] - surface[:, :-1]).abs()
    right = opaque[:, :, 1:] * opaque[:, :, :-1] * (surface[:, :, 1:] - surface[:, :, :-1]).abs()
    return (down.mean() + right.mean()) / 2


def point_depth_loss(
    weights: Float[Tensor, "r s"],
    starts: Float[Tensor, "r s"],
    ends: Float[Tensor, "r s"],
    depth: Float[Tensor, " r"],
    confidence: Float[Tensor, " r"],
) -> Float[Tensor, ""]:
    """Mean over rays of -c sum_k log(w_k) N(m_k; D, σ²) l_k: where a ray ends is distributed as the depth of the point
    that it goes to is known (Deng et al. 2022, equation 7).

    m are the samples' middles, l their lengths. σ is DEPTH_SPREAD D or, where samples are coarser than that, the length
    of the one that is nearest to the point; a point in space that is skipped counts for nothing.

    Args:
        depth: D, the point's distance along the ray.
        confidence: c, how much the ray counts.
    """
    middles, lengths = (starts + ends) / 2, ends - starts
    offsets = middles - depth[:, None]
    nearest = torch.where(lengths > 0, offsets.abs(), torch.inf).argmin(dim=1, keepdim=True)
    spread = torch.maximum(DEPTH_SPREAD * depth[:, None], lengths.gather(1, nearest)).clamp(min=1e-9)
    share = torch.exp(-0.5 * (offsets / spread).square()) * lengths / (spread * math.sqrt(2 * math.pi))
    return -(confidence[:, None] * share.detach() * (weights + SMALLEST_WEIGHT).log()).sum(dim=1).mean()


def distortion_loss(
    weights: Float[Tensor, "r s"], starts: Float[Tensor, "r s"], ends: Float[Tensor, "r s"]
) -> Float[Tensor, ""]:
    """Mean over rays of sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i² (end_i - start_i) (mip-NeRF 360, equation 15).

    Nerfstudio's compares all pairs of samples; for sorted samples prefix sums give the same value in linear time.

    Args:
        starts, ends: of the samples along the ray, sorted, m their middles; in any unit.
    """
    middles = (starts + ends) / 2
    weighted = weights * middles
    before, weighted_before = weights.cumsum(dim=-1) - weights, weighted.cumsum(dim=-1) - weighted
    between = 2 * (weighted * before - weights * weighted_before).sum(dim=-1)
    within = (weights**2 * (ends - starts)).sum(dim=-1) / 3
    return (between + within).mean()
