"""The losses of a training step: the one place that both trainers, nerfstudio's and Lightning's, call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from common.checks import UserError
from dietnerf.regularizers import Samples, depth_smoothness, distortion_loss, occlusion_loss, point_depth_loss

if TYPE_CHECKING:
    from nerfstudio.cameras.rays import RayBundle

LEAST_GRADIENT = 1e-12
"""A smaller norm of the semantic loss's gradient is none."""


class TrainedField(Protocol):
    """What the losses ask of a field (`dietnerf.model.FewViewModel` is one)."""

    config: Any
    """Has `background_color`, `regularizers` and `semantic`."""
    renderer_rgb: Any
    far: float
    num_train_data: int
    semantic_loss: Any
    __call__: Callable[..., Any]

    def field_losses(self, outputs: dict[str, Any]) -> dict[str, Tensor]: ...
    def variation(self) -> tuple[Tensor, Tensor]: ...
    def refined(self, rays: RayBundle) -> RayBundle: ...
    def as_photographed(self, rgb: Tensor, rays: RayBundle) -> Tensor: ...
    def render_view(self, rays: RayBundle) -> dict[str, Tensor]: ...
    def needs_semantic_view(self, step: int) -> bool: ...
    def get_param_groups(self) -> dict[str, list[Any]]: ...


class PointRays(NamedTuple):
    """Rays from training cameras to sparse points that their photographs see."""

    rays: RayBundle
    depth: Tensor
    """Distance to the point (r,), in the scene's units."""
    confidence: Tensor
    """How much each counts (r,)."""


class _Required(TypedDict):
    ray_bundle: RayBundle
    """Rays of training pixels (r,)."""
    rgb: Tensor
    """Their colours in [0, 1], (r, 3) over the model's background, or (r, 4) with alpha that is blended over it."""


class Batch(_Required, total=False):
    """What a training step needs."""

    alpha: Tensor | None
    """Opacity (r, 1) of the pixels whose colours are (r, 3); the silhouette's truth, and needed when the model's
    background is random."""
    patches: RayBundle
    """Rays (n, p, p) of patches from random poses; needed when the depth smoothness is on."""
    points: PointRays | None
    """Rays to sparse points; used when the weight of their depth is not 0."""
    semantic_view: RayBundle | None
    """Rays of a random view (h, w); needed on steps where `model.needs_semantic_view(step)`."""


