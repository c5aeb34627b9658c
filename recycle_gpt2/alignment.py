"""From a small model's embedding space to a larger one's, by the English vocabulary that both share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.checks import UserError, require_at_least, require_one_of

Method = Literal["least_squares", "procrustes", "knn"]
METHODS: tuple[str, ...] = get_args(Method)
RIDGES: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1)
"""What `choose_options` tries."""


@dataclass(frozen=True)
class AlignmentConfig:
    """How relearned embeddings are carried over to a larger model."""

    method: Method = "least_squares"
    """least_squares (best as published), procrustes (a rotation) or knn (means of near English rows)."""
    k: int = 10
    """Neighbours of knn."""
    choose: bool = True
    """Choose centring, ridge and scale by held-out English rows; --no-choose aligns exactly as published."""


def align(
    small_source: Float[Tensor, "v s"],
    large_source: Float[Tensor, "v l"],
    small_target: Float[Tensor, "n s"],
    *,
    method: str = "least_squares",
    k: int = 1,
    centre: bool = False,
    ridge: float = 0.0,
    weights: Float[Tensor, " v"] | None = None,
    scale: bool = False,
) -> Float[Tensor, "n l"]:
    """Rows for the target tokens in the large model's space, from their rows in the small model's.

    The map is fitted on the source vocabulary, which both models share (de Vries & Nissim 2021, sec. 3.3).

    Args:
        small_source: the small model's source rows.
        large_source: the large model's, of the same tokens.
        small_target: relearned rows in the small model's space.
        method: "least_squares", "procrustes" (orthogonal, the small rows padded with zeros) or "knn" (mean of the
            large rows of the `k` nearest source tokens, weighted by inverse distance).
        k: of "knn".
        centre: map differences from the means instead of the rows themselves ("least_squares", "procrustes").
        ridge: penalty of the map's squared norm, as a share of the mean squared norm of a column ("least_squares").
        weights: of each source token, such as its frequency ("least_squares", "procrustes").
        scale: multiply the rotation by the scale that fits best ("procrustes").

    Raises:
        UserError: an unknown method, tables of other shapes, NaN, or an option that the method does not have.
    """
    require_one_of("method", method, METHODS)
    _require_tables(small_source, large_source)
    _require_finite("small_target", small_target)
    if small_target.ndim != 2 or small_target.shape[1] != small_source.shape[1]:
        raise UserError(
            f"small_target has shape {tuple(small_target.shape)} but the small model's rows are "
            f"{small_source.shape[1]} wide: align a table that was relearned in that model."
        )
    _require_options(method, k=k, centre=centre, ridge=ridge, weighted=weights is not None, scale=scale)
    if method == "knn":
        return fit_knn(small_source, large_source, small_target, k=k)
    if weights is not None:
        _require_weights(weights, len(small_source))
    # Means and products are summed in double precision: differences of large tables are small.
    small, large, target = small_source.double(), large_source.double(), small_target.double()
    share = None if weights is None else weights.to(small) / weights.to(small).sum()
    small_mean, large_mean = _mean(small, share), _mean(large, share)
    if not centre:
        small_mean, large_mean = torch.zeros_like(small_mean), torch.zeros_like(large_mean)
    small, large = small - small_mean, large - large_mean
    if method == "least_squares":
        mapping = fit_least_squares(small, large, ridge=ridge, weights=share)
    else:
        rotation, factor = fit_procrustes(small, large, weights=share)
        mapping = factor * rotation if scale else rotation
    return ((target - small_mean) @ mapping + large_mean).to(large_source.dtype)


def fit_least_squares(
    small: Float[Tensor, "v s"],
    large: Float[Tensor, "v l"],
    *,
    ridge: float = 0.0,
    weights: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, "s l"]:
    """W minimising Σ wᵢ ||smallᵢ W - largeᵢ||² + λ ||W||² (de Vries & Nissim 2021, sec. 3.3, where w = 1 and λ = 0).

    λ is `ridge` times the mean squared norm of a column of √w small. By the normal equations, of which only (s, s) and
    (s, l) are held; where small lacks rank, the W of least norm.
    """
    small, large = small.double(), large.double()
    weighted = small if weights is None else small * weights[:, None]
    gram = weighted.T @ small
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.pinv(gram, hermitian=True) @ (weighted.T @ large)


class Rotation(NamedTuple):
    """An orthogonal map, and the scale that would fit best after it."""

    matrix: Float[Tensor, "s l"]
    scale: float


def fit_procrustes(
    small: Float[Tensor, "v s"], large: Float[Tensor, "v l"], *, weights: Float[Tensor, " v"] | None = None
) -> Rotation:
    """R minimising Σ wᵢ ||smallᵢ R - largeᵢ||² among orthogonal maps, the narrower table padded with zeros.

    R = U Vᵀ of the SVD of smallᵀ W large (Schönemann 1966). Zeros add only zero rows to that product, so its thin SVD
    gives the rows of R that meet anything but zeros, and no padding is made.
    """
    small, large = small.double(), large.double()
    weighted = small if weights is None else small * weights[:, None]
    u, values, v = torch.linalg.svd(weighted.T @ large, full_matrices=False)
    rotation = u @ v
    energy = ((weighted @ rotation) * (small @ rotation)).sum()
    return Rotation(rotation, float(values.sum() / energy.clamp(min=torch.finfo(energy.dtype).tiny)))


def fit_knn(
    small_source: Float[Tensor, "v s"],
    large_source: Float[Tensor, "v l"],
    small_target: Float[Tensor, "n s"],
    *,
    k: int = 1,
    chunk: int = 256,
) -> Float[Tensor, "n l"]:
    """Mean of the large rows of the `k` nearest source tokens, weighted by inverse Euclidean distance.

    Distances are held for `chunk` target tokens at a time. A target row that equals a source row takes its large row.
    """
    if not 1 <= k <= len(small_source):
        raise UserError(f"k is {k}: use 1 to {len(small_source)}, the number of source tokens.")
    rows = []
    for targets in small_target.split(chunk):
        indices, distances = _nearest(targets, small_source, k)
        weights = 1 / distances  # (c, k)
        exact = distances == 0
        weights = torch.where(exact.any(-1, keepdim=True), exact.to(weights), weights)
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append(torch.einsum("ck,ckl->cl", weights, large_source[indices].double()))
    return torch.cat(rows).to(large_source.dtype)


@dataclass(frozen=True)
class AlignmentOptions:
    """Options of `align` that held-out rows have chosen: `align(..., method=method, **options.arguments(counts))`."""

    centre: bool = False
    ridge: float = 0.0
    weighted: bool = False
    scale: bool = False
    error: float = float("nan")
    """Held-out error with these options."""

    def arguments(self, counts: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for `align`; `counts` are the frequencies that were given to `choose_options`."""
        return {
            "centre": self.centre,
            "ridge": self.ridge,
            "scale": self.scale,
            "weights": counts if self.weighted else None,
        }


