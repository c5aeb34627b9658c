"""Priors for few views: frequency mask, occlusion, total variation, distortion. Each acts alone by its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RegularizerConfig:
    """Weights of the priors; 0 switches one off."""

    frequency_steps: int = 0
    """Steps over which the positional encoding's bands appear, lowest first (FreeNeRF); 0: all from the start."""
    occlusion: float = 0.0
    """Weight of density near the camera (FreeNeRF)."""
    occlusion_distance: float = 0.5
    """How far from where a ray starts density counts as near, in the scene's units."""
    density_variation: float = 0.0
    """Weight of the total variation of density."""
    colour_variation: float = 0.0
    """Weight of the total variation of colour."""
    distortion: float = 0.0
    """Weight of the distortion loss (mip-NeRF 360): compact density along a ray."""


def frequency_mask(
    num_frequencies: int, step: int, total_steps: int, in_dim: int = 3, include_input: bool = True
) -> Float[Tensor, "d"]:
    """FreeNeRF's mask (Yang et al. 2023, equation 4) in the layout of nerfstudio's NeRFEncoding.

    That layout is axis-major: sin of x's bands, of y's, of z's; the same for cos; the input last. Band k has weight
    clip(L step / total_steps - k, 0, 1) for L bands, sine and cosine alike; the input always 1. Ones from
    `total_steps` on.
    """
    raise NotImplementedError


def occlusion_loss(
    density: Float[Tensor, "r s"], starts: Float[Tensor, "r s"], near: Float[Tensor, "r 1"], distance: float
) -> Float[Tensor, ""]:
    """Mean over rays and samples of the density within `distance` of `near` (Yang et al. 2023, equation 5)."""
    raise NotImplementedError


def total_variation(grid: Float[Tensor, "x y z c"], voxel: Float[Tensor, "3"]) -> Float[Tensor, ""]:
    """Mean over voxels of the length of the gradient in world units: sqrt(sum over axes of (difference / voxel)²)."""
    raise NotImplementedError


def field_variation(
    values: Callable[[Tensor], Tensor], positions: Float[Tensor, "n 3"], distance: float
) -> Float[Tensor, ""]:
    """The same for any field, by forward differences over `distance` at given points."""
    raise NotImplementedError
