"""How photographs of one scene differ in exposure and white balance: a gain and an offset a channel."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Appearance(nn.Module):
    """Colour c of the scene in photograph i: exp(g_i) c + b_i, where g and b are 0 on average over the photographs.

    So the scene itself, and every new view of it, has the mean exposure of the photographs.
    """

    def __init__(self, photographs: int) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(photographs, 3))
        self.offset = nn.Parameter(torch.zeros(photographs, 3))

    def forward(self, rgb: Float[Tensor, "r 3"], photograph: Int[Tensor, " r"]) -> Float[Tensor, "r 3"]:
        gain = (self.log_gain - self.log_gain.mean(dim=0)).exp()
        offset = self.offset - self.offset.mean(dim=0)
        return gain[photograph] * rgb + offset[photograph]
