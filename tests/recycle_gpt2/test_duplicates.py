"""Near duplicates: the estimate beside the exact similarity, what is dropped, and how much is held."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from recycle_gpt2 import duplicates
from recycle_gpt2.corpus import build_corpus, read_manifest
from recycle_gpt2.documents import Document
from recycle_gpt2.duplicates import BANDS, ROWS, NearDuplicates, Selection


def text(seed: int, words: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(words)]


def changed(words: list[str], number: int, seed: int) -> list[str]:
    """The same words but for `number` of them."""
    rng, found = random.Random(seed), list(words)
    for place in rng.sample(range(len(words)), number):
        found[place] = f"new{rng.randrange(10**6)}"
    return found


def jaccard(one: list[str], two: list[str]) -> float:
    sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("changes", [0, 1, 3, 6, 12, 40])
def test_documents_meet_as_often_as_the_formula_says(changes):
    met, expected = [], []
    for seed in range(60):
        near, one = NearDuplicates(), text(seed)
        two = changed(one, changes, seed)
        assert near.is_new(" ".join(one))
        met.append(not near.is_new(" ".join(two)))
        expected.append(1 - (1 - jaccard(one, two) ** ROWS) ** BANDS)
    spread = np.sqrt(max(1e-3, np.mean(expected) * (1 - np.mean(expected))) / len(met))
    assert np.mean(met) == pytest.approx(np.mean(expected), abs=4 * spread)


def test_different_documents_and_other_scripts_are_kept():
    near = NearDuplicates()
    assert all(near.is_new(" ".join(text(seed))) for seed in range(100))
    chinese = (
        "".join(chr(0x4E00 + random.Random(0).randrange(3000)) for _ in range(1))
        + "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏" * 3
    )
    assert near.is_new(chinese) and not near.is_new(chinese + "。")
    assert near.is_new("kort") and not near.is_new("Kort") and near.is_new("")


def test_a_corpus_leaves_them_out_and_says_how_many(tokenizer, dutch, tmp_path):
    """Documents with one word changed, far from the first ones."""
    long = [" ".join(dutch[i : i + 4]).replace("\n", " ") for i in range(0, 160, 4)]
    again = [one.replace(one.split()[40], "anders", 1) for one in long[:10]]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([*long, *again, long[0]]), encoding="utf-8")
    settings = dict(block=16, shares=(0.8, 0.1, 0.1), progress=False)
    near = read_manifest(build_corpus([path], tokenizer, tmp_path / "near", duplicates="near", **settings))
    exact = read_manifest(build_corpus([path], tokenizer, tmp_path / "exact", **settings))
    documents = [sum(split["documents"] for split in found["splits"].values()) for found in (near, exact)]
    assert near["dropped"]["documents"] == exact["dropped"]["documents"] == 1 and exact["dropped"]["near"] == 0
    assert documents[1] == 50 and documents[0] == 50 - near["dropped"]["near"] and near["dropped"]["near"] >= 8


def test_what_is_held_is_bounded(monkeypatch, capsys):
    monkeypatch.setattr(duplicates, "MOST_DOCUMENTS", 3)
    near = NearDuplicates()
    for seed in range(5):
        assert near.is_new(" ".join(text(seed)))
    assert sum(map(len, near._bands)) == 3 * BANDS
    assert [near.is_new(" ".join(text(seed))) for seed in (0, 2, 3, 4)] == [False, False, True, True]
    assert capsys.readouterr().err.count("after the first 3 documents are only those of them") == 1


def test_the_memory_that_is_stated():
    """0.9 kB a document, of which the sets' tables are at worst twice what they need."""
    selection = Selection((1, 0, 0), 0, "near")
    for seed in range(2000):
        assert selection.take(Document(" ".join(text(seed, 30)), "", ""))
    bands = selection._near._bands
    size = sum(sys.getsizeof(band) + sum(map(sys.getsizeof, band)) for band in bands) / 2000
    assert 400 < size < 1000
