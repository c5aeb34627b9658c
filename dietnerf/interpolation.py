"""Values on the vertices of a grid: between them, and on those of a finer grid over the same box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

FEW = 4
"""Up to so many channels, the ways that suit few are faster."""
BAND = 8
"""Rows of a product with weights of neighbours that are computed at once."""


class Corners(NamedTuple):
    """The eight vertices around each of n points."""

    row: Int[Tensor, "n 8"]
    """Of a table (int32, which the look-up reads fastest)."""
    weight: Float[Tensor, "n 8"]
    """Trilinear weights."""

    def of(self, chosen: Int[Tensor, " k"]) -> Corners:
        return Corners(self.row.index_select(0, chosen), self.weight.index_select(0, chosen))


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


def trilinear_weights(after: Float[Tensor, "3 n"]) -> Float[Tensor, "n 8"]:
    """Of the vertices around each point, z's fastest, by how far it lies beyond the lower one along each axis: products
    of after or 1 - after. (Axis by axis, as products along so short a last dimension take four times as long.)"""
    x, y, z = torch.stack([1 - after, after], dim=1)  # (2, n) each
    xy = (x[:, None] * y).flatten(0, 1)
    return (xy[:, None] * z).flatten(0, 1).t().contiguous()


def refine(
    coarse: Float[Tensor, "a b d c"], sizes: Sequence[int], own: Float[Tensor, "x y z c"] | None = None
) -> Float[Tensor, "x y z c"]:
    """Trilinear values at the x, y, z = `sizes` vertices of a finer grid over the same box, added to `own`."""
    return _Refine.apply(coarse, tuple(sizes), own)


class _Refine(torch.autograd.Function):
    """Three matrix products, one along each axis, whose gradients are three more; in the table's own precision, where
    mixed precision would round what the levels add up to."""

    @staticmethod
    def forward(context, coarse: Tensor, sizes: tuple[int, ...], own: Tensor | None) -> Tensor:
        context.shape = coarse.shape
        a, b, d, channels = coarse.shape
        x, y, z = sizes
        with torch.autocast(coarse.device.type, enabled=False):
            found = _along_last(coarse.reshape(a * b, d, channels), linear_weights(z, d, coarse))
            found = torch.matmul(linear_weights(y, b, coarse), found.reshape(a, b, z * channels))
            added = None if own is None else own.reshape(x, -1)
            return _banded(linear_weights(x, a, coarse), found.reshape(a, -1), added).view(x, y, z, channels)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        a, b, d, channels = context.shape
        x, y, z, _ = gradient.shape
        with torch.autocast(gradient.device.type, enabled=False):
            found = _banded(linear_weights(x, a, gradient).T, gradient.reshape(x, -1))
            found = torch.matmul(linear_weights(y, b, gradient).T, found.reshape(a, y, z * channels))
            found = _along_last(found.reshape(a * b, z, channels), linear_weights(z, d, gradient).T)
        return found.reshape(context.shape), None, gradient if context.needs_input_grad[2] else None


def _along_last(values: Float[Tensor, "n d c"], weights: Float[Tensor, "z d"]) -> Float[Tensor, "n z c"]:
    """For each of n the product of the weights with its values."""
    number, depth, channels = values.shape
    if channels > FEW:
        return torch.matmul(weights, values)
    # One product with a matrix that keeps channels apart, instead of many thin ones.
    apart = torch.kron(weights.contiguous(), torch.eye(channels, device=values.device, dtype=values.dtype))
    found = values.new_empty(number, len(apart))
    _banded(apart, values.reshape(number, depth * channels).T, out=found.T)
    return found.view(number, len(weights), channels)


def _banded(
    weights: Float[Tensor, "m n"],
    values: Float[Tensor, "n q"],
    own: Float[Tensor, "m q"] | None = None,
    out: Float[Tensor, "m q"] | None = None,
) -> Float[Tensor, "m q"]:
    """The product, and `own` added to it, in blocks of rows, which need few of the values where the weights are those
    of neighbours: a block stays in the cache, and most of the multiplications by zero are left out."""
    found = values.new_empty(len(weights), values.shape[1]) if out is None else out
    for first in range(0, len(weights), BAND):
        rows = slice(first, first + BAND)
        used = weights[rows].any(dim=0).nonzero()
        columns = slice(int(used[0]), int(used[-1]) + 1)
        torch.mm(weights[rows, columns], values[columns], out=found[rows])
        if own is not None:
            found[rows] += own[rows]
    return found


def linear_weights(many: int, few: int, like: Tensor) -> Float[Tensor, "many few"]:
    """Weights of `few` values, evenly spaced from the first to the last, at `many` places from end to end."""
    places = torch.linspace(0, few - 1, many, device=like.device, dtype=like.dtype)
    return (1 - (places[:, None] - torch.arange(few, device=like.device)).abs()).clamp(min=0)
