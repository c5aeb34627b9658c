"""An English tokenizer extended by tokens of a new language: its own stay, and merges are learned after them."""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checks import UserError, require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LEAST = 2
"""Occurrences of a pair that is merged, as in training BPE from the beginning."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class EnglishConfig:
    """What stays of English beside the new language."""

    extend: int = 0
    """Tokens that are added to the English vocabulary, which stays, instead of a new one of vocab_size; 0 replaces
    it."""
    english: tuple[Path, ...] = ()
    """English text. With extend, it is tokenized as before: no pair of tokens that occurs in it is merged. With replay,
    it is trained on."""
    replay: float = 0.0
    """Share of the blocks of fine-tuning that are English, so that less of it is forgotten; such blocks count among
    the tokens of that stage."""

    def check(self) -> None:
        """Raise UserError for values that cannot work, or text that nothing would read."""
        require_at_least("extend", self.extend, 0)
        require_share(self.replay)
        if self.replay and not self.english:
            raise UserError(f"replay is {self.replay:g} but there is no English text: give it with --english.")
        if self.english and not (self.extend or self.replay):
            raise UserError("English text is given but neither extend nor replay reads it: give one, or leave it out.")


def require_share(replay: float) -> None:
    """Raise UserError unless a share of replayed blocks leaves room for the new language."""
    if not 0 <= replay < 1:
        raise UserError(f"replay is {replay:g}: use a share from 0 to below 1.")


def extends(english: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` has all tokens of `english`, with the same ids, and more."""
    new = tokenizer.get_vocab()
    return len(new) > len(english) and all(new.get(token) == index for token, index in english.get_vocab().items())


def extend_tokenizer(
    english: PreTrainedTokenizerBase, texts: Iterable[str], count: int, *, keep: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer with the tokens and merges of `english`, and `count` merges more that are learned from `texts`.

    The new merges rank after the old ones: byte-pair encoding (Sennrich, Haddow & Birch 2016) goes on where it ended.
    A pair of tokens that is adjacent within a word of `keep` is never merged, so those texts are tokenized as before.

    Args:
        english: a fast tokenizer of byte-level BPE.
        texts: documents of the new language, read once.
        count: tokens to add; their ids follow the old ones.
        keep: English documents, read once.

    Raises:
        UserError: the tokenizer is of another kind, or the texts support fewer tokens.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    require_at_least("extend", count, 1)
    backend: Any = getattr(english, "backend_tokenizer", None)
    state: dict[str, Any] = {"model": {"type": "slow"}, "pre_tokenizer": None}
    if backend is not None:
        state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        raise UserError(f"the English tokenizer is {state['model']['type']!r}: only byte-level BPE can be extended.")
    kept = {pair for word in _words(backend, keep) for pair in pairwise(word)}
    vocabulary = english.get_vocab()
    merges = list(_learn(_words(backend, texts), count, vocabulary.keys(), kept))
    if len(merges) < count:
        raise UserError(
            f"extend is {count} but the text supports {len(merges)} tokens: use at most that, or more text."
        )
    as_text = any(isinstance(pair, str) for pair in state["model"]["merges"][:1])
    first = max(vocabulary.values()) + 1
    for index, pair in enumerate(merges, first):
        state["model"]["vocab"]["".join(pair)] = index
        state["model"]["merges"].append(" ".join(pair) if as_text else list(pair))
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: getattr(english, name) for name in names if getattr(english, name)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), clean_up_tokenization_spaces=False, **special
    )


def _words(backend: Any, texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """How often each word, as a sequence of the tokenizer's tokens, occurs."""
    pieces: Counter[str] = Counter()
    for text in texts:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces.update(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    words: Counter[tuple[str, ...]] = Counter()
    for piece, number in pieces.items():
        words[tuple(token.value for token in backend.model.tokenize(piece))] += number
    return words


def _learn(words: Counter[tuple[str, ...]], count: int, taken: Iterable[str], kept: set[Pair]) -> Iterator[Pair]:
    """The `count` pairs that byte-pair encoding merges next, the commonest first; ties in the order of their text."""
    sequences, numbers = [list(word) for word in words], list(words.values())
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for place, (sequence, number) in enumerate(zip(sequences, numbers, strict=True)):
        for pair in pairwise(sequence):
            counts[pair] += number
            places[pair].add(place)
    heap = [(-number, pair) for pair, number in counts.items()]
    heapq.heapify(heap)
    known, found = set(taken), 0
    while heap and found < count:
        number, pair = heapq.heappop(heap)
        if -number != counts[pair]:  # of an earlier count; the present one is in the heap too
            continue
        if -number < LEAST:
            return
        joined = "".join(pair)
        if pair in kept or joined in known:
            continue
        known.add(joined)
        found += 1
        yield pair
        changed: set[Pair] = set()
        for place in places.pop(pair):
            before = sequences[place]
            after = _merged(before, pair, joined)
            for one, sign in ((before, -1), (after, 1)):
                for other in pairwise(one):
                    counts[other] += sign * numbers[place]
                    changed.add(other)
                    if sign > 0:
                        places[other].add(place)
            sequences[place] = after
        counts.pop(pair, None)
        for other in changed - {pair}:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))


def _merged(sequence: list[str], pair: Pair, joined: str) -> list[str]:
    """The sequence with each occurrence of the pair, from the left, as one token."""
    after, index = [], 0
    while index < len(sequence):
        if tuple(sequence[index : index + 2]) == pair:
            after.append(joined)
            index += 2
        else:
            after.append(sequence[index])
            index += 1
    return after
