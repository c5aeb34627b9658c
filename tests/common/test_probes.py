"""Probes of frozen embeddings: the naive formula beside each, and laws at the extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from common.checks import UserError
from common.probes import (
    FITS,
    TEMPLATES,
    class_weights,
    few_shot_probe,
    fill,
    linear_probe,
    recall_at,
    retrieval_ranks,
    sample_shots,
    score,
    split_by_class,
    sweep,
    zero_shot,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(each, classes=3, width=4, noise=0.1, seed=0):
    """Features around a corner of the simplex for each class, and labels."""
    labels = torch.arange(classes).repeat_interleave(each)
    return F.one_hot(labels, width).float() + noise * random(len(labels), width, seed=seed), labels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- zero-shot -----------------------------------------------------------------------------------------------------


def test_class_weights_and_zero_shot_against_loops():
    prompts, images = 3 * random(4, 5, 6), random(7, 6, seed=1)
    found = zero_shot(images, class_weights(prompts))
    for row, image in enumerate(images):
        for number in range(4):
            units = [prompt / prompt.norm() for prompt in prompts[number]]
            mean = sum(units) / len(units)
            assert found[row, number].item() == pytest.approx(
                float(image @ mean / image.norm() / mean.norm()), abs=1e-6
            )


def test_one_template_repeated_is_one_template():
    prompts = random(4, 1, 6)
    torch.testing.assert_close(class_weights(prompts.repeat(1, 5, 1)), class_weights(prompts))


def test_the_length_of_a_prompts_embedding_has_no_weight():
    prompts = random(3, 4, 6)
    lengths = torch.tensor([1.0, 10.0, 0.1, 5.0])[:, None]
    torch.testing.assert_close(class_weights(prompts * lengths), class_weights(prompts))


def test_templates_are_filled_with_the_class():
    assert fill(TEMPLATES["photo"], "{} dog") == ["a photo of a {} dog."]
    assert all(len(fill(templates, "dog")) == len(templates) for templates in TEMPLATES.values())
    with pytest.raises(UserError, match="no place for the class"):
        fill(["a photo"], "dog")
    with pytest.raises(UserError, match="templates are empty"):
        fill([], "dog")


# --- scores --------------------------------------------------------------------------------------------------------


def test_scores_against_counting():
    guesses = random(40, 7)
    labels = torch.randint(6, (40,), generator=generator())  # the last class has no images
    found = score(guesses, labels)
    guessed = [max(range(7), key=lambda c: float(row[c])) for row in guesses]
    right = [guess == label for guess, label in zip(guessed, labels.tolist(), strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / 40) and found.images == 40
    by_class = [[hit for hit, label in zip(right, labels.tolist(), strict=True) if label == c] for c in range(6)]
    assert found.mean_per_class == pytest.approx(sum(sum(hits) / len(hits) for hits in by_class) / 6)
    top = [
        int(label) in sorted(range(7), key=lambda c: -float(row[c]))[:5]
        for row, label in zip(guesses, labels, strict=True)
    ]
    assert found.top_5 == pytest.approx(sum(top) / 40)
    assert found.most_frequent == pytest.approx(max(map(len, by_class)) / 40)
    for c in range(7):
        for g in range(7):
            pairs = zip(labels.tolist(), guessed, strict=True)
            assert found.confusion[c][g] == sum(pair == (c, g) for pair in pairs)


def test_the_most_frequent_class_is_that_of_training():
    labels = torch.tensor([0, 0, 0, 1])
    found = score(torch.eye(2)[labels], labels, known=torch.tensor([1, 1, 0]))
    assert found.most_frequent == 0.25 and found.accuracy == 1 and found.top_5 is None
    with pytest.raises(UserError, match="0 images"):
        score(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


# --- retrieval -----------------------------------------------------------------------------------------------------


def test_retrieval_against_sorting(monkeypatch):
    monkeypatch.setattr("common.probes.ROWS", 3)
    owners = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
    images, texts = random(5, 6), random(8, 6, seed=1)
    of_images, of_texts = retrieval_ranks(images, texts, owners)
    similarity = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    for number in range(5):
        order = [int(owners[t]) for t in similarity[number].argsort(descending=True)]
        assert of_images[number] == order.index(number)  # before it are captions of others only
    for number, owner in enumerate(owners.tolist()):
        assert of_texts[number] == similarity[:, number].argsort(descending=True).tolist().index(owner)
    assert recall_at(of_texts, 1) == sum(int(rank) == 0 for rank in of_texts) / 8
    assert recall_at(of_images, 5) == 1 or int(of_images.max()) >= 5


def test_embeddings_that_are_all_the_same_find_nothing():
    owners = torch.arange(4).repeat_interleave(2)
    of_images, of_texts = retrieval_ranks(torch.ones(4, 3), torch.ones(8, 3), owners)
    assert recall_at(of_images, 1) == recall_at(of_texts, 1) == 0
    assert recall_at(of_texts, 4) == 1


def test_own_captions_find_their_image():
    images = random(4, 8)
    owners = torch.arange(4).repeat_interleave(3)
    ranks = retrieval_ranks(images, 2 * images[owners], owners)
    assert [recall_at(one, 1) for one in ranks] == [1, 1]
    with pytest.raises(UserError, match="3 with captions"):
        retrieval_ranks(images, images[:3], torch.arange(3))


# --- probes --------------------------------------------------------------------------------------------------------


def test_the_sweep_finds_a_peak_to_an_eighth_of_a_decade():
    for place in (-48, -13, 0, 5, 31, 48):
        peak = place / 8
        best, tried = sweep(lambda c, peak=peak: -abs(math.log10(c) - peak))
        assert math.log10(best) == pytest.approx(peak) and len(tried) <= FITS - 1
    assert sweep(lambda c: 0.5)[0] == pytest.approx(1e-6)  # of equal ones, the strongest penalty
    assert list(tried) == sorted(tried)


def test_a_separable_set_is_solved():
    test, labels = blobs(10, seed=3)
    fits = []
    found = linear_probe(blobs(20), blobs(5, seed=1), test, 3, progress=lambda: fits.append(1))
    assert score(found.guesses, labels).accuracy == 1
    assert max(found.tried.values()) == found.tried[found.strength] == 1
    assert found.converged and len(fits) == len(found.tried) + 1 <= FITS
    torch.testing.assert_close(found.guesses.sum(1), torch.ones(30, dtype=torch.float64))


def test_the_last_fit_is_scikit_learns_on_training_and_validation_images():
    from sklearn.linear_model import LogisticRegression

    train, val, (test, _) = blobs(8, noise=0.8), blobs(8, noise=0.8, seed=1), blobs(4, seed=2)
    found = linear_probe(train, val, test, 3)
    model = LogisticRegression(C=found.strength, max_iter=1000)
    model.fit(torch.cat([train[0], val[0]]).double().numpy(), torch.cat([train[1], val[1]]).numpy())
    torch.testing.assert_close(found.guesses, torch.from_numpy(model.predict_proba(test.double().numpy())))


def test_labels_without_meaning_are_not_learnt():
    features, labels = random(90, 4), torch.arange(3).repeat(30)
    test, truth = random(90, 4, seed=5), torch.arange(3).repeat(30)
    found = linear_probe((features, labels), (random(30, 4, seed=2), labels[:30]), test, 3)
    low, high = score(found.guesses, truth).interval
    assert low <= 1 / 3 <= high


def test_a_class_without_training_images_is_never_guessed():
    features, labels = blobs(6, classes=2)
    found = linear_probe((features, labels), (features, labels), features, 4)
    assert found.guesses.shape == (12, 4) and not found.guesses[:, 2:].any()


def test_few_shots_are_so_many_of_each_class():
    labels = torch.tensor([0, 1, 2] * 5 + [1, 1])
    rows = sample_shots(labels, 3, 4, generator())
    assert torch.bincount(labels[rows]).tolist() == [4, 4, 4] and len(set(rows.tolist())) == 12
    assert torch.equal(rows, sample_shots(labels, 3, 4, generator()))
    assert not torch.equal(rows, sample_shots(labels, 3, 4, generator(1)))
    with pytest.raises(UserError, match="class 0 has 5 training images"):
        sample_shots(labels, 3, 6, generator())
    with pytest.raises(UserError, match="shots is 0"):
        sample_shots(labels, 3, 0, generator())


def test_a_few_shot_probe_is_fitted_on_the_shots_alone():
    from sklearn.linear_model import LogisticRegression

    train, val, (test, labels) = blobs(9), blobs(6, seed=1), blobs(5, seed=2)
    found = few_shot_probe(train, val, test, 3, shots=2, generator=generator())
    rows = sample_shots(train[1], 3, 2, generator())
    model = LogisticRegression(C=found.strength, max_iter=1000).fit(train[0][rows].double().numpy(), train[1][rows])
    torch.testing.assert_close(found.guesses, torch.from_numpy(model.predict_proba(test.double().numpy())))
    assert score(found.guesses, labels).accuracy > 0.9


def test_shares_are_held_out_of_each_class():
    labels = torch.tensor([0] * 20 + [1] * 4 + [2])
    kept, held = split_by_class(labels, 0.25, generator())
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(25))
    assert torch.bincount(labels[held], minlength=3).tolist() == [5, 1, 0]  # a single image is kept
    kept, held = split_by_class(labels, 1.0, generator())
    assert torch.bincount(labels[kept]).tolist() == [1, 1, 1]


def test_what_cannot_be_fitted_is_named():
    features, labels = blobs(4)
    empty = features[:0], labels[:0]
    with pytest.raises(UserError, match="0 validation images"):
        linear_probe((features, labels), empty, features, 3)
    with pytest.raises(UserError, match="1 classes have training images"):
        linear_probe((features, torch.zeros_like(labels)), (features, labels), features, 3)
    with pytest.raises(UserError, match="NaN"):
        linear_probe((features / 0, labels), (features, labels), features, 3)
