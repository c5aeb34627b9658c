"""Train a GPT-2 in any stage of recycling: the tensors that ask for a gradient, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import tyro
from jaxtyping import Int
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.batches import BatchOrder, ResumableLoader
from common.checks import UserError, require_at_least, require_fields_at_least, require_rate
from common.decoders.families import blocks, blocks_name, is_norm, positions
from common.decoders.tables import is_tied, token_table
from common.files import write_json
from common.language import IGNORE
from common.optimizers import MuonAndAdam, decay_matrices, scheduled, warmup_cosine
from common.runtime import RuntimeConfig, seed_everything
from common.training import (
    GradientConfig,
    ScaleConfig,
    TrainerConfig,
    build_trainer,
    fit,
    load_best,
    mean_over_processes,
)
from recycle_gpt2.blocks import labels
from recycle_gpt2.loss import next_token_loss
from recycle_gpt2.records import RENEW, read_json, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MOST_PASSES, ENOUGH = 4, 2_000_000
"""What is trained on unless a length is given: passes over the text, until these tokens are reached. Four passes are
worth nearly as much as new text (Muennighoff et al. 2023, sec. 5)."""
ROWS_RATE, LAYERS_RATE = 0.025, 0.005
"""Learning rate of Adam as a share of the token table's standard deviation: of the table alone, and of everything."""
VALIDATIONS = 10
"""Of a stage, where it has the steps for them: each is a checkpoint, and the best weights are chosen among them."""


