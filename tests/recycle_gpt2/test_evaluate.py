"""Scores are exact, comparable between tokenizers and split by genre; samples repeat with their seed."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.checks import UserError
from common.gpt2 import load_gpt2
from recycle_gpt2.baseline import fit_ngrams, name_of, score_ngrams
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.cli import main
from recycle_gpt2.corpus import load_documents
from recycle_gpt2.documents import Document
from recycle_gpt2.evaluate import (
    DocumentScore,
    compare,
    interval,
    score,
    score_documents,
    shown,
    summarise,
    summarise_by,
    table,
    with_end,
)
from recycle_gpt2.sampling import sample
from recycle_gpt2.shards import Encoder


@pytest.fixture(scope="module")
def loaded(gpt2_directory):
    return load_gpt2(gpt2_directory, frozen=True)


def brute_force(model, ids: list[int], block: int, stride: int) -> float:
    """Nats of every token after the first by its own forward pass over its window's context."""
    total = 0.0
    for target in range(1, len(ids)):
        begin = 0
        while begin + block <= target:  # the first window, `stride` apart from the last, that holds the target
            begin += stride
        logits = model(input_ids=torch.tensor([ids[begin:target]])).logits[0, -1]
        total += -F.log_softmax(logits.double(), -1)[ids[target]].item()
    return total


@pytest.mark.parametrize("length", [2, 7, 16, 17, 40, 61])
def test_score_is_that_of_one_pass_for_each_token(loaded, length):
    model, tokenizer = loaded
    ids = torch.randint(0, len(tokenizer), (length,), generator=torch.Generator().manual_seed(length)).tolist()
    found = score(model, ids, block=16, stride=8)
    assert found.tokens == length - 1
    assert found.nats == pytest.approx(brute_force(model, ids, 16, 8), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))


def test_short_texts_are_not_scored_as_the_original_did(loaded):
    """The original scales a window's mean loss by the stride and divides by another length: 1081.8 for a true 33.1."""
    model, tokenizer = loaded
    ids = torch.randint(0, len(tokenizer), (20,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        true = F.cross_entropy(model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:])).exp().item()
    # One window holds the whole text, so block and stride must not matter.
    for block, stride in ((1024, 512), (32, 31), (20, 10), (32, 1)):
        assert score(model, ids, block=block, stride=stride).perplexity == pytest.approx(true, rel=1e-5)


def test_documents_are_scored_whole_and_by_themselves(loaded):
    model, tokenizer = loaded
    texts = ["the cat sat on the mat", "the hat", "", "naïve 🐈 the bat and the rat " * 3]
    documents = [Document(text, f"file-{i}", "genre") for i, text in enumerate(texts)]
    found = score_documents(model, tokenizer, documents)
    assert [item.source for item in found] == ["file-0", "file-1", "file-3"]
    for item in found:
        text = texts[int(item.source[-1])]
        ids = with_end(tokenizer, text)
        assert ids[0] == tokenizer.eos_token_id and tokenizer.decode(ids[1:]) == text
        assert item.tokens == len(ids) - 1
        assert (item.num_bytes, item.characters) == (len(text.encode()), len(text))
        assert item.nats == pytest.approx(brute_force(model, ids, 32, 16), rel=1e-5)


def item(nats: float, size: int, genre: str = "a") -> DocumentScore:
    return DocumentScore(f"{genre}.txt", genre, nats, size // 2, size, size - 1)


def test_summary_is_the_ratio_of_sums_with_an_interval():
    rng = np.random.default_rng(0)
    scores = [item(float(n), int(s)) for n, s in zip(rng.uniform(10, 200, 40), rng.integers(50, 400, 40), strict=True)]
    found = summarise(scores, resamples=500)
    nats, size = sum(s.nats for s in scores), sum(s.num_bytes for s in scores)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size)
    assert found.bits_per_character == pytest.approx(nats / math.log(2) / (size - 40))
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens))
    low, high = found.bits_per_byte_interval
    assert low < found.bits_per_byte < high
    wider = summarise(scores[:5], resamples=500).bits_per_byte_interval
    assert wider[1] - wider[0] > high - low
    assert summarise(scores, resamples=500) == found
    same = summarise([item(70.0, 100)] * 9).bits_per_byte_interval
    assert same[0] == pytest.approx(same[1])


