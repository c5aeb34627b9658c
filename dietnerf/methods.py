"""The methods as nerfstudio configurations: data, field, losses, optimizers. Both front doors start from these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from nerfstudio.engine.trainer import TrainerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.checks import require_one_of
from dietnerf.grid import DietGridModelConfig
from dietnerf.mlp import DietNeRFModelConfig, simplified_nerf_config
from dietnerf.model import FewViewModelConfig
from dietnerf.nerfacto import DietNerfactoModelConfig
from dietnerf.pipeline import FewViewPipelineConfig
from dietnerf.rays import FewViewDataManagerConfig
from dietnerf.regularizers import RegularizerConfig
from dietnerf.semantic import SemanticConfig

EXTRA = {"appearance": 5e-3, "camera_opt": 3e-4}
"""Learning rates of what may be learnt beside the field: exposures of photographs, and their poses."""
DESCRIPTIONS = {
    "dietnerf": "DietNeRF: the published MLP with the semantic consistency loss (for a GPU).",
    "dietnerf-nerfacto": "DietNeRF's losses on nerfacto's proposal sampling and hash grid.",
    "dietnerf-grid": "DietNeRF's losses on a dense voxel grid with total variation: minutes on a CPU.",
    "small-nerf": "DietNeRF's losses on an MLP that is small enough for minutes on a CPU.",
    "simplified-nerf": "The paper's Simplified NeRF baseline: no semantic loss, no fine network.",
}


@dataclass
class DecayConfig(SchedulerConfig):
    """Learning rate times rate^(step / steps) (Jain et al. 2021: x 0.1 per 500,000 steps)."""

    _target: type = field(default_factory=lambda: Decay)
    rate: float = 0.1
    """Factor over `steps`."""
    steps: int = 500_000
    """Steps over which it applies."""


class Decay(Scheduler):
    """Exponential decay in plain floats, which checkpoints hold without NumPy's types."""

    config: DecayConfig

    def factor(self, step: int) -> float:
        """Of the learning rate at `step`."""
        return float(self.config.rate ** (step / max(1, self.config.steps)))

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LambdaLR:
        return LambdaLR(optimizer, self.factor)


@dataclass
class FewViewTrainerConfig(TrainerConfig):
    """nerfstudio's trainer configuration, for a run that may lie in a directory of the user's own choice."""

    pipeline: FewViewPipelineConfig = field(default_factory=FewViewPipelineConfig)
    """Scene, field and losses."""
    run_directory: Path | None = None
    """Where this run lies, instead of nerfstudio's OUTPUT_DIR/EXPERIMENT/METHOD/TIMESTAMP."""

    def get_base_dir(self) -> Path:
        """The directory of config.yml."""
        return super().get_base_dir() if self.run_directory is None else Path(self.run_directory)


def method_config(method: str) -> FewViewTrainerConfig:
    """A fresh configuration of a method.

    Raises:
        UserError: a name that is not among `DESCRIPTIONS`.
    """
    require_one_of("method", method, list(DESCRIPTIONS))
    model: FewViewModelConfig
    if method == "dietnerf":
        model = DietNeRFModelConfig(semantic=SemanticConfig(weight=0.1))
        return _trainer(method, model, lr=5e-4, steps=200_000, decay=DecayConfig())
    if method == "simplified-nerf":
        # nerfstudio's commands look a run's method up by its name, and know the entry points alone.
        return _trainer("dietnerf", simplified_nerf_config(), lr=5e-5, steps=200_000, decay=DecayConfig())
    if method == "small-nerf":
        model = DietNeRFModelConfig(
            num_layers=4,
            layer_width=64,
            num_coarse_samples=24,
            num_importance_samples=24,
            position_bands=5,
            direction_bands=2,
            density_activation="softplus",
            semantic=SemanticConfig(poses="sphere"),
        )
        decay = DecayConfig(steps=1000)
        return _trainer("dietnerf", model, lr=3e-3, steps=1000, decay=decay, rays_from="all", rays=512)
    if method == "dietnerf-nerfacto":
        model = DietNerfactoModelConfig(
            regularizers=RegularizerConfig(distortion=2e-3, depth=3e-3), semantic=SemanticConfig(poses="sphere")
        )
        return _trainer(method, model, lr=1e-2, steps=3000, decay=DecayConfig(steps=3000), rays_from="all")
    model = DietGridModelConfig(
        grow_at=(150, 400),
        regularizers=RegularizerConfig(
            density_variation=1.2e-3, colour_variation=2.4e-3, distortion=None, depth=0.03, silhouette=1.0
        ),
        semantic=SemanticConfig(poses="sphere"),
    )
    return _trainer(method, model, lr=0.3, steps=1000, decay=DecayConfig(steps=1000), rays_from="all", rays=4096)


def _trainer(
    method: str,
    model: FewViewModelConfig,
    *,
    lr: float,
    steps: int,
    decay: DecayConfig,
    rays: int = 1024,
    rays_from: Any = "one",
) -> FewViewTrainerConfig:
    eps = 1e-8 if method == "dietnerf" else 1e-15
    groups = dict.fromkeys(("fields", "proposal_networks") if method == "dietnerf-nerfacto" else ("fields",), lr)
    return FewViewTrainerConfig(
        method_name=method,
        steps_per_save=max(100, steps // 10),
        steps_per_eval_batch=500,
        steps_per_eval_image=500,
        steps_per_eval_all_images=max(1000, steps),
        max_num_iterations=steps,
        mixed_precision=False,
        pipeline=FewViewPipelineConfig(
            datamanager=FewViewDataManagerConfig(
                train_num_rays_per_batch=rays,
                rays_from=rays_from,
                crop_steps=500 if rays_from == "one" else 0,
            ),
            model=model,
        ),
        optimizers={
            name: {"optimizer": AdamOptimizerConfig(lr=rate, eps=eps, max_norm=1.0), "scheduler": decay}
            for name, rate in (groups | EXTRA).items()
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 13),
        vis="viewer",
    )
