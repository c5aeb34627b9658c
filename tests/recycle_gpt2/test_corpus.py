"""The corpus: what is read, what is dropped, that each token counts once, that a killed build ends in the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checks import UserError
from common.files import claimed
from common.language import IGNORE
from recycle_gpt2 import corpus as corpus_module
from recycle_gpt2 import shards
from recycle_gpt2.blocks import TokenBlocks, labels
from recycle_gpt2.corpus import (
    CorpusConfig,
    build_corpus,
    corpus_hash,
    load_documents,
    run,
)
from recycle_gpt2.documents import Document, read_documents
from recycle_gpt2.evaluate import with_end
from recycle_gpt2.texts import text_hash
from recycle_gpt2.tokenizer import load_tokenizer, save_tokenizer
from tests.recycle_gpt2.conftest import SHARES, contents

# Reading


def test_formats(tmp_path):
    folder = tmp_path / "text"
    (folder / "web" / "deep").mkdir(parents=True)
    plain = "\ufeffeen  \n  twee\r\n\r\n \ndrie\n"
    (folder / "a.txt").write_text(plain, encoding="utf-8", newline="")
    (folder / "b.txt.xz").write_bytes(lzma.compress(b"vier\n\nvijf"))
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"zes"))
    rows = [{"text": "zeven\n\n acht "}, {"text": "negen", "genre": "nieuws"}, {"text": " "}]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = (
        "<html><head><title>no</title><script>no</script></head><body><nav>no</nav><p>Eén\n <b>twee</b>&eacute;</p>"
        "<ul><li>drie<li>vier</ul><style>no</style><br/>vijf<form><p>no</p></form> &amp; zes</body></html>"
    )
    (folder / "web" / "deep" / "page.html").write_text(page, encoding="utf-8")
    (folder / "web" / "empty.htm").write_text("<html><body><img src='x.png'></body></html>")
    (folder / "web" / "picture.png").write_bytes(b"\0\1")
    (folder / "web" / ".hidden.txt").write_text("no")
    found = list(read_documents([folder]))
    assert [(document.text, document.genre) for document in found] == [
        ("een\ntwee", "a"),
        ("drie", "a"),
        ("vier", "b"),
        ("vijf", "b"),
        ("zes", "c"),
        ("zeven\nacht", "d"),
        ("negen", "nieuws"),
        ("Eén twee\u00e9\ndrie\nvier\nvijf\n& zes", "web"),
    ]
    assert found[2].source.endswith("b.txt.xz")
    assert [document.text for document in read_documents([folder / "c.txt.gz", folder / "a.txt"])] == [
        "zes",
        "een\ntwee",
        "drie",
    ]
    assert [document.text for document in read_documents([folder], suffixes=[".jsonl"])] == ["zeven\nacht", "negen"]


def test_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["een\n\ntwee", "drie"], "other": [1, 2]})
    rows.save_to_disk(str(tmp_path / "all" / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "all" / "parts"))
    assert [(d.text, d.genre) for d in read_documents([tmp_path / "all" / "plain"])] == [
        ("een\ntwee", "plain"),
        ("drie", "plain"),
    ]
    assert len(list(read_documents([tmp_path / "all"]))) == 4  # found inside a folder, but for the split test
    rows.rename_column("text", "body").save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match=r'no column "text" \(columns: body, other\)'):
        list(read_documents([tmp_path / "other"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"goed\nsl\xe9cht\n", r"a\.txt', line 2 is not UTF-8 \(byte 3 of the line is 0xe9\): convert"),
        ("a.txt", "goed".encode("utf-16"), r"a\.txt', line 1 is UTF-16"),
        ("a.txt", b"goed\n\0\1\2", r"a\.txt' is binary \(line 2"),
        ("a.txt", b"", r"a\.txt' is empty \(0 bytes\)"),
        ("a.txt", b" \n\n", r"a\.txt' is empty \(no text in 2 lines\)"),
        ("a.txt.xz", lzma.compress(b"goed\n" * 9999)[:-40], r"a\.txt\.xz' is damaged or cut short"),
        ("a.txt.xz", b"goed", r"a\.txt\.xz' is damaged"),
        ("a.txt.gz", gzip.compress(os.urandom(9999))[:-4000], r"a\.txt\.gz'"),
        ("a.txt.gz", b"goed", r"a\.txt\.gz' is damaged"),
        ("a.jsonl", b'{"text": "goed"}\n{"text": ', r"a\.jsonl', line 2 is not JSON"),
        ("a.jsonl", b'{"text": "goed"}\n\n{"body": "x"}', r'a\.jsonl\', line 3 has no "text"'),
        ("a.jsonl", b'{"text": "half \\ud800"}', r"a\.jsonl', line 1 holds half of a surrogate pair"),
        ("a.html", b"<p>sl\xe9cht</p>", r"a\.html', line 1 is not UTF-8"),
        ("a.html", b"<p></p>", r"': no text there"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents([tmp_path]))


def test_bad_paths(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read_documents([tmp_path / "absent"]))
    with pytest.raises(UserError, match=r"holds no text: put \.txt"):
        list(read_documents([tmp_path]))
    with pytest.raises(UserError, match="no text is given"):
        list(read_documents([]))


# Packing


def decode(tokenizer, ids):
    """The documents that a stream of ids spells, by the end token after each."""
    found = tokenizer.decode(ids).split(tokenizer.eos_token)
    assert found[-1] == ""
    return found[:-1]


def test_chunks_are_neither_repeated_nor_dropped(built, tokenizer, dutch):
    """The original repeats each document's first chunk and drops its last (2_prepare_0_tokens.py)."""
    spelled = []
    for split in ("train", "valid", "test"):
        blocks = TokenBlocks(built, split)
        assert all(block.shape == (32,) and block.dtype == torch.int64 for block in blocks)
        stream = torch.cat(list(blocks))
        fill = len(stream) - blocks.num_tokens
        assert 0 <= fill < 32 and (stream[blocks.num_tokens :] == blocks.end).all()
        assert torch.equal(stream[: blocks.num_tokens], torch.from_numpy(blocks.tokens(0, blocks.num_tokens)))
        spelled += decode(tokenizer, stream[: blocks.num_tokens].tolist())
        counted = labels(torch.stack(list(blocks)), blocks.end)
        assert int((counted != IGNORE).sum()) == blocks.num_tokens  # the fill is in no loss, all else is
        assert torch.equal(blocks.counts(), torch.bincount(stream[: blocks.num_tokens], minlength=320))
    assert sorted(spelled) == sorted(dutch)
    assert any(len(tokenizer(text).input_ids) > 3 * 32 for text in dutch)  # documents of many chunks are among them


