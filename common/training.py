"""The Lightning Trainer as all three applications use it: checkpoints, exact resume, progress, strategies."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
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

from common.checks import UserError, require_at_least, require_file
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

    Every index occurs exactly once per epoch over all `world` processes, which all get as many batches; the last
    batches of an epoch may be short, or longer by one where the rest is not enough for every process.
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
        order, ends = self.order().tolist(), self._ends()
        return [order[i:j][self.rank :: self.world] for i, j in zip([0, *ends], ends, strict=False)]

    def _ends(self) -> list[int]:
        """Where the batches of all processes together end in the order."""
        step = self.batch_size * self.world
        ends = list(range(step, self.num_items, step))
        if ends and self.num_items - ends[-1] < self.world:
            ends.pop()
        return [*ends, self.num_items]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def __len__(self) -> int:
        return len(self._ends())


class ResumableLoader(DataLoader):  # type: ignore[type-arg]
    """A DataLoader over a BatchOrder that Lightning can save in the middle of an epoch and continue exactly."""

    def __init__(self, dataset: Dataset[Any], order: BatchOrder, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=order, **kwargs)
        self.order = order
        self._done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        todo = self.order.batches()[self._done :]
        inner = DataLoader(
            self.dataset,
            batch_sampler=todo,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
            # Of its own, or a resumed run would draw once more from torch's and its dropout would differ.
            generator=torch.Generator().manual_seed(hash((self.order.seed, self.order.epoch, self._done)) % 2**63),
        )
        for left, batch in zip(range(len(todo) - 1, -1, -1), inner, strict=True):
            # Counted before it is handed out: the trainer does not come back after an epoch's last batch.
            self._done = self._done + 1 if left else 0
            self.order.epoch += not left
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the run stands: the epoch and the batches of it that were handed out."""
        return {"epoch": self.order.epoch, "done": self._done}

    def take_back(self) -> None:
        """Count the last batch that was handed out as not done."""
        if not self._done:  # it was an epoch's last
            self.order.epoch -= 1
            self._done = len(self.order)
        self._done -= 1

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


class KeepLast(Callback):
    """Writes `last.ckpt` at the end of a run, and when Ctrl-C ends it earlier."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "last.ckpt"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or not trainer.training:
            return
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        loader = trainer.train_dataloader
        if progress.current.ready > progress.current.processed and isinstance(loader, ResumableLoader):
            loader.take_back()  # the batch that was being trained on
        for counts in (progress.current, progress.total):  # or the next validations come one batch early
            counts.ready = counts.started = counts.completed = counts.processed
        trainer.save_checkpoint(self.path)


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
        callbacks=[RandomState(), StopOnNaN(), *(callbacks or []), *bars, *saved, KeepLast(directory)],
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
    if source:
        _require_readable(last)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*dataloader.*")
        try:
            with _interruptible(trainer):
                trainer.fit(module, **loaders, ckpt_path=source, weights_only=source is None)
        except (RuntimeError, KeyError, ValueError) as error:
            if source and ("state_dict" in str(error) or "size" in str(error)):
                raise UserError(
                    f"checkpoint {source!r} does not fit this run ({' '.join(str(error).split())[:200]}): "
                    f"use the settings it was written with, or another output directory."
                ) from error
            raise


def _require_readable(path: Path) -> None:
    """Raise UserError when a checkpoint is damaged."""
    require_file(path, "checkpoint")
    try:
        torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception as error:  # whatever unpickling a broken file comes upon
        raise UserError(
            f"checkpoint {str(path)!r} is damaged ({type(error).__name__}): delete it to begin anew, "
            f"or put an intact one in its place."
        ) from error


@contextlib.contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C comes out as KeyboardInterrupt and works again afterwards; Lightning exits and leaves it ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine to `floor` at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))

    return factor
