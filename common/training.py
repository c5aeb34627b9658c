"""The Lightning Trainer as all three applications use it: checkpoints, exact resume, progress, strategies."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.connectors import checkpoint_connector
from torch import Tensor

from common import callbacks as kept
from common.callbacks import (
    KeepBest,
    KeepLast,
    KeepMetrics,
    KeepSettings,
    MetricsFile,
    ProgressBar,
    RandomState,
    StopEarly,
    StopOnNaN,
    WholeCheckpoints,
)
from common.checks import (
    UserError,
    reason_of,
    require_at_least,
    require_fields_at_least,
    require_file,
    require_one_of,
    require_same_settings,
)
from common.files import clear_leftovers
from common.parts import ProcessesConfig
from common.processes import is_first_process
from common.runtime import resolve_device
from common.signals import Stopped, StopRequest

LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class ScaleConfig(ProcessesConfig):
    """Processes that train together."""

    strategy: str = "auto"
    """auto, ddp or a variant of it: how processes train together, each with a batch of its own."""

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        ProcessesConfig.check(self)
        if self.strategy.startswith(("fsdp", "deepspeed")):
            raise UserError(
                f"strategy is {self.strategy!r}, which spreads a model over GPUs: use ddp, these models fit on one."
            )
        require_one_of("strategy", self.strategy, ["auto", *(name for name in StrategyRegistry if "ddp" in name)])


@dataclass(frozen=True)
class GradientConfig:
    """Gradients of a step."""

    accumulate: int = 1
    """Batches whose gradients make one step."""
    clip_gradients: float = 1.0
    """Largest norm of the gradient; 0 never clips."""

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        require_at_least("accumulate", self.accumulate, 1)
        require_at_least("clip_gradients", self.clip_gradients, 0)


@dataclass(frozen=True)
class LogConfig:
    """What a training shows."""

    tensorboard: bool = True
    """Write TensorBoard logs beside the CSV."""
    progress: bool = True
    """Show a progress bar; --no-progress shows none."""


PARTS = ("scale", "gradients", "log")
"""Fields that hold one of these in the configuration of a command."""


@dataclass(frozen=True)
class TrainerConfig(ScaleConfig, GradientConfig, LogConfig):
    """Length, place and scale of a training run."""

    max_steps: int = -1
    """Optimizer steps; -1 leaves the end to max_epochs."""
    max_epochs: int = -1
    """Passes over the data; -1 leaves the end to max_steps."""
    val_every: int = 500
    """Batches between validations."""
    precision: str = "fp32"
    """fp32, or bf16 for mixed precision."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    patience: int = 0
    """Validations without improvement that end the run; 0 never ends it early."""
    save_minutes: float = 10.0
    """Longest time between two checkpoints to resume from, after which one is written before the next step."""

    def check(self) -> None:
        if self.max_steps < 0 and self.max_epochs < 0:
            raise UserError("max_steps and max_epochs are both -1: set one of them.")
        ScaleConfig.check(self)
        GradientConfig.check(self)
        require_at_least("val_every", self.val_every, 1)
        require_fields_at_least(self, 0, "patience", "save_minutes")


def build_trainer(
    config: TrainerConfig,
    directory: Path,
    *,
    monitor: str = "val/loss",
    mode: str = "min",
    settings: Mapping[str, Any] | None = None,
    callbacks: list[Callback] | None = None,
) -> Trainer:
    """A Trainer that writes `last.ckpt`, `best.ckpt`, `metrics.csv` and TensorBoard logs in `directory`.

    Args:
        config: length, place and scale.
        directory: where everything goes.
        monitor: what the best is the best in, at a validation.
        mode: "min" or "max".
        settings: what another run in the same directory must have been asked for to be resumed.
        callbacks: further ones.
    """
    config.check()
    device = resolve_device(config.device)
    table = MetricsFile(directory)
    loggers: list[Logger] = [table]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(directory, name="", version="tensorboard"))
    saved: list[Callback] = [
        KeepMetrics(table),
        KeepBest(
            directory,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_weights_only=True,
        ),
        KeepLast(directory, 60 * config.save_minutes, StopRequest()),  # after the best is known
    ]
    if settings is not None:
        saved.append(KeepSettings(settings))
    if config.patience:
        saved.append(StopEarly(monitor, mode=mode, patience=config.patience, check_finite=False))
    bars: list[Callback] = [ProgressBar(refresh_rate=5)] if config.progress else []
    with _quiet():
        return _trainer(config, device, directory, loggers, [*(callbacks or []), *bars, *saved])