@pytest.mark.parametrize("block", [2, 7, 32, 100])
def test_every_token_once_at_any_block_length(built, block):
    blocks = TokenBlocks(built, "train", block=block)
    stream = torch.cat([blocks[index] for index in range(len(blocks))])
    assert len(blocks) == -(-blocks.num_tokens // block)
    assert np.array_equal(stream[: blocks.num_tokens], blocks.tokens(0, blocks.num_tokens))
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_split_is_by_document(built, dutch, text, tokenizer, tmp_path):
    manifest = json.loads((built / "manifest.json").read_text())
    assert len(manifest["shards"]) > 3
    held_out = {split: load_documents(built, split) for split in ("valid", "test")}
    for split, documents in held_out.items():
        assert 5 < len(documents) < 45 and {document.text for document in documents} < set(dutch)
        ids = TokenBlocks(built, split).tokens(0, TokenBlocks(built, split).num_tokens)
        assert decode(tokenizer, ids) == [document.text for document in documents]
        assert {document.genre for document in documents} == {"stories", "news"}
    sizes = manifest["splits"]
    assert sum(counts["documents"] for counts in sizes.values()) == 200
    assert sum(counts["bytes"] for counts in sizes.values()) == sum(len(text.encode()) for text in dutch)
    assert sizes["test"]["characters"] == sum(len(document.text) for document in held_out["test"])
    assert sizes["train"]["tokens"] == TokenBlocks(built, "train").num_tokens
    assert manifest["dropped"] == {"documents": 0, "near": 0, "emptied": 0, "paragraphs": 0}
    # The order of the text does not matter, the seed does.
    news_first = build_corpus(
        [text / "news", text / "stories.txt"], tokenizer, tmp_path / "again", block=32, shares=SHARES, progress=False
    )
    other = build_corpus([text], tokenizer, tmp_path / "seed", block=32, shares=SHARES, seed=1, progress=False)
    test = {document.text for document in held_out["test"]}
    assert {document.text for document in load_documents(news_first, "test")} == test
    assert {document.text for document in load_documents(other, "test")} != test


def test_duplicates_are_dropped(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("een\ntwee\n\n een\ntwee \n\ntwee\ndrie\n\ndrie\neen\n\nEEN\n" + "vier " * 50, encoding="utf-8")
    settings = dict(block=4, shares=(1, 0, 0), progress=False)
    plain = TokenBlocks(build_corpus([path], tokenizer, tmp_path / "plain", **settings), "train")
    lines = "twee\ndrie", "drie\neen"  # of dialogue, code and verse, lines that come again are part of the text
    assert decode(tokenizer, plain.tokens(0, plain.num_tokens))[:3] == ["een\ntwee", *lines]
    out = build_corpus([path], tokenizer, tmp_path / "out", duplicates="paragraphs", **settings)
    blocks = TokenBlocks(out, "train")
    assert decode(tokenizer, blocks.tokens(0, blocks.num_tokens)) == [
        "een\ntwee",
        "drie",
        "EEN\n" + ("vier " * 50).strip(),
    ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["dropped"] == {"documents": 1, "near": 0, "emptied": 1, "paragraphs": 3}
    with pytest.raises(UserError, match="no token in test"):
        TokenBlocks(out, "test")


def test_text_that_spells_the_end_token(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("een <|endoftext|> twee\n\ndrie\n", encoding="utf-8")
    out = build_corpus([path], tokenizer, tmp_path / "out", block=2, shares=(1, 0, 0), progress=False)
    blocks = TokenBlocks(out, "train")
    assert int(blocks.counts()[blocks.end]) == 2
    assert (
        tokenizer.decode(blocks.tokens(0, blocks.num_tokens)) == "een <|endoftext|> twee<|endoftext|>drie<|endoftext|>"
    )


def test_truncation_in_a_tokenizer_cuts_no_document(built, text, tokenizer, dutch, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "short")
    path = tmp_path / "short" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 9999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path.write_text(json.dumps(state), encoding="utf-8")
    short = load_tokenizer(tmp_path / "short")
    assert len(short.backend_tokenizer.encode(dutch[0]).ids) != len(tokenizer(dutch[0]).input_ids)
    again = build_corpus([text], short, tmp_path / "again", block=32, shares=SHARES, chunk=4000, progress=False)
    assert TokenBlocks(again, "train").num_tokens == TokenBlocks(built, "train").num_tokens
    assert with_end(load_tokenizer(tmp_path / "short"), dutch[0]) == with_end(tokenizer, dutch[0])


def test_corpus_hash_is_of_what_trains(built, text, tokenizer, tmp_path):
    assert corpus_hash(tmp_path / "absent") is None
    before = corpus_hash(built)
    options = dict(shares=SHARES, chunk=4000, progress=False)
    os.utime(text / "stories.txt", ns=(1, 1))
    build_corpus([text], tokenizer, built, block=32, **options)
    assert corpus_hash(built) == before
    build_corpus([text], tokenizer, built, block=16, **options)
    shorter = corpus_hash(built)
    with open(text / "stories.txt", "a", encoding="utf-8") as file:
        file.write("\n\nde kat\n")
    build_corpus([text], tokenizer, built, block=16, **options)
    assert len({before, shorter, corpus_hash(built)}) == 3


def test_blocks_reach_a_loader_process_without_their_data(built):
    blocks = TokenBlocks(built, "train")
    first = blocks[0]
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 5000 and torch.equal(pickle.loads(pickled)[0], first)


@pytest.mark.slow
def test_workers_give_the_same_bytes(built, text, tokenizer, tmp_path):
    other = build_corpus(
        [text], tokenizer, tmp_path / "two", block=32, shares=SHARES, chunk=4000, workers=2, progress=False
    )
    assert contents(other) == contents(built)


def test_finished_corpus_is_used_again(built, text, tokenizer, dutch, monkeypatch):
    def fail(*_):
        raise AssertionError("a shard was written again")

    before = contents(built)
    options = dict(shares=SHARES, chunk=4000, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", fail)
        build_corpus([text], tokenizer, built, block=32, **options)
        assert contents(built) == before
        build_corpus([text], tokenizer, built, block=16, **options)  # the shards serve any block
    assert TokenBlocks(built, "train").block == 16
    # Less text: what is left of the longer corpus goes.
    (text / "stories.txt").write_text("\n\n".join(dutch[:20]), encoding="utf-8")
    build_corpus([text], tokenizer, built, block=32, **options)
    manifest = json.loads((built / "manifest.json").read_text())
    assert sum(counts["documents"] for counts in manifest["splits"].values()) == 70
    assert {path.name.split(".")[0] for path in (built / "shards").iterdir()} == {
        f"{number:06}" for number in range(len(manifest["shards"]))
    }


def test_a_text_is_what_it_holds_wherever_it_lies(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = text_hash([text])
    assert text_hash([Path("text")]) == before
    os.utime(text / "stories.txt", ns=(1, 1))
    (tmp_path / "elsewhere").mkdir()
    text.rename(tmp_path / "elsewhere" / "text")
    assert text_hash([Path("elsewhere/text")]) == before
    path = tmp_path / "elsewhere" / "text" / "stories.txt"
    path.write_bytes(b"de kat\n" * 600_000)
    before = text_hash([path])
    stat = path.stat()
    with open(path, "r+b") as file:  # in the middle, as long, and at the same time
        file.seek(2_100_000)
        file.write(b"de mat\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert text_hash([path]) != before


def test_a_moved_text_gives_the_same_corpus(built, text, tokenizer, tmp_path, monkeypatch):
    before, hashed = contents(built), corpus_hash(built)
    options = dict(block=32, shares=SHARES, chunk=4000, progress=False)
    moved = tmp_path / "moved"
    text.rename(moved)
    monkeypatch.setattr(shards, "_write_shard", None)
    build_corpus([moved], tokenizer, built, **options)
    assert contents(built) == before
    monkeypatch.undo()
    again = build_corpus([moved], tokenizer, tmp_path / "again", **options)
    assert corpus_hash(again) == hashed
    assert load_documents(again, "test")[0].source.startswith(str(moved))


def test_a_corpus_of_version_0_1_is_used_again(built, text, tokenizer, monkeypatch):
    """It knew texts by name, size and time, and shards had no hash of their content."""
    manifest = json.loads((built / "manifest.json").read_text())
    del manifest["text"]
    manifest["sources"] = corpus_module._sources_of([text])
    (built / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256(b"32")
    for path in sorted((built / "shards").glob("*.json")):
        shard = json.loads(path.read_text())
        del shard["content"]
        path.write_text(json.dumps(shard))
        digest.update(path.read_bytes())
    assert corpus_hash(built) == digest.hexdigest()  # what that version's records of training hold
    before = contents(built)
    monkeypatch.setattr(corpus_module, "write_shards", None)
    build_corpus([text], tokenizer, built, block=32, shares=SHARES, chunk=4000, progress=False)
    assert contents(built) == before


def test_what_is_not_of_a_corpus_is_left_alone(text, tokenizer, tmp_path):
    out = tmp_path / "out"
    for name, content in (("shards/000123.tar", "a"), ("shards/.notes.tmp", "b"), ("manifest.json", '{"files": []}')):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
        with pytest.raises(UserError, match="move it away or give another out"):
            build_corpus([text], tokenizer, out, block=16, shares=SHARES, progress=False)
        assert contents(out) == {name: content.encode()}
        (out / name).unlink()


def test_a_corpus_inside_its_text_is_refused(text, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="inside the text"):
        run(CorpusConfig(text=(text,), tokenizer=tmp_path / "tokenizer", out=text / "corpus", shares=SHARES))
    assert not (text / "corpus").exists()


def test_one_build_at_a_time(text, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    config = CorpusConfig(text=(text,), tokenizer=tmp_path / "tokenizer", out=tmp_path / "out", shares=SHARES)
    with claimed(tmp_path / "out"), pytest.raises(UserError, match="is in use by process"):
        run(config)


def test_too_little_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("een twee drie\n")
    with pytest.raises(UserError, match=r"the corpus has \d+ training tokens, less than a block of 1024"):
        build_corpus([path], tokenizer, tmp_path / "out", shares=(1, 0, 0), progress=False)
    with pytest.raises(UserError, match=r"none of the 1 documents falls to (valid|train) "):
        build_corpus([path], tokenizer, tmp_path / "out", progress=False)


def test_bad_settings(built, text, tokenizer, tmp_path):
    for shares in ((0.5, 0.1, 0.1), (0, 0.5, 0.5), (1.2, -0.1, -0.1)):
        with pytest.raises(UserError, match="shares are"):
            build_corpus([text], tokenizer, tmp_path / "out", shares=shares, progress=False)
    with pytest.raises(UserError, match="block is 1"):
        build_corpus([text], tokenizer, tmp_path / "out", block=1, progress=False)
    with pytest.raises(UserError, match="workers is 0"):
        build_corpus([text], tokenizer, tmp_path / "out", workers=0, progress=False)
    with pytest.raises(UserError, match="split is 'dev'"):
        TokenBlocks(built, "dev")
    with pytest.raises(UserError, match="split is 'train': choose one of valid, test"):
        load_documents(built, "train")
    with pytest.raises(UserError, match="less than a block of 100000"):
        TokenBlocks(built, "train", block=100_000)
    shard = next((built / "shards").glob("*.train.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"bytes instead of \d+"):
        TokenBlocks(built, "train")


def test_run(text, tokenizer, tmp_path, capsys):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    run(CorpusConfig(text=(text,), tokenizer=tmp_path / "tokenizer", out=tmp_path / "out", block=16, shares=SHARES))
    printed = capsys.readouterr().out
    assert "train: " in printed and "duplicates dropped: 0 documents" in printed
    assert isinstance(load_documents(tmp_path / "out", "test")[0], Document)
