"""Decoding: the cached, batched loop beside plain ones without cache, and beside transformers' own generate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from clipcap import ClipCapConfig, ClipCapModel
from clipcap.cache import IN_CACHE, largest, top_logits
from clipcap.decoding import decode
from clipcap.packing import decoding_parts
from clipcap.search import Sampler
from common.checks import UserError

STOPS = [3, 7, 11, 20, 25, 30, 36]
VOCABULARY = 41


@pytest.fixture(scope="module", params=[0, 1, 2])
def model(request) -> ClipCapModel:
    torch.manual_seed(request.param)
    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.4)
    return ClipCapModel(ClipCapConfig(gpt2_config=sizes, clip_width=8, prefix_length=3, eos_token_id=STOPS)).eval()


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    return 3 * torch.randn(7, 8, generator=torch.Generator().manual_seed(9))


def ended(tokens: list[int]) -> bool:
    return bool({*tokens} & {*STOPS})


def ids(found) -> list[list[list[int]]]:
    return [[caption.token_ids for caption in captions] for captions in found]


@torch.no_grad()
def naive_log_probs(model: ClipCapModel, embedding: Tensor, tokens: list[int]) -> Tensor:
    """Log-probabilities of the next token after `tokens`: everything computed again, one image, one caption."""
    words = model.gpt2.transformer.wte(torch.tensor([tokens], dtype=torch.long))
    inputs = torch.cat([model.prefix(embedding[None]), words], 1)
    return model.gpt2(inputs_embeds=inputs).logits[0, -1].log_softmax(-1)


def naive_score(model: ClipCapModel, embedding: Tensor, tokens: list[int]) -> float:
    parts = [naive_log_probs(model, embedding, tokens[:i])[token].item() for i, token in enumerate(tokens)]
    return sum(parts) / len(parts)


def naive_greedy(model: ClipCapModel, embedding: Tensor, longest: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < longest and not ended(tokens):
        tokens.append(int(naive_log_probs(model, embedding, tokens).argmax()))
    return tokens


def naive_original_beam(model: ClipCapModel, embedding: Tensor, width: int, longest: int) -> list[list[int]]:
    """The original's rule over Python lists: of all continuations, and ended captions as they are, the best means."""
    beams: list[tuple[list[int], float, int]] = [([], 0.0, 0)]
    for _ in range(longest):
        candidates = []
        for tokens, total, length in beams:
            if ended(tokens):
                candidates.append((tokens, total, length))
            else:
                for token, value in enumerate(naive_log_probs(model, embedding, tokens).tolist()):
                    candidates.append(([*tokens, token], total + value, length + 1))
        beams = sorted(candidates, key=lambda beam: -beam[1] / beam[2])[:width]
        if all(ended(tokens) for tokens, _, _ in beams):
            break
    return [tokens for tokens, _, _ in beams]


def test_greedy_equals_the_loop_without_cache(model, embeddings):
    found = decode(model, embeddings, strategy="greedy", max_new_tokens=12)
    assert ids(found) == [[naive_greedy(model, x, 12)] for x in embeddings]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 5])
def test_original_beam_equals_the_loop_without_cache(model, embeddings, width):
    found = decode(model, embeddings, strategy="beam_original", num_beams=width, num_captions=width, max_new_tokens=12)
    assert ids(found) == [naive_original_beam(model, x, width, 12) for x in embeddings]


@pytest.mark.parametrize("strategy", ["beam", "beam_original"])
def test_beam_of_one_is_greedy(model, embeddings, strategy):
    found = decode(model, embeddings, strategy=strategy, num_beams=1, max_new_tokens=12)
    assert ids(found) == ids(decode(model, embeddings, strategy="greedy", max_new_tokens=12))


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("stops", [[3], STOPS])
def test_beam_equals_generate_of_transformers(model, embeddings, width, stops):
    found = decode(model, embeddings, num_beams=width, num_captions=width, max_new_tokens=12, stop_token_ids=stops)
    theirs = model.gpt2.generate(
        inputs_embeds=model.prefix(embeddings), attention_mask=torch.ones(7, 3), num_beams=width, do_sample=False,
        num_return_sequences=width, max_new_tokens=12, eos_token_id=stops, pad_token_id=0, length_penalty=1.0,
        early_stopping=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    rows = theirs.sequences.view(7, width, -1)
    for image, captions in enumerate(found):
        assert len(captions) == width
        for rank, caption in enumerate(captions):
            length = len(caption.token_ids)
            assert caption.token_ids == rows[image, rank, :length].tolist()
            assert set(rows[image, rank, length:].tolist()) <= {0, stops[0]}  # filled up with either
            assert caption.score == pytest.approx(theirs.sequences_scores[image * width + rank].item(), abs=1e-4)


def test_greedy_equals_generate_of_transformers(model, embeddings):
    theirs = model.gpt2.generate(
        inputs_embeds=model.prefix(embeddings), attention_mask=torch.ones(7, 3), do_sample=False, max_new_tokens=12,
        eos_token_id=STOPS, pad_token_id=0,
    )  # fmt: skip
    for row, [caption] in zip(
        theirs.tolist(), decode(model, embeddings, strategy="greedy", max_new_tokens=12), strict=True
    ):
        assert row[: len(caption.token_ids)] == caption.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["beam", "beam_original", "greedy"])
