"""Read a prefix as words: the vocabulary tokens whose embeddings are nearest to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, require_at_least
from common.gpt2 import token_table

if TYPE_CHECKING:
    from clipcap.model import ClipCapModel


@torch.no_grad()
def nearest_tokens(model: ClipCapModel, prefix: Float[Tensor, "K d"], *, k: int = 1) -> list[list[tuple[str, float]]]:
    """For each prefix embedding, the k tokens of highest cosine similarity, with it (Mokady et al. 2021, sec. 4.3).

    Args:
        model: captioner with its tokenizer.
        prefix: of one image, a row of `ClipCapModel.prefix`.
        k: tokens per position.

    Raises:
        UserError: k below 1, or a model without a tokenizer.
    """
    require_at_least("k", k, 1)
    if model.tokenizer is None:
        raise UserError("the captioner has no tokenizer: load it with the name of its GPT-2.")
    table = F.normalize(token_table(model.gpt2).float(), dim=-1)  # (v, d)
    similarity = F.normalize(prefix.float(), dim=-1) @ table.T  # (K, v)
    values, ids = similarity.topk(k, dim=-1)
    return [
        [(model.tokenizer.decode([token]), value) for token, value in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
