"""The next-token loss with tied embeddings, whose gradient is taken while the logits are at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.language import IGNORE, chunked_cross_entropy
from recycle_gpt2.corpus import labels

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Logits that exist at once, by kind of device: the larger the vocabulary, the fewer positions in a chunk."""


def positions_at_once(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits are held together, so that their memory does not grow with the vocabulary."""
    return max(16, LOGITS.get(device.type, 2**24) // vocab_size)


class TiedCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(hidden · tableᵀ)[label], logits held for some positions at a time and computed once.

    The gradient of cross entropy, softmax - one-hot, needs nothing from later in the graph. So it is taken chunk by
    chunk in the forward pass, where `common.language.chunked_cross_entropy` computes every logit again in the
    backward pass: 6 instead of 8 multiplications for each weight of the table.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor) -> Tensor:
        keep_hidden, keep_table = ctx.needs_input_grad[:2]
        weight = table.to(hidden.dtype)
        for_hidden = torch.empty_like(hidden) if keep_hidden else None
        for_table = torch.zeros_like(table, dtype=torch.float32) if keep_table else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = positions_at_once(len(table), hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), step):
                h, y = hidden[begin : begin + step], labels[begin : begin + step, None]
                logits = (h @ weight.T).float()  # (c, v)
                normaliser = logits.logsumexp(-1, keepdim=True)
                total += (normaliser - logits.gather(1, y)).sum()
                slope = logits.sub_(normaliser).exp_()
                slope.scatter_add_(1, y, torch.full_like(y, -1, dtype=slope.dtype))
                slope = slope.mul_(1 / len(hidden)).to(h.dtype)
                if for_hidden is not None:
                    for_hidden[begin : begin + step] = slope @ weight
                if for_table is not None:
                    if h.dtype == for_table.dtype:
                        for_table.addmm_(slope.T, h)  # no second table in memory
                    else:
                        for_table += slope.T @ h
        ctx.gradients = for_hidden, for_table
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_hidden, for_table = ctx.gradients
        ctx.gradients = None  # whoever takes them is their only owner, and need not copy
        return (
            None if for_hidden is None else for_hidden.mul_(upstream),
            None if for_table is None else for_table.mul_(upstream),
            None,
        )


def tied_cross_entropy(
    hidden: Float[Tensor, "n d"], table: Float[Tensor, "v d"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Mean nats per label that is not IGNORE. Its gradient can be taken once."""
    counted = labels != IGNORE
    hidden, labels = hidden[counted], labels[counted]
    if torch.is_grad_enabled():
        return TiedCrossEntropy.apply(hidden, table, labels)
    return chunked_cross_entropy(hidden, table, labels, chunk=positions_at_once(len(table), hidden.device))


def next_token_loss(model: GPT2LMHeadModel, blocks: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean nats per token of `blocks`, each token after a block's first predicted from those before it.

    The end tokens that fill up a last block do not count.
    """
    hidden = model.transformer(input_ids=blocks, use_cache=False).last_hidden_state  # (b, t, d)
    wanted = labels(blocks, model.config.eos_token_id)[:, 1:]
    return tied_cross_entropy(
        hidden[:, :-1].flatten(0, 1), model.get_output_embeddings().weight, wanted.flatten()
    )
