"""Interpolated Witten-Bell n-gram model over token ids: the plain baseline beside every language model here."""

from __future__ import annotations

import numpy as np

from common.checks import UserError, require_at_least


class WittenBell:
    """P(w | h) = (c(hw) + T(h) P(w | h')) / (c(h) + T(h)), down to the uniform distribution over the vocabulary.

    c counts n-grams in the training text, h is the history of up to `order - 1` tokens, h' the history without its
    oldest token, c(h) the number of tokens that followed h and T(h) the number of different ones (Witten & Bell 1991;
    interpolation as in Chen & Goodman 1998, sec. 2.4). After a history that was never seen, P(w | h) = P(w | h').

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
        self._counts: list[np.ndarray] = []  # c(hw)
        self._followers: list[np.ndarray] = []  # c(h), by the number of h
        self._types: list[np.ndarray] = []  # T(h), by the number of h
        history = np.zeros(len(ids), dtype=np.int64)  # number of the n-gram that ends before each token
        num_histories = 1
        for length in range(1, min(order, len(ids)) + 1):
            packed = history * vocab_size + ids[length - 1 :]
            keys, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
            owner = keys // vocab_size
            self._keys.append(keys)
            self._counts.append(counts)
            self._followers.append(np.bincount(owner, weights=counts, minlength=num_histories))
            self._types.append(np.bincount(owner, minlength=num_histories))
            history, num_histories = inverse.reshape(-1)[:-1].astype(np.int64), len(keys)

    def probabilities(self, token_ids: np.ndarray) -> np.ndarray:
        """P of every token after those before it, float64 (n,); a history ends at the text's beginning."""
        ids = _checked(token_ids, self.vocab_size)
        result = np.full(len(ids), 1.0 / self.vocab_size)
        history = np.zeros(len(ids), dtype=np.int64)  # number of each token's history, -1 where it was never seen
        for length, (keys, counts, followers, types) in enumerate(
            zip(self._keys, self._counts, self._followers, self._types, strict=True), start=1
        ):
            if length > len(ids):
                break
            seen = history >= 0
            packed = history * self.vocab_size + ids[length - 1 :]
            place = np.minimum(np.searchsorted(keys, packed), len(keys) - 1)
            found = seen & (keys[place] == packed)
            here = history[seen]
            below = result[length - 1 :]  # a view: P(w | h')
            count = np.where(found, counts[place], 0)[seen]
            total = followers[here] + types[here]
            # The last n-gram of the training text is a history that nothing followed: c(h) = T(h) = 0.
            below[seen] = np.where(total > 0, (count + types[here] * below[seen]) / np.maximum(total, 1), below[seen])
            history = np.where(found, place, -1)[:-1]
        return result

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        """-log P of every token in nats, float64 (n,)."""
        return -np.log(self.probabilities(token_ids))


def _checked(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`token_ids` as int64 (n,), all within the vocabulary."""
    require_at_least("vocab_size", vocab_size, 1)
    ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise UserError(f"token id {wrong} is outside the vocabulary of {vocab_size}: use the model's tokenizer.")
    return ids
