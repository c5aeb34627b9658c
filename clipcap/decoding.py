"""Captions from image embeddings: greedy, sampling, beam search, and the original's beam rule, batched over images.

In most families all beams of an image share one key-value cache: each new token is written to it once, and which of
the written tokens a beam sees (the prefix and its own ancestors) is a mask. So an image's prefix is computed once, no
cache is copied when beams are reordered, and a step over all beams of all images is one set of matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipcap.cache import PrefixModel, cached_decoder, shares_cache
from clipcap.constraints import constraints
from clipcap.search import Beam, Caption, Draws, OriginalBeam, Sampler, Search, greedy
from common.checks import UserError, require_at_least, require_one_of, require_share, require_temperature
from common.decoders.families import numbers_cached, positions
from common.runtime import require_memory

STRATEGIES = ("beam", "beam_original", "greedy", "sample")


@torch.inference_mode()
def decode(
    model: PrefixModel,
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
    prompt_ids: Sequence[int] | Int[Tensor, "b p"] | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
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
        prompt_ids: tokens that captions begin with, of all images or of each; not among `max_new_tokens`, and not in
            the score.
        repetition_penalty, no_repeat_ngram_size, min_new_tokens: as in transformers' `generate`; they see the prompt
            and what follows. Beams are then chosen, and scored, by what these leave of the probabilities.
        length_penalty: exponent of the length that "beam" divides an ended caption's log-probability by, also in its
            score; 1 makes it the mean.
        early_stopping: True ends "beam" for an image with its first `num_beams` ended captions; "never" goes on as
            long as a longer caption could still be better.

    Raises:
        UserError: an option out of its range or of another strategy, or embeddings that do not fit the model.
    """
    prompt = _prompt(model, prompt_ids, len(clip_embeddings))  # (b, p)
    most = require_options(
        model, strategy=strategy, num_beams=num_beams, num_captions=num_captions, max_new_tokens=max_new_tokens,
        top_k=top_k, top_p=top_p, temperature=temperature, prompt_length=prompt.shape[1],
        repetition_penalty=repetition_penalty, no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens, length_penalty=length_penalty, early_stopping=early_stopping,
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
        if prompt.shape[1]:
            text = model.gpt2.get_input_embeddings()(prompt)  # (b, p, d)
            prefix = torch.cat([prefix.to(text.dtype), text], dim=1)
        search: Search
        if strategy == "beam":
            search = Beam(num_beams, stops, max_new_tokens, temperature, length_penalty, early_stopping)
        elif strategy == "beam_original":
            search = OriginalBeam(num_beams, stops, temperature)
        elif strategy == "greedy":
            search = Draws(1, stops, greedy)
        else:
            search = Draws(num_captions, stops, Sampler(top_k, top_p, temperature, generator))
        search.constraints = constraints(prompt, stops, repetition_penalty, no_repeat_ngram_size, min_new_tokens)
        found = _run(model, prefix, search, most, max_new_tokens, int8)
    finally:
        model.train(was_training)
    return [
        [Caption([*begun, *caption.token_ids], caption.score) for caption in captions[:num_captions]]
        for begun, captions in zip(prompt.tolist(), found, strict=True)
    ]


def require_options(
    model: PrefixModel | None = None,
    *,
    strategy: str = "beam",
    num_beams: int = 5,
    num_captions: int = 1,
    max_new_tokens: int = 67,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    prompt_length: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> int:
    """Check `decode`'s options; returns how many captions of an image are followed at once.

    Without a model, what can be checked before one is loaded. `prompt_length` is the number of the prompt's tokens.

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
    if not (isinstance(repetition_penalty, int | float) and 0 < repetition_penalty < float("inf")):
        raise UserError(f"repetition_penalty is {repetition_penalty}: use a number above 0; 1 is none.")
    require_at_least("no_repeat_ngram_size", no_repeat_ngram_size, 0)
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise UserError(f"min_new_tokens is {min_new_tokens}: use 0 to {max_new_tokens}, the max_new_tokens.")
    if not (isinstance(length_penalty, int | float) and math.isfinite(length_penalty)):
        raise UserError(f"length_penalty is {length_penalty}: use a number; 1 ranks captions by their mean.")
    if early_stopping not in (True, False, "never"):
        raise UserError(f"early_stopping is {early_stopping!r}: use True, False or 'never'.")
    if strategy != "beam" and (length_penalty != 1 or early_stopping is not False):
        raise UserError(
            f"length_penalty is {length_penalty} and early_stopping is {early_stopping} with strategy {strategy!r}: "
            f"use strategy 'beam'."
        )
    most = {"greedy": 1, "sample": num_captions}.get(strategy, num_beams)
    if num_captions > most:
        raise UserError(f"num_captions is {num_captions}: strategy {strategy!r} gives at most {most} here.")
    if model is None:
        return most
    vocabulary, places = model.gpt2.config.vocab_size, positions(model.gpt2.config)
    if most > vocabulary:
        name = "num_captions" if strategy == "sample" else "num_beams"
        raise UserError(f"{name} is {most}: use at most the {vocabulary} tokens of the vocabulary.")
    room = room_for_captions(model) - prompt_length
    if max_new_tokens > room:
        raise UserError(f"max_new_tokens is {max_new_tokens}: GPT-2's {places} positions leave room for {room}.")
    return most


def room_for_captions(model: PrefixModel) -> int:
    """Tokens of the longest caption that the decoder's positions hold behind the prefix."""
    return positions(model.gpt2.config) - model.config.prefix_length + 1  # the last token is never fed back


def ignored_options(strategy: str, *, num_beams: int | None = None, temperature: float | None = None) -> list[str]:
    """A line about each of these options, where it is given, that the strategy has no use for."""
    found = []
    if num_beams is not None and strategy in ("greedy", "sample"):
        found.append(f"num_beams {num_beams} is ignored: strategy {strategy!r} has no beams.")
    if temperature is not None and strategy == "greedy":
        found.append(f"temperature {temperature} is ignored: strategy 'greedy' takes the most probable token.")
    return found


def bytes_of(model: PrefixModel, strategy: str, width: int, max_new_tokens: int) -> int:
    """Memory that decoding takes for each image of a batch: the cache of keys and values, and the logits of a step.

    Args:
        model: captioner.
        strategy: of `decode`.
        width: captions of an image that are followed at once.
        max_new_tokens: longest caption.
    """
    config, size = model.gpt2.config, model.gpt2.get_input_embeddings().weight.element_size()
    prefix = model.config.prefix_length * (1 if shares_cache(model) else width)
    slots = prefix + width * max_new_tokens
    logits = width * config.vocab_size * 4 * (3 if strategy == "sample" else 1)
    return numbers_cached(config) * slots * size + logits


def _stop_tokens(model: PrefixModel, given: int | Sequence[int] | None) -> Int[Tensor, " s"]:
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


def _prompt(model: PrefixModel, given: Sequence[int] | Int[Tensor, "b p"] | None, images: int) -> Int[Tensor, "b p"]:
    ids = torch.as_tensor([] if given is None else given, dtype=torch.long, device=model.device)
    if ids.ndim == 1:
        ids = ids.expand(images, -1)
    if ids.ndim != 2 or len(ids) != images:
        raise UserError(
            f"prompt_ids have shape {tuple(ids.shape)}: give one prompt, or one for each of {images} images."
        )
    vocabulary = model.gpt2.config.vocab_size
    if ids.numel() and not (0 <= ids.min() and ids.max() < vocabulary):
        raise UserError(f"prompt_ids reach from {int(ids.min())} to {int(ids.max())}: use ids below {vocabulary}.")
    return ids


def _run(
    model: PrefixModel, prefix: Float[Tensor, "b K d"], search: Search, width: int, max_new_tokens: int, int8: bool
) -> list[list[Caption]]:
    """Let `search` choose tokens step by step until it is done with every image; a finished image leaves the batch."""
    found: list[list[Caption]] = [[] for _ in prefix]
    image = torch.arange(len(prefix))
    decoder = cached_decoder(model, prefix, width, max_new_tokens, int8)
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
