"""Rows of new tokens without training: means of their old pieces' rows, or sparse combinations of shared tokens'."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARSITY = 2
"""Shared tokens that a new one is a combination of: best of 2 to 32 before training, with vectors of 128 dimensions."""
COEFFICIENTS = 1 << 24
"""That are held at once."""


def transplant(
    vectors: Float[Tensor, "n e"],
    anchors: Float[Tensor, "m e"],
    rows: Float[Tensor, "m d"],
    *,
    sparsity: int = SPARSITY,
) -> Float[Tensor, "n d"]:
    """Each vector as a sparse combination of `anchors`, by orthogonal matching pursuit; the same one of their `rows`.

    c = argmin ||v - Aᵀc||² with at most `sparsity` entries chosen greedily (Pati, Rezaiifar & Krishnaprasad 1993), and
    the new row is Rᵀc: Goddard & Fernandes Neto 2025, "Training-Free Tokenizer Transplantation via Orthogonal Matching
    Pursuit", as in mergekit's tokensurgeon. Where rows are a linear map of vectors, and a vector a combination of at
    most `sparsity` anchors that are found, its row is exact.

    Args:
        vectors: of the new tokens, in a space that they share with the anchors.
        anchors: of the tokens that both vocabularies have; at least 1, none 0.
        rows: the anchors' rows in the model.
        sparsity: shared tokens in a combination, at most.

    Raises:
        UserError: `sparsity` is below 1, there is no anchor, or an anchor is 0.
    """
    from sklearn.linear_model import orthogonal_mp

    require_at_least("sparsity", sparsity, 1)
    lengths = anchors.double().norm(dim=-1)
    if not len(anchors) or not bool((lengths > 0).all()):
        raise UserError(f"{len(anchors)} anchors, of which some may be 0: give shared tokens with a vector each.")
    dictionary = (anchors.double() / lengths[:, None]).T.cpu().numpy()  # (e, m), columns of length 1
    found = []
    for part in vectors.double().split(max(1, COEFFICIENTS // len(anchors))):
        with warnings.catch_warnings():  # "ended prematurely": the residual is 0 before all entries are used
            warnings.simplefilter("ignore", RuntimeWarning)
            chosen = orthogonal_mp(
                dictionary, part.T.cpu().numpy(), n_nonzero_coefs=min(sparsity, *dictionary.shape), precompute=False
            )
        coefficients = torch.from_numpy(np.asarray(chosen).reshape(len(anchors), len(part))).T.to(lengths)
        found.append((coefficients / lengths).to(rows) @ rows)
    return torch.cat(found) if found else rows.new_zeros(0, rows.shape[1])


def subword_means(
    table: Float[Tensor, "v d"], source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> dict[int, Float[Tensor, " d"]]:
    """For each target token the mean of the rows of the source tokens that its text is made of.

    A token that is no text by itself, part of a character, is made of its bytes. Tokens without any source token are
    left out.
    """
    source, found = source_tokenizer.get_vocab(), {}
    for token, index in target_tokenizer.get_vocab().items():
        text = target_tokenizer.convert_tokens_to_string([token])
        if "\ufffd" in text:
            ids = [source[byte] for byte in token if byte in source]
        else:
            ids = source_tokenizer(text, add_special_tokens=False).input_ids
        if ids:
            found[index] = table[ids].mean(0)
    return found
