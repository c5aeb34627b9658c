"""Optimizer, schedule and logging around a captioner's loss, as LightningModules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, distributed

from clipcap.model import ClipCapModel
from clipcap.training.capdec import inject_noise
from clipcap.training.scst import CorpusCider, rewarded_samples, self_critical_loss, token_log_probs
from common.language import IGNORE
from common.optimizers import fused, scheduled, warmup_cosine, warmup_linear
from common.training import mean_over_processes

SCHEDULES: dict[str, Callable[[int, int], Callable[[int], float]]] = {"cosine": warmup_cosine, "linear": warmup_linear}


class CaptionTraining(LightningModule):
    """Optimizer, schedule and logging around `ClipCapModel`'s loss; checkpoints hold trained parameters alone.

    The loss of a step is the mean over all its tokens, however they are spread over batches and processes: batches
    give sums, which are divided by the step's tokens just before the optimizer takes them.

    Args:
        model: captioner.
        lr: peak rate.
        warmup, total: steps.
        weight_decay: AdamW's.
        schedule: "cosine" or "linear".
        text_noise: variance of noise on the embeddings of training batches, which are then of length 1.
    """

    strict_loading = False

    def __init__(
        self,
        model: ClipCapModel,
        *,
        lr: float,
        warmup: int,
        total: int,
        weight_decay: float,
        schedule: str = "cosine",
        text_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr, self.warmup, self.total, self.weight_decay = lr, warmup, total, weight_decay
        self.schedule, self.text_noise = schedule, text_noise
        self._sums: Tensor | None = None  # nats and tokens of the step so far
        self._valid = np.zeros(2)  # and of the validation

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = fused(torch.optim.AdamW, trained, lr=self.lr, weight_decay=self.weight_decay)
        factor = SCHEDULES[self.schedule](self.warmup, self.total)
        return scheduled(optimizer, factor)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.text_noise:
            batch = batch | {"clip_embeddings": inject_noise(batch["clip_embeddings"], self.text_noise)}
        tokens = (batch["labels"] != IGNORE).sum()
        return self._add(self._loss(batch) * tokens, tokens)

    def _add(self, nats: Tensor, tokens: Tensor) -> Tensor:
        """Count a batch's sum as part of the step; returns the sum, whose gradient is accumulated."""
        sums = torch.stack([nats.detach().float(), tokens.float()])
        self._sums = sums if self._sums is None else self._sums + sums
        return nats

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._sums is not None
        sums, world = self._sums, self.trainer.world_size
        if world > 1:
            distributed.all_reduce(sums)
        # Lightning has divided by the batches of a step, and DDP by the processes.
        factor = self.trainer.accumulate_grad_batches * world / sums[1]
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self.log("train/loss", sums[0] / sums[1], prog_bar=True)
        self._sums = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = int((batch["labels"] != IGNORE).sum())  # the mean over tokens, not over batches
        self._valid += np.array([float(self._loss(batch)) * tokens, tokens])

    def on_validation_epoch_start(self) -> None:
        self._valid = np.zeros(2)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", mean_over_processes(self, *self._valid), prog_bar=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        # Padding is on the right and unlabelled, so causal attention needs no mask.
        loss = self.model(
            batch["clip_embeddings"],
            batch["input_ids"],
            labels=batch["labels"],
            prompts=batch.get("prompts"),
            return_logits=False,
        ).loss
        assert loss is not None
        return loss

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained parameters only: a frozen backbone is kept by its name."""
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}


class SelfCriticalTraining(CaptionTraining):
    """Self-critical training: batches are of images with references, the loss that of `clipcap.training.scst`."""

    def __init__(
        self, model: ClipCapModel, cider: CorpusCider, *, samples: int, max_new_tokens: int, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.cider, self.samples, self.max_new_tokens = cider, samples, max_new_tokens

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        embeddings = batch["clip_embeddings"]
        ids, labels, advantage, greedy = rewarded_samples(
            self.model,
            embeddings,
            batch["references"],
            self.cider,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
        )
        log_probs = token_log_probs(self.model, embeddings.repeat_interleave(self.samples, 0), ids, labels)
        counted = (labels != IGNORE).float()
        self.log("train/greedy_cider", greedy.mean(), prog_bar=True)
        self.log("train/sampled_cider", greedy.mean() + advantage.mean())
        return self._add(self_critical_loss(log_probs, counted, advantage), counted.sum())
