"""What a training keeps and when it ends: checkpoints, random state, metrics, NaN, patience, signals."""

from __future__ import annotations

import contextlib
import csv
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed

from common.checks import UserError
from common.files import whole_file
from common.progress import Progress
from common.signals import Stopped, StopRequest


def save_whole(state: Any, path: Path) -> None:
    """`torch.save` to a file that takes the place of the one before when all of it is on the disk."""
    with whole_file(path) as file:
        torch.save(state, file)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole or not at all; Lightning's way by the directory for temporary files can lose both."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_whole(checkpoint, Path(path))


class RandomState(Callback):
    """Saves the random generators of Python, NumPy and torch, of every process, in checkpoints and restores them.

    A checkpoint has them as they were after the last step or validation that was finished.
    """

    _saved: dict[str, Any] | None = None
    _finished: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._finished = _generators()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._finished = _generators()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = self._finished or _generators()
        checkpoint["random_state"] = own
        if trainer.world_size > 1:
            states: list[Any] = [None] * trainer.world_size
            distributed.all_gather_object(states, own)
            checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("random_state")
        if isinstance(saved, list):
            saved = saved[trainer.global_rank if len(saved) == trainer.world_size else 0]
        self._saved = saved

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._saved is not None:
            _restore(self._saved)
        self._finished = _generators()


