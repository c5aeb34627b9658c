"""Values on the vertices of a grid: between them, and on those of a finer grid over the same box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

FEW = 4
"""Up to so many channels, the ways that suit few are faster."""


class Corners(NamedTuple):
    """The eight vertices around each of n points."""

    row: Int[Tensor, "n 8"]
    """Of a table (int32, which the look-up reads fastest)."""
    weight: Float[Tensor, "n 8"]
    """Trilinear weights."""

    def of(self, chosen: Bool[Tensor, " n"]) -> Corners:
        return Corners(self.row[chosen], self.weight[chosen])


def interpolate(table: Float[Tensor, "v c"], corners: Corners) -> Float[Tensor, "n c"]:
    """Weighted sum of eight rows for each point, differentiable in the table."""
    return _Interpolate.apply(table, corners.row, corners.weight)


class _Interpolate(torch.autograd.Function):
    """An embedding bag, whose own gradient sorts the indices and takes ten times as long on a CPU."""

    @staticmethod
    def forward(context, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(index, weight, table if context.needs_input_grad[2] else table[:0])
        context.rows = len(table)
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        index, weight, table = context.saved_tensors
        flat, channels = index.flatten(), gradient.shape[1]
        if channels > FEW:
            found = gradient.new_zeros(context.rows, channels)
            found.index_add_(0, flat, (weight[..., None] * gradient[:, None]).flatten(0, 1))
        else:
            found = gradient.new_empty(context.rows, channels)
            for channel, column in enumerate(gradient.unbind(1)):
                found[:, channel] = torch.bincount(flat, (weight * column[:, None]).flatten(), context.rows)
        moved = None
        if context.needs_input_grad[2]:  # poses that are refined
            moved = (F.embedding(index, table) * gradient[:, None]).sum(dim=-1)
        return found, None, moved


def refine(coarse: Float[Tensor, "a b d c"], sizes: Sequence[int]) -> Float[Tensor, "x y z c"]:
    """Trilinear values at the x, y, z = `sizes` vertices of a finer grid over the same box.

    Three matrix products, one along each axis, whose gradients are three more; in the table's own precision, where
    mixed precision would round what the levels add up to.
    """
    a, b, d, channels = coarse.shape
    _, y, z = sizes
    along_x, along_y, along_z = (linear_weights(*pair, coarse) for pair in zip(sizes, (a, b, d), strict=True))
    with torch.autocast(coarse.device.type, enabled=False):
        if channels > FEW:
            found = along_z @ coarse.reshape(a * b, d, channels)
        else:  # one product with a matrix that keeps channels apart, instead of many thin ones
            apart = torch.eye(channels, device=coarse.device, dtype=coarse.dtype)
            found = coarse.reshape(a * b, d * channels) @ torch.kron(along_z.T.contiguous(), apart)
        found = found.view(a, b, z * channels)
        found = (along_y @ found).view(a, y * z * channels)
        return (along_x @ found).view(-1, y, z, channels)


def linear_weights(many: int, few: int, like: Tensor) -> Float[Tensor, "many few"]:
    """Weights of `few` values, evenly spaced from the first to the last, at `many` places from end to end."""
    places = torch.linspace(0, few - 1, many, device=like.device, dtype=like.dtype)
    return (1 - (places[:, None] - torch.arange(few, device=like.device)).abs()).clamp(min=0)
