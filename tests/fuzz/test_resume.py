"""A run's last.ckpt, broken or hostile: a UserError, no hang, and nothing of it is run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from common.batches import BatchOrder, ResumableLoader
from common.checks import UserError
from common.training import TrainerConfig, build_trainer, fit, load_best, require_same_run
from tests.fuzz.mutations import FUZZ, JUNK, break_file, changed, damaged, only_user_errors

SETTINGS = {"lr": 0.1}


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss


def train(directory, steps, *, compare=True):
    """Up to `steps` steps, three in an epoch; `compare` as commands do it that know a run's settings."""
    if compare:
        require_same_run(directory, SETTINGS)
    config = TrainerConfig(max_steps=steps, val_every=2, device="cpu", progress=False, tensorboard=False)
    loader = ResumableLoader(TensorDataset(torch.ones(6, 2)), BatchOrder(6, 2))
    fit(
        build_trainer(config, directory, monitor="train/loss", settings=SETTINGS),
        Line(),
        directory,
        train_dataloaders=loader,
    )


def test_other_bytes(tmp_path):
    train(tmp_path, 2)
    path = tmp_path / "last.ckpt"
    break_file(path, damaged(path.read_bytes()), lambda: train(tmp_path, 4), 15)


def test_other_values(tmp_path):
    """Of everything but Lightning's own counters and the optimizer's moments."""
    train(tmp_path, 2)
    good = torch.load(tmp_path / "last.ckpt", weights_only=True)
    loader = good["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    ours = {name: good[name] for name in ("state_dict", "callbacks", "random_state", "settings")}

    @settings(FUZZ, max_examples=30)
    @given(
        changed({"loader": loader, **ours}), st.one_of(st.just(None), st.tuples(st.sampled_from(sorted(good)), JUNK))
    )
    def check(bad, name_and_junk):
        bad = copy.deepcopy(good) | bad
        bad["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [bad.pop("loader", None)]
        torch.save(bad | dict([name_and_junk] if name_and_junk else []), tmp_path / "last.ckpt")
        with only_user_errors():
            train(tmp_path, 4)

    check()


class Hostile:
    """Unpickled by Python itself, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["whole", "settings", "random_state", "state_dict"])
@pytest.mark.parametrize("compare", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, part, compare):
    train(tmp_path, 2)
    made, path = tmp_path / "made", tmp_path / "last.ckpt"
    good = torch.load(path, weights_only=True)
    torch.save(Hostile(made) if part == "whole" else good | {part: Hostile(made)}, path)
    with pytest.raises(UserError, match=r"last\.ckpt' is damaged or holds more than tensors and plain values"):
        train(tmp_path, 4, compare=compare)
    path.rename(tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"best\.ckpt' is damaged or holds more than"):
        load_best(Line(), tmp_path)
    assert not made.exists()
    torch.load(tmp_path / "best.ckpt", weights_only=False)  # it does run: the refusal is what stops it
    assert made.exists()


@pytest.mark.parametrize("change", [
    {"random_state": {"python": 5}}, {"lr_schedulers": None}, {"callbacks": 7}, {"settings": []},
    {"done": 10**30}, {"done": 3}, {"epoch": None},
], ids=str)  # fmt: skip
def test_found_by_this(tmp_path, change):
    train(tmp_path, 2)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    loader = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    (loader if change.keys() & loader.keys() else checkpoint).update(change)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="start over"):
        train(tmp_path, 4)
