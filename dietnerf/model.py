"""What every radiance field for few views shares, as a nerfstudio Model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_optimizers import CameraOptimizer, CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import Frustums, RayBundle, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.model_components.renderers import AccumulationRenderer, RGBRenderer
from nerfstudio.model_components.scene_colliders import AABBBoxCollider, NearFarCollider
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils import colormaps
from nerfstudio.utils.math import intersect_aabb
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from common.checks import UserError, require_above, require_at_least, require_fields_at_least, require_one_of
from dietnerf.appearance import Appearance
from dietnerf.contraction import Contraction
from dietnerf.data import BLENDER_PLANES
from dietnerf.losses import prior_losses, reconstruction_losses
from dietnerf.metrics import psnr, ssim
from dietnerf.regularizers import RegularizerConfig, Samples, field_variation
from dietnerf.semantic import SemanticConfig, SemanticLoss, check_semantic_config, is_due

VARIATION_POINTS = 512
"""Random points at which the total variation of a field without a grid is taken."""
VARIATION_DISTANCE = 0.01
"""Distance of its differences, as a share of the box's mean side."""
VISIBLE_WEIGHT = 1e-4
"""The grid looks up colour where a sample weighs more than this."""


@dataclass
class FewViewModelConfig(ModelConfig):
    """What every field shares."""

    _target: type = field(default_factory=lambda: FewViewModel)
    background_color: Literal["white", "black", "random"] = "white"
    """Behind the scene. random trains over colours redrawn for each ray, which teaches the field opacity and needs
    images with alpha; it renders over the scene's own background."""
    near: float | None = None
    """Where rays start, in training and in renders, in the scene's units (bounded fields: never before their box). Left
    out, where it suits the layout of the scene; renders of bounded fields then start at their box."""
    far: float | None = None
    """Where rays end (bounded fields: never behind their box). Left out, where it suits the layout of the scene; rays
    through bounded fields then end with their box."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Semantic consistency loss."""
    regularizers: RegularizerConfig = field(default_factory=RegularizerConfig)
    """Priors."""
    appearance: Literal["auto", "on", "off"] = "auto"
    """Let each training photograph have its own gain and offset of colour, as exposures differ; renders have the mean
    one. auto: where the space outside the box is contracted."""
    refine_poses: bool = False
    """Move the training cameras while training (nerfstudio's camera optimizer)."""


