"""nerfstudio's pipeline for few views: gives `compute_losses` its rays and the random view; both trainers drive it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from torch import Tensor

from common.checks import UserError
from common.runtime import fork_generators
from dietnerf.data import FewViewDataset
from dietnerf.losses import Batch, compute_losses
from dietnerf.mlp import DietNeRFModelConfig
from dietnerf.model import FewViewModel, FewViewModelConfig
from dietnerf.poses import PoseRanges, estimate_ranges, sample_sphere
from dietnerf.rays import FewViewDataManager, FewViewDataManagerConfig, patch_rays
from dietnerf.semantic import ViewSampler

BLANK = 1e-3
"""A render whose colours spread less than this is blank."""


@dataclass
class FewViewPipelineConfig(VanillaPipelineConfig):
    """Few views, a field, and what happens when it stays blank."""

    _target: type = field(default_factory=lambda: FewViewPipeline)
    datamanager: FewViewDataManagerConfig = field(default_factory=FewViewDataManagerConfig)
    """Scene and rays."""
    model: FewViewModelConfig = field(default_factory=DietNeRFModelConfig)
    """Field and losses."""
    blank_check: int = 500
    """Every how many steps to look whether the render is blank; 0 never looks."""
    max_restarts: int = 3
    """How often a field that stays blank starts over from another seed."""
    seed: int = 0
    """Seed of random views, and with the number of the restart of fields that start over."""


class FewViewPipeline(VanillaPipeline):
    """Every random choice outside the field's sampling is a function of (seed, rank, step)."""

    config: FewViewPipelineConfig
    datamanager: FewViewDataManager

    def __init__(
        self,
        config: FewViewPipelineConfig,
        device: str | torch.device,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        if world_size > 1:
            raise UserError(f"num_devices is {world_size}: use 1, or dietnerf train --devices {world_size}.")
        self.config, self.test_mode = config, test_mode
        self.world_size, self.local_rank = world_size, local_rank
        self.datamanager = config.datamanager.setup(
            device=device, test_mode=test_mode, world_size=world_size, local_rank=local_rank
        )
        dataset = self.datamanager.train_dataset
        self._fit_to(dataset)
        self._model_arguments: dict[str, Any] = dict(
            scene_box=dataset.scene_box, num_train_data=len(dataset), metadata=dataset.metadata, device=device
        )
        self._model = config.model.setup(**self._model_arguments)
        self.model.to(device)
        # An empty marker of the device: never in a loss, which DDP would wait for.
        self.model.device_indicator_param.requires_grad_(False)
        self._show_cameras(self.model)
        self.restarts = 0
        self.on_restart: list[Callable[[], None]] = []
        self._sampler: ViewSampler | None = None
        self._patch_ranges: PoseRanges | None = None

    def _fit_to(self, dataset: FewViewDataset) -> None:
        """Background of the field as the scene has it."""
        model = self.config.model
        with_silhouette = bool(model.regularizers.silhouette) and dataset.has_alpha
        self.datamanager.with_alpha = model.background_color == "random" or with_silhouette
        if model.background_color != "random":
            model.background_color = "white" if dataset.background == "white" else "black"
        elif not dataset.has_alpha:
            raise UserError("background_color is 'random' but the images have no alpha: use white or black.")

    def _show_cameras(self, model: FewViewModel) -> None:
        dataset = self.datamanager.train_dataset
        if dataset.has_alpha:  # of a photograph's background, one camera may see a part alone
            model.set_cameras(dataset.cameras)

    def prepare(self) -> None:
        """Embed the training views and set up random poses, once, when the semantic loss is on."""
        model: FewViewModel = self.model
        if self._sampler is None and model.config.semantic.weight:
            model.set_semantic_targets(self.datamanager.train_dataset.squeezed.to(self.device))
            assert model.semantic_loss is not None
            dataset, semantic = self.datamanager.train_dataset, model.config.semantic
            if semantic.poses == "published" and dataset.metadata["kind"] != "blender":
                semantic = replace(semantic, poses="sphere")  # the published sphere is Blender's
            self._sampler = ViewSampler(semantic, dataset.cameras.to(self.device), model.semantic_loss.encoder.size)

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """Random numbers of this step."""
        entropy = (self.config.seed, self.local_rank, step, purpose)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator().manual_seed(seed)

    def get_train_loss_dict(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """(nothing, weighted losses, metrics) of a step; the caller has called `before_step`."""
        self.prepare()
        self._look_for_blank(step)
        rays, pixels = self.datamanager.next_train(step)
        batch: Batch = {"ray_bundle": rays, "rgb": pixels["image"], "alpha": pixels.get("alpha"), "semantic_view": None}
        generator = self.generator(step, 1)
        if self.model.config.regularizers.depth_smoothness:
            batch["patches"] = self._draw_patches(step)
        if self.model.config.regularizers.depth:
            batch["points"] = self.datamanager.draw_points(step, self.local_rank)
        if self._sampler is not None and self.model.needs_semantic_view(step):
            batch["semantic_view"] = self._sampler(generator)
        losses = compute_losses(self.model, batch, step, generator)
        return {}, losses, {"psnr": -10 * losses["rgb"].detach().clamp(min=1e-12).log10()}

    def _draw_patches(self, step: int) -> RayBundle:
        """Rays of this step's patches for the depth smoothness."""
        generator, cameras = self.generator(step, 2), self.datamanager.train_dataset.cameras
        if self._patch_ranges is None:
            self._patch_ranges = estimate_ranges(cameras.camera_to_worlds)
        number = self.model.config.regularizers.depth_patches
        poses = torch.stack([sample_sphere(self._patch_ranges, generator) for _ in range(number)])
        return patch_rays(cameras, poses, generator).to(self.device)

    def get_eval_loss_dict(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The squared error on some held-out rays."""
        self.eval()
        with torch.no_grad():
            rays, pixels = self.datamanager.next_eval(step)
            outputs = self.model(rays)
            error = (outputs["rgb"] - pixels["image"]).square().mean()
        self.train()
        return outputs, {"rgb": error}, {"psnr": -10 * error.clamp(min=1e-12).log10()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool | None = None) -> Any:  # type: ignore[override]
        """All weights of the field or RuntimeError, where nerfstudio's takes what fits and leaves the rest random."""
        return super().load_state_dict(state_dict, strict=True)

    def get_training_callbacks(self, attributes: TrainingCallbackAttributes) -> list[TrainingCallback]:
        """Also forgets nerfstudio's optimizer state when the field starts over."""
        optimizers: Any = attributes.optimizers

        def forget() -> None:
            for optimizer in optimizers.optimizers.values():
                optimizer.state.clear()

        self.on_restart = [forget]
        return super().get_training_callbacks(attributes)

    def is_blank(self, step: int) -> bool:
        """Whether rays that differ in the training views all get one colour, the same rays in every process."""
        rays, pixels = self.datamanager.draw(step, rank=0)
        truth = pixels["image"]
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            rgb = self.model(rays)["rgb"]
        self.model.train(training)
        spread = rgb.std(dim=0).max()
        return bool(truth.std(dim=0).max() > 0.02 and not spread > BLANK)

    def _look_for_blank(self, step: int) -> None:
        every = self.config.blank_check
        if not every or not step or step % every or not self.is_blank(step):
            return
        if self.restarts >= self.config.max_restarts:
            raise UserError(
                f"the render is still blank at step {step} after {self.restarts} restarts: lower the learning rate or "
                f"the semantic weight, or use the grid method."
            )
        self.restarts += 1
        seed = self.config.seed + self.restarts
        print(f"the render is blank at step {step}: starting over from seed {seed}.", file=sys.stderr, flush=True)
        with fork_generators(seed):
            fresh = self.config.model.setup(**self._model_arguments)
        fresh.to(self.device)
        self._show_cameras(fresh)
        fresh.began = self.model.began = step
        fresh.before_step(step)
        found = dict(fresh.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(found[name].data)
            buffers = dict(fresh.named_buffers())
            for name, buffer in self.model.named_buffers():
                buffer.data.copy_(buffers[name].data)
        for forget in self.on_restart:
            forget()
