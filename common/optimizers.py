"""Optimizers and schedules of learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


def scheduled(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float] | list[Callable[[int], float]]
) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: a factor on the learning rate, or one for each group, at every step."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine to `floor` at `total`."""
    return _warmup(warmup, total, lambda progress: floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress))))


def warmup_linear(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then linear to `floor` at `total`."""
    return _warmup(warmup, total, lambda progress: 1 - (1 - floor) * progress)


def _warmup(warmup: int, total: int, after: Callable[[float], float]) -> Callable[[int], float]:
    """Linear to 1, then what `after` makes of the share of the remaining steps that are done."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return after(min(1.0, (step - warmup) / max(1, total - warmup)))

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
