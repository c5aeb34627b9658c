"""Captions from image embeddings: greedy, sampling, beam search, and the original's beam rule, batched over images.

All beams of an image share one key-value cache: each new token is written to it once, and which of the written
tokens a beam sees (the prefix and its own ancestors) is a mask. So an image's prefix is computed once, no cache is
copied when beams are reordered, and a step over all beams of all images is one set of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from clipcap.packing import decoding_parts
from common.checks import UserError, require_at_least, require_one_of, require_share, require_temperature
from common.runtime import require_memory

if TYPE_CHECKING:
    from clipcap.model import ClipCapModel

STRATEGIES = ("beam", "beam_original", "greedy", "sample")
NEVER = float("-inf")


@dataclass(frozen=True)
class Caption:
    """One decoded caption."""

    token_ids: list[int]
    """Its tokens; the last is the stop token unless `max_new_tokens` ended it."""
    score: float
    """Mean log-probability of its tokens under the model, stop token included, in nats."""


@torch.inference_mode()
def decode(
    model: ClipCapModel,
    clip_embeddings: Float[Tensor, "b e"] | Float[Tensor, "b n e"],
    *,
    strategy: str = "beam",
    num_beams: int = 5,
    num_captions: int = 1,
    max_new_tokens: int = 67,
    stop_token_ids: int | Sequence[int] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    int8: bool = False,
) -> list[list[Caption]]:
    """Captions of each image, best first.

    Strategies:
        "beam": the `num_beams` unfinished captions of largest total log-probability go on; captions that end are
            ranked by their mean log-probability. An image is done when it has `num_beams` ended captions and the best
            unfinished one has no larger mean than the worst of them (the rule of transformers' `generate` with
            `length_penalty=1` and `early_stopping=False`).
        "beam_original": the rule of ClipCap's own code: at every step the `num_beams` captions of largest mean
            log-probability go on, ended ones competing unchanged, until all of them have ended.
        "greedy": the most probable token at every step.
        "sample": tokens drawn at random, `num_captions` times for each image.

    Args:
        model: captioner; decodes in eval mode whatever its mode.
        clip_embeddings: as in `ClipCapModel.prefix`.
        num_beams: beams of the two beam strategies.
        num_captions: captions to return for each image: at most `num_beams`, and one for "greedy".
        max_new_tokens: longest caption, stop token included.
        stop_token_ids: tokens that end a caption; None takes the end token of the model's config.
        top_k: "sample" draws from the k most probable tokens only.
        top_p: "sample" draws from the smallest set of most probable tokens that together have this probability
            (nucleus sampling, Holtzman et al. 2020), after `top_k`.
        temperature: divides the logits before choosing (not for "greedy"); beam scores are of the divided logits.
        generator: source of randomness of "sample", on the model's device.
        int8: compute GPT-2's matrix products in 8-bit integers (CPU only): faster, and close but not equal in result.

    Raises:
        UserError: an option out of its range or of another strategy, or embeddings that do not fit the model.
    """
    most = require_options(
        model, strategy=strategy, num_beams=num_beams, num_captions=num_captions, max_new_tokens=max_new_tokens,
        top_k=top_k, top_p=top_p, temperature=temperature,
    )  # fmt: skip
    stops = _stop_tokens(model, stop_token_ids)
    if not len(clip_embeddings):
        return []
    require_memory(
        f"{len(clip_embeddings)} images are decoded at once, {most} captions of each",
        len(clip_embeddings) * bytes_of(model, strategy, most, max_new_tokens),
        model.device,
        "use a smaller batch, fewer beams or captions, or shorter ones",
    )

    was_training = model.training
    model.eval()
    try:
        prefix = model.prefix(clip_embeddings)
        search: _Search
        if strategy == "beam":
            search = _Beam(num_beams, stops, max_new_tokens, temperature)
        elif strategy == "beam_original":
            search = _OriginalBeam(num_beams, stops, temperature)
        elif strategy == "greedy":
            search = _Draws(1, stops, _greedy)
        else:
            search = _Draws(num_captions, stops, _Sampler(top_k, top_p, temperature, generator))
        found = _run(model, prefix, search, most, max_new_tokens, int8)
    finally:
        model.train(was_training)
    return [captions[:num_captions] for captions in found]


def require_options(
    model: ClipCapModel | None = None,
    *,
    strategy: str = "beam",
    num_beams: int = 5,
    num_captions: int = 1,
    max_new_tokens: int = 67,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
) -> int:
    """Check `decode`'s options; returns how many captions of an image are followed at once.

    Without a model, what can be checked before one is loaded.

    Raises:
        UserError: an option out of its range or of another strategy.
    """
    require_one_of("strategy", strategy, STRATEGIES)
    for name, count in (("num_beams", num_beams), ("num_captions", num_captions), ("max_new_tokens", max_new_tokens)):
        require_at_least(name, count, 1)
    require_temperature(temperature)
    if strategy != "sample" and (top_k is not None or top_p is not None):
        raise UserError(f"top_k is {top_k} and top_p is {top_p} with strategy {strategy!r}: use strategy 'sample'.")
    if top_k is not None:
        require_at_least("top_k", top_k, 1)
    if top_p is not None:
        require_share("top_p", top_p)
    most = {"greedy": 1, "sample": num_captions}.get(strategy, num_beams)
    if num_captions > most:
        raise UserError(f"num_captions is {num_captions}: strategy {strategy!r} gives at most {most} here.")
    if model is None:
        return most
    vocabulary, positions = model.gpt2.config.vocab_size, model.gpt2.config.n_positions
    if most > vocabulary:
        name = "num_captions" if strategy == "sample" else "num_beams"
        raise UserError(f"{name} is {most}: use at most the {vocabulary} tokens of the vocabulary.")
    room = positions - model.config.prefix_length + 1  # the last token is never fed back
    if max_new_tokens > room:
        raise UserError(f"max_new_tokens is {max_new_tokens}: GPT-2's {positions} positions leave room for {room}.")
    return most


def bytes_of(model: ClipCapModel, strategy: str, width: int, max_new_tokens: int) -> int:
    """Memory that decoding takes for each image of a batch: the cache of keys and values, and the logits of a step.

    Args:
        model: captioner.
        strategy: of `decode`.
        width: captions of an image that are followed at once.
        max_new_tokens: longest caption.
    """
    config, size = model.gpt2.config, model.gpt2.get_input_embeddings().weight.element_size()
    slots = model.config.prefix_length + width * max_new_tokens
    logits = width * config.vocab_size * 4 * (3 if strategy == "sample" else 1)
    return 2 * config.n_layer * config.n_embd * slots * size + logits


def _stop_tokens(model: ClipCapModel, given: int | Sequence[int] | None) -> Int[Tensor, " s"]:
    if given is None:
        given = model.config.eos_token_id
    if given is None:
        given = model.gpt2.config.eos_token_id
    stops = [] if given is None else [given] if isinstance(given, int) else list(given)
    vocabulary = model.gpt2.config.vocab_size
    for token in stops:
        if not 0 <= token < vocabulary:
            raise UserError(f"stop token {token} is not in the vocabulary: use ids from 0 to {vocabulary - 1}.")
    return torch.tensor(stops, dtype=torch.long, device=model.device)


def _run(
    model: ClipCapModel, prefix: Float[Tensor, "b K d"], search: _Search, width: int, max_new_tokens: int, int8: bool
) -> list[list[Caption]]:
    """Let `search` choose tokens step by step until it is done with every image; a finished image leaves the batch."""
    found: list[list[Caption]] = [[] for _ in prefix]
    image = torch.arange(len(prefix))
    decoder = _Decoder(model, prefix, width, max_new_tokens, int8)
    hidden = decoder.prefill(prefix)
    search.start(len(prefix), prefix.device)
    for step in range(1, max_new_tokens + 1):
        tokens, parents, done = search.advance(decoder, hidden)
        done = torch.ones_like(done) if step == max_new_tokens else done
        if done.any():
            for row in done.nonzero().flatten().tolist():
                found[image[row]] = search.captions(row)
            order = _closed_ranks(done)
            if not len(order):
                break
            image, tokens, parents = image[order], tokens[order], parents[order]
            search.keep(order)
            decoder.keep(order)
        hidden = decoder.step(tokens, parents)
    return found


def _closed_ranks(done: Bool[Tensor, " b"]) -> Int[Tensor, " a"]:
    """Rows that are not done, in an order that moves as few as possible: the last ones fill the holes of the first."""
    flags = done.tolist()
    remaining = flags.count(False)
    spare = [row for row in range(remaining, len(flags)) if not flags[row]]
    return torch.tensor([spare.pop() if flags[row] else row for row in range(remaining)], dtype=torch.long)


class _Decoder:
    """GPT-2 over a cache shared by all beams of an image.

    Slots of the cache: first the prefix, then for every step one slot per beam. GPT-2's own forward is used; it
    writes through `update`, as into any cache of transformers.
    """

    def __init__(
        self, model: ClipCapModel, prefix: Float[Tensor, "b K d"], width: int, max_new_tokens: int, int8: bool
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
        self, inputs: Float[Tensor, "b n d"], position: int, visible: Bool[Tensor, "b 1 n m"]
    ) -> Float[Tensor, "b n d"]:
        count = inputs.shape[1]
        # Prefixes begin at 0; later the tokens side by side are of different beams, all at one position.
        places = torch.arange(count) if position == 0 else torch.full((count,), position)
        mask = torch.zeros(visible.shape, dtype=inputs.dtype, device=inputs.device).masked_fill_(~visible, NEVER)
        states = self.transformer(
            inputs_embeds=inputs, position_ids=places[None].to(inputs.device), attention_mask=mask,
            past_key_values=self, use_cache=True,
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
        values, ids, total = _top_logits(self.head.chunks(hidden.flatten(0, 1)), count, temperature)
        shape = (*hidden.shape[:2], -1)
        return (values - total[:, None]).view(shape), ids.view(shape)


def _top_logits(
    chunks: Iterable[Float[Tensor, "n c"]], count: int, temperature: float
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
    """The largest `count` logits of each row, their ids, and the logsumexp of all, over the vocabulary in chunks.

    Their log-softmax never exists, nor all n·v logits at once where there are several chunks.
    """
    values, ids, totals, begin = [], [], [], 0
    for logits in chunks:
        if temperature != 1:
            logits = logits / temperature
        best, where = _topk(logits, min(count, logits.shape[1]))
        values.append(best)
        ids.append(where + begin)
        totals.append(logits.logsumexp(-1))
        begin += logits.shape[1]
    best, where = torch.cat(values, -1).topk(min(count, begin), -1)
    return best, torch.cat(ids, -1).gather(-1, where), torch.stack(totals, -1).logsumexp(-1)


def _topk(x: Float[Tensor, "n m"], count: int, *, block: int = 64) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
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


class _Search:
    """How tokens are chosen. Tensors are (images, captions); parents say which caption a new one continues."""

    tensors: tuple[str, ...]
    """Names of the attributes with a row per image."""

    def start(self, images: int, device: torch.device) -> None:
        """Begin with one empty caption for each image."""
        raise NotImplementedError

    def advance(
        self, decoder: _Decoder, hidden: Float[Tensor, "b w d"]
    ) -> tuple[Int[Tensor, "b u"], Int[Tensor, "b u"], Bool[Tensor, " b"]]:
        """Choose the next token of every caption: (tokens, parents, images that are done)."""
        raise NotImplementedError

    def captions(self, row: int) -> list[Caption]:
        """The captions of one image, best first."""
        raise NotImplementedError

    def keep(self, order: Int[Tensor, " a"]) -> None:
        """Go on with these images only."""
        for name in self.tensors:
            setattr(self, name, getattr(self, name)[order])


class _OriginalBeam(_Search):
    """`generate_beam` of the original implementation: beams compete by mean log-probability at every step."""

    tensors = ("tokens", "sums", "lengths", "stopped")

    def __init__(self, width: int, stops: Int[Tensor, " s"], temperature: float) -> None:
        self.width, self.stops, self.temperature = width, stops, temperature

    def start(self, images: int, device: torch.device) -> None:
        self.tokens = torch.empty(images, 1, 0, dtype=torch.long, device=device)
        self.sums = torch.zeros(images, 1, device=device)
        self.lengths = torch.zeros(images, 1, device=device)
        self.stopped = torch.zeros(images, 1, dtype=torch.bool, device=device)

    def advance(self, decoder: _Decoder, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs, ids = decoder.top_log_probs(hidden, self.width, self.temperature)  # (b, w, k)
        only = torch.full_like(log_probs, NEVER)  # a stopped beam is continued by token 0, free of charge
        only[..., 0] = 0
        log_probs = torch.where(self.stopped[..., None], only, log_probs)
        ids = torch.where(self.stopped[..., None], 0, ids)
        self.lengths = self.lengths + ~self.stopped
        means = (self.sums[..., None] + log_probs) / self.lengths[..., None]
        means, index = means.flatten(1).topk(self.width, -1)
        parents, chosen = index // ids.shape[-1], ids.flatten(1).gather(1, index)
        self.tokens = _extend(self.tokens, parents, chosen)
        self.lengths = self.lengths.gather(1, parents)
        self.sums = means * self.lengths
        self.stopped = self.stopped.gather(1, parents) | torch.isin(chosen, self.stops)
        return chosen, parents, self.stopped.all(1)

    def captions(self, row: int) -> list[Caption]:
        scores = self.sums[row] / self.lengths[row]
        return [
            Caption(self.tokens[row, beam, : int(self.lengths[row, beam])].tolist(), scores[beam].item())
            for beam in scores.argsort(descending=True, stable=True).tolist()
        ]


class _Beam(_Search):
    """Beam search by total log-probability; ended captions are set aside and ranked by their mean."""

    tensors = ("tokens", "sums", "ended", "ended_scores", "ended_lengths")

    def __init__(self, width: int, stops: Int[Tensor, " s"], max_new_tokens: int, temperature: float) -> None:
        self.width, self.stops, self.max_new_tokens, self.temperature = width, stops, max_new_tokens, temperature

    def start(self, images: int, device: torch.device) -> None:
        self.tokens = torch.empty(images, 1, 0, dtype=torch.long, device=device)
        self.sums = torch.zeros(images, 1, device=device)
        self.ended = torch.zeros(images, self.width, self.max_new_tokens, dtype=torch.long, device=device)
        self.ended_scores = torch.full((images, self.width), NEVER, device=device)
        self.ended_lengths = torch.zeros(images, self.width, dtype=torch.long, device=device)

    def advance(self, decoder: _Decoder, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Each beam has one continuation for every stop token, so among these enough go on.
        count = max(2, 1 + len(self.stops)) * self.width
        log_probs, ids = decoder.top_log_probs(hidden, count, self.temperature)  # (b, w, k)
        sums, index = (self.sums[..., None] + log_probs).flatten(1).topk(min(count, log_probs[0].numel()), -1)
        parents, chosen = index // ids.shape[-1], ids.flatten(1).gather(1, index)
        tokens = _extend(self.tokens, parents, chosen)  # (b, k, t)
        length = tokens.shape[-1]
        ends = torch.isin(chosen, self.stops) | (length == self.max_new_tokens)

        ranked = torch.arange(ends.shape[1], device=ends.device) < self.width
        scores = torch.where(ends & ranked, sums / length, NEVER)
        padded = F.pad(tokens, (0, self.max_new_tokens - length))
        self.ended_scores, best = torch.cat([self.ended_scores, scores], 1).topk(self.width, -1)
        lengths = torch.full_like(chosen, length)
        self.ended_lengths = torch.cat([self.ended_lengths, lengths], 1).gather(1, best)
        self.ended = _pick(torch.cat([self.ended, padded], 1), best)

        self.sums, go_on = torch.where(ends, -1e9, sums).topk(self.width, -1)
        self.tokens = _pick(tokens, go_on)
        done = self.sums[:, 0] / length <= self.ended_scores[:, -1]
        return chosen.gather(1, go_on), parents.gather(1, go_on), done

    def captions(self, row: int) -> list[Caption]:
        return [
            Caption(self.ended[row, beam, : int(self.ended_lengths[row, beam])].tolist(), score)
            for beam, score in enumerate(self.ended_scores[row].tolist())
            if score > NEVER
        ]


class _Draws(_Search):
    """Independent captions, each token chosen by `choose`."""

    tensors = ("tokens", "sums", "lengths", "stopped")

    def __init__(
        self, width: int, stops: Int[Tensor, " s"], choose: Callable[[_Decoder, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.width, self.stops, self.choose = width, stops, choose

    def start(self, images: int, device: torch.device) -> None:
        self.tokens = torch.empty(images, self.width, 0, dtype=torch.long, device=device)
        self.sums = torch.zeros(images, self.width, device=device)
        self.lengths = torch.zeros(images, self.width, dtype=torch.long, device=device)
        self.stopped = torch.zeros(images, self.width, dtype=torch.bool, device=device)

    def advance(self, decoder: _Decoder, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = hidden.shape[1] != self.width
        log_probs, chosen = self.choose(decoder, hidden.expand(-1, self.width, -1))  # (b, w)
        self.sums = self.sums + torch.where(self.stopped, 0, log_probs)
        self.lengths = self.lengths + ~self.stopped
        self.tokens = torch.cat([self.tokens, chosen[..., None]], -1)
        self.stopped = self.stopped | torch.isin(chosen, self.stops)
        own = torch.arange(self.width, device=chosen.device)
        parents = (torch.zeros_like(own) if first else own).expand_as(chosen)
        return chosen, parents, self.stopped.all(1)

    def captions(self, row: int) -> list[Caption]:
        scores = self.sums[row] / self.lengths[row]
        return [
            Caption(self.tokens[row, draw, : int(self.lengths[row, draw])].tolist(), scores[draw].item())
            for draw in scores.argsort(descending=True, stable=True).tolist()
        ]


def _greedy(decoder: _Decoder, hidden: Float[Tensor, "b w d"]) -> tuple[Float[Tensor, "b w"], Int[Tensor, "b w"]]:
    """The most probable token and its log-probability."""
    log_probs, ids = decoder.top_log_probs(hidden, 1)
    return log_probs[..., 0], ids[..., 0]


@dataclass(frozen=True)
class _Sampler:
    """Draws a token from the tempered distribution cut to `top_k` tokens and to the nucleus of mass `top_p`."""

    top_k: int | None
    top_p: float | None
    temperature: float
    generator: torch.Generator | None

    def __call__(self, decoder: _Decoder, hidden: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = decoder.logits(hidden).log_softmax(-1)  # (b, w, v)
        probs, ids = (log_probs / self.temperature).softmax(-1), None
        if self.top_k is not None or self.top_p is not None:
            probs, ids = probs.topk(min(self.top_k or probs.shape[-1], probs.shape[-1]), -1)
        if self.top_p is not None:
            probs = probs / probs.sum(-1, keepdim=True)
            before = probs.cumsum(-1) - probs  # mass of the more probable tokens
            probs = probs.masked_fill(before >= self.top_p, 0)
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=self.generator).view(*probs.shape[:2], 1)
        chosen = drawn if ids is None else ids.gather(-1, drawn)
        return log_probs.gather(-1, chosen)[..., 0], chosen[..., 0]


def _pick(tokens: Int[Tensor, "b w t"], index: Int[Tensor, "b u"]) -> Int[Tensor, "b u t"]:
    """Rows `index` of each image."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _extend(
    tokens: Int[Tensor, "b w t"], parents: Int[Tensor, "b u"], chosen: Int[Tensor, "b u"]
) -> Int[Tensor, "b u t+1"]:
    """Each new caption: its parent's tokens and the chosen one."""
    return torch.cat([_pick(tokens, parents), chosen[..., None]], -1)
