"""GPT-2 over a cache of keys and values that the beams of an image share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipcap.packing import decoding_parts

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


NEVER = float("-inf")


class PrefixModel(Protocol):
    """What decoding asks of a captioner (`clipcap.model.ClipCapModel` is one)."""

    config: Any
    """Has `eos_token_id` and `prefix_length`."""
    gpt2: GPT2LMHeadModel
    training: bool

    @property
    def device(self) -> torch.device: ...
    def prefix(self, clip_embeddings: Tensor) -> Float[Tensor, "b K d"]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


class CachedDecoder:
    """GPT-2 over a cache shared by all beams of an image.

    Slots of the cache: first the prefix, then for every step one slot per beam. GPT-2's own forward is used; it
    writes through `update`, as into any cache of transformers.
    """

    def __init__(
        self, model: PrefixModel, prefix: Float[Tensor, "b K d"], width: int, max_new_tokens: int, int8: bool
    ) -> None:
        config = model.gpt2.config
        self.transformer, self.head = decoding_parts(model.gpt2, int8=int8)
        self.embed = model.gpt2.get_input_embeddings()
        self.dtype = dtype = self.embed.weight.dtype
        device = prefix.device
        self.length = prefix.shape[1]  # positions so far
        self.filled = 0  # slots so far
        slots = self.length + width * (max_new_tokens - 1)
        shape = (len(prefix), config.n_head, slots, config.n_embd // config.n_head)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.visible = torch.zeros(len(prefix), 1, slots, dtype=torch.bool, device=device)  # (b, beams, slots)
        self.visible[:, :, : self.length] = True

    def prefill(self, prefix: Float[Tensor, "b K d"]) -> Float[Tensor, "b 1 d"]:
        """Run the prefixes; returns the hidden state that predicts each image's first token."""
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=prefix.device).tril()
        return self._forward(prefix.to(self.dtype), 0, causal[None, None])[:, -1:]

    def step(self, tokens: Int[Tensor, "b w"], parents: Int[Tensor, "b w"]) -> Float[Tensor, "b w d"]:
        """Append one token to each beam, where beam i continues what was beam `parents[:, i]`."""
        beams = tokens.shape[1]
        self.visible = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[-1]))
        own = torch.arange(beams, device=tokens.device)
        self.visible[:, own, self.filled + own] = True
        mask = self.visible[:, None, :, : self.filled + beams]  # (b, 1, w, slots)
        hidden = self._forward(self.embed(tokens), self.length, mask)
        self.length += 1
        return hidden

    def _forward(
        self, inputs: Float[Tensor, "b n d"], position: int, visible: Bool[Tensor, "#b 1 n m"]
    ) -> Float[Tensor, "b n d"]:
        count = inputs.shape[1]
        # Prefixes begin at 0; later the tokens side by side are of different beams, all at one position.
        places = torch.arange(count) if position == 0 else torch.full((count,), position)
        mask = torch.zeros(visible.shape, dtype=inputs.dtype, device=inputs.device).masked_fill_(~visible, NEVER)
        states = self.transformer(
            inputs_embeds=inputs,
            position_ids=places[None].to(inputs.device),
            attention_mask=mask,
            past_key_values=self,
            use_cache=True,
        )
        self.filled += count
        return states.last_hidden_state

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (b, h, n, d/h) to the next slots; returns all that are filled."""
        end = self.filled + keys.shape[2]
        self.keys[layer][:, :, self.filled : end] = keys
        self.values[layer][:, :, self.filled : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, order: Int[Tensor, " a"]) -> None:
        """Go on with these images only: row i becomes what was row `order[i]`, by copying only rows that move."""
        moves = [(row, source) for row, source in enumerate(order.tolist()) if row != source]
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                for row, source in moves:
                    store[row, :, : self.filled] = store[source, :, : self.filled]
                stores[layer] = store[: len(order)]
        self.visible = self.visible[order]

    def logits(self, hidden: Float[Tensor, "b w d"]) -> Float[Tensor, "b w v"]:
        """Next-token logits in float32."""
        return torch.cat(list(self.head.chunks(hidden)), -1)

    def top_log_probs(
        self, hidden: Float[Tensor, "b w d"], count: int, temperature: float = 1.0
    ) -> tuple[Float[Tensor, "b w k"], Int[Tensor, "b w k"]]:
        """Log-probabilities (float32) and ids of the `count` most probable next tokens, the most probable first."""
        values, ids, total = top_logits(self.head.chunks(hidden.flatten(0, 1)), count, temperature)
        shape = (*hidden.shape[:2], -1)
        return (values - total[:, None]).view(shape), ids.view(shape)


def top_logits(
    chunks: Iterable[Float[Tensor, "n c"]], count: int, temperature: float
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
    """The largest `count` logits of each row, their ids, and the logsumexp of all, over the vocabulary in chunks.

    Their log-softmax never exists, nor all n·v logits at once where there are several chunks.
    """
    values, ids, totals, begin = [], [], [], 0
    for logits in chunks:
        if temperature != 1:
            logits = logits / temperature
        best, where = largest(logits, min(count, logits.shape[1]))
        values.append(best)
        ids.append(where + begin)
        totals.append(logits.logsumexp(-1))
        begin += logits.shape[1]
    best, where = torch.cat(values, -1).topk(min(count, begin), -1)
    return best, torch.cat(ids, -1).gather(-1, where), torch.stack(totals, -1).logsumexp(-1)


def largest(x: Float[Tensor, "n m"], count: int, *, block: int = 64) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """`x.topk(count)` by the maxima of blocks of columns: the `count` largest lie in the `count` best blocks."""
    rows, columns = x.shape
    blocks = columns // block
    if blocks <= count:
        return x.topk(count, -1)
    whole = x[:, : blocks * block].unflatten(1, (blocks, block))
    chosen = whole.amax(-1).topk(count, -1).indices  # (n, k)
    inside = whole.gather(1, chosen[..., None].expand(-1, -1, block)).flatten(1)  # (n, k * block)
    ids = (chosen[..., None] * block + torch.arange(block, device=x.device)).flatten(1)
    rest = torch.arange(blocks * block, columns, device=x.device).expand(rows, -1)
    best, where = torch.cat([inside, x[:, blocks * block :]], 1).topk(count, -1)
    return best, torch.cat([ids, rest], 1).gather(1, where)
