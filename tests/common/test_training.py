"""Batch order, exact resume, signals, kills, full disks and NaN, with dropout on."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.batches import BatchOrder, ResumableLoader
from common.callbacks import KeepBest, KeepLast
from common.checks import UserError, run_command
from common.optimizers import MuonAndAdam, warmup_cosine, warmup_linear
from common.processes import sole_run
from common.training import TrainerConfig, build_trainer, fit, require_same_run, validation_interval
from tests.forks import AS_TESTS
from tests.kills import kill_everywhere


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("num_items", [8, 9, 28, 29, 100])
def test_every_index_once_per_epoch_over_all_processes(num_items, batch_size, world):
    orders = [BatchOrder(num_items, batch_size, seed=1, rank=rank, world=world) for rank in range(world)]
    for order in orders:
        order.epoch = 3
    batches = [list(order) for order in orders]
    assert sorted(i for of_rank in batches for batch in of_rank for i in batch) == list(range(num_items))
    assert {len(of_rank) for of_rank in batches} == {len(orders[0])}  # or a process would wait for ever
    assert all(1 <= len(batch) <= batch_size + 1 for of_rank in batches for batch in of_rank)
    if world == 1:
        assert all(len(batch) == batch_size for batch in batches[0][:-1])


def test_order_depends_on_seed_and_epoch_alone():
    def epoch(seed: int, number: int) -> list[list[int]]:
        order = BatchOrder(50, 8, seed=seed)
        order.epoch = number
        return list(order)

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0)
    assert list(BatchOrder(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_impossible_orders():
    with pytest.raises(UserError, match="batch size is 0"):
        BatchOrder(5, 0)
    with pytest.raises(UserError, match="2 items for 3 processes"):
        BatchOrder(2, 1, world=3)
    with pytest.raises(UserError, match="0 items"):
        BatchOrder(0, 1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_order_by_length(world):
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    orders = [BatchOrder(1000, 16 // world, seed=1, rank=rank, world=world, lengths=lengths) for rank in range(world)]
    parts = [order.batches() for order in orders]
    steps = [sum((part[number] for part in parts), []) for number in range(len(parts[0]))]
    assert sorted(i for step in steps for i in step) == list(range(1000))
    spread = np.mean([np.ptp(lengths[step]) for step in steps])
    assert spread < 5  # of 57 in a random batch of 16: nearly 51
    alone = BatchOrder(1000, 16, seed=1, rank=0, world=1, lengths=lengths).batches()
    assert [set(step) for step in steps] == [set(step) for step in alone]
    firsts = [lengths[step].mean() for step in steps]
    assert np.corrcoef(firsts, range(len(firsts)))[0, 1] < 0.5  # the steps are not in order of length


def test_rank_and_world_come_from_torch_distributed(monkeypatch):
    order = BatchOrder(20, 4)
    assert (order.rank, order.world, len(order)) == (0, 1, 5)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert (order.rank, order.world, len(order)) == (1, 2, 3)
    assert order.batches() == BatchOrder(20, 4, rank=1, world=2).batches()
    with pytest.raises(UserError, match="1 items for 2 processes"):
        BatchOrder(1, 4).batches()


@pytest.mark.parametrize("stop", [0, 1, 4, 6, 7, 9])
def test_loader_goes_on_where_it_stopped(stop):
    data = TensorDataset(torch.arange(50))

    def batches(loader: ResumableLoader, number: int) -> list[list[int]]:
        found: list[list[int]] = []
        while True:
            for (batch,) in loader:
                found.append(batch.tolist())
                if len(found) == number:
                    return found

    whole = batches(ResumableLoader(data, BatchOrder(50, 8)), 20)
    first = ResumableLoader(data, BatchOrder(50, 8))
    begun = batches(first, stop) if stop else []
    state = first.state_dict()
    second = ResumableLoader(data, BatchOrder(50, 8))
    second.load_state_dict(state)
    assert begun + batches(second, 20 - stop) == whole


class Regression(LightningModule):
    """A small network with dropout; `at` acts before a step is computed, `at_validation` before it is validated."""

    def __init__(self, at=lambda step: None, at_validation=lambda step: None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.at, self.at_validation = at, at_validation
        self.seen: list[list[float]] = []
        self.validated: list[int] = []

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(3, 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(y.flatten().tolist())
        factor = self.at(self.global_step)
        loss = nn.functional.mse_loss(self.net(x), y) * (1.0 if factor is None else factor)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.at_validation(self.global_step)
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))
        if batch_idx == 1:
            self.validated.append(self.global_step)


def train(
    directory: Path,
    steps: int,
    at=lambda step: None,
    at_validation=lambda step: None,
    *,
    val_every: int = 2,
    accumulate: int = 1,
    validate: bool = True,
    seed: int = 0,
    save_at: Collection[int] = (),
    kind: type[Regression] = Regression,
) -> Regression:
    """Up to `steps` steps over 21 items in batches of 3: seven batches in an epoch, eight of two to a step.

    `save_at`: steps after which ten minutes have passed.
    """
    torch.manual_seed(seed)
    module = kind(at, at_validation)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(21, 4))).float()
    data = TensorDataset(x, torch.arange(21.0)[:, None])
    config = TrainerConfig(
        max_steps=steps,
        val_every=val_every * accumulate,
        accumulate=accumulate,
        device="cpu",
        progress=False,
        tensorboard=False,
    )
    trainer = build_trainer(config, directory)
    (keeps_last,) = (callback for callback in trainer.callbacks if isinstance(callback, KeepLast))
    keeps_last._is_due = lambda trainer: trainer.global_step in save_at
    fit(
        trainer,
        module,
        directory,
        train_dataloaders=ResumableLoader(data, BatchOrder(21, 3, accumulate=accumulate)),
        val_dataloaders=DataLoader(data, batch_size=11) if validate else None,
    )
    return module


def same(a: Regression, b: Regression) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Regression:
    return train(tmp_path_factory.mktemp("whole"), 18)


@pytest.mark.parametrize("stops", [(5,), (4,), (7,), (3, 8, 14), (14,)])
def test_resume_is_exact(tmp_path, whole, stops):
    """Stopped within an epoch, at its end and in later ones, at and between validations: the same weights exactly."""
    seen = []
    for number, stop in enumerate(stops):
        # Another seed after the first: the state must come from the checkpoint.
        seen += train(tmp_path, stop, seed=100 * number).seen
    resumed = train(tmp_path, 18, seed=200)
    assert seen + resumed.seen == whole.seen
    assert same(resumed, whole)


def test_a_resumed_run_keeps_the_rows_of_its_metrics(tmp_path):
    def interrupt_at(stop: int):
        def interrupt(step: int) -> None:
            if step == stop:
                raise KeyboardInterrupt

        return interrupt

    for stop in (5, 12, 17):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "resumed", 30, interrupt_at(stop))
    for directory in ("whole", "resumed", "resumed"):  # the last time nothing is left to do
        train(tmp_path / directory, 30)
    whole, resumed = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "resumed"))
    assert resumed == whole and len(whole.splitlines()) == 1 + 3 + 15  # every tenth step, every second one's validation


class Killed(Exception):
    pass


def test_resume_after_a_kill_is_exact_from_the_last_validation(tmp_path, whole):
    def die(step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, 18, die)
    resumed = train(tmp_path, 18, seed=200)
    assert resumed.seen == whole.seen[4:]  # the last checkpoint is of step 4
    assert same(resumed, whole)


@pytest.mark.parametrize("val_every", [2, 1000])
def test_ctrl_c_leaves_a_checkpoint(tmp_path, whole, val_every):
    def interrupt(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 18, interrupt, val_every=val_every)
    assert signal.getsignal(signal.SIGINT) is handler  # a second run can be stopped too
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 5
    resumed = train(tmp_path, 18, seed=200, val_every=val_every)
    assert resumed.seen == whole.seen[5:]  # the batch that was interrupted comes again
    if val_every == 2:
        assert same(resumed, whole)


@pytest.mark.parametrize("name", ["best", "last"])
def test_ctrl_c_while_a_validation_is_taken_up(tmp_path, monkeypatch, name):
    """Its results are known to some callbacks and not to others: the checkpoint before holds."""
    whole = train(tmp_path / "whole", 10)
    original, calls = Trainer.save_checkpoint, []

    def interrupted(self, path, *args, **kwargs):
        if f"{name}.ckpt" in str(path) and self.validating:
            calls.append(path)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return original(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", 10)
    resumed = train(tmp_path / "stopped", 10, seed=200)
    assert same(resumed, whole)
    steps = [
        torch.load(tmp_path / run / "best.ckpt", weights_only=False)["global_step"] for run in ("whole", "stopped")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("steps", [6, 7])  # 7 make an epoch
@pytest.mark.parametrize("end", [Killed, KeyboardInterrupt])
def test_an_end_in_the_last_validation_loses_no_step(tmp_path, end, steps):
    def interrupt(step: int) -> None:
        if step == steps:
            raise end

    whole = train(tmp_path / "whole", steps, val_every=steps)
    with pytest.raises(end):
        train(tmp_path / "ended", steps, at_validation=interrupt, val_every=steps)
    resumed = train(tmp_path / "ended", steps, val_every=steps, seed=200)
    assert resumed.validated == [steps] and not resumed.seen and same(resumed, whole)
    assert (tmp_path / "ended/best.ckpt").is_file()
    files = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "ended")]
    assert files[0] == files[1] and files[0].count("\n") == 2
    assert not train(tmp_path / "ended", steps, val_every=steps).validated


def test_older_checkpoints_know_their_best(tmp_path):
    assert (
        KeepBest(tmp_path, filename="best", monitor="val/loss").state_key
        == ModelCheckpoint(tmp_path, filename="best", monitor="val/loss").state_key
    )


def test_batches_of_an_epoch_stay_what_they_are(tmp_path):
    data = TensorDataset(torch.arange(20))
    loader = ResumableLoader(data, BatchOrder(20, 4))
    next(iter(loader))
    for name, other in {
        "batch_size": {"batch_size": 5},
        "accumulate": {"accumulate": 2},
        "processes": {"world": 2},
    }.items():
        order = BatchOrder(20, **({"batch_size": 4, "rank": 0} | other))
        with pytest.raises(UserError, match=f"an epoch was begun with {name}|'an epoch' was begun with {name}"):
            ResumableLoader(data, order).load_state_dict(loader.state_dict())
    again = ResumableLoader(data, BatchOrder(20, 4))
    again.load_state_dict({"epoch": 0, "done": 1})  # as older checkpoints have it
    assert len(list(again)) == 4


def test_beginning_anew_forgets_the_run_before(tmp_path):
    train(tmp_path, 4)
    data = TensorDataset(torch.zeros(6, 4), torch.zeros(6, 1))
    config = TrainerConfig(max_steps=4, val_every=4, device="cpu", progress=False, tensorboard=False)

    def die(step: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        fit(
            build_trainer(config, tmp_path),
            Regression(die),
            tmp_path,
            resume=False,
            train_dataloaders=ResumableLoader(data, BatchOrder(6, 3)),
            val_dataloaders=DataLoader(data, batch_size=6),
        )
    assert not (tmp_path / "last.ckpt").exists() and not (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("at", [4, 14])  # within an epoch, and at the end of one
def test_ctrl_c_during_validation(tmp_path, whole, at):
    def interrupt(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 18, at_validation=interrupt)
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == at
    resumed = train(tmp_path, 18, seed=200)
    assert same(resumed, whole) and resumed.seen == whole.seen[at:]
    assert resumed.validated == list(range(at, 19, 2))  # what was interrupted is validated, once


def test_steps_of_several_batches_are_whole_and_validated_to_the_last(tmp_path):
    whole = train(tmp_path / "whole", 12, accumulate=2, val_every=3)
    assert whole.validated == [3, 6, 9, 12] and len(whole.seen) == 24

    def interrupt(step: int) -> None:
        if step == 5:
            seen.append(step)
            if len(seen) == 2:  # the first of its two batches is done
                raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", 12, interrupt, accumulate=2, val_every=3)
    resumed = train(tmp_path / "stopped", 12, accumulate=2, val_every=3, seed=200)
    assert resumed.seen == whole.seen[10:] and same(resumed, whole)


def test_without_validation_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    def die(step: int) -> None:
        if step == 9:
            raise Killed

    whole = train(tmp_path / "whole", 12, validate=False)
    with pytest.raises(Killed):
        train(tmp_path / "killed", 12, die, validate=False, save_at=[4, 8])
    resumed = train(tmp_path / "killed", 12, validate=False, seed=200)
    assert resumed.seen == whole.seen[8:] and same(resumed, whole)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [1, 3, 4, 6, 7, 8])  # within and between epochs and validations, and just after one
def test_a_run_goes_on_from_a_checkpoint_that_was_due_by_time(tmp_path, accumulate, at):
    def die(step: int) -> None:
        if step == at:
            raise Killed

    options = {"val_every": 3, "accumulate": accumulate}
    whole = train(tmp_path / "whole", 10, **options)
    with pytest.raises(Killed):
        train(tmp_path / "killed", 10, die, save_at=[at], **options)
    resumed = train(tmp_path / "killed", 10, seed=200, **options)
    assert resumed.seen == whole.seen[at * accumulate :] and same(resumed, whole)
    assert whole.validated == [3, 6, 9] and resumed.validated == [step for step in (3, 6, 9) if step > at]
    files = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_a_checkpoint_is_due_after_ten_minutes(tmp_path, monkeypatch):
    written, now = [], [0.0]
    monkeypatch.setattr("common.callbacks.time.monotonic", lambda: now[0])
    save = Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer, "save_checkpoint", lambda self, *a, **k: written.append(self.global_step) or save(self, *a, **k)
    )

    def wait(step: int) -> None:
        now[0] += 200

    data = TensorDataset(torch.zeros(20, 4), torch.zeros(20, 1))
    for minutes, expected in ((10.0, [3, 6, 8]), (0.0, [*range(1, 8), 8]), (20.0, [6, 8])):
        written.clear()
        config = TrainerConfig(max_steps=8, save_minutes=minutes, device="cpu", progress=False, tensorboard=False)
        directory = tmp_path / f"{minutes}"
        fit(
            build_trainer(config, directory),
            Regression(wait),
            directory,
            train_dataloaders=ResumableLoader(data, BatchOrder(20, 5)),
        )
        assert written == expected
    assert TrainerConfig().save_minutes == 10


class Signalled(Regression):
    """A signal comes when the optimizer has made its fifth step, before that is counted."""

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        if self.trainer.global_step == 4:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_ends_the_command(tmp_path, whole, name, capsys):
    signum = signal.Signals[name]

    def stop(step: int) -> None:
        if step == 5:
            signal.raise_signal(signum)
            signal.raise_signal(signum)  # not reached
        assert step < 6

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert run_command(lambda: train(tmp_path, 18, stop) and 0) == 128 + signum
    shown = "Ctrl-C" if name == "SIGINT" else name
    assert capsys.readouterr().err == f"\nstopped by {shown}; what was saved before is kept.\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    resumed = train(tmp_path, 18, seed=200)
    assert resumed.seen == whole.seen[5:] and same(resumed, whole)


def test_a_signal_within_the_optimizers_step_waits_for_its_end(tmp_path, whole):
    assert run_command(lambda: train(tmp_path, 18, kind=Signalled) and 0) == 143
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    resumed = train(tmp_path, 18, seed=200)
    assert resumed.seen == whole.seen[5:] and same(resumed, whole)


@pytest.mark.parametrize("at", [4, 10])
def test_a_signal_in_a_validation_has_it_come_again(tmp_path, at):
    whole = train(tmp_path / "whole", 10)
    stop = lambda step: signal.raise_signal(signal.SIGTERM) if step == at else None  # noqa: E731
    assert run_command(lambda: train(tmp_path / "stopped", 10, at_validation=stop) and 0) == 143
    resumed = train(tmp_path / "stopped", 10, seed=200)
    assert resumed.seen == whole.seen[at:] and same(resumed, whole)
    assert resumed.validated == list(range(at, 11, 2))


def test_a_second_signal_while_the_first_saves_is_ignored(tmp_path, monkeypatch, whole):
    save, calls = Trainer.save_checkpoint, []

    def signalled(self, *arguments, **options):
        calls.append(self.global_step)
        if calls[-1] == 5:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        return save(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", signalled)
        stop = lambda step: signal.raise_signal(signal.SIGTERM) if step == 5 else None  # noqa: E731
        assert run_command(lambda: train(tmp_path, 18, stop) and 0) == 143
    resumed = train(tmp_path, 18, seed=200)
    assert resumed.seen == whole.seen[5:] and same(resumed, whole)


def test_a_signal_in_the_last_writing_ends_the_command_after_it(tmp_path, monkeypatch):
    save = Trainer.save_checkpoint

    def signalled(self, *arguments, **options):
        if self.global_step == 6 and not self.validating:
            signal.raise_signal(signal.SIGTERM)
        return save(self, *arguments, **options)

    after = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", signalled)
        assert run_command(lambda: after.append(train(tmp_path, 6))) == 143
    assert not after and torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_signal_while_a_checkpoint_is_read_leaves_it_as_it_is(tmp_path, monkeypatch):
    train(tmp_path, 4)
    before = (tmp_path / "last.ckpt").read_bytes()
    for hook in ("on_load_checkpoint", "on_train_start"):
        with monkeypatch.context() as patch:
            patch.setattr(Regression, hook, lambda *_: signal.raise_signal(signal.SIGTERM))
            assert run_command(lambda: train(tmp_path, 8) and 0) == 143
        assert (tmp_path / "last.ckpt").read_bytes() == before


def test_ignored_signals_stay_so(tmp_path):
    """As with nohup, which leaves a training running when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        module = train(tmp_path, 4, lambda step: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(module.seen) == 4


def weights_hash(directory: Path) -> str:
    """Of both checkpoints' weights, and of the metrics."""
    digest = hashlib.sha256()
    for name in ("last", "best"):
        checkpoint = torch.load(directory / f"{name}.ckpt", weights_only=True)
        digest.update(str(checkpoint["global_step"]).encode())
        for value in checkpoint["state_dict"].values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest() + (directory / "metrics.csv").read_text()


def killed_run(directory: Path) -> str:
    """A scenario of `tests.kills`."""
    torch.set_num_threads(1)
    with sole_run(directory):
        train(directory, 9, val_every=3, accumulate=2, save_at=[1, 4])
    return weights_hash(directory)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_any_of_its_writes_ends_the_same(forks, tmp_path, exhaustive):
    kill_everywhere(forks, "tests.common.test_training:killed_run", tmp_path, points=60 if exhaustive else 6)


FULL = """
import resource, sys
from pathlib import Path
from common.checks import run_command
from tests.common.test_training import train

def fill(step):
    if step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))

raise SystemExit(run_command(lambda: train(Path(sys.argv[1]), 18, fill, val_every=4) and 0))
"""


@pytest.mark.parametrize("room", [100, 6000])
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(forks, tmp_path, whole, room):
    done = forks.run(FULL, tmp_path / "run", room)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("error: File too large") and "free disk space" in last
    assert str(tmp_path / "run/last.ckpt") in last or str(tmp_path / "run/metrics.csv") in last
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["global_step"] == 4
    assert not list((tmp_path / "run").glob("*.tmp"))
    resumed = train(tmp_path / "run", 18, val_every=4, seed=200)
    assert resumed.seen == whole.seen[4:]


def test_rows_of_metrics_that_a_kill_cut_short_come_again(tmp_path):
    train(tmp_path / "whole", 30)
    train(tmp_path / "cut", 12)
    path = tmp_path / "cut/metrics.csv"
    path.write_text(path.read_text() + "0,13,0.5,\n0,1")
    train(tmp_path / "cut", 30)
    found, expected = (list(csv.DictReader(file.open())) for file in (path, tmp_path / "whole/metrics.csv"))
    for row in (*found, *expected):
        row.pop("epoch")  # Lightning counts it up before an epoch's last validation in a resumed run
    assert found == expected and all(row["step"] for row in found)


def test_about_ten_validations():
    assert [validation_interval(0, steps, most=500) for steps in (1, 7, 20, 1234, 5000, 10**6)] == [
        1,
        1,
        2,
        123,
        500,
        500,
    ]
    assert validation_interval(0, 10**6) == 10**5
    assert validation_interval(250, 10**6, most=500) == 250 and validation_interval(250, 100) == 100


TWO = """
import sys
import time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from common.checks import run_command
from common.batches import BatchOrder, ResumableLoader
from common.training import TrainerConfig, build_trainer, fit
from tests.common.test_training import Regression

torch.set_num_threads(1)
directory = Path(sys.argv[1])
directory.mkdir(exist_ok=True)

class Slow(Regression):
    def training_step(self, batch, batch_idx):
        (directory / f"begun{self.global_rank}").touch()
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)

def command():
    torch.manual_seed(0)
    module = Slow()
    data = TensorDataset(torch.arange(84.0).reshape(21, 4) / 84, torch.arange(21.0)[:, None])
    config = TrainerConfig(max_steps=400, val_every=30, devices=2, strategy="ddp", device="cpu",
                           progress=False, tensorboard=False)
    fit(build_trainer(config, directory), module, directory,
        train_dataloaders=ResumableLoader(data, BatchOrder(21, 3)), val_dataloaders=DataLoader(data, batch_size=11))
    return 0

raise SystemExit(run_command(command))
"""


@pytest.mark.parametrize("whom", ["first", "second", "both"])
@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_after_they_have_saved(forks, tmp_path, whom):
    ranks = forks.start_ranks(TWO, tmp_path / "run")
    try:
        wait_for(lambda: all((tmp_path / f"run/begun{rank}").exists() for rank in (0, 1)), ranks[0])
        for process in {"first": ranks[:1], "second": ranks[1:], "both": ranks}[whom]:
            os.kill(process.pid, signal.SIGTERM)
        first, second = (process.wait(60) for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    assert first.returncode == 143, first.stderr + second.stderr
    assert second.returncode == 0  # with another code, Lightning would kill the first
    assert "stopped by SIGTERM" in first.stderr and "Traceback" not in first.stderr
    require_checkpoint_of_two(tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_the_process_that_started_the_other_ends_both(tmp_path):
    """As above, with Lightning's own launcher."""
    script = tmp_path / "script.py"
    script.write_text(AS_TESTS + TWO)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: all((tmp_path / f"run/begun{rank}").exists() for rank in (0, 1)), process)
        process.terminate()
        error = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143, error
    assert error.count("stopped by SIGTERM") == 1 and "Traceback" not in error
    require_checkpoint_of_two(tmp_path / "run")


def wait_for(condition, process) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def require_checkpoint_of_two(run: Path) -> None:
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert 0 < checkpoint["global_step"] < 400 and len(checkpoint["random_state"]) == 2


def test_a_moved_run_knows_its_best(tmp_path):
    data = TensorDataset(torch.ones(16, 2))

    def go(directory: Path, steps: int) -> None:
        trainer = build_trainer(TrainerConfig(max_steps=steps, val_every=2, device="cpu", progress=False), directory)
        module = GetsWorse()
        module.validated = steps
        fit(
            trainer,
            module,
            directory,
            train_dataloaders=ResumableLoader(data, BatchOrder(16, 2)),
            val_dataloaders=DataLoader(data, batch_size=16),
        )

    go(tmp_path / "here", 4)
    (tmp_path / "here").rename(tmp_path / "there")
    go(tmp_path / "there", 6)
    assert torch.load(tmp_path / "there/best.ckpt", weights_only=False)["global_step"] == 2


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path):
    data = TensorDataset(torch.zeros(6, 4), torch.zeros(6, 1))
    config = TrainerConfig(max_steps=2, val_every=1, device="cpu", progress=False, tensorboard=False)
    trainer = build_trainer(config, tmp_path, settings={"lr": 0.1, "width": 4})
    require_same_run(tmp_path, {"lr": 0.1})  # nothing is there yet
    fit(trainer, Regression(), tmp_path, train_dataloaders=ResumableLoader(data, BatchOrder(6, 3)))
    require_same_run(tmp_path, {"lr": 0.1, "width": 4})
    with pytest.raises(UserError, match=r"was begun with lr 0\.1, now it is 0\.2: use the same again, --no-resume"):
        require_same_run(tmp_path, {"lr": 0.2, "width": 4})


def test_nan_stops_the_run_and_keeps_the_checkpoint_before(tmp_path):
    with pytest.raises(UserError, match="the loss is nan at step 6: lower the learning rate"):
        train(tmp_path, 18, lambda step: float("nan") if step == 5 else None)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_is_looked_for_every_ten_steps_and_the_first_is_named(tmp_path, accumulate):
    steps = []

    def breaks(step: int) -> float:
        steps.append(step)
        return float("nan") if step == 2 else float("inf") if step == 3 else 1.0

    at = 3 if accumulate == 1 else 2  # of the first of its two batches
    with pytest.raises(UserError, match=f"the loss is nan at step {at}: lower the learning rate"):
        train(tmp_path, 18, breaks, val_every=1000, accumulate=accumulate)
    assert len(steps) == 10 * accumulate and not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, "a checkpoint is due", "last step"])
