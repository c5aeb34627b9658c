"""Radiance fields for few views, as nerfstudio Models: the published MLP, a hash grid, a dense voxel grid."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import Frustums, RayBundle, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.field_components.activations import trunc_exp
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.field_components.spatial_distortions import SceneContraction
from nerfstudio.fields.density_fields import HashMLPDensityField
from nerfstudio.fields.nerfacto_field import NerfactoField
from nerfstudio.model_components.losses import interlevel_loss
from nerfstudio.model_components.ray_samplers import PDFSampler, ProposalNetworkSampler, UniformSampler
from nerfstudio.model_components.renderers import AccumulationRenderer, RGBRenderer
from nerfstudio.model_components.scene_colliders import AABBBoxCollider, NearFarCollider
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils import colormaps
from nerfstudio.utils.math import intersect_aabb
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from common.checks import UserError, require_above, require_at_least, require_between, require_one_of
from common.runtime import require_memory
from dietnerf.data import BLENDER_PLANES
from dietnerf.grid import VoxelGrid, bytes_of
from dietnerf.metrics import psnr, ssim
from dietnerf.mlp import PublishedField
from dietnerf.regularizers import RegularizerConfig, field_variation, frequency_mask
from dietnerf.semantic import SemanticConfig, SemanticLoss, check_semantic_config, is_due

VARIATION_POINTS = 512
"""Random points at which the total variation of a field without a grid is taken."""
VARIATION_DISTANCE = 0.01
"""Distance of its differences, as a share of the box's mean side."""
VISIBLE_WEIGHT = 1e-4
"""The grid looks up colour where a sample weighs more than this."""
SLOWEST_PROPOSALS = 4
"""Proposal networks of nerfacto learn at every step at first, then at every such many."""
PROPOSAL_WARMUP = 500
ANNEAL_STEPS = 300
"""Steps over which proposal weights go from flat to their own (mip-NeRF 360, equation 18)."""


class Samples(NamedTuple):
    """What regularizers need of the samples along r rays; distances in the scene's units."""

    density: Float[Tensor, "r s"]
    weights: Float[Tensor, "r s"]
    starts: Float[Tensor, "r s"]
    ends: Float[Tensor, "r s"]
    entry: Float[Tensor, "r 1"]
    """Where the ray comes to what may be filled."""