def _generators() -> dict[str, Any]:
    """The states of this process's random generators."""
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (numpy_name, torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)), *numpy_rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(state: dict[str, Any]) -> None:
    """Put this process's random generators into `state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    for device in range(min(len(state["cuda"]), torch.cuda.device_count())):  # there may be fewer GPUs than before
        torch.cuda.set_rng_state(state["cuda"][device].cpu(), device)


class KeepBest(ModelCheckpoint):
    """Writes `best.ckpt`; it knows how good that one is also where the directory was moved."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace("KeepBest", "ModelCheckpoint", 1)  # as older checkpoints have it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = {**state_dict, "dirpath": self.dirpath}
        for name in ("best_model_path", "kth_best_model_path"):
            here[name] = self._moved(state_dict[name])
        here["best_k_models"] = {self._moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(here)

    def _moved(self, path: str) -> str:
        return str(Path(self.dirpath or "") / Path(path).name) if path else path


class KeepLast(Checkpoint):
    """Writes `last.ckpt`: before and after each validation, every few minutes between, at the end, when one is stopped.

    Whenever a run is killed, going on from there makes what it would have made. A signal that asks it to end is looked
    at where a checkpoint can be written: with one process it ends a step or a validation that has begun, which comes
    again; several processes agree on it before they begin a step or a batch of validation.

    Args:
        directory: where it is written.
        seconds: longest time between two.
        request: tells of signals.
    """

    def __init__(self, directory: Path, seconds: float, request: StopRequest) -> None:
        self.path, self.seconds, self.request = directory / "last.ckpt", seconds, request
        self._written = time.monotonic()
        self._begun = False  # before it has, what a resumed run was given may not be complete
        self._place: Callable[[Trainer, dict[str, Any]], None] | None = None
        self._max_steps = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.request.install()  # Lightning has its own for SIGTERM by now, which saves nothing
        self.request.at_once = trainer.world_size == 1
        self._written = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun = True
        if batch_idx % trainer.accumulate_grad_batches == 0:
            signum, due = _most(trainer, self.request.signum, self._is_due(trainer))
            if due or signum:
                self._write(trainer, _at_the_last_step)
            if signum:
                raise Stopped(signum)
        self._let_stop(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.global_step > 0 and time.monotonic() - self._written >= self.seconds

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.request.at_once = False  # the optimizer's step and its bookkeeping are one

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begun = True
        self._set_max_steps(trainer)
        self._write(trainer, _before_validation)
        self._let_stop(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if signum := _most(trainer, self.request.signum)[0]:
            raise Stopped(signum)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.request.at_once = False
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.request.at_once = False
        self._write(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        # In a validation, what was written before it holds; several processes have written before they agreed to stop.
        stopped = isinstance(exception, (KeyboardInterrupt, Stopped))
        if stopped and self._begun and trainer.training and trainer.world_size == 1:
            self._write(trainer, _at_the_last_step)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._place is not None:
            self._place(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("unvalidated") and checkpoint["global_step"] >= trainer.max_steps > 0:
            # Or Lightning would take the run for finished and leave out its last validation.
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def _set_max_steps(self, trainer: Trainer) -> None:
        if self._max_steps:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, 0

    def _let_stop(self, trainer: Trainer) -> None:
        """From here a signal may end what has begun: what came in between does now."""
        if trainer.world_size == 1:
            self.request.at_once = True
            if self.request.signum:
                raise Stopped(self.request.signum)

    def _write(self, trainer: Trainer, place: Callable[[Trainer, dict[str, Any]], None] | None = None) -> None:
        self._place = place
        trainer.save_checkpoint(self.path)
        self._written = time.monotonic()


def _most(trainer: Trainer, *values: float) -> list[int]:
    """The largest of each value over all processes."""
    if trainer.world_size == 1:
        return [int(value) for value in values]
    together = torch.tensor(values, dtype=torch.int32, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(together, reduce_op="max").tolist()  # type: ignore[union-attr]


def _at_the_last_step(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Have batches whose gradients the optimizer has not taken yet come again."""
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    current = progress["current"]
    done = current["processed"]
    if done < trainer.num_training_batches:
        done -= done % trainer.accumulate_grad_batches
    loader: Any = trainer.train_dataloader
    if hasattr(loader, "state_before"):
        loop["state_dict"]["combined_loader"] = [loader.state_before(current["ready"] - done)]
    progress["is_last_batch"] = done >= trainer.num_training_batches  # what has begun may be the last
    undone = current["processed"] - done
    for counts in (current, progress["total"]):  # or the next validations come early
        counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), counts["processed"] - undone))


def _before_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Have the validation that is to come begin, which for Lightning has begun."""
    checkpoint["unvalidated"] = True
    for counts in _parts(checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]):
        counts.update(ready=1, started=1, processed=0, completed=0)


def _parts(progress: dict[str, Any]) -> list[dict[str, int]]:
    return [progress["current"], progress["total"]]


class KeepSettings(Callback):
    """Writes into checkpoints what the run was asked for, which `require_same_run` compares."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self.settings


class MetricsFile(Logger):
    """`metrics.csv`: a row each time that something is logged, appended as it comes.

    A new column has the file written again in full. A resumed run keeps the rows that were there when its
    checkpoint was written; Lightning's own logger deletes the file.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.path = directory / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self._columns: list[str] = []  # of the file, once this run has written it

    name = version = ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: a run's settings are in its checkpoints and its record."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})
        missing = self.rows[-1].keys() - set(self._columns)
        if missing:
            self._columns = sorted(set().union(*self.rows))
        with whole_file(self.path, "w", newline="") if missing else open(self.path, "a", newline="") as file:
            table = csv.DictWriter(file, self._columns)
            if missing:
                table.writeheader()
            table.writerows(self.rows if missing else self.rows[-1:])

    def read(self, before: int, count: int | None) -> None:
        """Take the file's first rows as this run's: `count` of them (None for all), of steps before one."""
        with contextlib.suppress(FileNotFoundError), open(self.path, newline="") as file:
            # A row has no value for what was logged at other steps; the last may be of a killed run, cut short.
            rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)][:count]
            self.rows = [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < before]


class KeepMetrics(Callback):
    """Lets a resumed run keep the rows of its metrics, numbered by steps."""

    def __init__(self, table: MetricsFile) -> None:
        self.table = table

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = len(self.table.rows)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self.table.read(checkpoint["global_step"], checkpoint.get("rows"))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        # What rows are numbered by; Lightning takes some restarts for a step.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class StopOnNaN(Callback):
    """Ends a run whose loss is no longer a number, before it is written to a checkpoint.

    Looking at a loss waits for the GPU and for the other processes: it looks every `log_every_n_steps` steps, before a
    validation, before a checkpoint and when the run ends.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []  # after which step, of batches that were not looked at yet

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append((trainer.global_step, outputs["loss"]))
        if len(self._losses) == trainer.log_every_n_steps * trainer.accumulate_grad_batches:  # type: ignore[attr-defined]
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._look(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        # Another error may come of such a loss, and in this process alone; Ctrl-C comes to all, though to some of them
        # a batch later.
        interrupted = isinstance(exception, KeyboardInterrupt)
        if interrupted or self._losses:
            self._tell(trainer, together=interrupted)

    def _look(self, trainer: Trainer) -> None:
        if self._losses:
            self._tell(trainer, together=True)

    def _tell(self, trainer: Trainer, *, together: bool) -> None:
        seen, self._losses = self._losses, []
        values = torch.stack([loss for _, loss in seen]).tolist() if seen else []
        lost = [
            f"{value} at step {step}" for (step, _), value in zip(seen, values, strict=True) if not math.isfinite(value)
        ]
        # All processes stop together: one that stopped alone would leave the others waiting for it.
        if trainer.strategy.reduce_boolean_decision(bool(lost), all=False) if together else lost:
            elsewhere = f"not finite in another process by step {trainer.global_step}"
            raise UserError(
                f"the loss is {lost[0] if lost else elsewhere}: lower the learning rate "
                f"(checkpoints written before are kept)."
            )


class StopEarly(EarlyStopping):
    """Ends a run when its monitored value has not improved for `patience` validations; a resumed run ends at once."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})  # which may be another now

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class ProgressBar(TQDMProgressBar):
    """Lightning's, without the name of the logger's directory, and in lines where there is no terminal."""

    def init_train_tqdm(self) -> Any:
        return Progress(
            desc=self.train_description,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def init_validation_tqdm(self) -> Any:
        return Progress(
            desc=self.validation_description,
            position=1,
            disable=self.is_disabled,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
        )

    def init_sanity_tqdm(self) -> Any:
        return self.init_validation_tqdm()

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}
