"""Language modelling quantities: the next-token loss in chunks, and exact strided scoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.checks import UserError, require_at_least
from common.decoders.families import base_model, positions
from common.decoders.heads import OutputHead, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_RESAMPLES = 1_000_000
"""Of a bootstrap."""
IGNORE = -100
"""Label of a position that is not counted in the loss."""


def chunked_cross_entropy(
    hidden: Float[Tensor, "n d"],
    table: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    *,
    chunk: int = 2048,
    reduction: str = "mean",
    bias: Float[Tensor, " v"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """-log softmax(hidden · tableᵀ)[label], over the positions whose label is not IGNORE.

    With `bias`, `scale` and `softcap` the logits are those of `common.decoders.OutputHead`.

    Logits exist for `chunk` positions at a time, and once: their gradient, softmax - one-hot, is taken in the forward
    pass, chunk by chunk, so backward computes none again. Under autocast the products are in its dtype.

    Args:
        hidden: final hidden states.
        table: token table tied to the output, or the output's own.
        labels: token ids, IGNORE where nothing is to be predicted.
        chunk: positions per chunk.
        reduction: "mean" over counted positions or "sum".
        bias, scale, softcap: of the head; most have none.

    Returns:
        Loss in nats; 0 when no position counts. It can be differentiated once.
    """
    counted = (labels != IGNORE).nonzero().flatten()  # a GPU is waited for once: here, and not in backward
    hidden, labels = hidden[counted], labels[counted]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    head = OutputHead(table, bias, scale, softcap)
    total = _SummedCrossEntropy.apply(hidden, table, bias, labels, head, chunk, torch.is_grad_enabled())
    return total / max(len(labels), 1) if reduction == "mean" else total


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[label] over the logits of an output head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: OutputHead,
        chunk: int,
        with_gradients: bool,
    ) -> Tensor:
        wants_hidden, wants_table, wants_bias = (with_gradients and needed for needed in ctx.needs_input_grad[:3])
        for_hidden: Tensor | None = torch.empty_like(hidden) if wants_hidden else None
        for_table: Tensor | None = None
        for_bias: Tensor | None = torch.zeros_like(bias) if bias is not None and wants_bias else None
        weight = table.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), chunk):
                h, y = hidden[begin : begin + chunk], labels[begin : begin + chunk, None]
                logits = (h @ weight.T).float()  # (c, v), from here on the only matrix of its size
                if bias is not None:
                    logits += bias.float()
                steepness: Tensor | float = head.scale
                if head.softcap is not None or head.scale != 1:
                    logits = head.shape(logits)
                if head.softcap is not None:  # tanh' = 1 - tanh², a second matrix
                    steepness = head.scale * (1 - (logits / head.softcap).square())
                wanted, top = logits.gather(1, y), logits.amax(-1, keepdim=True)
                slope = logits.sub_(top).exp_()
                sums = slope.sum(-1, keepdim=True)
                total += (sums.log() + top - wanted).sum()
                if not (wants_hidden or wants_table or wants_bias):
                    continue
                slope.div_(sums).scatter_add_(1, y, slope.new_full(y.shape, -1))
                if head.softcap is not None or head.scale != 1:
                    slope.mul_(steepness)
                if for_bias is not None:
                    for_bias += slope.sum(0).to(for_bias.dtype)
                slope = slope.to(h.dtype)
                if for_hidden is not None:
                    torch.mm(slope, weight, out=for_hidden[begin : begin + chunk])
                if not wants_table:
                    continue
                if for_table is None:  # the first part is taken as it is, no zeros of the table's size
                    for_table = (slope.T @ h).to(table.dtype)
                elif for_table.dtype == h.dtype:  # no second table in memory
                    for_table.addmm_(slope.T, h)
                else:
                    for_table.add_(slope.T @ h)
        ctx.gradients = [for_hidden, for_table, for_bias]  # not saved tensors: they are handed on, never shared
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy can be differentiated once only.")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(upstream) for g in gradients), None, None, None, None)


def head_cross_entropy(
    hidden: Float[Tensor, "n d"], head: OutputHead, labels: Int[Tensor, " n"], **options: Any
) -> Float[Tensor, ""]:
    """`chunked_cross_entropy` of the logits that a decoder's head makes."""
    return chunked_cross_entropy(
        hidden, head.weight, labels, bias=head.bias, scale=head.scale, softcap=head.softcap, **options
    )


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text: total nats over the counted tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats / self.tokens)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits per byte of the UTF-8 text that the tokens spell: comparable between tokenizers."""
        return self.nats / math.log(2) / num_bytes


@torch.no_grad()
def score(
    model: PreTrainedModel,
    token_ids: Int[Tensor, " n"] | np.ndarray | list[int],
    *,
    block: int = 1024,
    stride: int = 512,
    chunk: int = 2048,
) -> Score:
    """Score every token after the first exactly once, after at least `block - stride` tokens if so many precede it.

    The windows start `stride` apart and hold `block` tokens; of a window only the tokens that no earlier window
    has scored are counted, so short texts, and the last partial window, are exact.

    Args:
        model: GPT-2 or another decoder; scored in eval mode whatever its mode.
        token_ids: one text. Its first token is context only (put an end token before it to score all).
        block: window length, at most the model's number of positions.
        stride: distance between windows, below `block`.

    Raises:
        UserError: fewer than two tokens, or a block or stride that does not fit.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=model.device).flatten()
    block = min(block, positions(model.config))
    require_at_least("block", block, 2)
    require_at_least("stride", stride, 1)
    stride = min(stride, block - 1)  # so that every window after the first begins with context
    if len(ids) < 2:
        raise UserError(f"text has {len(ids)} tokens: scoring needs at least 2 (the first is context only).")
    was_training = model.training
    model.eval()
    try:
        nats, head = 0.0, output_head(model)
        scored = 1  # tokens before this index are done
        for begin in range(0, len(ids), stride):
            window = ids[begin : begin + block]
            fresh = begin + len(window) - scored
            if fresh > 0:
                states = base_model(model)(input_ids=window[None], use_cache=False)
                hidden = states.last_hidden_state[0]  # (t, d)
                first = len(window) - fresh
                nats += head_cross_entropy(
                    hidden[first - 1 : -1], head, window[first:], chunk=chunk, reduction="sum"
                ).item()
                scored = begin + len(window)
            if scored == len(ids):
                break
    finally:
        model.train(was_training)
    return Score(nats, len(ids) - 1)


