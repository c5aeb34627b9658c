"""The lexical embeddings: a new language's token table, how its rows begin, and what trains beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, require_at_least, require_one_of
from common.gpt2 import replace_token_table
from common.runtime import fork_generators

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

INITIALISATIONS: tuple[str, ...] = ("random", "mean", "frequency", "copy", "focus")


def initialise(
    name: str,
    source_table: Float[Tensor, "v d"],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    *,
    generator: torch.Generator,
    source_counts: Int[Tensor, " v"] | None = None,
    target_counts: Int[Tensor, " n"] | None = None,
    dictionary: Path | None = None,
    auxiliary: Float[Tensor, "n e"] | None = None,
) -> Float[Tensor, "n d"]:
    """Rows for the target language's tokens, made of the source language's.

    Args:
        name: "random": normal, with the source rows' mean and variance in each dimension.
            "mean": all rows are the source rows' mean.
            "frequency": the row of the source token with the same frequency rank; random where there are more tokens.
            "copy": the row of the source token that is spelled the same; random for the others.
            "focus": as "copy", and the others are means of the copied rows, weighted by how similar the tokens are in
            the auxiliary embeddings (FOCUS, Dobler & de Melo 2023), or their translations' rows by the dictionary.
        source_table: the source model's token table.
        source_tokenizer: its tokenizer.
        target_tokenizer: the new language's.
        generator: of the random rows.
        source_counts: how often each source token occurs, for "frequency"; None ranks by id, as BPE's ids roughly do.
        target_counts: the same for the target's tokens.
        dictionary: for "focus": a file of target word, tab, source word in each line.
        auxiliary: for "focus": an embedding of each target token; see `cooccurrence_embeddings`.

    Raises:
        UserError: an unknown name, counts or embeddings of another number of rows, or "focus" without both auxiliary
            and dictionary.
    """
    raise NotImplementedError


def cooccurrence_embeddings(
    token_ids: Int[np.ndarray, " n"],
    vocab_size: int,
    *,
    dim: int = 128,
    window: int = 5,
    seed: int = 0,
    end: int | None = None,
) -> Float[Tensor, "v e"]:
    """Embeddings of tokens from the text that they occur in: PPMI of co-occurrence, factored by truncated SVD.

    PPMI(i, j) = max(0, log P(i, j) / (P(i) P(j)^0.75)) over pairs at most `window` apart (Levy, Goldberg & Dagan 2015,
    sec. 3); the rows of U √S are the embeddings. Tokens that do not occur have zero rows.

    Args:
        token_ids: the text.
        vocab_size: of its tokenizer.
        dim: e.
        window: tokens on each side.
        seed: of the randomised SVD.
        end: end token; pairs do not reach over it.
    """
    raise NotImplementedError


def replace_lexical(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, table: Float[Tensor, "n d"]
) -> None:
    """Put the new language's token table into `model`, tied to the output, and the ids of its end token in its config.

    Raises:
        UserError: `table` has not a row for each token of `tokenizer`, is of another width, or holds NaN or infinity.
    """
    raise NotImplementedError


def train_only(
    model: GPT2LMHeadModel,
    *,
    positions: bool = False,
    norms: bool = False,
    layers: Sequence[int] | Literal["all"] = (),
) -> list[str]:
    """Let the lexical embeddings train, and what else is asked; freeze the rest and drop its gradients.

    Args:
        model: changed in place.
        positions: also the position embeddings.
        norms: also every layer norm.
        layers: also these blocks, counted from the input; "all" is every parameter of the model.

    Returns:
        Names of the parameters that train.

    Raises:
        UserError: the model has no such layer.
    """
    raise NotImplementedError


def layers_from_top(n_layer: int, count: int) -> list[int]:
    """The `count` blocks nearest to the output, the topmost first: n_layer - 1, n_layer - 2, ..."""
    raise NotImplementedError


def shuffle_weights(model: GPT2LMHeadModel, generator: torch.Generator) -> None:
    """Permute the values within each parameter but the token table, in place: the control of same scale, no English."""
    raise NotImplementedError


def reinitialise_layers(model: GPT2LMHeadModel, generator: torch.Generator) -> None:
    """Draw every parameter but the token table anew as GPT-2's own initialisation does, in place."""
    raise NotImplementedError
