"""How decoding chooses tokens: beams, the original's beams, and draws."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from clipcap.cache import NEVER, CachedDecoder
from clipcap.constraints import Constraints

Adjust = Callable[[Tensor], Tensor]
"""Next-token logits (b, w, v) as constraints leave them."""


@dataclass(frozen=True)
class Caption:
    """One decoded caption."""

    token_ids: list[int]
    """Its tokens; the last is the stop token unless `max_new_tokens` ended it."""
    score: float
    """Mean log-probability of its tokens under the model, stop token included, in nats."""
    similarity: float | None = field(default=None, compare=False)
    """CLIP's cosine of image and caption, where it was ranked by that."""


class Search:
    """How tokens are chosen. Tensors are (images, captions); parents say which caption a new one continues."""

    tensors: tuple[str, ...]
    """Names of the attributes with a row per image."""
    tokens: Int[Tensor, "b w t"]
    sums: Float[Tensor, "b w"]
    """Log-probabilities of the captions so far."""
    lengths: Shaped[Tensor, "b w"]
    constraints: Constraints | None = None

    def start(self, images: int, device: torch.device) -> None:
        """Begin with one empty caption for each image."""
        raise NotImplementedError

    def advance(
        self, decoder: CachedDecoder, hidden: Float[Tensor, "b w d"]
    ) -> tuple[Int[Tensor, "b u"], Int[Tensor, "b u"], Bool[Tensor, " b"]]:
        """Choose the next token of every caption: (tokens, parents, images that are done)."""
        raise NotImplementedError

    def captions(self, row: int) -> list[Caption]:
        """The captions of one image, best first by mean log-probability."""
        scores = self.sums[row] / self.lengths[row]
        return [
            Caption(self.tokens[row, place, : int(self.lengths[row, place])].tolist(), scores[place].item())
            for place in scores.argsort(descending=True, stable=True).tolist()
        ]

    def keep(self, order: Int[Tensor, " a"]) -> None:
        """Go on with these images only."""
        for name in self.tensors:
            setattr(self, name, getattr(self, name)[order])
        if self.constraints is not None:
            self.constraints.keep(order)

    def top_log_probs(
        self, decoder: CachedDecoder, hidden: Float[Tensor, "b w d"], count: int, temperature: float
    ) -> tuple[Float[Tensor, "b w k"], Int[Tensor, "b w k"]]:
        """The decoder's, as the constraints leave them."""
        if self.constraints is None:
            return decoder.top_log_probs(hidden, count, temperature)
        log_probs = (decoder.logits(hidden) / temperature).log_softmax(-1)
        best, ids = self.constraints(self.tokens, log_probs).topk(min(count, log_probs.shape[-1]), -1)
        return best, ids