@torch.no_grad()
def score_texts(
    model: PreTrainedModel,
    texts: Sequence[Int[Tensor, " _"] | np.ndarray | list[int]],
    *,
    block: int = 1024,
    stride: int = 512,
    chunk: int = 2048,
    at_once: int = 8192,
) -> list[Score]:
    """What `score` says of each text, its windows batched with those of the others.

    Windows of similar length make a batch; what fills the shorter ones up comes after them, where a causal decoder does
    not see it.

    Args:
        model, block, stride, chunk: as in `score`.
        texts: each with at least two tokens.
        at_once: tokens in a batch, filling included, or one window.

    Raises:
        UserError: as in `score`.
    """
    block = min(block, positions(model.config))
    require_at_least("block", block, 2)
    require_at_least("stride", stride, 1)
    stride = min(stride, block - 1)
    windows: list[tuple[int, Tensor, int]] = []  # text, tokens, those that are scored
    for number, text in enumerate(texts):
        ids = torch.as_tensor(text, dtype=torch.long).flatten()
        if len(ids) < 2:
            raise UserError(f"text has {len(ids)} tokens: scoring needs at least 2 (the first is context only).")
        scored = 1
        for begin in range(0, len(ids), stride):
            window = ids[begin : begin + block]
            fresh = begin + len(window) - scored
            if fresh > 0:
                windows.append((number, window, fresh))
                scored = begin + len(window)
            if scored == len(ids):
                break
    windows.sort(key=lambda window: len(window[1]), reverse=True)
    nats, head = [0.0] * len(texts), output_head(model)
    was_training = model.training
    model.eval()
    try:
        done = 0
        while done < len(windows):
            batch = windows[done : done + max(1, at_once // len(windows[done][1]))]
            done += len(batch)
            ids = torch.nn.utils.rnn.pad_sequence([window for _, window, _ in batch], batch_first=True).to(model.device)
            hidden = base_model(model)(input_ids=ids, use_cache=False).last_hidden_state  # (b, t, d)
            losses = []
            for row, (_, window, fresh) in enumerate(batch):
                first, last = len(window) - fresh, len(window)
                wanted = ids[row, first:last]
                losses.append(
                    head_cross_entropy(hidden[row, first - 1 : last - 1], head, wanted, chunk=chunk, reduction="sum")
                )
            for (number, _, _), loss in zip(batch, torch.stack(losses).tolist(), strict=True):
                nats[number] += loss
    finally:
        model.train(was_training)
    return [Score(found, len(text) - 1) for found, text in zip(nats, texts, strict=True)]
