"""nerfacto's hash grid (Tancik et al. 2023) as a field for few views."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.activations import trunc_exp
from nerfstudio.fields.density_fields import HashMLPDensityField
from nerfstudio.fields.nerfacto_field import NerfactoField
from nerfstudio.model_components.losses import interlevel_loss
from nerfstudio.model_components.ray_samplers import ProposalNetworkSampler, UniformSampler
from torch import Tensor
from torch.nn import Parameter

from common.checks import UserError
from dietnerf.model import BoxCollider, FewViewModel, FewViewModelConfig, samples_of
from dietnerf.regularizers import frequency_mask

SLOWEST_PROPOSALS = 4
"""Proposal networks of nerfacto learn at every step at first, then at every such many."""
PROPOSAL_WARMUP = 500
ANNEAL_STEPS = 300
"""Steps over which proposal weights go from flat to their own (mip-NeRF 360, equation 18)."""


@dataclass
class DietNerfactoModelConfig(FewViewModelConfig):
    """Nerfacto's proposal sampling and hash grid, small enough for a CPU."""

    _target: type = field(default_factory=lambda: DietNerfactoModel)
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
        if self.contraction is None:
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
            spatial_distortion=self.contraction,
            implementation=config.implementation,
        )
        self.proposal_networks = torch.nn.ModuleList(
            HashMLPDensityField(
                self.scene_box.aabb,
                hidden_dim=16,
                num_levels=5,
                max_res=min(128 * 2**index, config.max_res),
                log2_hashmap_size=min(15, config.log2_hashmap_size),
                spatial_distortion=self.contraction,
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
            initial_sampler=UniformSampler(single_jitter=True) if self.contraction is None else None,
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

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:  # type: ignore[override]
        if ray_bundle.camera_indices is None:  # the field asks for them, and uses them for appearance only
            ray_bundle.camera_indices = torch.zeros_like(ray_bundle.origins[..., :1], dtype=torch.long)
        densities = [network.density_fn for network in self.proposal_networks]
        samples, weights_list, samples_list = self.proposal_sampler(ray_bundle, density_fns=densities)
        found = self.field(samples)
        outputs, weights = self._composite(samples, found)
        if self.training:
            outputs["samples"] = samples_of(samples, found, weights, self.entry(ray_bundle))
            outputs["proposals"] = (weights_list + [weights], samples_list + [samples])
        return outputs

    def field_losses(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """What trains the proposal networks (mip-NeRF 360, equation 13)."""
        return {"interlevel": self.config.interlevel_weight * interlevel_loss(*outputs["proposals"])}


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
