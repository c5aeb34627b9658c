"""A decoder over a cache of keys and values: one that the beams of an image share, or the library's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from clipcap.packing import decoding_parts
from common.decoders.families import cache_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NEVER = float("-inf")
IN_CACHE = 1 << 17
"""Logits (float32) that are read several times while they stay in the processor's cache."""
TREE_ATTENTION = frozenset(
    "gemma gemma2 gemma3_text gpt2 gpt_neox llama mistral olmo2 opt phi qwen2 qwen3 smollm3 starcoder2".split()
)
"""Families whose attention depends on nothing but position ids and a mask of any shape, so that beams may share it."""


class PrefixModel(Protocol):
    """What decoding asks of a captioner (`clipcap.model.ClipCapModel` is one)."""

    config: Any
    """Has `eos_token_id` and `prefix_length`."""
    gpt2: PreTrainedModel
    training: bool

    @property
    def device(self) -> torch.device: ...
    def prefix(self, clip_embeddings: Tensor) -> Float[Tensor, "b K d"]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


def shares_cache(model: PrefixModel) -> bool:
    """Whether the beams of an image share one cache; each has its own where attention is not by position ids."""
    return model.gpt2.config.model_type in TREE_ATTENTION


def cached_decoder(
    model: PrefixModel, prefix: Float[Tensor, "b K d"], width: int, max_new_tokens: int, int8: bool
) -> CachedDecoder:
    """The decoder of a captioner for these prefixes, `width` captions of each and at most `max_new_tokens` tokens."""
    kind = SharedCacheDecoder if shares_cache(model) else OwnCacheDecoder
    return kind(model, prefix, width, max_new_tokens, int8)


class CachedDecoder:
    """A decoder that reads prefixes once, and then one token more of every beam at a time."""

    def __init__(
        self, model: PrefixModel, prefix: Float[Tensor, "b K d"], width: int, max_new_tokens: int, int8: bool
    ) -> None:
        self.config = model.gpt2.config
        self.transformer, self.head = decoding_parts(model.gpt2, int8=int8)
        self.embed = model.gpt2.get_input_embeddings()
        self.dtype = self.embed.weight.dtype
        self.cache_name = str(cache_name(self.transformer.forward))

    def prefill(self, prefix: Float[Tensor, "b K d"]) -> Float[Tensor, "b 1 d"]:
        """Run the prefixes; returns the hidden state that predicts each image's first token."""
        raise NotImplementedError

    def step(self, tokens: Int[Tensor, "b w"], parents: Int[Tensor, "b w"]) -> Float[Tensor, "b w d"]:
        """Append one token to each beam, where beam i continues what was beam `parents[:, i]`."""
        raise NotImplementedError

    def keep(self, order: Int[Tensor, " a"]) -> None:
        """Go on with these images only: row i becomes what was row `order[i]`."""
        raise NotImplementedError

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