def test_batched_equals_one_by_one(model, embeddings, strategy):
    count = 1 if strategy == "greedy" else 3
    options = dict(strategy=strategy, num_captions=count, max_new_tokens=15, stop_token_ids=range(0, VOCABULARY, 3))
    together = decode(model, embeddings, **options)
    assert ids(together) == [ids(decode(model, x[None], **options))[0] for x in embeddings]
    assert len({len(captions[0].token_ids) for captions in together}) > 1  # images that end at different steps


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["beam", "beam_original", "greedy", "sample"])
def test_score_is_the_mean_log_probability(model, embeddings, strategy):
    count = 1 if strategy == "greedy" else 3
    generator = torch.Generator().manual_seed(0)
    found = decode(model, embeddings, strategy=strategy, num_captions=count, max_new_tokens=9, generator=generator)
    for x, captions in zip(embeddings, found, strict=True):
        assert len(captions) == count
        assert [c.score for c in captions] == sorted((c.score for c in captions), reverse=True)
        for caption in captions:
            assert caption.score == pytest.approx(naive_score(model, x, caption.token_ids), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["beam", "beam_original", "greedy", "sample"])
def test_captions_end_at_end_token(model, embeddings, strategy):
    """The end token, once, last: the original's "." also ends captions, and without one it ran on to 67 tokens."""
    found = decode(model, embeddings, strategy=strategy, max_new_tokens=25)
    captions = [caption for image in found for caption in image]
    assert any(ended(caption.token_ids) for caption in captions)
    for caption in captions:
        assert not ended(caption.token_ids[:-1])
        assert ended(caption.token_ids) or len(caption.token_ids) == 25
    first = decode(model, embeddings, strategy="greedy", max_new_tokens=25)[0][0].token_ids
    cut = decode(model, embeddings[:1], strategy="greedy", max_new_tokens=25, stop_token_ids=first[0])
    assert cut[0][0].token_ids == first[:1]
    endless = decode(model, embeddings, strategy=strategy, max_new_tokens=25, stop_token_ids=[])
    assert {len(caption.token_ids) for image in endless for caption in image} == {25}


def test_nucleus_really_samples(model, embeddings):
    """The original's top-p takes the most probable token of the nucleus: always the greedy caption."""
    generator = torch.Generator().manual_seed(0)
    [captions] = decode(
        model, embeddings[:1], strategy="sample", num_captions=30, top_p=0.9, max_new_tokens=6, generator=generator
    )
    assert len({tuple(caption.token_ids) for caption in captions}) > 5


class FixedLogits:
    """Stands for the decoder: the same next-token probabilities whatever the hidden state."""

    def __init__(self, probabilities: list[float]) -> None:
        self.values = torch.tensor(probabilities).log()

    def logits(self, hidden: Tensor) -> Tensor:
        return self.values.expand(*hidden.shape[:2], -1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 3 / 9, 2 / 9]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
    ],
)
def test_samples_have_the_asked_distribution(options, expected):
    sampler = Sampler(
        **{"top_k": None, "top_p": None, "temperature": 1.0} | options, generator=torch.Generator().manual_seed(0)
    )
    log_probs, chosen = sampler(FixedLogits([0.1, 0.4, 0.3, 0.2]), torch.zeros(1, 20000, 1))
    shares = torch.bincount(chosen[0], minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0)
    torch.testing.assert_close(log_probs[0].exp(), torch.tensor([0.1, 0.4, 0.3, 0.2])[chosen[0]])


def test_samples_come_again_from_the_same_generator(model, embeddings):
    def draw(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return ids(decode(model, embeddings, strategy="sample", num_captions=2, top_k=20, generator=generator))

    assert draw(4) == draw(4) != draw(5)


def test_training_mode_comes_back_and_drops_nothing(embeddings):
    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=128)
    model = ClipCapModel(ClipCapConfig(gpt2_config=sizes, clip_width=8, prefix_length=3, tune_gpt2=True)).train()
    a, b = (ids(decode(model, embeddings, max_new_tokens=8)) for _ in range(2))
    assert a == b and model.training and model.gpt2.training


