"""A tiny configuration of each field."""

from dietnerf.grid import DietGridModelConfig
from dietnerf.mlp import DietNeRFModelConfig
from dietnerf.nerfacto import DietNerfactoModelConfig

CONFIGS = {
    "mlp": DietNeRFModelConfig(
        num_coarse_samples=6,
        num_importance_samples=8,
        num_layers=2,
        layer_width=16,
        position_bands=4,
        density_activation="softplus",
    ),
    "nerfacto": DietNerfactoModelConfig(
        num_levels=3,
        max_res=32,
        log2_hashmap_size=8,
        hidden_dim=8,
        num_proposal_samples_per_ray=(8, 6),
        num_nerf_samples_per_ray=6,
    ),
    "grid": DietGridModelConfig(resolutions=(8, 12), grow_at=(3,)),
}
