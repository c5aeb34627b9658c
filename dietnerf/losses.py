"""The losses of a training step: the one place that both trainers, nerfstudio's and Lightning's, call."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from common.checks import UserError
from dietnerf.regularizers import distortion_loss, occlusion_loss

if TYPE_CHECKING:
    from nerfstudio.cameras.rays import RayBundle

    from dietnerf.model import FewViewModel


class _Required(TypedDict):
    ray_bundle: RayBundle
    """Rays of training pixels (r,)."""
    rgb: Tensor
    """Their colours in [0, 1], (r, 3), or (r, 4) with alpha that is blended over the model's background."""


class Batch(_Required, total=False):
    """What a training step needs."""

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
    outputs = model(batch["ray_bundle"])
    losses = reconstruction_losses(model, outputs, batch["rgb"]) | prior_losses(model, outputs)
    if model.needs_semantic_view(step):
        losses |= semantic_losses(model, batch.get("semantic_view"), generator)
    return losses


def reconstruction_losses(model: FewViewModel, outputs: dict[str, Tensor], rgb: Tensor) -> dict[str, Tensor]:
    """Mean squared error of the colours, and of the coarse network's."""
    losses: dict[str, Tensor] = {}
    for name in ("rgb", "rgb_coarse"):
        if name in outputs:
            rendered, target = model.renderer_rgb.blend_background_for_loss_computation(
                pred_image=outputs[name],
                pred_accumulation=outputs[name.replace("rgb", "accumulation")],
                gt_image=rgb.to(outputs[name].device),
            )
            losses[name] = torch.nn.functional.mse_loss(rendered, target)
    return losses


def prior_losses(model: FewViewModel, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The regularizers that are on, and what the field itself needs, weighted."""
    config, samples = model.config.regularizers, outputs["samples"]
    losses = dict(model.field_losses(outputs))
    if config.occlusion:
        near = occlusion_loss(samples.density, samples.starts, samples.near, config.occlusion_distance)
        losses["occlusion"] = config.occlusion * near
    if config.distortion:
        losses["distortion"] = config.distortion * distortion_loss(samples.weights, samples.starts, samples.ends)
    if config.density_variation or config.colour_variation:
        density, colour = model.variation()
        if config.density_variation:
            losses["density_variation"] = config.density_variation * density
        if config.colour_variation:
            losses["colour_variation"] = config.colour_variation * colour
    return losses


def semantic_losses(
    model: FewViewModel, view: RayBundle | None, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The semantic loss of the fine and the coarse render of a random view, weighted."""
    if view is None:
        raise UserError("batch has no semantic_view on a semantic step: add the rays of a random view.")
    if model.semantic_loss is None:
        raise UserError("the semantic loss has no targets: call model.set_semantic_targets with the training views.")
    rendered = model.render_view(view)
    names = [name for name in ("rgb", "rgb_coarse") if name in rendered]
    values = model.semantic_loss(torch.stack([rendered[name] for name in names]), generator)
    weight = model.config.semantic.weight
    return {name.replace("rgb", "semantic"): weight * value for name, value in zip(names, values, strict=True)}
