"""Witten-Bell against its definition, written down with dictionaries."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from common.checks import UserError
from common.ngram import WittenBell


def naive(train: list[int], order: int, vocab_size: int):
    """P_WB(w | h) = (c(hw) + T(h) P_WB(w | h')) / (c(h) + T(h)), word by word."""
    following: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for length in range(order):
        for i in range(length, len(train)):
            following[tuple(train[i - length : i])][train[i]] += 1

    def probability(history: tuple[int, ...], word: int, depth: int) -> float:
        below = 1 / vocab_size if depth == 0 else probability(history[1:], word, depth - 1)
        counts = following.get(history)
        if not counts:
            return below
        return (counts[word] + len(counts) * below) / (sum(counts.values()) + len(counts))

    def of(text: list[int]) -> list[float]:
        result = []
        for i, word in enumerate(text):
            depth = min(order - 1, i)
            result.append(probability(tuple(text[i - depth : i]), word, depth))
        return result

    return of


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_naive_definition(order):
    rng = np.random.default_rng(order)
    train, text = rng.integers(0, 7, 300), rng.integers(0, 9, 200)  # 7 and 8 never occur in training
    model = WittenBell(train, order=order, vocab_size=9)
    np.testing.assert_allclose(model.probabilities(text), naive(train.tolist(), order, 9)(text.tolist()), rtol=1e-12)
    np.testing.assert_allclose(model.score(text), -np.log(model.probabilities(text)))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("history", [[], [0], [3, 1], [8, 8, 8], [2, 0, 1]])
def test_sums_to_one_over_the_vocabulary(order, history):
    model = WittenBell(np.random.default_rng(0).integers(0, 5, 50), order=order, vocab_size=9)
    total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(9))
    assert total == pytest.approx(1, abs=1e-12)


def test_history_at_the_very_end_of_the_training_text():
    # 4 occurs once, last: nothing ever followed it, so it says nothing.
    model = WittenBell(np.array([0, 1, 0, 4]), order=2, vocab_size=5)
    unigram = WittenBell(np.array([0, 1, 0, 4]), order=1, vocab_size=5)
    assert model.probabilities(np.array([4, 0]))[1] == unigram.probabilities(np.array([0]))[0]


def test_a_text_that_repeats_is_learnt():
    train = np.tile([0, 1, 2, 3], 500)
    bits = [WittenBell(train, order=order, vocab_size=4).score(train)[5:].mean() for order in (1, 2)]
    assert bits[0] == pytest.approx(np.log(4), rel=1e-3) and bits[1] < 0.01


@pytest.mark.parametrize("length", [1, 2, 3])
def test_training_texts_shorter_than_the_order(length):
    train = list(range(length))
    model = WittenBell(np.array(train), order=4, vocab_size=5)
    text = [0, 1, 2, 3, 4, 0]
    np.testing.assert_allclose(model.probabilities(np.array(text)), naive(train, 4, 5)(text))
    assert len(model.score(np.array([], dtype=int))) == 0


def test_a_million_tokens_take_seconds():
    rng = np.random.default_rng(0)
    train = rng.zipf(1.3, 1_000_000) % 8192
    begun = time.process_time()
    WittenBell(train, order=3, vocab_size=8192).score(train[:100_000])
    assert time.process_time() - begun < 10


def test_errors():
    with pytest.raises(UserError, match="order is 0"):
        WittenBell(np.array([0]), order=0, vocab_size=2)
    with pytest.raises(UserError, match="0 tokens"):
        WittenBell(np.array([], dtype=int), order=2, vocab_size=2)
    with pytest.raises(UserError, match="token id 2 is outside the vocabulary of 2"):
        WittenBell(np.array([0, 2]), order=2, vocab_size=2)
    with pytest.raises(UserError, match="token id -1"):
        WittenBell(np.array([0, 1]), order=2, vocab_size=2).score(np.array([-1]))
