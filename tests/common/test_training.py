"""Batch order, exact resume, signals, kills, full disks and NaN, with dropout on."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.batches import BatchOrder, ResumableLoader
from common.callbacks import KeepBest
from common.checks import UserError
from common.training import TrainerConfig, build_trainer, fit, require_same_run, validation_interval
from tests.common.regression import Regression, same, train


@pytest.mark.slow
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


def test_starting_over_forgets_the_run_before(tmp_path):
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


@pytest.mark.slow
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
