"""The rows that relearning begins with: what the settings say, made of a model, two tokenizers and the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.checks import UserError, require_file
from common.gpt2 import token_tables
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.extend import extends
from recycle_gpt2.lexical import MIXED, RowsConfig, cooccurrence_embeddings, initialise
from recycle_gpt2.vectors import read_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_TOKENS = 20_000_000
"""Of the text, that co-occurrence is counted in: as many as tell the vocabulary's company."""


def require_rows(config: RowsConfig) -> None:
    """Raise UserError where vectors are given that nothing would read, or are missing."""
    if config.vectors is None:
        return
    if config.initialisation not in MIXED:
        raise UserError(
            f"vectors are given but initialisation is {config.initialisation!r}: use {' or '.join(MIXED)}, or leave "
            f"them out."
        )
    require_file(config.vectors, "vectors")


def new_rows(
    config: RowsConfig,
    model: PreTrainedModel,
    english: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    train: TokenBlocks,
    *,
    seed: int,
    dictionary: Path | None = None,
) -> list[torch.Tensor]:
    """The token table that relearning begins with, and the output's where the model has two.

    Of a tokenizer that extends the English one, the English tokens keep their rows, whatever the initialisation.
    """
    require_rows(config)
    auxiliary = None
    if config.vectors is not None:
        auxiliary = read_vectors(config.vectors, tokenizer)
    elif config.initialisation in MIXED:
        ids = train.tokens(0, min(train.num_tokens, MOST_TOKENS))
        auxiliary = cooccurrence_embeddings(ids, len(tokenizer), seed=seed, end=tokenizer.eos_token_id)
    generator, counts = torch.Generator().manual_seed(seed), train.counts()
    tables = [
        initialise(
            config.initialisation,
            rows,
            english,
            tokenizer,
            generator=generator,
            target_counts=counts,
            dictionary=dictionary,
            auxiliary=auxiliary,
        )
        for rows in token_tables(model)
    ]
    return with_english(tables, token_tables(model), english, tokenizer)


def with_english(
    tables: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    english: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
) -> list[torch.Tensor]:
    """The new `tables`, in which the English tokens of an extended vocabulary have the model's `own` rows."""
    if not extends(english, tokenizer):
        return list(tables)
    kept = len(english)
    return [torch.cat([rows[:kept].to(table), table[kept:]]) for table, rows in zip(tables, own, strict=True)]
