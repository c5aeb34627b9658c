"""Signals, kills and full disks while a model trains: what was saved is kept, and the same command resumes."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from common.checks import run_command
from common.processes import sole_run
from tests.common.regression import Regression, same, train
from tests.forks import AS_TESTS
from tests.kills import kill_everywhere


class Signalled(Regression):
    """A signal comes when the optimizer has made its fifth step, before that is counted."""

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        if self.trainer.global_step == 4:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
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
    kill_everywhere(forks, "tests.common.test_stopping:killed_run", tmp_path, points=60 if exhaustive else 6)


FULL = """
import io, resource, sys
from pathlib import Path
from common.checks import run_command
from tests.common.regression import train

def fill(step):
    if step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))

sys.stderr = io.StringIO()  # the real one is a file with the same limit
code = run_command(lambda: train(Path(sys.argv[1]), 18, fill, val_every=4) and 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
sys.__stderr__.write(sys.stderr.getvalue())
raise SystemExit(code)
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


TWO = """
import sys
import time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from common.checks import run_command
from common.batches import BatchOrder, ResumableLoader
from common.training import TrainerConfig, build_trainer, fit
from tests.common.regression import Regression

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
