"""Schedules of the learning rate, and Muon beside AdamW."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from common.batches import BatchOrder, ResumableLoader
from common.optimizers import MuonAndAdam, warmup_cosine, warmup_linear
from common.training import TrainerConfig, build_trainer, fit


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
