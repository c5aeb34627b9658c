"""Nearest neighbours against the plain formula, and a lexicon of two tables that are known to match."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from common.checks import UserError
from recycle_gpt2.lexicon import (
    Entry,
    LexiconConfig,
    build_lexicon,
    nearest,
    precision,
    read_dictionary,
    run,
    word_tokens,
)

PAIRS = {
    "kat": "cat",
    "huis": "house",
    "hout": "wood",
    "nacht": "night",
    "water": "water",
    "koud": "cold",
    "mat": "mat",
}


@pytest.fixture
def dictionary(tmp_path):
    path = tmp_path / "nld-eng.tsv"
    path.write_text("\n".join(f"{target}\t{source}" for target, source in PAIRS.items()) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tables(tokenizer, english_tokenizer):
    """A source table, and a target table in which each word's row is its translation's, nearly."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(len(english_tokenizer), 12, generator=generator)
    target = torch.randn(len(tokenizer), 12, generator=generator)
    words, source_words = word_tokens(tokenizer), word_tokens(english_tokenizer)
    for word, translation in PAIRS.items():
        assert word in words and translation in source_words
        target[words[word]] = source[source_words[translation]] + 0.05 * torch.randn(12, generator=generator)
    return target, source


def test_nearest_is_the_plain_formula():
    generator = torch.Generator().manual_seed(1)
    target, source = torch.randn(23, 5, generator=generator), torch.randn(31, 5, generator=generator)
    cosine = torch.tensor([[float(F.cosine_similarity(x, y, dim=0)) for y in source] for x in target])
    r_target = torch.tensor([row.sort(descending=True).values[:4].mean() for row in cosine])
    r_source = torch.tensor([row.sort(descending=True).values[:4].mean() for row in cosine.T])
    csls = 2 * cosine - r_target[:, None] - r_source
    for measure, expected in (("cosine", cosine), ("csls", csls)):
        best = expected.sort(descending=True, dim=-1)
        for chunk in (1, 7, 1000):
            found = nearest(target, source, k=6, measure=measure, neighbourhood=4, chunk=chunk)
            assert torch.equal(found.indices, best.indices[:, :6])
            torch.testing.assert_close(found.scores, best.values[:, :6], atol=1e-5, rtol=0)
    assert not torch.equal(csls.argmax(-1), cosine.argmax(-1))  # the measures differ here


def test_csls_lowers_hubs():
    generator = torch.Generator().manual_seed(0)
    source = F.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    target = source + 0.9 * source.mean(0) * 8  # all move towards the mean
    source = torch.cat([source, target.mean(0, keepdim=True)])  # a hub: near to every target
    hits = {
        measure: (nearest(target, source, k=1, measure=measure).indices == 20).sum() for measure in ("cosine", "csls")
    }
    assert hits["cosine"] > hits["csls"]


def test_word_tokens(tokenizer):
    words = word_tokens(tokenizer)
    assert "kat" in words and words["kat"] == tokenizer(" kat").input_ids[0]
    assert all(word.isalpha() and len(word) > 1 for word in words) and list(words.values()) == sorted(words.values())


def test_lexicon_and_precision(tables, tokenizer, english_tokenizer, dictionary, tmp_path):
    target, source = tables
    lexicon = build_lexicon(target, tokenizer, source, english_tokenizer, k=5)
    by_word = {entry.word: entry for entry in lexicon}
    assert [by_word[word].candidates[0] for word in PAIRS] == list(PAIRS.values())
    assert all(list(entry.scores) == sorted(entry.scores, reverse=True) and len(entry.scores) == 5 for entry in lexicon)
    found = precision(lexicon, dictionary)
    assert (found.at_1, found.at_5, found.words) == (1, 1, len(PAIRS))
    assert [entry.word for entry in build_lexicon(target, tokenizer, source, english_tokenizer, words=3)] == [
        entry.word for entry in lexicon[:3]
    ]
    wrong = [
        Entry("kat", ("dog", "Cat", "x", "y", "z"), (5, 4, 3, 2, 1)),
        Entry("Huis", ("House", "a", "b", "c", "d"), (5, 4, 3, 2, 1)),
        Entry("hout", ("a", "b", "c", "d", "e"), (5, 4, 3, 2, 1)),
        Entry("onbekend", ("a", "b", "c", "d", "e"), (5, 4, 3, 2, 1)),
    ]
    found = precision(wrong, dictionary)
    assert (found.at_1, found.at_5, found.words) == (1 / 3, 2 / 3, 3)
    assert precision(wrong, dictionary, source_words=["cat", "house"]).words == 2
    with pytest.raises(UserError, match="no word of the lexicon is in dictionary"):
        precision(wrong[3:], dictionary)


def test_dictionary_files(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text("\ufeffkat\tcat\n\n huis\thouse \r\n", encoding="utf-8")
    assert read_dictionary(path) == [("kat", "cat"), ("huis", "house")]
    for content, message in (
        (b"kat\tcat\nhuis house\n", "line 2 is not a word, a tab"),
        (b"kat\tcat\nhuis\t\n", "line 2"),
        (b"kat\tcat\nk\xe9\tx\n", "line 2 is not UTF-8"),
        (b"", "0 bytes"),
        (b"\n\n", "has no pair"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_dictionary(path)


@pytest.mark.usefixtures("any_shape")
def test_bad_input():
    table = torch.randn(5, 4)
    with pytest.raises(UserError, match=r"\(5, 4\) and \(6, 3\)"):
        nearest(table, torch.randn(6, 3))
    with pytest.raises(UserError, match="k is 10 but the source has 5 rows"):
        nearest(table, table)
    with pytest.raises(UserError, match="measure is 'dot'"):
        nearest(table, table, k=1, measure="dot")


def test_run(tables, tokenizer, english_tokenizer, dictionary, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    from common.gpt2 import replace_token_table

    for name, table, own in zip(("nld", "eng"), tables, (tokenizer, english_tokenizer), strict=True):
        config = GPT2Config(vocab_size=len(table), n_embd=12, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config)
        replace_token_table(model, table)
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    out = tmp_path / "lexicon.tsv"
    run(LexiconConfig(model=tmp_path / "nld", source=str(tmp_path / "eng"), out=out, k=5, dictionary=dictionary))
    rows = [line.split("\t") for line in out.read_text(encoding="utf-8").splitlines()]
    assert all(len(row) == 11 for row in rows) and "cat" in next(row for row in rows if row[0] == "kat")[1]
    assert json.loads(out.with_suffix(".json").read_text())["precision"] == {"at_1": 1, "at_5": 1, "words": len(PAIRS)}
    assert "precision at 1: 1.000, at 5: 1.000" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lexicon.json', where the precision goes: use another ending"):
        run(LexiconConfig(model=tmp_path / "nld", source=str(tmp_path / "eng"), out=out.with_suffix(".json")))
    with pytest.raises(UserError, match="k .*is 3: use at least 5"):
        run(LexiconConfig(model=tmp_path / "nld", source=str(tmp_path / "eng"), out=out, k=3, dictionary=dictionary))
    others = tmp_path / "words.json"
    others.write_text('{"mine": 1}')
    for out, message in ((tmp_path, "a directory"), (tmp_path / "words.tsv", r"words.json' would be replaced")):
        with pytest.raises(UserError, match=message):
            run(LexiconConfig(model=tmp_path / "absent", out=out))
    assert others.read_text() == '{"mine": 1}'
    run(LexiconConfig(model=tmp_path / "nld", source=str(tmp_path / "eng"), out=tmp_path / "lexicon.tsv", k=5))