def choose_options(
    small_source: Float[Tensor, "v s"],
    large_source: Float[Tensor, "v l"],
    *,
    method: str = "least_squares",
    counts: Tensor | None = None,
    k: int = 1,
    generator: torch.Generator | None = None,
) -> AlignmentOptions:
    """The options (centre, ridge, frequency weights, scale) with the least error on held-out source rows.

    Args:
        small_source: the small model's source rows.
        large_source: the large model's.
        method: as for `align`; "knn" has no such options, only an error.
        counts: how often each source token occurs. With them, weighting by them is tried too, and errors count a row
            as often as its token occurs.
        k: of "knn".
        generator: of the choice of rows; None always makes the same.
    """
    require_one_of("method", method, METHODS)
    seed = int(torch.randint(2**62, (), generator=generator)) if generator is not None else 0
    if counts is not None:
        _require_weights(counts, len(small_source))
    candidates = [AlignmentOptions()]
    if method != "knn":
        flags = (False, True)
        candidates = [
            AlignmentOptions(centre, ridge, weighted, scale)
            for weighted, centre, ridge, scale in itertools.product(
                flags if counts is not None else (False,),
                flags,
                RIDGES if method == "least_squares" else (0.0,),
                flags if method == "procrustes" else (False,),
            )
        ]
    errors = [
        held_out_error(
            small_source,
            large_source,
            method=method,
            k=k,
            importance=counts,
            generator=torch.Generator().manual_seed(seed),
            **options.arguments(counts),
        )
        for options in candidates
    ]
    enough = 1.001 * min(errors) + 1e-9
    best = next(place for place, error in enumerate(errors) if error <= enough)  # the plainest comes first
    return replace(candidates[best], error=errors[best])


