"""Accuracy against coverage, the halves of the other photographs, and the rows of the tables."""

import json

import numpy as np
import pytest

from common.checks import UserError
from experiments.captions.confidence import auroc, column_of, coverage_curve, halved, level_rows

FOUND = {
    "confidence": np.array([0.9, 0.1, 0.5, 0.3]),
    "right": np.array([True, False, True, False]),
    "cider": np.array([2.0, 0.0, 1.0, 0.5]),
    "scores": np.array([[-1.0, 0.5, 0.2, 0.4], [-2.0, 0.1, 1.3, 0.1], [-1.5, 0.3, 0.9, 0.3], [-1.2, 0.4, 0.8, 0.2]]),
}


def test_the_surest_are_kept_first():
    coverage, accuracy = coverage_curve(FOUND["confidence"], FOUND["right"].astype(float))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert accuracy.tolist() == pytest.approx([1, 1, 2 / 3, 0.5])


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    score, right = rng.normal(size=30).round(1), rng.random(30) < 0.4
    pairs = [(good > bad) + (good == bad) / 2 for good in score[right] for bad in score[~right]]
    assert auroc(score, right) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(score, np.ones(30, bool)))


def test_a_small_distance_counts_as_a_good_score():
    assert column_of(FOUND, "distance").tolist() == [-0.2, -1.3, -0.9, -0.8]
    assert column_of(FOUND, "similarity").tolist() == [0.4, 0.1, 0.3, 0.2]
    assert auroc(column_of(FOUND, "confidence"), FOUND["right"]) == 1


def test_rows_of_at_least_each_confidence():
    first, *_, last = level_rows(FOUND)
    assert first["captions"] == "4 of 4" and first["right"].startswith("50%") and first["CIDEr"] == "87.5"
    assert last["confidence at least"] == "0.6" and last["captions"] == "1 of 4" and last["mean confidence"] == "90%"


def test_other_photographs_are_halved_by_file_name(tmp_path):
    rows = [{"file_name": f"{name}.jpg", "captions": [f"a {name}"]} for name in ("d", "b", "a", "c")]
    (tmp_path / "others.json").write_text(json.dumps(rows))
    found = json.loads(halved(tmp_path / "others.json", tmp_path / "out").read_text())["images"]
    assert [(row["filename"], row["split"]) for row in found] == [
        ("a.jpg", "val"), ("b.jpg", "test"), ("c.jpg", "val"), ("d.jpg", "test")
    ]  # fmt: skip
    assert found[0]["sentences"] == [{"raw": "a a"}]
    (tmp_path / "others.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="no list"):
        halved(tmp_path / "others.json", tmp_path / "out")
