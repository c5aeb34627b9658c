"""The losses of a training step: the one place that both trainers, nerfstudio's and Lightning's, call."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nerfstudio.cameras.rays import RayBundle

    from dietnerf.model import FewViewModel


class Batch(TypedDict, total=False):
    """What a training step needs."""

    ray_bundle: RayBundle
    """Rays of training pixels (r,)."""
    rgb: Tensor
    """Their colours in [0, 1], (r, 3), or (r, 4) with alpha that is blended over the model's background."""
    semantic_view: RayBundle | None
    """Rays of a random view (h, w); needed on steps where `model.needs_semantic_view(step)`."""


def compute_losses(
    model: FewViewModel, batch: Batch, step: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The weighted terms of a step, whose sum is minimised: rgb, rgb_coarse, semantic, semantic_coarse, occlusion,
    density_variation, colour_variation, distortion, interlevel; a term that is off is absent.

    Call `model.before_step(step)` first. `rgb` is the plain mean squared error, so PSNR = -10 log10(rgb).

    Raises:
        UserError: a due semantic step without a view, or without targets.
    """
    raise NotImplementedError