class SharedCacheDecoder(CachedDecoder):
    """A decoder over a cache shared by all beams of an image.

    Slots of the cache: first the prefix, then for every step one slot per beam. The family's own forward is used; what
    a beam sees (the prefix and its own ancestors, and of them in some layers only those within a window) is a mask,
    and where it stands is its position id.
    """

    def __init__(
        self, model: PrefixModel, prefix: Float[Tensor, "b K d"], width: int, max_new_tokens: int, int8: bool
    ) -> None:
        super().__init__(model, prefix, width, max_new_tokens, int8)
        device, length = prefix.device, prefix.shape[1]
        self.length = length  # positions so far
        slots = length + width * (max_new_tokens - 1)
        self.cache = SharedCache(self.config.num_hidden_layers, slots)
        self.visible = torch.zeros(len(prefix), 1, slots, dtype=torch.bool, device=device)  # (b, beams, slots)
        self.visible[:, :, :length] = True
        self.windowed, window = sliding_window(self.config)
        # Where no caption reaches over the window, there is none.
        self.window = window if window is not None and window < length + max_new_tokens else None
        steps = torch.arange(max_new_tokens - 1, device=device).repeat_interleave(width)
        self.places = torch.cat([torch.arange(length, device=device), length + steps])  # position of each slot

    def prefill(self, prefix: Float[Tensor, "b K d"]) -> Float[Tensor, "b 1 d"]:
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=prefix.device).tril()
        return self._forward(prefix.to(self.dtype), 0, causal[None, None])[:, -1:]

    def step(self, tokens: Int[Tensor, "b w"], parents: Int[Tensor, "b w"]) -> Float[Tensor, "b w d"]:
        beams, filled = tokens.shape[1], self.cache.filled
        self.visible = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[-1]))
        own = torch.arange(beams, device=tokens.device)
        self.visible[:, own, filled + own] = True
        mask = self.visible[:, None, :, : filled + beams]  # (b, 1, w, slots)
        hidden = self._forward(self.embed(tokens), self.length, mask)
        self.length += 1
        return hidden

    def _forward(
        self, inputs: Float[Tensor, "b n d"], position: int, visible: Bool[Tensor, "#b 1 n m"]
    ) -> Float[Tensor, "b n d"]:
        count = inputs.shape[1]
        # Prefixes begin at 0; later the tokens side by side are of different beams, all at one position.
        places = torch.arange(count) if position == 0 else torch.full((count,), position)
        places = places.to(inputs.device)
        states = self.transformer(
            inputs_embeds=inputs,
            position_ids=places[None],
            attention_mask=self._masks(visible, places, inputs.dtype),
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        self.cache.filled += count
        return states.last_hidden_state

    def _masks(
        self, visible: Bool[Tensor, "#b 1 n m"], places: Int[Tensor, " n"], dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """What is added to the scores: one mask, or one for each kind of layer."""
        everything = _additive(visible, dtype)
        if self.window is None:
            return everything
        near = places[:, None] - self.places[None, : visible.shape[-1]] < self.window  # (n, m)
        within = _additive(visible & near, dtype)
        return {"full_attention": everything, "sliding_attention": within} if self.windowed == "some" else within

    def keep(self, order: Int[Tensor, " a"]) -> None:
        self.cache.keep(order)
        self.visible = self.visible[order]


def sliding_window(config: Any) -> tuple[str, int | None]:
    """Which layers see a window only ("all", "some" or "none"), and how wide it is."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return "none", None
    return ("all" if kinds is None else "some"), window


def _additive(visible: Bool[Tensor, "#b 1 n m"], dtype: torch.dtype) -> Float[Tensor, "b 1 n m"]:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, NEVER)


class SharedCache(Cache):
    """Keys and values of all beams of an image in one row: what comes is written to the next slots.

    Args:
        layers: of the decoder.
        slots: for all that will come.
    """

    def __init__(self, layers: int, slots: int) -> None:
        super().__init__(layers=[SharedLayer(slots) for _ in range(layers)])
        self.filled = 0  # slots so far, in all layers once a forward is done

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values (b, h, n, d/h) to the next slots; returns all that are filled."""
        return self.layers[layer_idx].update(key_states, value_states, self.filled)

    def keep(self, order: Int[Tensor, " a"]) -> None:
        """Go on with these images only: row i becomes what was row `order[i]`, by copying only rows that move."""
        moves = [(row, source) for row, source in enumerate(order.tolist()) if row != source]
        for layer in self.layers:
            for row, source in moves:
                layer.keys[row, :, : self.filled] = layer.keys[source, :, : self.filled]
                layer.values[row, :, : self.filled] = layer.values[source, :, : self.filled]
            layer.keys, layer.values = layer.keys[: len(order)], layer.values[: len(order)]


class SharedLayer(CacheLayerMixin):
    """One layer's slots, whose heads and widths its first keys and values tell."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots, self.filled = slots, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            setattr(self, name, states.new_empty(*states.shape[:2], self.slots, states.shape[-1]))
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, begin: int
    ) -> tuple[Tensor, Tensor]:
        """Write to the slots from `begin` on; returns all that are filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.filled = end = begin + key_states.shape[2]
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        return self.slots


class OwnCacheDecoder(CachedDecoder):
    """A decoder with a row of transformers' own cache for every beam, which is copied when beams are reordered.

    For families whose attention goes by the distance between slots (BLOOM's ALiBi), or is not known to do otherwise.
    """

    def __init__(
        self, model: PrefixModel, prefix: Float[Tensor, "b K d"], width: int, max_new_tokens: int, int8: bool
    ) -> None:
        super().__init__(model, prefix, width, max_new_tokens, int8)
        self.cache = DynamicCache(config=self.config)
        self.beams = 1  # rows of an image so far

    def prefill(self, prefix: Float[Tensor, "b K d"]) -> Float[Tensor, "b 1 d"]:
        return self._forward(prefix.to(self.dtype))[:, -1:]

    def step(self, tokens: Int[Tensor, "b w"], parents: Int[Tensor, "b w"]) -> Float[Tensor, "b w d"]:
        images, beams = tokens.shape
        first = torch.arange(images, device=parents.device)[:, None] * self.beams
        self.cache.batch_select_indices((first + parents).flatten())
        self.beams = beams
        return self._forward(self.embed(tokens.flatten())[:, None]).view(images, beams, -1)

    def _forward(self, inputs: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        states = self.transformer(inputs_embeds=inputs, use_cache=True, **{self.cache_name: self.cache})
        return states.last_hidden_state

    def keep(self, order: Int[Tensor, " a"]) -> None:
        rows = order[:, None] * self.beams + torch.arange(self.beams)
        self.cache.batch_select_indices(rows.flatten().to(self.cache.layers[0].keys.device))


def top_logits(
    chunks: Iterable[Float[Tensor, "n c"]], count: int, temperature: float
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
    """The largest `count` logits of each row, their ids, and the logsumexp of all, over the vocabulary in chunks.

    Their log-softmax never exists, nor all n·v logits at once where there are several chunks. Chunks are
    overwritten; on a CPU a few rows at once, which stay in its cache while they are read.
    """
    values, ids, totals, begin = [], [], [], 0
    for logits in chunks:
        rows = max(1, IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        parts = [_top_part(part, count, temperature) for part in logits.split(rows)]
        best, where, total = (torch.cat(found) for found in zip(*parts, strict=True))
        values.append(best)
        ids.append(where + begin)
        totals.append(total)
        begin += logits.shape[1]
    best, where = torch.cat(values, -1).topk(min(count, begin), -1)
    return best, torch.cat(ids, -1).gather(-1, where), torch.stack(totals, -1).logsumexp(-1)


def _top_part(
    logits: Float[Tensor, "n c"], count: int, temperature: float
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
    """`top_logits` of a few rows of a chunk."""
    if temperature != 1:
        logits.div_(temperature)
    best, where = largest(logits, min(count, logits.shape[1]))
    most = best[:, :1]
    return best, where, logits.sub_(most).exp_().sum(-1).log_().add_(most[:, 0])


def largest(x: Float[Tensor, "n m"], count: int, *, block: int = 64) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """`x.topk(count)` by the maxima of blocks of columns: the `count` largest lie in the `count` best blocks.

    The columns of a block are evenly spaced, so that the maxima of neighbouring blocks are found side by side.
    """
    rows, columns = x.shape
    blocks = columns // block
    if blocks <= count:
        return x.topk(count, -1)
    whole = x[:, : blocks * block].unflatten(1, (block, blocks))
    chosen = whole.amax(1).topk(count, -1).indices  # (n, k)
    inside = whole.gather(2, chosen[:, None].expand(-1, block, -1)).flatten(1)  # (n, block * k)
    spaced = torch.arange(0, blocks * block, blocks, device=x.device)
    ids = (spaced[:, None] + chosen[:, None]).flatten(1)
    rest = torch.arange(blocks * block, columns, device=x.device).expand(rows, -1)
    best, where = torch.cat([inside, x[:, blocks * block :]], 1).topk(count, -1)
    return best, torch.cat([ids, rest], 1).gather(1, where)
