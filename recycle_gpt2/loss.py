"""The next-token loss, in chunks whose memory does not grow with the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.decoders.families import base_model
from common.decoders.heads import OutputHead, output_head
from common.language import head_cross_entropy
from recycle_gpt2.blocks import labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Logits that exist at once, by kind of device: the larger the vocabulary, the fewer positions in a chunk."""


def positions_at_once(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits are held together, so that their memory does not grow with the vocabulary."""
    return max(16, LOGITS.get(device.type, 2**24) // vocab_size)


def tied_cross_entropy(
    hidden: Float[Tensor, "n d"], table: Float[Tensor, "v d"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Mean nats per label that is not IGNORE. Its gradient can be taken once."""
    return _cross_entropy(hidden, OutputHead(table), labels)


def _cross_entropy(hidden: Float[Tensor, "n d"], head: OutputHead, labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    chunk = positions_at_once(len(head.weight), hidden.device)
    return head_cross_entropy(hidden, head, labels, chunk=chunk)


def next_token_loss(model: PreTrainedModel, blocks: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean nats per token of `blocks`, each token after a block's first predicted from those before it.

    The end tokens that fill up a last block do not count.
    """
    hidden = base_model(model)(input_ids=blocks, use_cache=False).last_hidden_state  # (b, t, d)
    wanted = labels(blocks, model.config.eos_token_id)[:, 1:]
    return _cross_entropy(hidden[:, :-1].flatten(0, 1), output_head(model), wanted.flatten())
