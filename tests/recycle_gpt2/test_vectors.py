"""Vectors in fastText's format: read for the tokens that they are of, and what FOCUS makes of them."""

from __future__ import annotations

import gzip

import pytest
import torch

from common.checks import UserError
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.lexical import RowsConfig, initialise, same_tokens
from recycle_gpt2.rows import new_rows
from recycle_gpt2.vectors import read_vectors


def test_a_token_has_its_own_vector_or_its_words(tmp_path, tokenizer):
    """As fastText writes it: a line of sizes, and a space at each line's end."""
    spelled = tokenizer.get_vocab()
    assert {"Ġhuis", "Ġkat", "Ġhout"} <= set(spelled)
    path = tmp_path / "nld.vec.gz"
    lines = ["5 3", "huis 1 2 3 ", "Ġhuis 4 5 6 ", "kat -1 0.5 1e-2 ", "onbekend 9 9 9 "]
    path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\nonbek\xc3 9 9 9\n"))
    found = read_vectors(path, tokenizer)
    assert found.shape == (320, 3)
    assert found[spelled["Ġhuis"]].tolist() == [4, 5, 6]
    torch.testing.assert_close(found[spelled["Ġkat"]], torch.tensor([-1, 0.5, 0.01]))
    assert not found[spelled["Ġhout"]].any()
    path = tmp_path / "words.vec"  # GloVe writes no sizes
    path.write_text("kat 1 2\nhout 3 4\n")
    assert read_vectors(path, tokenizer)[spelled["Ġhout"]].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"2 3\nkat 1 2 3\nhout 1 2\n", "line 3 is not a word and as many numbers"),
        (b"kat een twee\n", "line 1 is not a word"),
        (b"\xbaOL/\x0c 1 1\n", "line 1 is not a word .* beside its .bin"),
        (b"2 2\nkat nan 1\n", "line 2 is not a word"),
        (b"2 2\nonbekend 1 1\n", "has no token of the new tokenizer"),
    ],
)
def test_another_file_is_one_line(tmp_path, tokenizer, content, message):
    path = tmp_path / "some.vec"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_vectors(path, tokenizer)


@pytest.mark.parametrize("initialisation", ["focus", "transplant"])
def test_tokens_without_a_vector_begin_as_random_rows(
    tmp_path, text, tokenizer, english_tokenizer, english_models, initialisation
):
    """As FOCUS was published: what is rare has no vector; a vector of an anchor's own gives that anchor's row."""
    from common.gpt2 import load_gpt2, token_table
    from recycle_gpt2.corpus import build_corpus

    corpus = build_corpus([text], tokenizer, tmp_path / "corpus", block=16, shares=(0.8, 0.1, 0.1), progress=False)
    target_ids, source_ids = same_tokens(english_tokenizer, tokenizer)
    shared, spelled = set(target_ids.tolist()), tokenizer.get_vocab()
    words = [token for token, index in spelled.items() if index in shared and token.isascii() and token.isalpha()]
    anchors = sorted(word for word in words if f"Ġ{word}" not in spelled)[:5]  # a word's vector is its token's too
    assert len(anchors) == 5 and spelled["Ġhuis"] not in shared and spelled["Ġkat"] not in shared
    path = tmp_path / "nld.vec"
    lines = [f"{token} " + " ".join("1" if i == j else "0" for j in range(5)) for i, token in enumerate(anchors)]
    path.write_text("\n".join([*lines, "Ġhuis 0 0 2 0 0"]))
    model, english = load_gpt2(english_models[0])
    config = RowsConfig(initialisation=initialisation, vectors=path)
    (rows,) = new_rows(config, model, english, tokenizer, TokenBlocks(corpus, "train"), seed=0)
    random = initialise("random", token_table(model), english, tokenizer, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows[target_ids], token_table(model)[source_ids])
    assert torch.equal(rows[spelled["Ġkat"]], random[spelled["Ġkat"]])
    expected = token_table(model)[english_tokenizer.get_vocab()[anchors[2]]]  # only directions count
    torch.testing.assert_close(rows[spelled["Ġhuis"]], expected)


def test_vectors_that_nothing_reads_are_refused(tmp_path, tokenizer, english_tokenizer, built, english_models):
    from common.gpt2 import load_gpt2

    model, english = load_gpt2(english_models[0])
    config = RowsConfig(initialisation="copy", vectors=tmp_path / "nld.vec")
    with pytest.raises(UserError, match="initialisation is 'copy': use focus or transplant"):
        new_rows(config, model, english, tokenizer, TokenBlocks(built, "train"), seed=0)
