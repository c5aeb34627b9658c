"""Radiance fields for few views, as nerfstudio Models: the published MLP, a hash grid, a dense voxel grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.models.base_model import Model, ModelConfig
from torch import Tensor
from torch.nn import Parameter

from dietnerf.regularizers import RegularizerConfig
from dietnerf.semantic import SemanticConfig, SemanticLoss


@dataclass
class FewViewModelConfig(ModelConfig):
    """What every field shares."""

    _target: type = field(default_factory=lambda: FewViewModel)
    background_color: Literal["white", "black", "random"] = "white"
    """Behind the scene. random teaches the field opacity and needs images with alpha."""
    near_plane: float = 2.0
    """Where rays start, in the scene's units (bounded fields: never before their box)."""
    far_plane: float = 6.0
    """Where rays end."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Semantic consistency loss."""
    regularizers: RegularizerConfig = field(default_factory=RegularizerConfig)
    """Priors."""


class FewViewModel(Model):
    """A field with its renderers and what `compute_losses` needs of it.

    `get_outputs` gives rgb (r, 3), accumulation (r, 1), depth (r, 1), rgb_coarse (r, 3) where there is a coarse
    network, all with gradients in training; in training also density, starts and what regularizers need.
    """

    config: FewViewModelConfig
    semantic_loss: SemanticLoss | None

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """Parameters by the optimizer's name: "fields", and "proposal_networks" for nerfacto."""
        raise NotImplementedError

    def set_semantic_targets(self, images: Float[Tensor, "n 3 h w"]) -> None:
        """Embed the training views, in [0, 1] over the background. Call once when the semantic weight is not 0."""
        raise NotImplementedError

    def needs_semantic_view(self, step: int) -> bool:
        """Whether this step's batch must hold a semantic view."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """What follows the schedule: mask, annealing, growth. Idempotent; both trainers call it before each step."""

    def after_step(self, step: int) -> None:
        """What follows an optimizer step; both trainers call it."""

    def get_training_callbacks(self, attributes: TrainingCallbackAttributes) -> list[TrainingCallback]:
        """`before_step` and `after_step` for nerfstudio's trainer."""
        raise NotImplementedError

    def render_view(self, rays: RayBundle, chunk: int | None = None) -> dict[str, Tensor]:
        """A whole view with gradients, in chunks under gradient checkpointing: rgb, rgb_coarse, depth,
        accumulation, each (h, w, c). `rays` has shape (h, w)."""
        raise NotImplementedError


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


@dataclass
class DietGridModelConfig(FewViewModelConfig):
    """A dense voxel grid, coarse to fine."""

    _target: type = field(default_factory=lambda: DietGridModel)
    resolutions: tuple[int, ...] = (32, 64, 96)
    """Cube root of the number of voxels, level by level."""
    grow_at: tuple[int, ...] = (300, 900)
    """Steps at which the next level starts; one fewer than the levels."""
    harmonics: int = 0
    """Degree of the spherical harmonics of colour; 0 is plain colour."""
    steps_per_voxel: float = 2.0
    """Samples along a ray for each voxel that it crosses."""


class DietGridModel(FewViewModel):
    """Density and colour by trilinear look-up; empty space is skipped."""

    config: DietGridModelConfig
