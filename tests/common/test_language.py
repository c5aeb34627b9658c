"""Scoring against one forward pass per token; the chunked loss against the plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.checks import UserError
from common.gpt2 import load_gpt2
from common.language import IGNORE, Score, chunked_cross_entropy, score, score_texts


@pytest.fixture(scope="module")
def model(gpt2_directory):
    return load_gpt2(gpt2_directory)[0]


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 257, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def nats_of(model, ids: torch.Tensor, contexts: list[int]) -> float:
    """The sum over tokens i = 1, 2, ... of -log p(token i | the contexts[i] tokens before it), one pass for each."""
    total = 0.0
    for i in range(1, len(ids)):
        logits = model(ids[None, i - contexts[i] : i]).logits[0, -1]
        total -= torch.log_softmax(logits, -1)[ids[i]].item()
    return total


def contexts(length: int, block: int, stride: int) -> list[int]:
    """How many tokens before each token its window shows, by marking the windows one after the other."""
    result = [0] * length
    for begin in range(0, length, stride):
        for i in range(begin, min(begin + block, length)):
            if not result[i]:
                result[i] = i - begin
        if begin + block >= length:
            break
    return result


@pytest.mark.parametrize(
    ("length", "block", "stride"),
    [
        (2, 32, 16),
        (20, 32, 16),
        (32, 32, 16),
        (33, 32, 16),
        (50, 16, 8),
        (50, 16, 15),
        (50, 16, 1),
        (49, 16, 7),
        (17, 16, 8),
        (40, 2, 1),
        (31, 8, 3),
    ],
)
def test_score_equals_one_pass_per_token(model, length, block, stride):
    ids = text(length)
    result = score(model, ids, block=block, stride=stride)
    assert result.tokens == length - 1
    shown = contexts(length, block, stride)
    assert all(shown[i] >= min(i, block - stride) for i in range(1, length))  # no less than is promised
    assert result.nats == pytest.approx(nats_of(model, ids, shown), rel=1e-5)


@pytest.mark.parametrize("length", [2, 3, 5, 10, 15, 16, 17, 18, 24, 31, 32])
def test_perplexity_is_right_on_short_texts(model, length):
    """A text that fits in one window is the plain mean loss, whatever the stride; nothing is divided by the block."""
    ids = text(length, seed=1)
    with torch.no_grad():
        loss = model(ids[None], labels=ids[None]).loss.item()
    for stride in (1, 8, 16, 31):
        result = score(model, ids, block=32, stride=stride)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert result.tokens == length - 1


def test_stride_as_long_as_the_block_still_scores_every_token(model):
    ids = text(50)
    assert score(model, ids, block=16, stride=16).nats == score(model, ids, block=16, stride=15).nats
    assert score(model, ids, block=16, stride=500).tokens == 49


def test_block_is_cut_to_the_positions_of_the_model(model):
    ids = text(60)
    assert score(model, ids, block=1024, stride=16).nats == score(model, ids, block=32, stride=16).nats


def test_score_takes_lists_and_arrays_and_keeps_the_mode(model):
    ids = text(20)
    expected = score(model, ids).nats
    assert score(model, ids.tolist()).nats == expected
    assert score(model, np.asarray(ids, dtype=np.int32)).nats == expected
    model.train()
    try:
        assert score(model, ids).nats == expected and model.training
    finally:
        model.eval()


@pytest.mark.parametrize("ids", [[], [3]])
def test_too_short_to_score(model, ids):
    with pytest.raises(UserError, match=f"{len(ids)} tokens"):
        score(model, ids)


@pytest.mark.parametrize("wrong", [{"block": 1}, {"block": 0}, {"stride": 0}, {"stride": -3}])
def test_block_and_stride_are_checked(model, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        score(model, [1, 2, 3], **wrong)


def test_units():
    result = Score(nats=20 * math.log(2), tokens=10)
    assert result.perplexity == pytest.approx(4) and result.bits_per_byte(40) == pytest.approx(0.5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 2048])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunked_cross_entropy_equals_the_plain_one(chunk, reduction):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    table = torch.randn(11, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (20,), generator=generator)
    labels[[0, 5, 6, 19]] = IGNORE
    plain = F.cross_entropy(hidden @ table.T, labels, ignore_index=IGNORE, reduction=reduction)
    chunked = chunked_cross_entropy(hidden, table, labels, chunk=chunk, reduction=reduction)
    torch.testing.assert_close(chunked, plain)
    expected = torch.autograd.grad(plain, (hidden, table))
    found = torch.autograd.grad(chunked, (hidden, table))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[0][labels == IGNORE].any()
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_cross_entropy(hidden, table, labels, chunk=chunk, reduction=reduction), plain
        )


def test_the_loss_asks_once_which_positions_count():
    """A GPU must be waited for wherever the size of a result hangs on the values of a mask."""
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            aten = torch.ops.aten
            indices = args[1] if func in (aten.index.Tensor, aten.index_put.default) else []
            if func is aten.nonzero.default or any(index.dtype == torch.bool for index in indices):
                asked.append(str(func))
            return func(*args, **(kwargs or {}))

    hidden, table = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with Watch():
        chunked_cross_entropy(hidden, table, torch.tensor([3, IGNORE, 0, 10])).backward()
    assert asked == ["aten.nonzero.default"]


def test_loss_without_counted_positions_is_zero():
    hidden, table = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, table, torch.full((4,), IGNORE))
    assert loss.item() == 0
    loss.backward()  # a batch of padding alone must not end a run


def test_loss_in_bf16_is_summed_in_fp32():
    hidden, table = torch.randn(64, 8).bfloat16(), torch.randn(11, 8)
    labels = torch.randint(0, 11, (64,))
    loss = chunked_cross_entropy(hidden, table, labels, chunk=5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy((hidden @ table.bfloat16().T).float(), labels))


def test_loss_under_autocast_is_near_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, requires_grad=True)
    table = torch.randn(30, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 30, (40,), generator=generator)
    exact = chunked_cross_entropy(hidden, table, labels)
    expected = torch.autograd.grad(exact, (hidden, table))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, table, labels, chunk=7)
    found = torch.autograd.grad(loss, (hidden, table))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.01) and loss != exact
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() / b.norm() < 0.02


def test_a_frozen_table_gets_no_gradient_and_a_second_backward_is_refused():
    hidden, table = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    loss = chunked_cross_entropy(hidden, table, torch.arange(6))
    loss.backward(retain_graph=True)
    assert hidden.grad is not None and table.grad is None
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("at_once", [1, 50, 8192])
def test_texts_that_are_scored_together_have_the_scores_of_each(model, at_once):
    """Of many lengths, so that short windows are filled up, and long texts have several."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(50, (length,), generator=generator) for length in (2, 3, 17, 17, 31, 32, 33, 100, 5)]
    together = score_texts(model, texts, block=32, stride=16, at_once=at_once)
    for text, found in zip(texts, together, strict=True):
        alone = score(model, text, block=32, stride=16)
        assert found.tokens == alone.tokens
        assert found.nats == pytest.approx(alone.nats, rel=1e-6)
    model.train()
    assert score_texts(model, texts[:1])[0].nats == pytest.approx(score(model, texts[0]).nats, rel=1e-6)
    assert model.training and score_texts(model, []) == []
    model.eval()
    with pytest.raises(UserError, match="text has 1 tokens"):
        score_texts(model, [texts[0], texts[0][:1]])


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "BloomForCausalLM", "GPTNeoXForCausalLM"])
def test_what_fills_a_batch_up_is_not_seen_by_any_family(family):
    """With rotated positions, and with distances (ALiBi)."""
    import transformers

    kind = getattr(transformers, family)
    config = kind.config_class(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, n_head=2, n_layer=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = kind(config).eval()
    texts = [torch.randint(50, (length,)) for length in (4, 20, 50)]
    for text, found in zip(texts, score_texts(decoder, texts), strict=True):
        assert found.nats == pytest.approx(score(decoder, text).nats, rel=1e-6)