@dataclass
class FewViewModelConfig(ModelConfig):
    """What every field shares."""

    _target: type = field(default_factory=lambda: FewViewModel)
    background_color: Literal["white", "black", "random"] = "white"
    """Behind the scene. random trains over colours drawn anew for each ray, which teaches the field opacity and needs
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


class FewViewModel(Model):
    """A field with its renderers and what `compute_losses` needs of it.

    `get_outputs` gives rgb (r, 3), accumulation (r, 1), depth (r, 1), and the same with _coarse where there is a coarse
    network, all with gradients; in training also `samples`, for regularizers.
    """

    config: FewViewModelConfig
    field: Any
    semantic_loss: SemanticLoss | None
    near: float
    """The near plane."""
    far: float
    """The far plane."""
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
        self.collider = NearFarCollider(near_plane=self.near, far_plane=self.far, reset_near_plane=False)
        behind = config.background_color
        if behind == "random":
            behind = metadata.get("background", "white")
        self.renderer_rgb = RGBRenderer(background_color=behind)
        self.renderer_accumulation = AccumulationRenderer()
        self.semantic_loss = None

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """Parameters by the optimizer's name: "fields", and "proposal_networks" for nerfacto."""
        return {"fields": list(self.field.parameters())}

    def set_semantic_targets(self, images: Float[Tensor, "n 3 h w"]) -> None:
        """Embed the training views, in [0, 1] over the background. Call once when the semantic weight is not 0."""
        self.semantic_loss = SemanticLoss(self.config.semantic, images, self.device)

    def set_cameras(self, cameras: Cameras) -> None:
        """The training cameras of a scene whose images have alpha, for fields that leave unseen space empty."""

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
        from dietnerf.losses import prior_losses, reconstruction_losses

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
    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        """Outputs of rays (r,) that have nears and fars."""

    def _visible_outputs(self, rays: RayBundle, on_device: Tensor) -> dict[str, Tensor]:
        """What is seen of rays. `checkpoint` draws the same again in the backward pass, on a GPU only where it is given
        a tensor of it (a RayBundle is none)."""
        names = ("rgb", "depth", "accumulation")
        outputs: Any = self.forward(rays)
        return {name: value for name, value in outputs.items() if name.removesuffix("_coarse") in names}

    def _composite(
        self, samples: RaySamples, outputs: dict[FieldHeadNames, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
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


@dataclass
class DietNeRFModelConfig(FewViewModelConfig):
    """The published MLP (Jain et al. 2021, after Mildenhall et al. 2020)."""

    _target: type = field(default_factory=lambda: DietNeRFModel)
    num_coarse_samples: int = 64
    """Samples along a ray for the coarse network."""
    num_importance_samples: int = 128
    """More samples for the fine network; 0: no fine network."""
    num_layers: int = 8
    """Layers of the density network."""
    layer_width: int = 256
    """Their width; the colour layer has half of it."""
    position_bands: int = 10
    """Frequency bands of positions: 2^0 to 2^(bands - 1)."""
    direction_bands: int = 4
    """Frequency bands of view directions."""
    use_view_directions: bool = True
    """Colour depends on where it is seen from."""
    density_activation: Literal["relu", "softplus"] = "relu"
    """relu as published; softplus cannot die."""


class DietNeRFModel(FewViewModel):
    """Coarse and fine MLP with hierarchical sampling."""

    config: DietNeRFModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        require_at_least("num_coarse_samples", self.config.num_coarse_samples, 2)
        require_at_least("num_importance_samples", self.config.num_importance_samples, 0)
        self.field_coarse = self._make_field()
        self.sampler_uniform = UniformSampler(num_samples=self.config.num_coarse_samples)
        self.field_fine: PublishedField | None = None
        if self.config.num_importance_samples:
            self.field_fine = self._make_field()
            self.sampler_pdf = PDFSampler(num_samples=self.config.num_importance_samples, histogram_padding=1e-5)

    @property
    def field(self) -> PublishedField:
        """The network whose render counts."""
        return self.field_fine or self.field_coarse

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        fields = [self.field_coarse] + ([self.field_fine] if self.field_fine is not None else [])
        return {"fields": [parameter for one in fields for parameter in one.parameters()]}

    def update_to_step(self, step: int) -> None:
        """Move the frequency mask."""
        if self.config.regularizers.frequency_steps:
            for one in {self.field_coarse, self.field}:
                one.set_mask(step, self.config.regularizers.frequency_steps)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        samples = self.sampler_uniform(ray_bundle)
        found = self.field_coarse(samples)
        outputs: dict[str, Any]
        outputs, weights = self._composite(samples, found)
        if self.field_fine is not None:
            outputs = {f"{name}_coarse": value for name, value in outputs.items()}
            samples = self.sampler_pdf(ray_bundle, samples, weights)
            found = self.field_fine(samples)
            fine, weights = self._composite(samples, found)
            outputs |= fine
        if self.training:
            outputs["samples"] = _samples_of(samples, found, weights, self.entry(ray_bundle))
        return outputs

    def _make_field(self) -> PublishedField:
        config = self.config
        return PublishedField(
            num_layers=config.num_layers,
            layer_width=config.layer_width,
            position_bands=config.position_bands,
            direction_bands=config.direction_bands,
            use_view_directions=config.use_view_directions,
            density_activation=config.density_activation,
        )


def simplified_nerf_config() -> DietNeRFModelConfig:
    """The *Simplified NeRF* baseline of the authors' released configurations: 6 bands, 128 samples, no fine network
    (trained with Adam at 5e-5)."""
    return DietNeRFModelConfig(position_bands=6, num_coarse_samples=128, num_importance_samples=0)


@dataclass
class DietNerfactoModelConfig(FewViewModelConfig):
    """Nerfacto's proposal sampling and hash grid, small enough for a CPU."""

    _target: type = field(default_factory=lambda: DietNerfactoModel)
    bounded: bool = True
    """The scene lies inside its box (no contraction); otherwise space is contracted as in mip-NeRF 360."""
    num_levels: int = 8
    """Levels of the hash grid."""
    max_res: int = 256
    """Resolution of its finest level."""
    log2_hashmap_size: int = 15
    """Entries of a level, as a power of 2."""
    hidden_dim: int = 32
    """Width of the two small networks."""
    num_proposal_samples_per_ray: tuple[int, ...] = (64, 32)
    """Samples of each proposal network."""
    num_nerf_samples_per_ray: int = 24
    """Samples of the field."""
    interlevel_weight: float = 1.0
    """Weight of the loss that trains the proposal networks."""
    implementation: Literal["torch", "tcnn"] = "torch"
    """torch runs everywhere; tcnn needs a GPU and tiny-cuda-nn."""


class DietNerfactoModel(FewViewModel):
    """Proposal networks, hash grid, small MLPs."""

    config: DietNerfactoModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        config = self.config
        if config.regularizers.frequency_steps and config.implementation == "tcnn":
            raise UserError("regularizers.frequency_steps needs the hash grid's torch implementation: use torch.")
        contraction = None if config.bounded else SceneContraction(order=float("inf"))
        if config.bounded:
            self.collider = BoxCollider(self.scene_box, self.near, (config.near, config.far))
        self.field = HashField(
            self.scene_box.aabb,
            num_images=self.num_train_data,
            hidden_dim=config.hidden_dim,
            hidden_dim_color=config.hidden_dim,
            num_levels=config.num_levels,
            max_res=config.max_res,
            log2_hashmap_size=config.log2_hashmap_size,
            appearance_embedding_dim=0,
            spatial_distortion=contraction,
            implementation=config.implementation,
        )
        self.proposal_networks = torch.nn.ModuleList(
            HashMLPDensityField(
                self.scene_box.aabb,
                hidden_dim=16,
                num_levels=5,
                max_res=min(128 * 2**index, config.max_res),
                log2_hashmap_size=min(15, config.log2_hashmap_size),
                spatial_distortion=contraction,
                implementation=config.implementation,
            )
            for index in range(len(config.num_proposal_samples_per_ray))
        )
        # Whether proposals learn depends on the step alone: a checkpointed render must do the same again.
        self.proposal_sampler = ProposalNetworkSampler(
            num_nerf_samples_per_ray=config.num_nerf_samples_per_ray,
            num_proposal_samples_per_ray=config.num_proposal_samples_per_ray,
            num_proposal_network_iterations=len(config.num_proposal_samples_per_ray),
            single_jitter=True,
            update_sched=lambda step: -1 if step < PROPOSAL_WARMUP or step % SLOWEST_PROPOSALS == 0 else float("inf"),
            initial_sampler=UniformSampler(single_jitter=True) if config.bounded else None,
        )
        self.level_mask: Tensor
        self.register_buffer("level_mask", torch.ones(config.num_levels), persistent=False)
        if config.implementation == "torch":
            encoding = self.field.mlp_base.model[0]
            encoding.register_forward_hook(
                lambda module, _, found: found * self.level_mask.repeat_interleave(module.features_per_level)
            )

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        return super().get_param_groups() | {"proposal_networks": list(self.proposal_networks.parameters())}

    def update_to_step(self, step: int) -> None:
        """Move the frequency mask (levels of the hash grid are its bands, the coarsest always on) and the annealing."""
        self.proposal_sampler.step_cb(step)
        bias, share = 10.0, min(step / ANNEAL_STEPS, 1.0)
        self.proposal_sampler.set_anneal(bias * share / ((bias - 1) * share + 1))
        total = self.config.regularizers.frequency_steps
        if total and self.config.num_levels > 1:
            bands = frequency_mask(self.config.num_levels - 1, step, total, 1, include_input=False)
            self.level_mask[1:] = bands[: self.config.num_levels - 1].to(self.level_mask)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        if ray_bundle.camera_indices is None:  # the field asks for them, and uses them for appearance only
            ray_bundle.camera_indices = torch.zeros_like(ray_bundle.origins[..., :1], dtype=torch.long)
        densities = [network.density_fn for network in self.proposal_networks]
        samples, weights_list, samples_list = self.proposal_sampler(ray_bundle, density_fns=densities)
        found = self.field(samples)
        outputs: dict[str, Any]
        outputs, weights = self._composite(samples, found)
        if self.training:
            outputs["samples"] = _samples_of(samples, found, weights, self.entry(ray_bundle))
            outputs["proposals"] = (weights_list + [weights], samples_list + [samples])
        return outputs

    def field_losses(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """What trains the proposal networks (mip-NeRF 360, equation 13)."""
        return {"interlevel": self.config.interlevel_weight * interlevel_loss(*outputs["proposals"])}


@dataclass
class DietGridModelConfig(FewViewModelConfig):
    """A dense voxel grid, coarse to fine."""

    _target: type = field(default_factory=lambda: DietGridModel)
    resolutions: tuple[int, ...] = (32, 64, 128)
    """Cube root of the number of voxels, level by level."""
    grow_at: tuple[int, ...] = (300, 900)
    """Steps at which the next level starts; one fewer than the levels."""
    harmonics: int = 0
    """Degree of the spherical harmonics of colour; 0 is plain colour."""
    steps_per_voxel: float = 1.5
    """Samples along a ray for each voxel that it crosses."""
    occupancy_every: int = 100
    """Steps between two looks at which cells are empty."""
    min_views: int = 2
    """What fewer training cameras see stays empty, where images have alpha; 1 lets one camera suffice."""


class DietGridModel(FewViewModel):
    """Density and colour by trilinear look-up; empty space is skipped."""

    config: DietGridModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        config = self.config
        if len(config.grow_at) != len(config.resolutions) - 1 or list(config.grow_at) != sorted(set(config.grow_at)):
            raise UserError(
                f"grow_at is {config.grow_at}: give {len(config.resolutions) - 1} rising steps, one fewer than the "
                f"resolutions."
            )
        for resolution in config.resolutions:
            require_at_least("resolutions", resolution, 4)
        require_between("harmonics", config.harmonics, 0, 4)
        require_at_least("occupancy_every", config.occupancy_every, 1)
        require_at_least("min_views", config.min_views, 1)
        require_above("steps_per_voxel", config.steps_per_voxel, 0)
        size = bytes_of(config.resolutions, config.harmonics)
        require_memory(f"resolutions is {config.resolutions}", size, torch.device("cpu"), "use smaller ones")
        if config.regularizers.frequency_steps:
            raise UserError("regularizers.frequency_steps: a grid has none; its levels (grow_at) do the same.")
        self.field = VoxelGrid(self.scene_box.aabb, config.resolutions, config.harmonics)
        chosen = config.near, config.far
        self.collider = BoxCollider(SceneBox(self.field.aabb), self.near, chosen, self.field)

    def before_step(self, step: int) -> None:
        """Grow into the next level when its step has come, and look now and then which cells are empty."""
        level = sum(start <= step for start in self.config.grow_at)
        # Before, what is thin may only be unlearnt.
        settled = step - self.began >= 2 * self.config.occupancy_every
        while int(self.field.level) < level:
            self.field.grow(crop=settled)
        if step % self.config.occupancy_every == 0:
            self.field.update_occupancy(settled=settled)

    def set_cameras(self, cameras: Cameras) -> None:
        self.field.keep_to(cameras, self.config.min_views)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        grid, origins, directions = self.field, ray_bundle.origins, ray_bundle.directions
        near, far = ray_bundle.nears, ray_bundle.fars
        assert near is not None and far is not None
        step = grid.voxel.mean().item() / self.config.steps_per_voxel
        ray, slot, middle = grid.march(origins, directions, near, far, step, jitter=self.training)
        width = int(slot.max()) + 1 if len(slot) else 1
        corners = grid.locate(origins[ray] + middle[:, None] * directions[ray])
        table = (len(origins), width)
        where = (ray, slot)
        density = origins.new_zeros(table).index_put(where, grid.density(corners))
        starts = near.expand(table).index_put(where, middle - step / 2)
        ends = starts.index_put(where, middle + step / 2)  # unused slots have no length
        samples = ray_bundle.get_ray_samples(bin_starts=starts[..., None], bin_ends=ends[..., None])
        weights = samples.get_weights(density[..., None])
        seen = weights.detach()[ray, slot, 0] > VISIBLE_WEIGHT
        colour = grid.colour(corners.of(seen), directions[ray[seen]])
        rgb = origins.new_zeros(*table, 3).index_put((ray[seen], slot[seen]), colour)
        outputs: dict[str, Any] = {
            "rgb": self.renderer_rgb(rgb=rgb, weights=weights),
            "accumulation": self.renderer_accumulation(weights=weights),
            "depth": self._depth(weights[..., 0], starts, ends),
        }
        if self.training:
            outputs["samples"] = Samples(density, weights[..., 0], starts, ends, self.entry(ray_bundle))
        return outputs

    def variation(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        return self.field.variation()


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
        source: VoxelGrid | None = None,
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


class HashField(NerfactoField):
    """Nerfacto's field without gradients for positions, which only normals need and which cost as much again."""

    def get_density(self, ray_samples: RaySamples) -> tuple[Tensor, Tensor]:
        positions = ray_samples.frustums.get_positions()
        if self.spatial_distortion is not None:
            positions = (self.spatial_distortion(positions) + 2.0) / 4.0
        else:
            positions = SceneBox.get_normalized_positions(positions, self.aabb)
        inside = ((positions > 0.0) & (positions < 1.0)).all(dim=-1, keepdim=True)
        found = self.mlp_base((positions * inside).view(-1, 3)).view(*ray_samples.frustums.shape, -1)
        raw, embedding = torch.split(found, [1, self.geo_feat_dim], dim=-1)
        return self.average_init_density * trunc_exp(raw.to(positions)) * inside, embedding


def point_samples(positions: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"]) -> RaySamples:
    """Single points as samples, for asking a field outside of rendering."""
    zeros = torch.zeros_like(positions[:, :1])
    frustums = Frustums(
        origins=positions, directions=directions, starts=zeros, ends=zeros, pixel_area=torch.ones_like(zeros)
    )
    return RaySamples(frustums=frustums, camera_indices=zeros.long())


def _samples_of(
    samples: RaySamples, found: dict[FieldHeadNames, Tensor], weights: Float[Tensor, "r s 1"], entry: Tensor
) -> Samples:
    starts, ends = samples.frustums.starts[..., 0], samples.frustums.ends[..., 0]
    return Samples(found[FieldHeadNames.DENSITY][..., 0], weights[..., 0], starts, ends, entry)
