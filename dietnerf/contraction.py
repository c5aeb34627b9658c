"""All of space in a cube, as a field with a box can hold it: the contraction of mip-NeRF 360 around a box."""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.field_components.spatial_distortions import SpatialDistortion
from torch import Tensor

FARTHEST = 1e6
"""Points are taken back to at most so many half sides of the box."""


class Contraction(SpatialDistortion):
    """nerfstudio's SceneContraction around a box: the box becomes [-1, 1]³, all of space [-2, 2]³.

    y = (x - centre) / reach; y where |y|∞ <= 1, else (2 - 1 / |y|∞) y / |y|∞ (Barron et al. 2022, equation 10, with the
    maximum norm).
    """

    centre: Tensor
    reach: Tensor

    def __init__(self, aabb: Float[Tensor, "2 3"]) -> None:
        super().__init__()
        self.register_buffer("centre", aabb.float().mean(dim=0))
        self.register_buffer("reach", (aabb[1] - aabb[0]).float() / 2)

    def forward(self, positions: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:  # type: ignore[override]
        scaled = (positions - self.centre) / self.reach
        norm = (
            scaled.abs().amax(dim=-1, keepdim=True).clamp(min=1)
        )  # nerfstudio's linalg.norm takes eight times as long
        return scaled * ((2 - 1 / norm) / norm)

    def inverse(self, contracted: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
        """Where points (within [-2, 2]) come from."""
        norm = contracted.abs().amax(dim=-1, keepdim=True)
        stretch = 1 / (norm * (2 - norm)).clamp(min=1 / FARTHEST)
        return self.centre + self.reach * torch.where(norm <= 1, contracted, contracted * stretch)