def test_patches_bf16_and_empty_batches(embeddings):
    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=128)
    config = ClipCapConfig(gpt2_config=sizes, clip_width=8, mapper="transformer", inputs="patches", mapper_layers=1)
    model = ClipCapModel(config).bfloat16()
    for strategy in ("beam", "beam_original", "greedy", "sample"):
        found = decode(model, embeddings[:, None].expand(-1, 4, -1), strategy=strategy, max_new_tokens=5)
        assert len(found) == 7 and all(len(captions) == 1 for captions in found)
    assert decode(model, torch.zeros(0, 4, 8)) == []


def test_generate_pads_captions(model, embeddings):
    rows = model.generate(embeddings, strategy="beam", num_captions=2, max_new_tokens=9)
    flat = [caption for captions in decode(model, embeddings, num_captions=2, max_new_tokens=9) for caption in captions]
    assert len(rows) == 14
    for row, caption in zip(rows.tolist(), flat, strict=True):
        assert row[: len(caption.token_ids)] == caption.token_ids
        assert set(row[len(caption.token_ids) :]) <= {STOPS[0]}


def test_topk_by_blocks_is_topk():
    x = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0))
    for count in (1, 5, 15):
        for columns in (1000, 960, 17):
            values, where = largest(x[:, :columns], count, block=16)
            expected = x[:, :columns].topk(count, -1)
            assert torch.equal(values, expected.values) and torch.equal(where, expected.indices)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("offset", [0.0, -200.0, 200.0])  # exp underflows or overflows without the maximum taken off
def test_top_logits_in_chunks_are_those_of_the_log_softmax(temperature, offset):
    x = torch.randn(70, 3 * IN_CACHE // 64, generator=torch.Generator().manual_seed(0)) + offset
    expected = (x / temperature).log_softmax(-1).topk(7, -1)
    values, ids, total = top_logits(iter(x.clone().split(IN_CACHE // 32, -1)), 7, temperature)
    torch.testing.assert_close(values - total[:, None], expected.values, atol=1e-3, rtol=1e-5)
    assert torch.equal(ids, expected.indices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "strategy is 'best': choose one of beam"),
        ({"num_beams": 0}, "num_beams is 0: use at least 1."),
        ({"num_captions": 6}, "num_captions is 6: strategy 'beam' gives at most 5 here."),
        ({"num_captions": 2, "strategy": "greedy"}, "at most 1 here"),
        ({"num_beams": 60}, "num_beams is 60: use at most the 41 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 127}, "max_new_tokens is 127: GPT-2's 128 positions leave room for 126."),
        ({"temperature": 0, "strategy": "sample"}, "temperature is 0: use at least 1e-06."),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0, "strategy": "sample"}, "top_p is 0: use a number above 0 and at most 1."),
        ({"top_p": 1.5, "strategy": "sample"}, "top_p is 1.5"),
        ({"top_k": 0, "strategy": "sample"}, "top_k is 0"),
        ({"top_k": 5}, "top_k is 5 and top_p is None with strategy 'beam': use strategy 'sample'."),
        ({"stop_token_ids": 41}, "stop token 41 is not in the vocabulary"),
    ],
)
def test_options_out_of_range_are_named(model, embeddings, options, message):
    with pytest.raises(UserError, match=message):
        decode(model, embeddings, **options)


@pytest.mark.slow
def test_longest_caption_that_fits(model, embeddings):
    found = decode(model, embeddings[:1], strategy="greedy", max_new_tokens=126, stop_token_ids=[])
    assert len(found[0][0].token_ids) == 126


def test_packed_gpt2_computes_the_same(model):
    x = torch.randn(5, 6, 16)
    with torch.inference_mode():
        transformer, head = decoding_parts(model.gpt2)
        assert transformer is not model.gpt2.transformer or not torch.backends.mkldnn.is_available()
        hidden = model.gpt2.transformer(inputs_embeds=x).last_hidden_state
        torch.testing.assert_close(transformer(inputs_embeds=x).last_hidden_state, hidden, atol=1e-4, rtol=1e-4)
        logits = torch.cat(list(head.chunks(hidden)), -1)
        torch.testing.assert_close(logits, model.gpt2.lm_head(hidden), atol=1e-4, rtol=1e-4)
        assert decoding_parts(model.gpt2)[0] is transformer  # packed once


@pytest.mark.parametrize(
    "change", [lambda p: p.mul_(-1), lambda p: p.data.mul_(-1)], ids=["in_place", "behind_its_back"]
)
def test_changed_weights_are_packed_again(model, embeddings, change):
    model = copy.deepcopy(model)  # also after decoding
    before = ids(decode(model, embeddings, strategy="greedy", max_new_tokens=6))
    with torch.no_grad():
        change(model.gpt2.transformer.h[0].mlp.c_fc.weight)
    after = ids(decode(model, embeddings, strategy="greedy", max_new_tokens=6))
    assert before != after == [[naive_greedy(model, x, 6)] for x in embeddings]
