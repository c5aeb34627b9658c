"""Train a field with Lightning, in the files of a nerfstudio run: `ns-viewer`, `ns-eval` and `ns-render` open it."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import DataLoader

from common.batches import BatchOrder, ResumableLoader
from common.callbacks import save_whole
from common.checks import UserError, require_place
from common.files import clear_leftovers, write_json, write_text
from common.optimizers import fused, scheduled
from common.processes import is_first_process, sole_run
from common.runtime import provenance, start
from common.training import (
    TrainerConfig,
    build_trainer,
    fit,
    mean_over_processes,
    require_same_run,
    validation_interval,
)
from dietnerf.methods import DESCRIPTIONS, FewViewTrainerConfig
from dietnerf.metrics import overfitted, psnr
from dietnerf.pipeline import FewViewPipeline
from dietnerf.posing import has_photographs_only, with_poses
from dietnerf.settings import METHODS, TrainConfig, nerfstudio_config, options_of, preset, settings_of_run


class FewViewTraining(LightningModule):
    """Optimizer, schedule and logging around the pipeline's losses."""

    def __init__(self, config: FewViewTrainerConfig) -> None:
        super().__init__()
        self.run_config = config
        self._row: dict[str, Tensor] = {}  # of the step's loss and its parts
        self._valid: list[float] = []  # PSNR of the validation's views
        self.pipeline: FewViewPipeline = config.pipeline.setup(device="cpu", test_mode="val")
        self.pipeline.on_restart = [self._forget]

    @property
    def model(self) -> Any:
        """The field."""
        return self.pipeline.model

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups, factors = [], []
        for name, parameters in self.model.get_param_groups().items():
            chosen = self.run_config.optimizers[name]
            groups.append({"params": parameters, "lr": chosen["optimizer"].lr, "eps": chosen["optimizer"].eps})
            factors.append(chosen["scheduler"].setup().factor)
        # One pass over a grid's tables takes a fifth of several.
        optimizer = fused(torch.optim.Adam, groups)
        return scheduled(optimizer, factors)

    def on_fit_start(self) -> None:
        self.pipeline.datamanager.device = self.device
        self.pipeline.local_rank = self.pipeline.datamanager.local_rank = self.global_rank
        self.pipeline.prepare()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.model.before_step(self.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, losses, metrics = self.pipeline.get_train_loss_dict(self.global_step)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/psnr", metrics["psnr"], prog_bar=True, logger=False)
        self.log("train/loss", loss, logger=False)
        self._row = {"loss": loss, "psnr": metrics["psnr"]} | (losses if len(losses) > 1 else {})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log a step in ten, and the first in ten that has a semantic loss: all that is in a row is of its step.

        Lightning's own rows would repeat what was logged last where a step has no such loss.
        """
        step, every = self.global_step - 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0 or "semantic" in self._row and step % every < self.model.config.semantic.every:
            row = {f"train/{name}": float(value.detach()) for name, value in self._row.items()}
            for logger in self.loggers:
                logger.log_metrics(row, step)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        for index in batch.tolist():
            image, _ = self.pipeline.datamanager.eval_dataset.load(index)
            camera = self.pipeline.datamanager.eval_dataset.cameras[index : index + 1].to(self.device)
            rgb = self.model.get_outputs_for_camera(camera)["rgb"].cpu()
            mask = self.pipeline.datamanager.eval_dataset.mask(index)
            self._valid.append(psnr(rgb, image, mask))

    def on_validation_epoch_start(self) -> None:
        self._valid = []

    def on_validation_epoch_end(self) -> None:
        self.log("val/psnr", mean_over_processes(self, sum(self._valid), len(self._valid)), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["restarts"], checkpoint["began"] = self.pipeline.restarts, self.model.began

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.pipeline.restarts, self.model.began = checkpoint.get("restarts", 0), checkpoint.get("began", 0)
        self.model.update_to_step(checkpoint["global_step"])

    def _forget(self) -> None:
        optimizer = self.optimizers()
        optimizer.optimizer.state.clear()  # type: ignore[union-attr]


def nerfstudio_state(module: FewViewTraining, steps: int) -> dict[str, Any]:
    """What nerfstudio's trainer would save after `steps` steps, optimizers included."""
    optimizer: Any = module.optimizers()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    optimizers = {}
    for (name, parameters), group in zip(module.model.get_param_groups().items(), optimizer.param_groups, strict=True):
        settings = {key: value for key, value in group.items() if key not in ("params", "fused")}
        optimizers[name] = {
            "state": {i: dict(optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state},
            "param_groups": [settings | {"params": list(range(len(parameters)))}],
        }
    schedule: Any = module.lr_schedulers()
    state = schedule.state_dict()
    schedulers = {
        name: state | {key: [state[key][i]] for key in ("base_lrs", "_last_lr", "lr_lambdas")}
        for i, name in enumerate(optimizers)
    }
    return {
        "step": steps - 1,
        "pipeline": module.pipeline.state_dict(),
        "optimizers": optimizers,
        "schedulers": schedulers,
        "scalers": {},
    }


class NerfstudioCheckpoint(Callback):
    """Keeps nerfstudio_models/step-*.ckpt as new as `last.ckpt`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._step = 0  # of the one that this run has written

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer.is_global_zero or trainer.global_step == self._step:
            return
        assert isinstance(module, FewViewTraining)
        self._step = trainer.global_step
        clear_leftovers(self.directory)
        path = self.directory / f"step-{self._step - 1:09d}.ckpt"
        save_whole(nerfstudio_state(module, self._step), path)
        for other in self.directory.glob("step-*.ckpt"):
            if other != path:
                other.unlink(missing_ok=True)


def train(config: TrainConfig) -> Path:
    """Train a field and return the directory of the run; photographs without poses are posed first, in OUT/scene.

    An interrupted run resumes from its last checkpoint, exactly.

    Raises:
        UserError: anything in the scene or the settings that cannot work, with its cure; another run uses OUT.
    """
    require_place(config.out, directory=True)
    nerfstudio_config(config)  # what cannot work is refused before anything is posed
    with sole_run(config.out):
        if has_photographs_only(config.scene):
            config = replace(config, scene=with_poses(config.scene, config.out, config.resume, config.limit))
        return _train(config, nerfstudio_config(config))


def _train(config: TrainConfig, run: FewViewTrainerConfig) -> Path:
    """`train`, alone in its directory and with settings that can work."""
    device = start(config.runtime)
    settings = settings_of_run(config)
    if config.resume:
        require_same_run(config.out, settings, unset=True)
    module = FewViewTraining(run)
    meta = module.pipeline.datamanager.train_dataset.metadata
    if config.far and meta["kind"] == "blender" and (scale := meta["world"].scale) != 1:
        print(f"near and far are taken in the field's units: the scene is scaled by {scale:.3g}.", file=sys.stderr)
    silhouette = config.regularizers.silhouette
    asked = silhouette and silhouette != preset(config.method).pipeline.model.regularizers.silhouette
    if asked and not module.pipeline.datamanager.train_dataset.has_alpha:
        raise UserError(f"silhouette is {silhouette:g} but the images have no alpha: leave it out.")
    held_out = len(module.pipeline.datamanager.eval_dataset)
    stride = max(1, held_out // max(1, config.val_views))
    looks = list(range(0, held_out, stride))[: config.val_views]
    steps = run.max_num_iterations
    write_text(config.out / "config.yml", yaml.dump(run))
    module.pipeline.datamanager.train_dataparser_outputs.save_dataparser_transform(
        config.out / "dataparser_transforms.json"
    )
    scale = config.scale
    if scale.world > 1 and scale.strategy in ("auto", "ddp"):  # a grid's other levels have no gradient
        scale = replace(scale, strategy="ddp_find_unused_parameters_true")
    trainer = build_trainer(
        TrainerConfig(
            max_steps=steps,
            val_every=validation_interval(config.val_every, steps),
            precision=config.runtime.precision,
            device=str(device),
            **vars(scale),
            **vars(config.log),
        ),
        config.out,
        monitor="val/psnr" if looks else "train/loss",
        mode="max" if looks else "min",
        settings=settings,
        callbacks=[NerfstudioCheckpoint(run.get_checkpoint_dir())],
    )
    # The steps are the data: what each one trains on follows from its number.
    numbers: Any = list(range(steps))
    order = BatchOrder(steps, 1, shuffle=False, rank=0, world=1)
    loaders: dict[str, Any] = {"train_dataloaders": ResumableLoader(numbers, order)}
    if looks:
        loaders["val_dataloaders"] = DataLoader(looks, batch_size=1)  # type: ignore[arg-type]
    begun, cpu = time.perf_counter(), time.process_time()
    fit(trainer, module, config.out, resume=config.resume, **loaders)
    found = trainer.callback_metrics
    if {"train/psnr", "val/psnr"} <= found.keys():
        if warning := overfitted(float(found["train/psnr"]), float(found["val/psnr"])):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    record = config.out / "training.json"
    # Without a metric all its steps were made before.
    if trainer.is_global_zero and (trainer.callback_metrics or not record.is_file()):
        data = module.pipeline.datamanager
        write_json(
            record,
            {
                "config": options_of(config),
                "view_ids": data.train_dataset.view_ids,
                "images": [path.name for path in data.train_dataset.image_filenames],
                "steps": trainer.global_step,
                "restarts": module.pipeline.restarts,
                "parameters": sum(p.numel() for p in module.model.parameters()),
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
                "seconds": round(time.perf_counter() - begun, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                **provenance(),
            },
        )
    return config.out


def run(config: TrainConfig) -> int:
    """`dietnerf train`: train a field and say where it is."""
    directory = train(config)
    if is_first_process():
        print(f"run written to {directory} ({DESCRIPTIONS[METHODS[config.method]]})")
        print(f"next: dietnerf render {directory}, dietnerf evaluate {directory}")
    return 0