def test_one_document_has_no_interval():
    found = summarise([item(70.0, 100)])
    assert found.bits_per_byte_interval is None and "none: one document" in table("x", {"all": found})
    assert interval((1, 2)) == "1.0000 to 2.0000"


def test_a_spelled_end_token_is_text_as_in_the_corpus(loaded):
    tokenizer = loaded[1]
    ids = with_end(tokenizer, "the cat<|endoftext|>sat")
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids[1:]) == "the cat<|endoftext|>sat"
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, "uint16")
    assert ids[1:] == encoder.tokenizer.encode("the cat<|endoftext|>sat", add_special_tokens=False).ids
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]  # what others ask it is as before


def test_more_new_tokens_than_positions_is_said(gpt2_directory, capsys):
    assert main(["sample", str(gpt2_directory), "--max-new-tokens", "500", "--device", "cpu"]) == 0
    assert "max_new_tokens is 500 but after the prompt the model has positions for 31" in capsys.readouterr().err
    assert main(["sample", str(gpt2_directory), "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert "max_new_tokens" not in capsys.readouterr().err


def test_bootstrap_does_not_hold_all_resamples():
    scores = [item(float(n % 7 + 1), 10 + n % 11) for n in range(2000)]
    tracemalloc.start()
    found = summarise(scores, resamples=300, seed=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 300 * 8 / 4
    drawn = np.stack([g.integers(0, 2000, 2000) for g in [np.random.default_rng(2)] for _ in range(300)])
    nats, size = (np.array([getattr(s, name) for s in scores], dtype=float) for name in ("nats", "num_bytes"))
    ratios = nats[drawn].sum(1) / math.log(2) / size[drawn].sum(1)
    assert found.bits_per_byte_interval == tuple(np.quantile(ratios, [0.025, 0.975]))


def test_summaries_by_genre_and_file():
    scores = [item(10, 20, "a"), item(30, 20, "b"), item(20, 20, "b")]
    found = summarise_by(scores, "genre", resamples=10)
    assert list(found) == ["all", "a", "b"]
    assert found["b"].nats == 50 and found["all"].nats == 60
    assert list(summarise_by(scores, "file", resamples=10)) == ["all", "a.txt", "b.txt"]
    with pytest.raises(UserError, match="0 documents"):
        summarise([])


@pytest.mark.parametrize("strategy", ["greedy", "beam", "top_k", "nucleus"])
def test_samples_repeat_with_their_seed(loaded, strategy):
    model, tokenizer = loaded
    options = dict(strategy=strategy, max_new_tokens=12, num_beams=3, top_k=20)
    texts = [sample(model, tokenizer, "the cat", seed=seed, **options) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("the cat")
    assert (texts[0] != texts[2]) == (strategy in ("top_k", "nucleus"))


def test_greedy_takes_the_likeliest_and_top_1_is_greedy(loaded):
    model, tokenizer = loaded
    ids = with_end(tokenizer, "the hat")
    for _ in range(6):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[1:], skip_special_tokens=True)
    assert sample(model, tokenizer, "the hat", strategy="greedy", max_new_tokens=6) == [expected]
    assert sample(model, tokenizer, "the hat", strategy="top_k", top_k=1, max_new_tokens=6) == [expected]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(strategy="beam", count=2), "beam always writes the same"),
        (dict(strategy="best"), "choose one of greedy, beam, top_k, nucleus"),
        (dict(prompt="the " * 50), "shorten the prompt"),
    ],
)
def test_sampling_settings_that_cannot_work(loaded, changes, message):
    prompt = changes.pop("prompt", "the")
    with pytest.raises(UserError, match=message):
        sample(*loaded, prompt, **changes)


