"""The Lightning Trainer as all three applications use it: checkpoints, exact resume, progress, strategies."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.connectors import checkpoint_connector
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

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
from common.checks import UserError, require_at_least, require_file, require_same_settings
from common.processes import is_first_process
from common.runtime import resolve_device
from common.signals import Stopped, StopRequest

SAME_BATCHES = "go on with as many, or begin anew"
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
    """auto, ddp or a variant of it."""
    patience: int = 0
    """Validations without improvement that end the run; 0 never ends it early."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the CSV."""
    progress: bool = True
    """Show a progress bar."""
    save_minutes: float = 10.0
    """Longest time between two checkpoints to go on from, after which one is written before the next step."""


class BatchOrder(Sampler[list[int]]):
    """Batches of indices whose order is a function of (seed, epoch) alone, so that a run can go on where it stopped.

    Every index occurs exactly once per epoch over all processes, which all get as many batches; the last batches of an
    epoch may be short, or longer by one where the rest is not enough for every process. What the processes take
    together in a step is what one process would take with a `batch_size` as many times as large. An epoch is a whole
    number of optimizer steps: its last step has as many batches as the others, of fewer items.

    Args:
        num_items: items in the data set.
        batch_size: of each process.
        accumulate: batches of an optimizer step.
        seed: of the order.
        shuffle: another order in every epoch; False takes the items as they come.
        rank, world: this process and their number; None asks torch.distributed when batches are made.
        lengths: of the items; batches then hold items of similar length, so that little of them is padding.
    """

    POOL = 50
    """Steps whose items are sorted by length together."""

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world: int | None = None,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        require_at_least("batch size", batch_size, 1)
        require_at_least("accumulate", accumulate, 1)
        self.num_items, self.batch_size, self.accumulate = num_items, batch_size, accumulate
        self.seed, self.shuffle = seed, shuffle
        self._rank, self._world, self.epoch = rank, world, 0
        self.lengths = None if lengths is None else np.asarray(lengths)
        if num_items < (world or 1) * accumulate:
            raise self._too_few()

    @property
    def rank(self) -> int:
        """This process, counted from 0."""
        if self._rank is not None:
            return self._rank
        return distributed.get_rank() if _is_distributed() else 0

    @property
    def world(self) -> int:
        """Number of processes."""
        if self._world is not None:
            return self._world
        return distributed.get_world_size() if _is_distributed() else 1

    def order(self) -> np.ndarray:
        """Indices of this epoch in their order, before they are cut into batches."""
        if not self.shuffle:
            return np.arange(self.num_items)
        shuffled = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_items)
        return shuffled if self.lengths is None else self._by_length(shuffled, self.lengths)

    def _by_length(self, shuffled: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The same indices sorted by length within pools; then the steps change places."""
        step = self.batch_size * self.world
        pools = np.split(shuffled, range(self.POOL * step, len(shuffled), self.POOL * step))
        ordered = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in pools])
        whole = len(ordered) // step * step
        steps = ordered[:whole].reshape(-1, step)
        mixed = np.random.default_rng((self.seed, self.epoch, 1)).permutation(steps)
        return np.concatenate([mixed.ravel(), ordered[whole:]])

    def batches(self) -> list[list[int]]:
        """This process's batches of this epoch."""
        order, ends = self.order().tolist(), self._ends()
        return [order[i:j][self.rank :: self.world] for i, j in zip([0, *ends], ends, strict=False)]

    def _ends(self) -> list[int]:
        """Where the batches of all processes together end in the order."""
        least = self.accumulate * self.world
        if self.num_items < least:
            raise self._too_few()
        step = self.batch_size * least
        ends = list(range(step, self.num_items, step))
        if ends and self.num_items - ends[-1] < least:
            ends.pop()
        ends = [0, *ends, self.num_items]
        parts = range(1, self.accumulate + 1)
        return [i + (j - i) * part // self.accumulate for i, j in pairwise(ends) for part in parts]

    def _too_few(self) -> UserError:
        needed = f"{self.world} processes" + (f" of {self.accumulate} batches a step" if self.accumulate > 1 else "")
        cure = "give at least one to each" + (", or lower accumulate" if self.accumulate > 1 else "")
        return UserError(f"dataset has {self.num_items} items for {needed}: {cure}.")

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def __len__(self) -> int:
        return len(self._ends())


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


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

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: the epoch and the batches of it that were handed out, and what they are made by."""
        return self.state_before(0)

    def state_before(self, batches: int) -> dict[str, Any]:
        """Where it stood before the last `batches`, which are of one epoch, were handed out."""
        epoch, done = self.order.epoch, self._done
        if not done and batches:  # the last was an epoch's last
            epoch, done = epoch - 1, len(self.order)
        return {"epoch": epoch, "done": done - batches, "batches": self._made_by()}

    def _made_by(self) -> dict[str, int]:
        order = self.order
        return {
            "batch_size": order.batch_size, "accumulate": order.accumulate, "seed": order.seed,
            "processes": order.world,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken; UserError where batches are others, or it is no such place."""
        match state:
            case {"epoch": int(epoch), "done": int(done), **rest} if epoch >= 0 <= done:
                before = rest.get("batches")
                if done and isinstance(before, dict):  # between epochs they may change; older checkpoints have none
                    require_same_settings("an epoch", before, self._made_by(), SAME_BATCHES)
                if done < len(self.order):
                    self.order.epoch, self._done = epoch, done
                    return
        raise UserError(
            f"the checkpoint was written at {str(state)[:150]}, which is no place in epochs of {len(self.order)} "
            f"batches: use the data it was written with, or begin anew."
        )


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
        settings: what another run in the same directory must have been asked for to be gone on with.
        callbacks: further ones.
    """
    if config.max_steps < 0 and config.max_epochs < 0:
        raise UserError("max_steps and max_epochs are both -1: set one of them.")
    for name in ("devices", "num_nodes", "accumulate", "val_every"):
        require_at_least(name, getattr(config, name), 1)
    for name in ("clip_gradients", "patience", "save_minutes"):
        require_at_least(name, getattr(config, name), 0)
    if config.strategy.startswith(("fsdp", "deepspeed")):
        raise UserError(
            f"strategy is {config.strategy!r}, which spreads a model over GPUs: use ddp, these models fit on one."
        )
    device = resolve_device(config.device)
    table = MetricsFile(directory)
    loggers: list[Logger] = [table]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(directory, name="", version="tensorboard"))
    saved: list[Callback] = [
        KeepMetrics(table),
        KeepBest(directory, filename="best", monitor=monitor, mode=mode, save_top_k=1,
                 enable_version_counter=False, auto_insert_metric_name=False, save_weights_only=True),
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


def settings_of(config: Any, free: Collection[str]) -> dict[str, Any]:
    """The fields of a configuration but those that are `free` to differ, in JSON's own types, and its seed."""
    fields = json.loads(json.dumps(asdict(config), default=str))
    seed = fields.pop("runtime", {}).get("seed", 0)
    return {name: value for name, value in fields.items() if name not in free} | {"seed": seed}


def require_same_run(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError when the run in `directory` was begun with other `settings` (see `build_trainer`)."""
    last = directory / "last.ckpt"
    if last.exists():
        before = _read_checkpoint(last).get("settings", settings)  # older ones have none
        cure = "use the same again, --no-resume to begin anew, or another --out"
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
            f"({type(error).__name__}): delete it to begin anew, or put an intact one in its place."
        ) from error


def _does_not_fit(path: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {str(path)!r} is damaged or does not fit this run ({' '.join(str(error).split())[:200]}): use the "
        f"settings it was written with, delete it to begin anew, or give another output directory."
    )


def _is_from_restoring(error: Exception) -> bool:
    """Whether it was raised while a checkpoint's values were put in place, by Lightning or by our callbacks."""
    return any(
        frame.f_globals.get("__name__") in (kept.__name__, checkpoint_connector.__name__)
        and frame.f_code.co_name.startswith(("restore", "_restore"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine to `floor` at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))

    return factor


def warmup_linear(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then linear to `floor` at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return 1 - (1 - floor) * progress

    return factor


def fused(kind: Callable[..., torch.optim.Optimizer], parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """An Adam or AdamW that takes one pass over each parameter, whose gradients Lightning may clip."""
    optimizer = kind(parameters, fused=True, **options)
    # A fused step could undo fp16's loss scaling, for which Lightning refuses to clip gradients; bf16 has none.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def decay_matrices(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's groups: weight decay is for matrices, not for norms and biases."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class MuonAndAdam(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices and AdamW for the rest; to Lightning and schedules one optimizer.

    Args:
        model: whose parameters are trained, those that ask for a gradient.
        hidden: part of the names of the parameters whose matrices are Muon's, such as ".h.".
        lr_muon, lr: Muon's and AdamW's rate.
        weight_decay: of matrices, both parts'.
        betas: AdamW's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        hidden: str,
        lr_muon: float,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        by_muon = sorted(name for name, p in trained.items() if hidden in name and p.ndim == 2)
        matrices = [trained.pop(name) for name in by_muon]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr_muon, weight_decay=weight_decay, momentum=0.95),
            torch.optim.AdamW(decay_matrices([*trained.values()], weight_decay), lr=lr, betas=betas),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts read this optimizer's groups, which schedules write to, and their states be its own."""
        first = len(self.parts[0].param_groups)
        self.parts[0].param_groups, self.parts[1].param_groups = self.param_groups[:first], self.param_groups[first:]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
