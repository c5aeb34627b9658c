"""Orders of batches: every index once, the same for every number of processes, resumable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from common.batches import BatchOrder, ResumableLoader
from common.checks import UserError


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