@pytest.mark.slow
def test_command_compares_models_by_genre(gpt2_directory, english_models, text, tmp_path, capsys):
    models = [str(gpt2_directory), str(english_models[0])]
    out = tmp_path / "scores.json"
    assert (
        main(["evaluate", *models, "--text", str(text), "--out", str(out), "--max-documents", "160", "--device", "cpu"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "stories" in printed and "news" in printed and "bits/byte" in printed
    found = json.loads(out.read_text())["models"]
    assert set(found) == set(models)
    assert found[models[0]]["all"]["num_bytes"] == found[models[1]]["all"]["num_bytes"]


def test_command_computes_in_bf16_and_reads_no_more_than_it_scores(gpt2_directory, text, tmp_path, monkeypatch):
    read = []

    def documents(paths, *_, **__):
        for number in range(5):
            read.append(number)
            yield Document("the cat sat on the mat " * 3, "a.txt", "a")

    monkeypatch.setattr("recycle_gpt2.evaluate.read_documents", documents)
    out = tmp_path / "scores.json"
    nats = {}
    for precision in ("fp32", "bf16"):
        assert (
            main(
                [
                    "evaluate",
                    str(gpt2_directory),
                    "--text",
                    str(text),
                    "--out",
                    str(out),
                    "--max-documents",
                    "2",
                    "--device",
                    "cpu",
                    "--precision",
                    precision,
                ]
            )
            == 0
        )
        nats[precision] = json.loads(out.read_text())["models"][str(gpt2_directory)]["all"]["nats"]
    assert read == [0, 1] * 2
    assert nats["fp32"] != nats["bf16"] and nats["bf16"] == pytest.approx(nats["fp32"], rel=0.02)
    on = []
    monkeypatch.setattr(
        "recycle_gpt2.sampling.sample", lambda *args, **options: on.append(torch.is_autocast_enabled("cpu")) or []
    )
    for precision in ("fp32", "bf16"):
        main(["sample", str(gpt2_directory), "--device", "cpu", "--precision", precision])
    assert on == [False, True]


def test_command_samples_to_a_file(gpt2_directory, tmp_path):
    out = tmp_path / "samples.jsonl"
    assert (
        main(
            [
                "sample",
                str(gpt2_directory),
                "--prompts",
                "the cat",
                "the bat",
                "--count",
                "2",
                "--out",
                str(out),
                "--max-new-tokens",
                "5",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["the cat"] * 2 + ["the bat"] * 2
    assert all(line["text"].startswith(line["prompt"]) for line in lines)


def test_paired_differences_are_narrower_than_the_documents_differ():
    rng = np.random.default_rng(0)
    size, hard = rng.integers(100, 400, 30), rng.uniform(0.5, 3, 30)
    ours = [item(float(n * h), int(n)) for n, h in zip(size, hard, strict=True)]
    theirs = [item(float(n * (h + 0.1)), int(n)) for n, h in zip(size, hard, strict=True)]
    found = compare(ours, theirs, resamples=200)
    one, two = summarise(ours), summarise(theirs)
    assert found.bits_per_byte == pytest.approx(one.bits_per_byte - two.bits_per_byte)
    assert found.interval == pytest.approx((-0.1 / math.log(2),) * 2)  # every document is better by as much
    low, high = one.bits_per_byte_interval
    assert high - low > 0.2
    assert compare(theirs, ours, resamples=200).bits_per_byte == -found.bits_per_byte
    assert compare(ours, ours).interval == (0, 0)
    assert compare(ours[:1], theirs[:1]).interval is None and "none: one document" in shown(
        compare(ours[:1], theirs[:1])
    )
    for others in (theirs[:-1], theirs[::-1], []):
        with pytest.raises(UserError, match="compare those of the same ones"):
            compare(ours, others)


def test_the_ngram_baseline_reads_the_training_documents_alone(built, tokenizer):
    train, documents = TokenBlocks(built, "train"), load_documents(built, "test")
    model = fit_ngrams(train)
    scores = score_ngrams(model, tokenizer, [*documents, Document("", "x", "y")])
    assert [s.source for s in scores] == [d.source for d in documents]
    ids = with_end(tokenizer, documents[0].text)
    assert scores[0].tokens == len(ids) - 1
    assert scores[0].nats == pytest.approx(-np.log(model.probabilities(np.array(ids))[1:]).sum())
    # Words drawn evenly from 23: hardly more than log2(23) bits for each.
    text = " ".join(d.text for d in documents)
    assert summarise(scores).bits_per_byte < 1.3 * len(text.split()) * math.log2(23) / len(text)
    assert name_of(train) == "5-gram (Kneser-Ney)"
