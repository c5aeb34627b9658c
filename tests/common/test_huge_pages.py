"""Packed weights in huge pages: the same weights, wherever Linux has such pages and wherever not."""

from __future__ import annotations

import sys

import pytest
import torch

from common.huge_pages import SIZE, to_huge_pages
from common.packing import ROWS, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="torch has no oneDNN here")


def packed(rows: int) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(torch.arange(rows * 64.0).view(rows, 64), ROWS)


@pytest.mark.parametrize("rows", [3, 4 * SIZE // 256 + 5])
@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
def test_the_weights_stay_the_same(rows, platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    weights = packed(rows)
    assert to_huge_pages(weights) is weights
    assert torch.equal(weights.to_dense(), packed(rows).to_dense())


def test_other_systems_are_not_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)
    to_huge_pages(packed(SIZE // 64))