def compute_losses(
    model: TrainedField, batch: Batch, step: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The weighted terms of a step, whose sum is minimised: rgb, rgb_coarse, silhouette, silhouette_coarse, semantic,
    semantic_coarse, occlusion, density_variation, colour_variation, distortion, depth, depth_smoothness, interlevel; a
    term that is off is absent.

    Call `model.before_step(step)` first. `rgb` is the plain mean squared error, so PSNR = -10 log10(rgb).

    Raises:
        UserError: a due semantic step without a view or targets, a random background without alpha, or a depth
            smoothness without patches.
    """
    rays = model.refined(batch["ray_bundle"])
    outputs = model(rays)
    outputs |= {name: model.as_photographed(outputs[name], rays) for name in ("rgb", "rgb_coarse") if name in outputs}
    losses = reconstruction_losses(model, outputs, batch["rgb"], batch.get("alpha")) | prior_losses(model, outputs)
    if model.config.regularizers.depth and batch.get("points") is not None:
        losses["depth"] = depth_loss(model, batch["points"])
    if model.config.regularizers.depth_smoothness:
        losses["depth_smoothness"] = patch_loss(model, batch.get("patches"))
    if model.needs_semantic_view(step):
        semantic = semantic_losses(model, batch.get("semantic_view"), generator)
        if model.config.semantic.balance:
            scale = balance(model, [losses[name] for name in ("rgb", "rgb_coarse") if name in losses], semantic)
            semantic = {name: scale * value for name, value in semantic.items()}
        losses |= semantic
    return losses


def reconstruction_losses(
    model: TrainedField, outputs: dict[str, Any], rgb: Tensor, alpha: Tensor | None = None
) -> dict[str, Tensor]:
    """Mean squared error of the colours and, weighted, of the opacity, and the coarse network's; see `Batch` for rgb
    and alpha."""
    renderer, rgb = model.renderer_rgb, rgb.to(outputs["rgb"].device)
    if rgb.shape[-1] == 4:
        rgb, alpha = renderer.blend_background(rgb), rgb[..., 3:]
    change = None
    if model.config.background_color == "random":
        if alpha is None:
            raise UserError("background_color is 'random' but the batch has no alpha: use white or black.")
        own = renderer.get_background_color(renderer.background_color, shape=rgb.shape, device=rgb.device)
        change = torch.rand_like(rgb) - own
        rgb = rgb + change * (1 - alpha.to(rgb))
    losses: dict[str, Tensor] = {}
    for name in ("rgb", "rgb_coarse"):
        if name in outputs:
            rendered = outputs[name]
            if change is not None:
                rendered = rendered + change * (1 - outputs[name.replace("rgb", "accumulation")])
            losses[name] = torch.nn.functional.mse_loss(rendered, rgb)
    weight = model.config.regularizers.silhouette
    if weight and alpha is not None:
        for name in ("accumulation", "accumulation_coarse"):
            if name in outputs:
                error = torch.nn.functional.mse_loss(outputs[name], alpha.to(outputs[name]))
                losses[name.replace("accumulation", "silhouette")] = weight * error
    return losses


def depth_loss(model: TrainedField, points: PointRays | None) -> Tensor:
    """The weighted loss of the depths of sparse points."""
    assert points is not None
    samples: Samples = model(model.refined(points.rays))["samples"]
    found = point_depth_loss(samples.weights, samples.starts, samples.ends, points.depth, points.confidence)
    return model.config.regularizers.depth * found


def patch_loss(model: TrainedField, patches: RayBundle | None) -> Tensor:
    """The weighted depth smoothness of patches (n, p, p)."""
    if patches is None:
        raise UserError("batch has no patches but the depth smoothness is on: add rays of patches from random poses.")
    found = model(patches.flatten())
    shape = patches.origins.shape[:-1]
    smoothness = depth_smoothness(found["depth"].view(shape), found["accumulation"].view(shape), model.far)
    return model.config.regularizers.depth_smoothness * smoothness


def prior_losses(model: TrainedField, outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The regularizers that are on, and what the field itself needs, weighted."""
    config = model.config.regularizers
    samples: Samples = outputs["samples"]
    losses = dict(model.field_losses(outputs))
    if config.occlusion:
        near = occlusion_loss(samples.density, samples.starts, samples.entry, config.occlusion_distance)
        losses["occlusion"] = config.occlusion * near
    if config.distortion:
        losses["distortion"] = config.distortion * distortion_loss(samples.weights, samples.starts, samples.ends)
    if config.density_variation or config.colour_variation:
        density, colour = model.variation()
        if config.density_variation:
            losses["density_variation"] = config.density_variation / model.num_train_data * density
        if config.colour_variation:
            losses["colour_variation"] = config.colour_variation / model.num_train_data * colour
    return losses


def balance(model: TrainedField, images: list[Tensor], semantic: dict[str, Tensor]) -> Tensor:
    """What the semantic losses are multiplied by, so that `weight` is the ratio of their gradient's norm to that of the
    images' losses, both with respect to the field's parameters; 0 where they have no gradient, as beyond the hinge."""
    parameters = model.get_param_groups()["fields"]

    def norm(losses: Iterable[Tensor]) -> Tensor:
        found = torch.autograd.grad(torch.stack(list(losses)).sum(), parameters, retain_graph=True, allow_unused=True)
        return torch.stack([gradient.norm() for gradient in found if gradient is not None]).norm()

    unweighted = norm(semantic.values()) / model.config.semantic.weight
    return norm(images) / unweighted if unweighted > LEAST_GRADIENT else torch.zeros_like(unweighted)


def semantic_losses(
    model: TrainedField, view: RayBundle | None, generator: torch.Generator | None = None
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
