"""A linear regression and its training, for tests of what trains."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.batches import BatchOrder, ResumableLoader
from common.callbacks import KeepLast
from common.optimizers import warmup_cosine
from common.training import TrainerConfig, build_trainer, fit


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
