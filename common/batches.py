"""Batches in an order that a run can resume in the middle of an epoch, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from common.checks import UserError, require_at_least, require_same_settings

SAME_BATCHES = "go on with as many, or start over"


class BatchOrder(Sampler[list[int]]):
    """Batches of indices whose order is a function of (seed, epoch) alone, so that a run can resume where it stopped.

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
            f"batches: use the data it was written with, or start over."
        )
