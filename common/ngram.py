"""Interpolated n-gram models over token ids, Kneser-Ney and Witten-Bell: the baselines beside every language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from common.checks import UserError, require_at_least


class Counted(NamedTuple):
    """The n-grams of one length in a text."""

    length: int
    ids: np.ndarray
    """The text."""
    number: np.ndarray
    """Of the n-gram that begins at each token but the last `length - 1`."""
    counts: np.ndarray
    """How often each n-gram occurs."""
    owner: np.ndarray
    """The number of each one's history."""
    num_histories: int

    def by_history(self, values: np.ndarray) -> np.ndarray:
        """Sums of a value of each n-gram, over those of each history."""
        return np.bincount(self.owner, weights=values, minlength=self.num_histories)


class NGrams(ABC):
    """P(w | h) = (kept(hw) + passed(h) P(w | h')) / total(h), down to the uniform distribution over the vocabulary.

    h is the history of up to `order - 1` tokens, h' the history without its oldest token. What kept, passed and total
    are is the smoothing. After a history that was never seen, P(w | h) = P(w | h').

    An n-gram is known by the number of its (n-1)-gram and its last token, packed into one int64, so that any order
    fits and a lookup is a binary search.
    """

    def __init__(self, token_ids: np.ndarray, *, order: int, vocab_size: int) -> None:
        """Count the n-grams of `token_ids`, one text, up to length `order`.

        Raises:
            UserError: no tokens, an order below 1, or an id outside the vocabulary.
        """
        require_at_least("order", order, 1)
        ids = _checked(token_ids, vocab_size)
        if len(ids) == 0:
            raise UserError("the training text has 0 tokens: an n-gram model needs at least 1.")
        self.order, self.vocab_size = order, vocab_size
        self._keys: list[np.ndarray] = []  # of n-grams of length 1, 2, ...: sorted
        self._kept: list[np.ndarray] = []  # by n-gram
        self._passed: list[np.ndarray] = []  # by the number of h
        self._total: list[np.ndarray] = []  # by the number of h
        history = np.zeros(len(ids), dtype=np.int64)  # number of the n-gram that ends before each token
        num_histories = 1
        for length in range(1, min(order, len(ids)) + 1):
            packed = history * vocab_size + ids[length - 1 :]
            keys, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
            number = inverse.reshape(-1).astype(np.int64)  # of the n-gram that begins at each token
            kept, passed, total = self._smooth(Counted(length, ids, number, counts, keys // vocab_size, num_histories))
            self._keys.append(keys)
            self._kept.append(kept)
            self._passed.append(passed)
            self._total.append(total)
            history, num_histories = number[:-1], len(keys)

    @abstractmethod
    def _smooth(self, grams: Counted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """kept of each n-gram of one length, passed and total of each history."""

    def probabilities(self, token_ids: np.ndarray) -> np.ndarray:
        """P of every token after those before it, float64 (n,); a history ends at the text's beginning."""
        ids = _checked(token_ids, self.vocab_size)
        result = np.full(len(ids), 1.0 / self.vocab_size)
        # The number of each token's history, -1 where it was never seen.
        history: np.ndarray = np.zeros(len(ids), dtype=np.int64)
        for length, (keys, kept, passed, total) in enumerate(
            zip(self._keys, self._kept, self._passed, self._total, strict=True), start=1
        ):
            if length > len(ids):
                break
            seen = history >= 0
            packed = history * self.vocab_size + ids[length - 1 :]
            place = np.minimum(np.searchsorted(keys, packed), len(keys) - 1)
            found = seen & (keys[place] == packed)
            here = history[seen]
            below = result[length - 1 :]  # a view: P(w | h')
            own = np.where(found, kept[place], 0)[seen]
            # The last n-gram of the training text is a history that nothing followed: its total is 0.
            whole = total[here]
            below[seen] = np.where(
                whole > 0, (own + passed[here] * below[seen]) / np.where(whole > 0, whole, 1), below[seen]
            )
            history = np.where(found, place, -1)[:-1]
        return result

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        """-log P of every token in nats, float64 (n,)."""
        return -np.log(self.probabilities(token_ids))


class WittenBell(NGrams):
    """P(w | h) = (c(hw) + T(h) P(w | h')) / (c(h) + T(h)).

    c counts n-grams in the training text, c(h) is the number of tokens that followed h and T(h) the number of different
    ones (Witten & Bell 1991; interpolation as in Chen & Goodman 1998, sec. 2.4).
    """

    def _smooth(self, grams: Counted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        types = np.bincount(grams.owner, minlength=grams.num_histories)
        return grams.counts, types, grams.by_history(grams.counts) + types


class KneserNey(NGrams):
    """P(w | h) = (c(hw) - D(c(hw)) + (D1 N1(h) + D2 N2(h) + D3+ N3+(h)) P(w | h')) / c(h): modified Kneser-Ney.

    c counts an n-gram of the full order by its occurrences, a shorter one by the different tokens before it (the
    beginning of the text is one); c(h) is the sum of c(hw) over w, and Ni(h) the number of w with c(hw) = i. The
    discounts of each length are those of `discounts` (Chen & Goodman 1998, sec. 3; Kneser & Ney 1995).
    """

    def __init__(self, token_ids: np.ndarray, *, order: int, vocab_size: int, begin: int | None = None) -> None:
        """Count the n-grams of `token_ids`, one text, up to length `order`.

        Args:
            token_ids: (n,).
            order: longest n-gram.
            vocab_size: of the tokenizer.
            begin: token that stands before every document. What begins with it is counted by its occurrences at any
                length, as KenLM's <s>, because no token before it says anything.

        Raises:
            UserError: no tokens, an order below 1, or an id outside the vocabulary.
        """
        self.begin = begin
        super().__init__(token_ids, order=order, vocab_size=vocab_size)

    def _smooth(self, grams: Counted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts, number = grams.counts, grams.number
        if grams.length < self.order:
            before = np.concatenate([[self.vocab_size], grams.ids[: len(number) - 1]])
            pairs = np.unique(before * len(counts) + number)
            different = np.bincount(pairs % len(counts), minlength=len(counts))
            if self.begin is not None:
                first = number[grams.ids[: len(number)] == self.begin]
                different[first] = counts[first]
            counts = different
        discount = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
        return counts - discount, grams.by_history(discount), grams.by_history(counts)


def discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """D1, D2 and D3+ of modified Kneser-Ney from the counts of all n-grams of one length.

    Dk = k - (k + 1) Y n(k+1) / nk with Y = n1 / (n1 + 2 n2), nk the number of n-grams with count k (Chen & Goodman
    1998, sec. 3.2). Where one of n1 to n4 is 0, or a discount is not within 0 and k, as in tiny texts: 0.5, 1 and 1.5,
    KenLM's fallback.
    """
    n = [int((counts == k).sum()) for k in range(1, 5)]
    if min(n) > 0:
        y = n[0] / (n[0] + 2 * n[1])
        found = tuple(k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3))
        if all(0 <= value <= k for k, value in enumerate(found, 1)):
            return found[0], found[1], found[2]
    return 0.5, 1.0, 1.5


def _checked(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`token_ids` as int64 (n,), all within the vocabulary."""
    require_at_least("vocab_size", vocab_size, 1)
    ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise UserError(f"token id {wrong} is outside the vocabulary of {vocab_size}: use the model's tokenizer.")
    return ids