def test_nan_is_told_and_not_written_whatever_comes_next(tmp_path, end):
    def breaks(step: int) -> float:
        if step == 6 and end in (KeyboardInterrupt, RuntimeError):
            raise end
        return float("nan") if step == 5 else 1.0

    with pytest.raises(UserError, match="the loss is nan at step 6"):
        train(tmp_path, 6 if end == "last step" else 18, breaks, validate=False, save_at=[4, 8])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_nan_is_never_the_best(tmp_path):
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        train(tmp_path, 18, lambda step: float("nan"))
    assert not (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_nan_is_told_before_other_callbacks_write(tmp_path, interrupted):
    class Writes(Callback):
        written = False

        def on_train_end(self, trainer, module):
            self.written = True

        def on_exception(self, trainer, module, exception):
            self.written |= isinstance(exception, KeyboardInterrupt)

    def breaks(step: int) -> float:
        if step == 3 and interrupted:
            raise KeyboardInterrupt
        return float("nan")

    data, writes = TensorDataset(torch.zeros(12, 4), torch.zeros(12, 1)), Writes()
    config = TrainerConfig(max_steps=4, device="cpu", progress=False, tensorboard=False)
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        fit(
            build_trainer(config, tmp_path, callbacks=[writes]),
            Regression(breaks),
            tmp_path,
            train_dataloaders=ResumableLoader(data, BatchOrder(12, 3)),
        )
    assert not writes.written


def test_best_and_last_are_kept(tmp_path):
    train(tmp_path, 9, val_every=4)
    last, best = (torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("last", "best"))
    assert last["global_step"] == 9 and len(last["optimizer_states"]) == 1
    assert best["global_step"] in (4, 8) and "optimizer_states" not in best  # which nothing goes on from
    assert (tmp_path / "metrics.csv").stat().st_size > 0
    assert not list(tmp_path.glob("*-v*"))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train(tmp_path, 2)
    path = tmp_path / "last.ckpt"
    content = path.read_bytes()
    half = content[: len(content) // 2]
    path.write_bytes({"truncated": half, "garbage": b"no checkpoint" * 99, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"last\.ckpt"):
        train(tmp_path, 4)


def test_a_checkpoint_of_other_sizes_is_named(tmp_path):
    train(tmp_path, 2)
    module = Regression()
    module.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    data = TensorDataset(torch.zeros(6, 4), torch.zeros(6, 1))
    config = TrainerConfig(max_steps=4, val_every=1, device="cpu", progress=False, tensorboard=False)
    with pytest.raises(UserError, match=r"last\.ckpt.*does not fit"):
        fit(
            build_trainer(config, tmp_path),
            module,
            tmp_path,
            train_dataloaders=ResumableLoader(data, BatchOrder(6, 3)),
            val_dataloaders=DataLoader(data, batch_size=6),
        )


def test_configuration_is_checked(tmp_path):
    with pytest.raises(UserError, match="max_steps and max_epochs"):
        build_trainer(TrainerConfig(), tmp_path)
    with pytest.raises(UserError, match="devices is 0"):
        build_trainer(TrainerConfig(max_steps=1, devices=0), tmp_path)
    for strategy in ("fsdp", "fsdp_cpu_offload", "deepspeed_stage_2"):
        with pytest.raises(UserError, match=f"strategy is '{strategy}', .*: use ddp"):
            build_trainer(TrainerConfig(max_steps=1, strategy=strategy), tmp_path)


def test_warmup_cosine():
    factor = warmup_cosine(10, 110, floor=0.1)
    assert [factor(0), factor(4), factor(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == pytest.approx(1) and factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1) and factor(10**6) == pytest.approx(0.1)
    assert warmup_cosine(0, 0)(0) == pytest.approx(1)
    linear = warmup_linear(10, 110, floor=0.1)
    assert [linear(0), linear(9), linear(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert [linear(60), linear(110), linear(10**6)] == pytest.approx([0.55, 0.1, 0.1])
    assert warmup_linear(0, 10)(10) == pytest.approx(0)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.add_module("embed", nn.Linear(4, 8))
        self.model.add_module("hidden", nn.Linear(8, 8))
        self.model.add_module("out", nn.Linear(8, 1))

    def configure_optimizers(self):
        optimizer = MuonAndAdam(
            self.model, hidden="hidden.", lr_muon=0.02, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(4, 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])


def test_muon_and_adam_take_their_parameters_and_step_together(tmp_path):
    torch.manual_seed(0)
    module = Net()
    twin = nn.Sequential(*[type(layer)(layer.in_features, layer.out_features) for layer in module.model])
    twin.load_state_dict(
        {
            f"{n}.{kind}": module.model.state_dict()[f"{name}.{kind}"]
            for n, name in enumerate(("embed", "hidden", "out"))
            for kind in ("weight", "bias")
        }
    )
    data = TensorDataset(torch.randn(30, 4), torch.randn(30, 1))
    config = TrainerConfig(max_steps=6, clip_gradients=0.5, device="cpu", progress=False, tensorboard=False)
    loader = ResumableLoader(data, BatchOrder(30, 10))
    fit(build_trainer(config, tmp_path, monitor="x"), module, tmp_path, train_dataloaders=loader)

    muon = torch.optim.Muon([twin[1].weight], lr=0.02, weight_decay=0.1, momentum=0.95)
    plain = [layer.bias for layer in twin]
    adam = torch.optim.AdamW(
        [{"params": [twin[0].weight, twin[2].weight], "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    factor, order = warmup_cosine(4, 20), BatchOrder(30, 10)
    for step in range(6):
        order.epoch = step // 3
        rows = order.batches()[step % 3]
        for group in (*muon.param_groups, *adam.param_groups):
            group["lr"] = (0.02 if group in muon.param_groups else 0.01) * factor(step)
        twin.zero_grad()
        nn.functional.mse_loss(twin(data.tensors[0][rows]), data.tensors[1][rows]).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        muon.step()
        adam.step()
    for ours, expected in zip(module.model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_patience_survives_a_resume(tmp_path):
    """Nothing is learned: the run ends after `patience` validations, and again at once."""

    class Still(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = TensorDataset(torch.zeros(6, 4), torch.zeros(6, 1))
    config = TrainerConfig(max_steps=50, val_every=1, patience=3, device="cpu", progress=False, tensorboard=False)
    for seen in (4, 0, 2):
        module = Still()
        if seen == 2:  # more patience than before
            config = replace(config, patience=5)
        trainer = build_trainer(config, tmp_path)
        fit(
            trainer,
            module,
            tmp_path,
            train_dataloaders=ResumableLoader(data, BatchOrder(6, 3)),
            val_dataloaders=DataLoader(data, batch_size=6),
        )
        assert (trainer.global_step, len(module.seen)) == (6 if seen == 2 else 4, seen)


class GetsWorse(LightningModule):
    """A module whose validation loss only rises, and which fails in the middle of the fourth round."""

    def __init__(self):
        super().__init__()
        self.weight, self.validated = nn.Parameter(torch.zeros(2)), 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        if self.global_step == 7:
            raise RuntimeError("power failure")
        return (self.weight * batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += 1
        self.log("val/loss", float(self.validated))


def test_every_validation_writes_last_and_only_the_better_ones_best(tmp_path):
    data = TensorDataset(torch.ones(16, 2))
    trainer = build_trainer(TrainerConfig(max_steps=20, val_every=2, device="cpu", progress=False), tmp_path)
    loader = ResumableLoader(data, BatchOrder(16, 2))
    with pytest.raises(RuntimeError, match="power failure"):
        fit(trainer, GetsWorse(), tmp_path, train_dataloaders=loader, val_dataloaders=DataLoader(data, batch_size=16))
    steps = {
        name: torch.load(tmp_path / f"{name}.ckpt", weights_only=False)["global_step"] for name in ("best", "last")
    }
    assert steps == {"best": 2, "last": 6}


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("num_items", [24, 25, 100, 131])
def test_an_epoch_is_whole_steps(num_items, accumulate, world):
    orders = [BatchOrder(num_items, 2, accumulate=accumulate, rank=rank, world=world) for rank in range(world)]
    batches = [order.batches() for order in orders]
    assert {len(of_rank) for of_rank in batches} == {len(orders[0])} and len(orders[0]) % accumulate == 0
    assert sorted(i for of_rank in batches for batch in of_rank for i in batch) == list(range(num_items))
    assert all(1 <= len(batch) <= 3 for of_rank in batches for batch in of_rank)
    with pytest.raises(UserError, match=f"{accumulate - 1} items for 1 processes of {accumulate} batches"):
        BatchOrder(accumulate - 1, 2, accumulate=accumulate, world=1)