@dataclass(frozen=True)
class StageConfig:
    """How long and how a stage trains."""

    epochs: float | None = None
    """Passes over the blocks. Left out, four, or fewer once they make two million tokens, but at least one."""
    tokens: int = 0
    """Tokens to train on, when not 0, instead of epochs."""
    batch_size: int = 8
    """Blocks in a batch, for each process."""
    optimizer: Literal["amsgrad", "adamw", "muon"] = "adamw"
    """amsgrad: Adam as published; adamw; muon: Muon for the layers' matrices, AdamW for the rest."""
    lr: float | None = None
    """Peak learning rate (of AdamW's part with muon; the paper: 1e-3, and 1e-4 for fine-tuning). Left out, a share of
    the token table's standard deviation at the beginning: 2.5%, or 0.5% where AdamW trains the layers too."""
    lr_muon: float = 0.02
    """Muon's peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay, on matrices only; decoupled but for amsgrad."""
    schedule: Literal["plateau", "cosine"] = "cosine"
    """plateau: a tenth of the rate when validation stops improving, as published; cosine: down to zero."""
    patience: int = 1
    """Validations in a row without improvement that the plateau schedule bears."""
    warmup: int = 0
    """Steps of linear warm-up."""
    early_stopping: int = 0
    """Validations without improvement that end the stage; 0 never does."""
    val_every: int = 500
    """Steps between validations, at most: there are about ten in a stage or more, and one after its last step."""
    share: tyro.conf.Suppress[float] = 1.0
    """Of that length: what a run's other stages take of it."""
    gradients: GradientConfig = field(default_factory=GradientConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def check(self) -> None:
        """Raise UserError for a value that cannot work, whatever the model and the corpus."""
        self.scale.check()
        self.gradients.check()
        require_fields_at_least(self, 1, "batch_size", "val_every")
        require_fields_at_least(self, 0, "patience", "warmup", "early_stopping", "weight_decay", "tokens")
        require_at_least("epochs", 1.0 if self.epochs is None else self.epochs, 0)
        for name in ("lr", "lr_muon"):
            require_rate(name, getattr(self, name))
        if self.epochs == 0 and not self.tokens:
            raise UserError(f"epochs is {self.epochs} and tokens is {self.tokens}: set one of them above 0.")

    def length(self, tokens: int) -> float:
        """Tokens that are trained on, of a corpus that has `tokens`."""
        passes = min(MOST_PASSES, max(1.0, ENOUGH / tokens)) if self.epochs is None else self.epochs
        return self.share * (self.tokens or passes * tokens)


PUBLISHED = StageConfig(epochs=1.0, optimizer="amsgrad", lr=1e-3, schedule="plateau")
"""As de Vries & Nissim 2021 relearn."""


def learning_rate(model: PreTrainedModel, config: StageConfig) -> float:
    """The peak rate that `config` says or leaves out: Adam moves each weight by about the rate, whatever its scale."""
    if config.lr is not None:
        return config.lr
    inside = any(parameter.requires_grad and parameter.ndim == 2 for parameter in blocks(model).parameters())
    share = LAYERS_RATE if inside and config.optimizer != "muon" else ROWS_RATE
    return share * float(token_table(model).detach().float().std())


@dataclass(frozen=True)
class Plan:
    """The length of a stage in steps."""

    steps: int
    val_every: int
    """Divides `steps`, so that the last weights are validated too."""
    tokens_per_step: int


def plan(num_blocks: int, block: int, config: StageConfig) -> Plan:
    """Steps that make up the epochs or tokens asked for, rounded up.

    Raises:
        UserError: a number that leaves nothing to do.
    """
    config.check()
    blocks_per_step = min(config.batch_size * config.gradients.accumulate * config.scale.world, num_blocks)
    steps = max(1, math.ceil(config.length(num_blocks * block) / (blocks_per_step * block) - 1e-6))
    validations = math.ceil(steps / min(config.val_every, math.ceil(steps / VALIDATIONS)))
    every = math.ceil(steps / validations)
    return Plan(every * validations, every, blocks_per_step * block)


def flops_per_token(model: PreTrainedModel, block: int) -> int:
    """Floating-point operations that a training step needs for one token, frozen parts counted as such.

    A matrix of n weights takes 2n forwards, 2n for the gradient of what entered it if anything before it is trained,
    and 2n for its own gradient if it is trained: 6n in all when everything is (Kaplan et al. 2020, sec. 2.1).
    Attention takes 4·t·d forwards in each layer and twice that backwards. A token table counts as the head only.
    """
    layers, head, config = blocks(model), model.get_output_embeddings().weight, model.config
    inside = {id(parameter) for parameter in layers.parameters()}
    norms = [p for m in model.modules() if is_norm(m) for p in m.parameters() if id(p) not in inside]
    inside |= {id(parameter) for parameter in norms}
    if not is_tied(model):
        inside |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    # Whether a gradient must pass through.
    below = any(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in inside)
    total = 0
    for layer in layers:
        matrices = [parameter for parameter in layer.parameters() if parameter.ndim == 2]
        trained_here = any(parameter.requires_grad for parameter in layer.parameters())
        for matrix in matrices:
            total += matrix.numel() * (2 + 2 * (below or trained_here) + 2 * matrix.requires_grad)
        total += 4 * block * config.hidden_size * (1 + 2 * (below or trained_here))
        below = below or trained_here
    below = below or any(parameter.requires_grad for parameter in norms)
    return total + head.numel() * (2 + 2 * below + 2 * head.requires_grad)


def build_optimizer(model: PreTrainedModel, config: StageConfig) -> torch.optim.Optimizer:
    """The optimizer over the parameters that ask for a gradient; weight decay is for matrices only.

    Raises:
        UserError: nothing to train, or a value that cannot work.
    """
    config.check()
    lr = learning_rate(model, config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UserError("no tensor is to be trained: choose what the stage trains.")
    if config.optimizer == "muon":
        hidden = f"{blocks_name(model)}."
        if any(hidden in name and p.ndim == 2 for name, p in trained.items()):
            return MuonAndAdam(model, hidden=hidden, lr_muon=config.lr_muon, lr=lr, weight_decay=config.weight_decay)
    groups = decay_matrices([*trained.values()], config.weight_decay)
    if config.optimizer == "amsgrad":
        return torch.optim.Adam(groups, lr=lr, amsgrad=True)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


class Recycling(LightningModule):
    """Optimizer, schedule, counting and logging around `next_token_loss`; checkpoints hold trained tensors alone."""

    strict_loading = False

    def __init__(self, model: PreTrainedModel, config: StageConfig, plan: Plan, block: int) -> None:
        super().__init__()
        self.model, self.config, self.plan = model, config, plan
        self.flops_per_token = flops_per_token(model, block)
        self.tokens = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self._train_nats: list[Tensor] = []
        self._pending: list[tuple[int, Tensor]] = []  # of batches whose gradients were not taken yet
        self._valid: list[tuple[Tensor, int]] = []
        self._plateau: dict[str, Any] | None = None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.config)
        if self.config.schedule == "cosine":
            factor = warmup_cosine(self.config.warmup, self.plan.steps)
        else:
            warmup = self.config.warmup

            def factor(step: int) -> float:
                return min(1.0, (step + 1) / (warmup + 1)) * self._decayed()

        return scheduled(optimizer, factor)

    def _decayed(self) -> float:
        return 1.0 if self._plateau is None else self._plateau["factor"]

    def _meet_plateau(self, loss: float) -> None:
        """A tenth of the rate once `patience` validations in a row brought no relative gain of 1e-4 (as torch's)."""
        state = self._plateau or {"best": math.inf, "bad": 0, "factor": 1.0}
        if loss < state["best"] * (1 - 1e-4):
            state |= {"best": loss, "bad": 0}
        elif state["bad"] + 1 > self.config.patience:
            state |= {"bad": 0, "factor": state["factor"] * 0.1}
        else:
            state["bad"] += 1
        self._plateau = state

    def on_train_start(self) -> None:
        self._clock = time.monotonic()

    def training_step(self, batch: Int[Tensor, "b t"], batch_idx: int) -> Tensor:
        loss = next_token_loss(self.model, batch)
        self._pending.append((batch.numel() * self.trainer.world_size, loss.detach()))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        now = time.monotonic()
        elapsed = max(now - self._clock, 1e-9)
        self.seconds, self._clock = self.seconds + elapsed, now
        if (batch_idx + 1) % self.config.gradients.accumulate == 0:
            self.tokens += sum(tokens for tokens, _ in self._pending)
            self._train_nats += [nats for _, nats in self._pending]
            self._pending = []
        self.log("tokens/s", batch.numel() * self.trainer.world_size / elapsed, prog_bar=True)
        self.log("tokens", float(self.tokens))

    def validation_step(self, batch: Int[Tensor, "b t"], batch_idx: int) -> None:
        count = int((labels(batch, self.model.config.eos_token_id)[:, 1:] != IGNORE).sum())
        self._valid.append((next_token_loss(self.model, batch), count))

    def on_validation_epoch_end(self) -> None:
        total, count = sum(float(nats) * n for nats, n in self._valid), sum(n for _, n in self._valid)
        loss = mean_over_processes(self, total, count)
        self._valid = []
        self.log("val/loss", loss, prog_bar=True, rank_zero_only=False)
        self._meet_plateau(loss)
        train = torch.stack([nats.cpu() for nats in self._train_nats]).mean().item() if self._train_nats else math.nan
        self._train_nats = []
        self.curve.append(
            {
                "step": self.trainer.global_step,
                "tokens": self.tokens,
                "flops": self.tokens * self.flops_per_token,
                "seconds": round(self.seconds, 3),
                "train_loss": train,
                "val_loss": loss,
            }
        )

    def on_validation_end(self) -> None:
        self._clock = time.monotonic()  # validation is no training time

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recycling"] = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "curve": list(self.curve),
            "train_nats": [float(nats) for nats in self._train_nats],
            "plateau": dict(self._plateau) if self._plateau else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["recycling"]
        self.tokens, self.seconds, self.curve = state["tokens"], state["seconds"], list(state["curve"])
        self._train_nats = [torch.tensor(nats) for nats in state["train_nats"]]
        self._plateau = state["plateau"]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained tensors only: the frozen ones are known from the model that the stage began with."""
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}


@dataclass(frozen=True)
class StageRecord:
    """What a stage did."""

    trained: tuple[str, ...]
    """Names of the trained tensors."""
    trained_parameters: int
    tokens: int
    flops: float
    """Computed: of training steps alone, by `flops_per_token`."""
    seconds: float
    """Of training, without validation."""
    val_loss: float
    """Lowest validation loss, of the weights that were kept."""
    curve: tuple[dict[str, float], ...]
    """At each validation: step, tokens, flops, seconds, train_loss (mean since the last), val_loss."""
    rate: float | None = None
    """Peak learning rate; records of earlier versions have none."""


def train_stage(
    model: PreTrainedModel,
    train: Dataset[Tensor],
    valid: Dataset[Tensor],
    directory: Path,
    config: StageConfig,
    *,
    runtime: RuntimeConfig,
    order: int = 0,
    progress: bool = True,
) -> StageRecord:
    """Train the tensors of `model` that ask for a gradient and leave the best weights in it.

    An interrupted stage resumes from `last.ckpt` in `directory`, exactly; one that is finished only loads its weights.

    Args:
        model: GPT-2, with `requires_grad` set as the stage wants it (see `recycle_gpt2.lexical.train_only`).
        train: int64 token blocks (t,).
        valid: the same, for early stopping, the schedule and the choice of the best weights.
        directory: where checkpoints, logs and `stage.json` go.
        config: length and optimizer.
        runtime: device, precision and seed of the order.
        order: of the blocks; stages with other numbers see other blocks first.
        progress: show a bar with the loss and tokens per second.

    Raises:
        UserError: a setting that cannot work, or a loss that is no longer a number.
    """
    num_blocks, block = len(cast(Sized, train)), len(train[0])
    if (directory / "stage.json").exists():
        _load_best(model, directory)
        return read_record(directory)
    if block > positions(model.config):
        raise UserError(
            f"block is {block} tokens but the model has {positions(model.config)} positions: pack the corpus with "
            f"--block {positions(model.config)} or less."
        )
    if len(cast(Sized, valid)) == 0:
        raise UserError("the validation split has 0 blocks: give more text or a larger validation share.")
    planned = plan(num_blocks, block, config)
    config = replace(config, lr=learning_rate(model, config))
    seed_everything(runtime.seed)  # a stage's dropout does not depend on what the process did before it
    model.train()  # Lightning leaves the mode as it is; GPT-2's dropout is its config's
    module = Recycling(model, config, planned, block)
    build_optimizer(model, config)  # its complaints come before anything is written
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    directory.mkdir(parents=True, exist_ok=True)
    accumulate = config.gradients.accumulate
    trainer = build_trainer(
        TrainerConfig(
            max_steps=planned.steps,
            val_every=planned.val_every * accumulate,
            precision=runtime.precision,
            device=runtime.device,
            patience=config.early_stopping,
            tensorboard=False,
            progress=progress,
            **vars(config.gradients),
            **vars(config.scale),
        ),
        directory,
    )
    loaders: dict[str, Any] = {
        "train_dataloaders": ResumableLoader(
            train,
            BatchOrder(num_blocks, config.batch_size, accumulate=accumulate, seed=runtime.seed + 1_000_003 * order),
        ),
        "val_dataloaders": DataLoader(
            valid, batch_sampler=BatchOrder(len(cast(Sized, valid)), config.batch_size, shuffle=False)
        ),
    }
    fit(trainer, module, directory, **loaders)
    _load_best(model, directory)
    record = StageRecord(
        trained=trained,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        tokens=module.tokens,
        flops=float(module.tokens * module.flops_per_token),
        seconds=round(module.seconds, 1),
        val_loss=min(point["val_loss"] for point in module.curve),
        curve=tuple(module.curve),
        rate=config.lr,
    )
    if trainer.is_global_zero:
        write_json(directory / "stage.json", record)
    return record


def _load_best(model: PreTrainedModel, directory: Path) -> None:
    """Put the weights with the lowest validation loss into `model`, in eval mode."""
    load_best(torch.nn.ModuleDict({"model": model}), directory)  # with the names that `Recycling` gives them
    model.eval()


def read_record(directory: Path) -> StageRecord:
    """The record that `train_stage` wrote in `directory`.

    Raises:
        UserError: it is damaged.
    """
    path = directory / "stage.json"
    fields = read_json(path, RENEW)
    with reading(path, RENEW):
        numbers = ("trained_parameters", "tokens", "flops", "seconds", "val_loss")
        if not all(isinstance(fields[name], (int, float)) for name in numbers):
            raise TypeError
        return StageRecord(**fields | {"trained": tuple(fields["trained"]), "curve": tuple(fields["curve"])})
