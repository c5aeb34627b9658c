"""From a small model's embedding space to a larger one's, by the English vocabulary that both share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common.checks import UserError, require_at_least, require_one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Method = Literal["least_squares", "procrustes", "knn"]
METHODS: tuple[str, ...] = ("least_squares", "procrustes", "knn")


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
    raise NotImplementedError


@dataclass(frozen=True)
class AlignmentOptions:
    """Options of `align` that held-out rows have chosen: `align(..., method=method, **options.arguments(counts))`."""

    centre: bool = False
    ridge: float = 0.0
    weighted: bool = False
    scale: bool = False
    error: float = float("nan")
    """Held-out error with these options."""

    def arguments(self, counts: Tensor | None = None) -> dict[str, object]:
        """Keyword arguments for `align`; `counts` are the frequencies that were given to `choose_options`."""
        raise NotImplementedError


def choose_options(
    small_source: Float[Tensor, "v s"],
    large_source: Float[Tensor, "v l"],
    *,
    method: str = "least_squares",
    counts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> AlignmentOptions:
    """The options (centre, ridge, frequency weights, scale) with the least error on held-out source rows."""
    raise NotImplementedError


def held_out_error(
    small_source: Float[Tensor, "v s"],
    large_source: Float[Tensor, "v l"],
    *,
    method: str = "least_squares",
    k: int = 1,
    centre: bool = False,
    ridge: float = 0.0,
    weights: Float[Tensor, " v"] | None = None,
    scale: bool = False,
    share: float = 0.1,
    generator: torch.Generator | None = None,
) -> float:
    """Squared error of aligned source rows that the map was not fitted on, over their variance: 0 perfect, 1 useless."""
    raise NotImplementedError


def neighbour_overlap(
    before: Float[Tensor, "n s"],
    after: Float[Tensor, "n l"],
    *,
    small_source: Float[Tensor, "v s"] | None = None,
    large_source: Float[Tensor, "v l"] | None = None,
    k: int = 10,
    chunk: int = 1024,
) -> float:
    """Mean share of a token's `k` nearest neighbours before alignment that are among its nearest after it.

    Neighbours are the source tokens where both source tables are given, else the other tokens of the same table.
    """
    raise NotImplementedError