def _trainer(
    config: TrainerConfig, device: torch.device, directory: Path, loggers: list[Logger], callbacks: list[Callback]
) -> Trainer:
    plugins: list[Any] = [WholeCheckpoints()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # which has its own checkpoints, by its own signals
    return Trainer(
        default_root_dir=directory,
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=[device.index] if device.index is not None and config.devices == 1 else config.devices,
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
        plugins=plugins,
        callbacks=[RandomState(), StopOnNaN(), *callbacks],
    )


def fit(trainer: Trainer, module: LightningModule, directory: Path, *, resume: bool = True, **loaders: Any) -> None:
    """Train, from `last.ckpt` in `directory` when there is one and `resume` is set; without it, that one is deleted.

    Ctrl-C, SIGTERM and SIGHUP write `last.ckpt` before they do what they do outside of a training.

    Raises:
        UserError: the checkpoint cannot be read, holds more than tensors and plain values, or belongs to another run.
        KeyboardInterrupt: after Ctrl-C; Stopped: after other signals, in a command.
    """
    if is_first_process():
        clear_leftovers(directory)
    last = directory / "last.ckpt"
    if not resume and is_first_process():
        for name in ("last.ckpt", "best.ckpt"):
            (directory / name).unlink(missing_ok=True)
    source = str(last) if resume and last.exists() else None
    if source:
        _read_checkpoint(last)
    (request,) = (callback.request for callback in trainer.callbacks if isinstance(callback, KeepLast))  # type: ignore[attr-defined]
    try:
        with _quiet(), request:
            trainer.fit(module, **loaders, ckpt_path=source, weights_only=True)
    except UserError:
        raise
    except Stopped as stop:
        _end_together(trainer, agreed=not request.at_once)
        signal.raise_signal(stop.signum)
        raise
    except SystemExit as error:  # Lightning's after a KeyboardInterrupt
        raise error.__context__ or error from None
    except Exception as error:
        if source and _is_from_restoring(error):
            raise _does_not_fit(last, error) from error
        raise
    if request.signum:  # during the last steps, after which everything was written
        _end_together(trainer, agreed=True)
        signal.raise_signal(request.signum)


def _end_together(trainer: Trainer, *, agreed: bool) -> None:
    """End the processes but the first, which speaks for all; where they have not agreed on it, the first ends them."""
    if trainer.world_size > 1 and agreed and not trainer.is_global_zero:
        raise SystemExit(0)  # with another code, Lightning would kill the first
    if trainer.world_size > 1 and not agreed and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)


def load_best(module: torch.nn.Module, directory: Path) -> None:
    """Put the weights of `best.ckpt` in `directory` into `module`; what it does not hold stays as it is.

    Raises:
        UserError: the checkpoint cannot be read, or its weights are of other sizes.
    """
    path = directory / "best.ckpt"
    weights = _read_checkpoint(path)["state_dict"]
    try:
        module.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError) as error:
        raise _does_not_fit(path, error) from error


def validation_interval(asked: int, steps: int, most: int | None = None) -> int:
    """Steps between validations, at most all: those asked for or, for 0, a tenth of the run and no more than `most`."""
    tenth = max(1, steps // 10)
    return min(asked or min(tenth, most or tenth), steps)


def flat(fields: Mapping[str, Any], parts: Collection[str] = PARTS) -> dict[str, Any]:
    """A configuration's fields with those of its `parts` among them, as options stand on the command line."""
    own = {name: value for name, value in fields.items() if name not in parts}
    return own | {name: value for part in parts for name, value in fields.get(part, {}).items()}


def settings_of(config: Any, free: Collection[str]) -> dict[str, Any]:
    """The options of a configuration but those that are `free` to differ, in JSON's own types, and its seed."""
    found = config if isinstance(config, dict) else flat(asdict(config))
    fields = json.loads(json.dumps(found, default=str))
    seed = fields.pop("runtime", {}).get("seed", 0)
    return {name: value for name, value in fields.items() if name not in free} | {"seed": seed}


def require_same_run(directory: Path, settings: Mapping[str, Any], *, unset: bool = False) -> None:
    """Raise UserError when the run in `directory` was begun with other `settings` (see `build_trainer`).

    Args:
        unset: an earlier version, which did not know all settings, recorded None for what it left to the method:
            neither is compared.
    """
    last = directory / "last.ckpt"
    if last.exists():
        before = _read_checkpoint(last).get("settings", settings)  # older ones have none
        if unset and not settings.keys() <= before.keys():
            before = {**settings, **{name: value for name, value in before.items() if value is not None}}
        cure = "use the same again, --no-resume to start over, or another --out"
        require_same_settings(directory, before, settings, cure)


def mean_over_processes(module: LightningModule, total: float, count: float) -> float:
    """The mean of what all processes have summed up, each `total` over `count` items.

    Lightning's own mean over processes cuts the mean of their counts to a whole number.
    """
    dtype = torch.float32 if module.device.type == "mps" else torch.float64  # which it has not
    sums = torch.tensor([total, count], dtype=dtype, device=module.device)
    totals = cast(Tensor, module.trainer.strategy.reduce(sums, reduce_op="sum"))
    return float(totals[0] / totals[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on devices, its tips and its advice on data loaders out of a user's terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*dataloader.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of Lightning's, its tensors left on the disk; nothing in it is run.

    Raises:
        UserError: it is damaged, or holds more than tensors and plain values.
    """
    require_file(path, "checkpoint")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found["state_dict"], dict) or not isinstance(found.get("settings", {}), dict):
            raise TypeError
        return found
    except Exception as error:  # whatever unpickling a broken file comes upon
        raise UserError(
            f"checkpoint {str(path)!r} is damaged or holds more than tensors and plain values "
            f"({type(error).__name__}): delete it to start over, or put an intact one in its place."
        ) from error


def _does_not_fit(path: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {str(path)!r} is damaged or does not fit this run ({reason_of(error)}): use the "
        f"settings it was written with, delete it to start over, or give another output directory."
    )


def _is_from_restoring(error: Exception) -> bool:
    """Whether it was raised while a checkpoint's values were put in place, by Lightning or by our callbacks."""
    return any(
        frame.f_globals.get("__name__") in (kept.__name__, checkpoint_connector.__name__)
        and frame.f_code.co_name.startswith(("restore", "_restore"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
