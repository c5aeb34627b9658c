"""The Lightning Trainer as all three applications use it: checkpoints, exact resume, progress, strategies."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader, Dataset, Sampler

from common.checks import UserError, require_at_least
from common.runtime import resolve_device

LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class TrainerConfig:
    """Length, place and scale of a training run."""

    max_steps: int = -1
    """Optimizer steps; -1 leaves the end to max_epochs."""
    max_epochs: int = -1
    """Passes over the data; -1 leaves the end to max_steps."""
    val_every: int = 500
    """Batches between validations."""
    accumulate: int = 1
    """Batches whose gradients make one optimizer step."""
    clip_gradients: float = 1.0
    """Largest norm of the gradient; 0 never clips."""
    precision: str = "fp32"
    """fp32, or bf16 for mixed precision."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    devices: int = 1
    """Processes or GPUs on each machine."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """auto, ddp, fsdp and what else Lightning knows."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the CSV."""
    progress: bool = True
    """Show a progress bar."""


class BatchOrder(Sampler[list[int]]):
    """Batches of indices whose order is a function of (seed, epoch) alone, so that a run can go on where it stopped.

    Every index occurs exactly once per epoch over all `world` processes (the last batches of an epoch may be short).
    """

    def __init__(
        self, num_items: int, batch_size: int, *, seed: int = 0, shuffle: bool = True, rank: int = 0, world: int = 1
    ) -> None:
        require_at_least("batch size", batch_size, 1)
        if num_items < world:
            raise UserError(f"dataset has {num_items} items for {world} processes: give at least one to each.")
        self.num_items, self.batch_size, self.seed, self.shuffle = num_items, batch_size, seed, shuffle
        self.rank, self.world, self.epoch = rank, world, 0

    def order(self) -> np.ndarray:
        """Indices of this epoch in their order, before they are cut into batches."""
        if not self.shuffle:
            return np.arange(self.num_items)
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.num_items)

    def batches(self) -> list[list[int]]:
        """This process's batches of this epoch."""
        order = self.order().tolist()
        step = self.batch_size * self.world
        cut = [order[i : i + step][self.rank :: self.world] for i in range(0, len(order), step)]
        return [batch for batch in cut if batch] if self.world == 1 else cut[: len(order) // step]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def __len__(self) -> int:
        step = self.batch_size * self.world
        return len(range(0, self.num_items, step)) if self.world == 1 else self.num_items // step


class ResumableLoader(DataLoader):  # type: ignore[type-arg]
    """A DataLoader over a BatchOrder that Lightning can save in the middle of an epoch and continue exactly."""

    def __init__(self, dataset: Dataset[Any], order: BatchOrder, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=order, **kwargs)
        self.order = order
        self._done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._done = self._done, 0
        todo = self.order.batches()[skip:]
        inner = DataLoader(
            self.dataset,
            batch_sampler=todo,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
        )
        self._done = skip
        for batch in inner:
            self._done += 1
            yield batch
        self._done = 0
        self.order.epoch += 1

    def state_dict(self) -> dict[str, int]:
        """Where the run stands: the epoch and the batches of it that were handed out."""
        return {"epoch": self.order.epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state_dict` was taken."""
        self.order.epoch, self._done = state["epoch"], state["done"]


class RandomState(Callback):
    """Saves the random generators of Python, NumPy and torch in every checkpoint and restores them."""

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
        checkpoint["random_state"] = {
            "python": random.getstate(),
            "numpy": (numpy_name, torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)), *numpy_rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._state = checkpoint.get("random_state")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        state = getattr(self, "_state", None)
        if state is None:
            return
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        self._state = None


class StopOnNaN(Callback):
    """Ends a run whose loss is no longer a number, before it is written to a checkpoint."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor) and not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {trainer.global_step}: lower the learning rate "
                f"(checkpoints written before are kept)."
            )


def build_trainer(
    config: TrainerConfig,
    directory: Path,
    *,
    monitor: str = "val/loss",
    mode: str = "min",
    callbacks: list[Callback] | None = None,
) -> Trainer:
    """A Trainer that writes `last.ckpt`, `best.ckpt`, `metrics.csv` and TensorBoard logs in `directory`."""
    if config.max_steps < 0 and config.max_epochs < 0:
        raise UserError("max_steps and max_epochs are both -1: set one of them.")
    require_at_least("devices", config.devices, 1)
    device = resolve_device(config.device)
    loggers: list[Logger] = [CSVLogger(directory, name="", version="")]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(directory, name="", version="tensorboard"))
    saved: list[Callback] = [
        ModelCheckpoint(directory, filename="best", monitor=monitor, mode=mode, save_top_k=1, save_last=True,
                        enable_version_counter=False, auto_insert_metric_name=False, save_weights_only=False),
    ]
    bars: list[Callback] = [TQDMProgressBar(refresh_rate=5)] if config.progress else []
    return Trainer(
        default_root_dir=directory,
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision=LIGHTNING_PRECISION[config.precision],  # type: ignore[arg-type]
        max_steps=config.max_steps,
        max_epochs=config.max_epochs if config.max_epochs > 0 else None,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip_gradients or None,
        val_check_interval=config.val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=10,
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        logger=loggers,
        callbacks=[RandomState(), StopOnNaN(), *(callbacks or []), *bars, *saved],
    )


def fit(trainer: Trainer, module: LightningModule, directory: Path, *, resume: bool = True, **loaders: Any) -> None:
    """Train, from `last.ckpt` in `directory` when there is one and `resume` is set.

    Ctrl-C writes `last.ckpt` before it ends the run.

    Raises:
        UserError: the checkpoint cannot be read or belongs to a model of other sizes.
        KeyboardInterrupt: after Ctrl-C.
    """
    last = directory / "last.ckpt"
    source = str(last) if resume and last.exists() else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*dataloader.*")
        try:
            trainer.fit(module, **loaders, ckpt_path=source, weights_only=source is None)
        except (RuntimeError, KeyError, EOFError) as error:
            if source and ("state_dict" in str(error) or "PytorchStreamReader" in str(error) or "size" in str(error)):
                raise UserError(
                    f"checkpoint {source!r} does not fit this run or is damaged ({str(error).splitlines()[0]}): "
                    f"use the settings it was written with, or another output directory."
                ) from error
            raise


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine to `floor` at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))

    return factor