def held_out_error(
    small_source: Float[Tensor, "v s"],
    large_source: Float[Tensor, "v l"],
    *,
    weights: Float[Tensor, " v"] | None = None,
    share: float = 0.1,
    importance: Float[Tensor, " v"] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> float:
    """Squared error of aligned source rows that the map was not fitted on, over that of the fitted rows' mean.

    0 is perfect, 1 no better than one row for all.

    Args:
        small_source, large_source, weights, options: as `align` takes them.
        share: of the rows that are held out.
        importance: how much each row's error counts; None is equally.
        generator: of the choice of rows; None always makes the same.
    """
    _require_tables(small_source, large_source)
    size = len(small_source)
    num_held = round(share * size)
    if not 1 <= num_held < size:
        raise UserError(f"share is {share}: of {size} rows it holds out {num_held}; use one that leaves some for both.")
    order = torch.randperm(size, generator=generator or torch.Generator().manual_seed(0)).to(small_source.device)
    held, fitted = order[:num_held], order[num_held:]
    aligned = align(
        small_source[fitted],
        large_source[fitted],
        small_source[held],
        weights=None if weights is None else weights.to(order.device)[fitted],
        **options,
    )
    truth = large_source[held].double()
    counted = torch.ones(size, device=order.device) if importance is None else importance.to(order.device)
    counted = counted.double()
    middle = _mean(large_source[fitted].double(), counted[fitted] / counted[fitted].sum())
    error = (counted[held] * (aligned.double() - truth).square().sum(-1)).sum()
    return float(error / (counted[held] * (middle - truth).square().sum(-1)).sum())


def neighbour_overlap(
    before: Float[Tensor, "n s"],
    after: Float[Tensor, "n l"],
    *,
    small_source: Float[Tensor, "v s"] | None = None,
    large_source: Float[Tensor, "v l"] | None = None,
    k: int = 10,
    chunk: int = 256,
) -> float:
    """Mean share of a token's `k` nearest neighbours before alignment that are among its nearest after it.

    Neighbours by Euclidean distance, as in the original's `eval_overlap`: source tokens, where both source tables are
    given; else the other tokens of the same table.

    Args:
        before: target rows in the small model.
        after: the same tokens' rows in the large model.
        small_source: the small model's source rows.
        large_source: the large model's.
        k: neighbours.
        chunk: target tokens whose distances are held at once.
    """
    if len(before) != len(after) or (small_source is None) != (large_source is None):
        raise UserError(
            f"{len(before)} rows before and {len(after)} after: give one after for each before, "
            f"and both source tables or none."
        )
    _require_finite("before", before)
    _require_finite("after", after)
    own = small_source is None or large_source is None
    if not own:
        _require_tables(small_source, large_source)
    small, large = (before, after) if small_source is None or large_source is None else (small_source, large_source)
    if not 1 <= k <= len(small) - own:
        raise UserError(f"k is {k}: use 1 to {len(small) - own}, the number of possible neighbours.")
    common = 0
    for rows in torch.arange(len(before)).split(chunk):
        exclude = rows if own else None
        first, second = (_nearest(x[rows], y, k, exclude)[0] for x, y in ((before, small), (after, large)))
        common += int((first[:, :, None] == second.to(first.device)[:, None, :]).sum())
    return common / (k * len(before))


def _nearest(
    queries: Float[Tensor, "c d"], table: Float[Tensor, "v d"], k: int, exclude: Int[Tensor, " c"] | None = None
) -> tuple[Int[Tensor, "c k"], Float[Tensor, "c k"]]:
    """Indices and Euclidean distances (double) of the `k` nearest rows, nearest first, without row `exclude`."""
    rough = torch.cdist(queries.float(), table.float())  # by matrix products: near 0 it is inexact
    if exclude is not None:
        rough[torch.arange(len(queries)), exclude] = torch.inf
    spare = min(k + 8, len(table) - (exclude is not None))
    indices = rough.topk(spare, largest=False).indices
    exact = (queries.double()[:, None] - table[indices].double()).norm(dim=-1)  # (c, spare)
    distances, order = exact.sort(dim=-1, stable=True)
    return indices.gather(-1, order)[:, :k], distances[:, :k]


def _mean(rows: Tensor, share: Tensor | None) -> Tensor:
    return rows.mean(0) if share is None else share @ rows


def _require_tables(small_source: Tensor | None, large_source: Tensor | None) -> None:
    assert small_source is not None and large_source is not None
    _require_finite("small_source", small_source)
    _require_finite("large_source", large_source)
    if small_source.ndim != 2 or large_source.ndim != 2 or len(small_source) != len(large_source):
        raise UserError(
            f"small_source has shape {tuple(small_source.shape)} and large_source {tuple(large_source.shape)}: both "
            f"models must share one English vocabulary, a row for each of its tokens."
        )
    if not len(small_source):
        raise UserError("small_source and large_source have 0 rows: give tables with a row for each English token.")


def _require_finite(name: str, table: Tensor) -> None:
    if not torch.isfinite(table).all():
        raise UserError(f"{name} holds NaN or infinity: check the model that it is from.")


def _require_weights(weights: Tensor, size: int) -> None:
    if weights.shape != (size,) or not torch.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise UserError(f"weights have shape {tuple(weights.shape)}: give {size} numbers of at least 0, not all 0.")


def _require_options(method: str, *, k: int, centre: bool, ridge: float, weighted: bool, scale: bool) -> None:
    require_at_least("ridge", ridge, 0)
    allowed = {"least_squares": ("centre", "ridge", "weights"), "procrustes": ("centre", "weights", "scale")}
    given = {"k": k != 1, "centre": centre, "ridge": ridge != 0, "weights": weighted, "scale": scale}
    for name in (name for name, used in given.items() if used):
        if name not in allowed.get(method, ("k",)):
            raise UserError(f"method is {method!r}, which has no {name}: leave it out.")
