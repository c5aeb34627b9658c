"""Rows without training: matching pursuit beside the plain algorithm, what it recovers exactly, and means of pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.checks import UserError
from recycle_gpt2.lexical import initialise, same_tokens
from recycle_gpt2.transplant import subword_means, transplant


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def matched(vector: np.ndarray, anchors: np.ndarray, sparsity: int) -> np.ndarray:
    """The plain algorithm: the anchor nearest in direction to what is left, then least squares on all chosen."""
    chosen: list[int] = []
    left, unit = vector, anchors / np.linalg.norm(anchors, axis=1, keepdims=True)
    for _ in range(sparsity):
        chosen.append(int(np.abs(unit @ left).argmax()))
        found = np.linalg.lstsq(anchors[chosen].T, vector, rcond=None)[0]
        left = vector - anchors[chosen].T @ found
    coefficients = np.zeros(len(anchors))
    coefficients[chosen] = found
    return coefficients


def test_transplant_is_the_plain_algorithm(generator, monkeypatch):
    vectors, anchors, rows = (torch.randn(size, generator=generator) for size in ((7, 12), (40, 12), (40, 5)))
    anchors *= torch.linspace(0.1, 3, 40)[:, None]
    expected = np.stack([matched(v, anchors.double().numpy(), 4) for v in vectors.double().numpy()])
    for at_once in (1 << 24, 90):  # all at once, and two by two
        monkeypatch.setattr("recycle_gpt2.transplant.COEFFICIENTS", at_once)
        found = transplant(vectors, anchors, rows, sparsity=4)
        torch.testing.assert_close(found, torch.from_numpy(expected).float() @ rows, atol=1e-4, rtol=1e-4)


def test_a_combination_of_few_anchors_has_the_same_combination_of_rows(generator):
    """Whatever the map between both spaces, linear or not; and with a linear one, the token's own row."""
    anchors, rows = torch.randn(30, 64, generator=generator), torch.randn(30, 8, generator=generator)
    chosen, weights = torch.tensor([3, 17, 21]), torch.tensor([2.0, -1.0, 0.5])
    vector = weights @ anchors[chosen]
    torch.testing.assert_close(
        transplant(vector[None], anchors, rows, sparsity=3)[0], weights @ rows[chosen], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(transplant(anchors, anchors, rows), rows, atol=1e-4, rtol=1e-4)
    linear = torch.randn(64, 8, generator=generator)
    torch.testing.assert_close(
        transplant(vector[None], anchors, anchors @ linear, sparsity=3)[0], vector @ linear, atol=1e-3, rtol=1e-3
    )


def test_transplant_refuses_what_cannot_be_matched():
    with pytest.raises(UserError, match="sparsity is 0"):
        transplant(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 3), sparsity=0)
    for anchors in (torch.zeros(0, 2), torch.zeros(1, 2)):
        with pytest.raises(UserError, match="give shared tokens"):
            transplant(torch.ones(1, 2), anchors, torch.ones(len(anchors), 3))


def test_subwords_are_means_of_the_pieces_rows(english_tokenizer, tokenizer, generator):
    source = torch.randn(310, 8, generator=generator)
    rows = initialise("subwords", source, english_tokenizer, tokenizer, generator=generator)
    target_ids, source_ids = same_tokens(english_tokenizer, tokenizer)
    assert torch.equal(rows[target_ids], source[source_ids])  # a token spelled alike is one piece
    new = sorted(set(range(320)) - set(target_ids.tolist()))
    assert len(new) > 20
    for index in new:
        pieces = english_tokenizer(tokenizer.decode([index])).input_ids
        assert len(pieces) > 1
        torch.testing.assert_close(rows[index], source[pieces].mean(0))


def test_half_a_character_is_the_mean_of_its_bytes(english_tokenizer):
    """A token of two of the three bytes of a character is no text."""
    from recycle_gpt2.tokenizer import train_tokenizer

    target = train_tokenizer(["中上下不" * 40, "丁七丈三" * 40], 265)
    parts = [
        token
        for token in target.get_vocab()
        if len(token) == 2 and "\ufffd" in target.convert_tokens_to_string([token])
    ]
    assert parts
    source, spelled = torch.eye(310), english_tokenizer.get_vocab()
    means = subword_means(source, english_tokenizer, target)
    for token in parts:
        expected = source[[spelled[byte] for byte in token]].mean(0)
        assert torch.equal(means[target.get_vocab()[token]], expected)
