"""Text files and finished corpora, broken: a UserError and no hang."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from hypothesis import given

from common.checks import UserError
from recycle_gpt2.corpus import TokenBlocks, build_corpus, load_documents
from recycle_gpt2.documents import read_documents
from recycle_gpt2.tokenizer import train_tokenizer
from tests.fuzz.mutations import FUZZ, bad_json, break_file, damaged, only_user_errors

TEXT = b"De kat zit op de mat.\nHet is de mat van de kat.\n\nEen hond loopt langs.\n"
FILES = {
    "a.txt": TEXT,
    "a.jsonl": b'{"text": "De kat", "genre": "news"}\n{"text": "Een hond"}\n',
    "a.html": b"<html><head><title>x</title></head><body><p>De kat &amp; de <b>hond</b></p><script>x</script></body>",
    "a.txt.gz": gzip.compress(TEXT, mtime=0),
    "a.txt.xz": lzma.compress(TEXT),
}


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
    return build_corpus([place / "text.txt"], tokenizer, place / "corpus", block=8, shares=(0.6, 0.2, 0.2), progress=False)


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

    try:
        check()
    finally:
        (corpus / "manifest.json").write_bytes(good)


def test_found_by_this(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"9" * 5000 + b"}\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        list(read_documents([tmp_path / "a.jsonl"]))