class FewViewModel(Model):
    """A field with its renderers and what `compute_losses` needs of it.

    `get_outputs` gives rgb (r, 3), accumulation (r, 1), depth (r, 1), and the same with _coarse where there is a coarse
    network, all with gradients; in training also `samples`, for regularizers.
    """

    config: FewViewModelConfig
    field: Any
    collider: Any
    """Gives rays their near and far."""
    contraction: Contraction | None
    """Of the space outside the scene's box; None: there is nothing outside."""
    appearance: Appearance | None
    """Of the training photographs; None: they are as the scene is."""
    semantic_loss: SemanticLoss | None
    near: float
    """The near plane."""
    far: float
    """The far plane."""
    behind_all: Literal["black", "last_sample"] = "last_sample"
    """Colour behind a photograph's whole scene, where space is contracted."""
    began: int = 0
    """The step at which the field began: another than 0 after a restart."""

    def populate_modules(self) -> None:
        """Collider and renderers; nothing that would be downloaded."""
        config, metadata = self.config, self.kwargs.get("metadata", {})
        require_one_of("background_color", config.background_color, ("white", "black", "random"))
        near, far = metadata.get("planes", BLENDER_PLANES)
        self.near = near if config.near is None else config.near
        self.far = far if config.far is None else config.far
        require_at_least("near", self.near, 0)
        require_above("far", self.far, self.near)
        check_semantic_config(config.semantic)
        weights = [name for name, value in vars(config.regularizers).items() if value is not None]
        require_fields_at_least(config.regularizers, 0, *weights)
        self.contraction = Contraction(self.scene_box.aabb) if metadata.get("unbounded") else None
        require_one_of("appearance", config.appearance, ("auto", "on", "off"))
        with_appearance = bool(metadata.get("unbounded")) if config.appearance == "auto" else config.appearance == "on"
        self.appearance = Appearance(self.num_train_data) if with_appearance else None
        self.camera_optimizer: CameraOptimizer | None = None
        if config.refine_poses:
            mode = CameraOptimizerConfig(mode="SO3xR3")
            self.camera_optimizer = mode.setup(num_cameras=self.num_train_data, device="cpu")
        self.collider = NearFarCollider(near_plane=self.near, far_plane=self.far, reset_near_plane=False)
        behind: Any = config.background_color
        if behind == "random":
            behind = metadata.get("background", "white")
        if self.contraction is not None and metadata.get("background") == "image":
            behind = self.behind_all
        self.renderer_rgb = RGBRenderer(background_color=behind)
        self.renderer_accumulation = AccumulationRenderer()
        self.semantic_loss = None

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """Parameters by the optimizer's name: "fields", "proposal_networks" of nerfacto, "appearance", "camera_opt"."""
        groups = {"fields": list(self.field.parameters())}
        for name, module in (("appearance", self.appearance), ("camera_opt", self.camera_optimizer)):
            if module is not None:
                groups[name] = list(module.parameters())
        return groups

    def set_semantic_targets(self, images: Float[Tensor, "n 3 h w"]) -> None:
        """Embed the training views, in [0, 1] over the background. Call once when the semantic weight is not 0."""
        self.semantic_loss = SemanticLoss(self.config.semantic, images, self.device)

    def set_cameras(self, cameras: Cameras) -> None:
        """The training cameras of a scene whose images have alpha, for fields that leave unseen space empty."""

    def refined(self, rays: RayBundle) -> RayBundle:
        """Rays (r,) of training cameras, where these stand by now."""
        if self.camera_optimizer is None:
            return rays
        rays = replace(rays, camera_indices=rays.camera_indices)
        self.camera_optimizer.apply_to_raybundle(rays)
        return rays

    def as_photographed(self, rgb: Float[Tensor, "r 3"], rays: RayBundle) -> Float[Tensor, "r 3"]:
        """Rendered colours as the photographs have them that the rays are of."""
        if self.appearance is None:
            return rgb
        assert rays.camera_indices is not None
        return self.appearance(rgb, rays.camera_indices[:, 0])

    def needs_semantic_view(self, step: int) -> bool:
        """Whether this step's batch must hold a semantic view."""
        return is_due(self.config.semantic, step)

    def entry(self, rays: RayBundle) -> Float[Tensor, "r 1"]:
        """Where rays come to what may be filled: the near plane, or the box of a bounded field as it was at first (one
        that is cropped to the thing begins at its surface)."""
        near = torch.full_like(rays.origins[..., :1], self.near)
        if not isinstance(self.collider, BoxCollider):
            return near
        box = self.scene_box.aabb.flatten().to(rays.origins)
        return torch.maximum(near, intersect_aabb(rays.origins, rays.directions, box)[0][..., None])

    def before_step(self, step: int) -> None:
        """What follows the schedule: mask, annealing, growth. Idempotent; both trainers call it before each step."""
        self.update_to_step(step)

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """`before_step` for nerfstudio's trainer."""
        place = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION
        return [TrainingCallback(where_to_run=[place], update_every_num_iters=1, func=self.before_step)]

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Tensor], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The terms that need no semantic view, for nerfstudio's own pipeline."""
        losses = reconstruction_losses(self, outputs, batch["image"], batch.get("alpha"))
        return losses | prior_losses(self, outputs) if "samples" in outputs else losses

    def field_losses(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """Weighted terms that the field itself cannot train without."""
        return {}

    def variation(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Total variation of density and of colour, at random points of the scene's box and in random directions."""
        low, high = self.scene_box.aabb.to(self.device)
        positions = low + (high - low) * torch.rand(VARIATION_POINTS, 3, device=self.device)
        directions = torch.nn.functional.normalize(torch.randn_like(positions), dim=-1).repeat(4, 1)

        def density_and_colour(points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 4"]:
            outputs = self.field(point_samples(points, directions))
            return torch.cat([outputs[FieldHeadNames.DENSITY], outputs[FieldHeadNames.RGB]], dim=-1)

        distance = VARIATION_DISTANCE * (high - low).mean().item()
        variation = field_variation(density_and_colour, positions, distance)
        return variation[0], variation[1:].mean()

    def render_view(self, rays: RayBundle, chunk: int | None = None) -> dict[str, Tensor]:
        """A whole view with gradients, in chunks under gradient checkpointing.

        Args:
            rays: of shape (h, w).
            chunk: rays at once; None is the semantic loss's.

        Returns:
            rgb, depth and accumulation, and the same with _coarse, each (h, w, c).

        Raises:
            UserError: no memory for a chunk.
        """
        shape = rays.origins.shape[:-1]
        size = chunk or self.config.semantic.chunk
        parts: dict[str, list[Tensor]] = {}
        flat = rays.flatten()
        for first in range(0, len(flat), size):
            part = flat[first : first + size].to(self.device)
            try:
                found = checkpoint(self._visible_outputs, part, part.origins, use_reentrant=False)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's is a plain one
                if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                    raise
                raise UserError(f"no memory for a chunk of {size} rays: use {max(1, size // 4)} or fewer.") from error
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values).view(*shape, -1) for name, values in parts.items()}

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR and SSIM, and pictures of the truth beside the render, its opacity and its depth."""
        rgb = outputs["rgb"]
        truth, mask = self.renderer_rgb.blend_background(batch["image"].to(rgb.device)), batch.get("mask")
        if mask is not None:  # what it hides is shown, and to SSIM it is as rendered
            mask = mask.to(rgb.device)
        depth = colormaps.apply_depth_colormap(outputs["depth"], outputs["accumulation"], self.near, self.far)
        images = {
            "img": torch.cat([truth, rgb], dim=1),
            "accumulation": colormaps.apply_colormap(outputs["accumulation"]),
            "depth": depth,
        }
        seen = truth if mask is None else torch.where(mask, truth, rgb)
        return {"psnr": psnr(rgb, truth, mask), "ssim": ssim(rgb, seen)}, images

    @abstractmethod
    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:  # type: ignore[override]
        """Outputs of rays (r,) that have nears and fars. (nerfstudio's models are declared to take cameras too.)"""

    def _visible_outputs(self, rays: RayBundle, on_device: Tensor) -> dict[str, Tensor]:
        """What is seen of rays. `checkpoint` draws the same again in the backward pass, on a GPU only where it is given
        a tensor of it (a RayBundle is none)."""
        names = ("rgb", "depth", "accumulation")
        outputs: Any = self.forward(rays)
        return {name: value for name, value in outputs.items() if name.removesuffix("_coarse") in names}

    def _composite(self, samples: RaySamples, outputs: dict[FieldHeadNames, Tensor]) -> tuple[dict[str, Any], Tensor]:
        """rgb, accumulation, depth and the weights (r, s, 1) that they were made with."""
        weights = samples.get_weights(outputs[FieldHeadNames.DENSITY])
        rendered = {
            "rgb": self.renderer_rgb(rgb=outputs[FieldHeadNames.RGB], weights=weights),
            "accumulation": self.renderer_accumulation(weights=weights),
        }
        starts, ends = samples.frustums.starts[..., 0], samples.frustums.ends[..., 0]
        rendered["depth"] = self._depth(weights[..., 0], starts, ends)
        return rendered, weights

    def _depth(
        self, weights: Float[Tensor, "r s"], starts: Float[Tensor, "r s"], ends: Float[Tensor, "r s"]
    ) -> Float[Tensor, "r 1"]:
        """Expected distance, the background being at the far plane. (Nerfstudio's DepthRenderer leaves the background
        out and clips to the nearest and farthest sample of all rays, so that its values depend on the chunk.)"""
        middle = (starts + ends) / 2
        return self.far + (weights * (middle - self.far)).sum(dim=-1, keepdim=True)


class Boxed(Protocol):
    """Has a box, which may shrink while it trains."""

    @property
    def aabb(self) -> Float[Tensor, "2 3"]: ...


class BoxCollider(AABBBoxCollider):
    """Rays from where they enter a box to where they leave it; the box follows its owner's device and cropping.

    Args:
        near_plane: before which no ray starts in training.
        chosen: near and far plane that hold in renders as well, where the user has given them.
    """

    def __init__(
        self,
        scene_box: SceneBox,
        near_plane: float,
        chosen: tuple[float | None, float | None],
        source: Boxed | None = None,
    ) -> None:
        super().__init__(scene_box, near_plane=near_plane)
        self.chosen = chosen
        self._source = (source,)  # a tuple: the owner's module, not ours

    def set_nears_and_fars(self, ray_bundle: RayBundle) -> RayBundle:
        (source,) = self._source
        aabb = self.scene_box.aabb if source is None else source.aabb
        near, far = self._intersect_with_aabb(
            ray_bundle.origins, ray_bundle.directions, aabb.to(ray_bundle.origins.device)
        )
        first, last = self.chosen
        if first is not None:
            near = near.clamp(min=first)
        if last is not None:
            far = far.clamp(max=last)
        ray_bundle.nears, ray_bundle.fars = near[..., None], torch.maximum(far, near + 1e-6)[..., None]
        return ray_bundle


def point_samples(positions: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"]) -> RaySamples:
    """Single points as samples, for asking a field outside of rendering."""
    zeros = torch.zeros_like(positions[:, :1])
    frustums = Frustums(
        origins=positions, directions=directions, starts=zeros, ends=zeros, pixel_area=torch.ones_like(zeros)
    )
    return RaySamples(frustums=frustums, camera_indices=zeros.long())


def samples_of(
    samples: RaySamples, found: dict[FieldHeadNames, Tensor], weights: Float[Tensor, "r s 1"], entry: Tensor
) -> Samples:
    starts, ends = samples.frustums.starts[..., 0], samples.frustums.ends[..., 0]
    return Samples(found[FieldHeadNames.DENSITY][..., 0], weights[..., 0], starts, ends, entry)


def __getattr__(name: str) -> Any:
    """The fields, which configurations that 0.1.0 wrote look for here."""
    from importlib import import_module

    homes = {"DietNeRF": "mlp", "DietNerfacto": "nerfacto", "DietGrid": "grid"}
    for start, home in homes.items():
        if name in (f"{start}Model", f"{start}ModelConfig"):
            return getattr(import_module(f"dietnerf.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
