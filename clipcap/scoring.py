"""Log-probability of given captions after a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from common.decoders.heads import output_head


class Scorer(Protocol):
    """What scoring needs of a captioner's model: `ClipCapModel` is one."""

    gpt2: Any

    def hidden_after(self, prefix: Float[Tensor, "b K d"], input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]: ...


def caption_nats(
    model: Scorer, prefix: Float[Tensor, "n K d"], captions: Sequence[Sequence[int]]
) -> Float[Tensor, " n"]:
    """log p(caption | prefix) in nats of each caption's token ids, at most 0.

    Args:
        model: captioner.
        prefix: of each caption.
        captions: token ids, with their end tokens where they have one; at least one each.
    """
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in captions], batch_first=True, padding_value=-1
    ).to(prefix.device)  # fmt: skip
    kept = ids >= 0
    hidden = model.hidden_after(prefix, ids.clamp(min=0))[kept]
    nats = torch.zeros(ids.shape, device=ids.device)
    nats[kept] = -F.cross_entropy(output_head(model.gpt2).logits(hidden).float(), ids[kept], reduction="none")
    return nats.sum(1)
