"""Modified Kneser-Ney against its definition, written down with dictionaries, and its laws."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from common.ngram import KneserNey, WittenBell, discounts


def naive(train: list[int], order: int, vocab_size: int, begin: int | None = None):
    """P(w | h) word by word, from sets of what stands before each n-gram."""
    grams: Counter[tuple[int, ...]] = Counter()
    before: dict[tuple[int, ...], set[int | None]] = defaultdict(set)
    for length in range(1, order + 1):
        for i in range(len(train) - length + 1):
            gram = tuple(train[i : i + length])
            grams[gram] += 1
            before[gram].add(train[i - 1] if i else None)
    counts = {
        gram: number if len(gram) == order or gram[0] == begin else len(before[gram]) for gram, number in grams.items()
    }
    taken = {}
    for length in range(1, order + 1):
        n = Counter(count for gram, count in counts.items() if len(gram) == length)
        taken[length] = (0.5, 1, 1.5)
        if all(n[k] for k in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
            if all(0 <= found[k - 1] <= k for k in (1, 2, 3)):
                taken[length] = tuple(found)
    following: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    for gram, count in counts.items():
        following[gram[:-1]][gram[-1]] = count

    def probability(history: tuple[int, ...], word: int) -> float:
        below = probability(history[1:], word) if history else 1 / vocab_size
        counted = following.get(history)
        if not counted:
            return below
        d = [taken[len(history) + 1][min(count, 3) - 1] for count in counted.values()]
        own = counted.get(word, 0)
        kept = own - taken[len(history) + 1][min(own, 3) - 1] if own else 0
        return (kept + sum(d) * below) / sum(counted.values())

    return lambda text: [probability(tuple(text[max(0, i - order + 1) : i]), word) for i, word in enumerate(text)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("begin", [None, 0])
def test_equals_the_naive_definition(order, begin):
    rng = np.random.default_rng(order)
    train, text = rng.zipf(1.5, 600) % 9, rng.integers(0, 11, 200)  # 9 and 10 never occur in training
    model = KneserNey(train, order=order, vocab_size=11, begin=begin)
    np.testing.assert_allclose(
        model.probabilities(text), naive(train.tolist(), order, 11, begin)(text.tolist()), rtol=1e-10
    )


@pytest.mark.parametrize("length", [1, 2, 3])
def test_training_texts_shorter_than_the_order(length):
    train, text = list(range(length)), [0, 1, 2, 3, 4, 0]
    model = KneserNey(np.array(train), order=4, vocab_size=5)
    np.testing.assert_allclose(model.probabilities(np.array(text)), naive(train, 4, 5)(text))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("history", [[], [0], [3, 1], [8, 8, 8], [2, 0, 1]])
def test_sums_to_one_over_the_vocabulary(order, history):
    train = np.random.default_rng(0).zipf(1.5, 400) % 5
    model = KneserNey(train, order=order, vocab_size=9, begin=0)
    total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(9))
    assert total == pytest.approx(1, abs=1e-12)


def test_a_word_of_one_history_is_unlikely_after_others():
    """San Francisco (Chen & Goodman 1998, sec. 2.7): frequent, but after one word only."""
    rng = np.random.default_rng(1)
    train = []
    for _ in range(300):
        train += [0, 1] if rng.random() < 0.5 else rng.integers(2, 10, 2).tolist()  # 1 follows 0 alone
    common = max(range(2, 10), key=train.count)
    assert train.count(1) > 2 * train.count(common)
    kneser_ney, witten_bell = (cls(np.array(train), order=2, vocab_size=12) for cls in (KneserNey, WittenBell))
    unseen = 11  # a history that never occurs
    one, other = (kneser_ney.probabilities(np.array([unseen, word]))[1] for word in (1, common))
    assert one < other
    assert witten_bell.probabilities(np.array([unseen, 1]))[1] > one


def test_discounts_are_chen_and_goodmans():
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 12, 5])
    y = 100 / 180
    assert discounts(counts) == pytest.approx((1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.6))
    assert discounts(np.array([1, 1, 2])) == discounts(np.array([])) == (0.5, 1, 1.5)
    assert discounts(np.repeat([1, 2, 3, 4], [1, 1, 99, 99])) == (0.5, 1, 1.5)  # D2 below 0


def test_better_than_witten_bell_on_text_like_counts():
    rng = np.random.default_rng(0)
    after = rng.integers(0, 400, (400, 6))
    text = [0]
    for _ in range(30_000):
        text.append(int(after[text[-1], min(rng.zipf(1.6) - 1, 5)]) if rng.random() < 0.8 else int(rng.zipf(1.3) % 400))
    train, test = np.array(text[:25_000]), np.array(text[25_000:])
    kneser_ney = KneserNey(train, order=5, vocab_size=400).score(test).mean()
    assert kneser_ney < WittenBell(train, order=3, vocab_size=400).score(test).mean()


@pytest.mark.slow
def test_a_million_tokens_take_seconds():
    train = np.random.default_rng(0).zipf(1.3, 1_000_000) % 8192
    begun = time.process_time()
    KneserNey(train, order=5, vocab_size=8192).score(train[:100_000])
    assert time.process_time() - begun < 20