class OriginalBeam(Search):
    """`generate_beam` of the original implementation: beams compete by mean log-probability at every step."""

    tensors = ("tokens", "sums", "lengths", "stopped")

    def __init__(self, width: int, stops: Int[Tensor, " s"], temperature: float) -> None:
        self.width, self.stops, self.temperature = width, stops, temperature

    def start(self, images: int, device: torch.device) -> None:
        self.tokens = torch.empty(images, 1, 0, dtype=torch.long, device=device)
        self.sums = torch.zeros(images, 1, device=device)
        self.lengths = torch.zeros(images, 1, device=device)
        self.stopped = torch.zeros(images, 1, dtype=torch.bool, device=device)

    def advance(self, decoder: CachedDecoder, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs, ids = self.top_log_probs(decoder, hidden, self.width, self.temperature)  # (b, w, k)
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


class Beam(Search):
    """Beam search by total log-probability; ended captions are set aside and ranked by their mean.

    With a length penalty α by their total / length^α.
    """

    tensors = ("tokens", "sums", "ended", "ended_scores", "ended_lengths")

    def __init__(
        self,
        width: int,
        stops: Int[Tensor, " s"],
        max_new_tokens: int,
        temperature: float,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> None:
        self.width, self.stops, self.max_new_tokens, self.temperature = width, stops, max_new_tokens, temperature
        self.length_penalty, self.early_stopping = length_penalty, early_stopping

    def start(self, images: int, device: torch.device) -> None:
        self.tokens = torch.empty(images, 1, 0, dtype=torch.long, device=device)
        self.sums = torch.zeros(images, 1, device=device)
        self.ended = torch.zeros(images, self.width, self.max_new_tokens, dtype=torch.long, device=device)
        self.ended_scores = torch.full((images, self.width), NEVER, device=device)
        self.ended_lengths = torch.zeros(images, self.width, dtype=torch.long, device=device)

    def advance(self, decoder: CachedDecoder, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Each beam has one continuation for every stop token, so among these enough go on.
        count = max(2, 1 + len(self.stops)) * self.width
        log_probs, ids = self.top_log_probs(decoder, hidden, count, self.temperature)  # (b, w, k)
        sums, index = (self.sums[..., None] + log_probs).flatten(1).topk(min(count, log_probs[0].numel()), -1)
        parents, chosen = index // ids.shape[-1], ids.flatten(1).gather(1, index)
        tokens = _extend(self.tokens, parents, chosen)  # (b, k, t)
        length = tokens.shape[-1]
        ends = torch.isin(chosen, self.stops) | (length == self.max_new_tokens)

        ranked = torch.arange(ends.shape[1], device=ends.device) < self.width
        scores = torch.where(ends & ranked, sums / length**self.length_penalty, NEVER)
        padded = F.pad(tokens, (0, self.max_new_tokens - length))
        self.ended_scores, best = torch.cat([self.ended_scores, scores], 1).topk(self.width, -1)
        lengths = torch.full_like(chosen, length)
        self.ended_lengths = torch.cat([self.ended_lengths, lengths], 1).gather(1, best)
        self.ended = _pick(torch.cat([self.ended, padded], 1), best)

        self.sums, go_on = torch.where(ends, -1e9, sums).topk(self.width, -1)
        self.tokens = _pick(tokens, go_on)
        done = self.sums[:, 0] / self._hoped_length(length) ** self.length_penalty <= self.ended_scores[:, -1]
        if self.early_stopping is True:
            done = done | (self.ended_scores[:, -1] > NEVER)
        return chosen.gather(1, go_on), parents.gather(1, go_on), done

    def _hoped_length(self, length: int) -> int:
        """Length at which the best unfinished caption is compared with the ended ones."""
        longest = self.early_stopping == "never" and self.length_penalty > 0
        return self.max_new_tokens if longest else length

    def captions(self, row: int) -> list[Caption]:
        return [
            Caption(self.ended[row, beam, : int(self.ended_lengths[row, beam])].tolist(), score)
            for beam, score in enumerate(self.ended_scores[row].tolist())
            if score > NEVER
        ]


class Draws(Search):
    """Independent captions, each token chosen by `choose`."""

    tensors = ("tokens", "sums", "lengths", "stopped")

    def __init__(
        self,
        width: int,
        stops: Int[Tensor, " s"],
        choose: Callable[[CachedDecoder, Tensor, Adjust | None], tuple[Tensor, Tensor]],
    ) -> None:
        self.width, self.stops, self.choose = width, stops, choose

    def start(self, images: int, device: torch.device) -> None:
        self.tokens = torch.empty(images, self.width, 0, dtype=torch.long, device=device)
        self.sums = torch.zeros(images, self.width, device=device)
        self.lengths = torch.zeros(images, self.width, dtype=torch.long, device=device)
        self.stopped = torch.zeros(images, self.width, dtype=torch.bool, device=device)

    def advance(self, decoder: CachedDecoder, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = hidden.shape[1] != self.width
        adjust = None if self.constraints is None else functools.partial(self.constraints, self.tokens)
        log_probs, chosen = self.choose(decoder, hidden.expand(-1, self.width, -1), adjust)  # (b, w)
        self.sums = self.sums + torch.where(self.stopped, 0, log_probs)
        self.lengths = self.lengths + ~self.stopped
        self.tokens = torch.cat([self.tokens, chosen[..., None]], -1)
        self.stopped = self.stopped | torch.isin(chosen, self.stops)
        own = torch.arange(self.width, device=chosen.device)
        parents = (torch.zeros_like(own) if first else own).expand_as(chosen)
        return chosen, parents, self.stopped.all(1)


def greedy(
    decoder: CachedDecoder, hidden: Float[Tensor, "b w d"], adjust: Adjust | None = None
) -> tuple[Float[Tensor, "b w"], Int[Tensor, "b w"]]:
    """The most probable token, of those that constraints leave, and its log-probability."""
    if adjust is None:
        log_probs, ids = decoder.top_log_probs(hidden, 1)
        return log_probs[..., 0], ids[..., 0]
    logits = decoder.logits(hidden)
    chosen = adjust(logits).argmax(-1)
    return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0], chosen


@dataclass(frozen=True)
class Sampler:
    """Draws a token from the tempered distribution cut to `top_k` tokens and to the nucleus of mass `top_p`."""

    top_k: int | None
    top_p: float | None
    temperature: float
    generator: torch.Generator | None

    def __call__(self, decoder: CachedDecoder, hidden: Tensor, adjust: Adjust | None = None) -> tuple[Tensor, Tensor]:
        logits = decoder.logits(hidden)  # (b, w, v)
        log_probs = logits.log_softmax(-1)
        allowed = log_probs if adjust is None else adjust(logits)
        probs, ids = (allowed / self.temperature).softmax(-1), None
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
