"""Text files and finished corpora, broken: a UserError and no hang."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from hypothesis import given, settings

from common.checks import UserError
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.corpus import build_corpus, corpus_hash, load_documents
from recycle_gpt2.documents import read_documents
from recycle_gpt2.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests.fuzz.mutations import FUZZ, bad_json, break_file, damaged, only_user_errors

TEXT = b"De kat zit op de mat.\nHet is de mat van de kat.\n\nEen hond loopt langs.\n"
FILES = {
    "a.txt": TEXT,
    "a.jsonl": b'{"text": "De kat", "genre": "news"}\n{"text": "Een hond"}\n',
    "a.html": b"<html><head><title>x</title></head><body><p>De kat &amp; de <b>hond</b></p><script>x</script></body>",
    "a.txt.gz": gzip.compress(TEXT, mtime=0),
    "a.txt.xz": lzma.compress(TEXT),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_documents(name, tmp_path):
    def read():
        for document in read_documents([tmp_path / name]):
            assert document.text.strip() and document.text.encode("utf-8")

    break_file(tmp_path / name, damaged(FILES[name]), read)


@pytest.mark.parametrize("row", [{"text": "De kat", "genre": "news"}, ["text", "De kat"]])
def test_rows(row, tmp_path):
    @FUZZ
    @given(bad_json(row))
    def check(data):
        (tmp_path / "rows.jsonl").write_bytes(data + b"\n" + FILES["a.jsonl"])
        with only_user_errors():
            list(read_documents([tmp_path]))

    check()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    place = tmp_path_factory.mktemp("corpus")
    text = "\n\n".join(f"Dit is tekst {number}, over de kat en de hond." for number in range(60))
    (place / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text] * 2, 260)
    save_tokenizer(tokenizer, place / "tokenizer")
    tokenizer = load_tokenizer(place / "tokenizer")
    return build_corpus(
        [place / "text.txt"], tokenizer, place / "corpus", block=8, shares=(0.6, 0.2, 0.2), progress=False
    )


def test_manifest(corpus):
    good = (corpus / "manifest.json").read_bytes()

    @FUZZ
    @given(bad_json(json.loads(good)))
    def check(data):
        (corpus / "manifest.json").write_bytes(data)
        with only_user_errors():
            blocks = TokenBlocks(corpus, "train")
            assert blocks[0].shape == (blocks.block,)
        with only_user_errors():
            load_documents(corpus, "test")
        with only_user_errors():
            corpus_hash(corpus)

    try:
        check()
    finally:
        (corpus / "manifest.json").write_bytes(good)


def test_a_build_over_a_broken_manifest_is_refused_or_ends_whole(corpus):
    place, good = corpus.parent, (corpus / "manifest.json").read_bytes()
    tokenizer = load_tokenizer(place / "tokenizer")

    @settings(FUZZ, max_examples=40)
    @given(bad_json(json.loads(good)))
    def check(data):
        (corpus / "manifest.json").write_bytes(data)
        with only_user_errors():
            build_corpus([place / "text.txt"], tokenizer, corpus, block=8, shares=(0.6, 0.2, 0.2), progress=False)
            assert load_documents(corpus, "test") and len(TokenBlocks(corpus, "train"))

    try:
        check()
    finally:
        (corpus / "manifest.json").write_bytes(good)


@pytest.mark.parametrize("name", ["000000.json", "000000.test.jsonl", "000000.train.bin"])
def test_shards(name, corpus):
    place, path = corpus.parent, corpus / "shards" / name
    good, manifest = path.read_bytes(), (corpus / "manifest.json").read_bytes()
    tokenizer = load_tokenizer(place / "tokenizer")

    def use():
        corpus_hash(corpus)
        load_documents(corpus, "test")
        blocks = TokenBlocks(corpus, "train")
        assert all(int(block.max()) < blocks.vocab_size for block in blocks)
        assert len(blocks.counts()) == blocks.vocab_size

    try:
        break_file(path, damaged(good), use, examples=40)
        for content in (b"", b"{", b"[]", b'{"digest": 1}', good[:-3]):
            path.write_bytes(content)
            (corpus / "manifest.json").unlink(missing_ok=True)  # an unfinished build over it
            build_corpus([place / "text.txt"], tokenizer, corpus, block=8, shares=(0.6, 0.2, 0.2), progress=False)
            if not name.endswith("jsonl"):  # no shard knows how long its texts are
                assert path.read_bytes() == good and (corpus / "manifest.json").read_bytes() == manifest
    finally:
        path.write_bytes(good)
        (corpus / "manifest.json").write_bytes(manifest)


def test_tokenizer(corpus, tmp_path):
    good = (corpus.parent / "tokenizer" / "tokenizer.json").read_bytes()
    save_tokenizer(load_tokenizer(corpus.parent / "tokenizer"), tmp_path)
    break_file(tmp_path / "tokenizer.json", damaged(good), lambda: load_tokenizer(tmp_path), examples=30)


def test_found_by_this(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"9" * 5000 + b"}\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        list(read_documents([tmp_path / "a.jsonl"]))
