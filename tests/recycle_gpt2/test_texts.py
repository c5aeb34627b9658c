"""A text is read once: hashed while its documents are read and kept, and not opened again while it is the same."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from common.checks import UserError
from common.runtime import RuntimeConfig
from recycle_gpt2 import texts
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.corpus import build_corpus
from recycle_gpt2.extend import EnglishConfig
from recycle_gpt2.run import RunConfig, recycle
from recycle_gpt2.texts import FileHashes, KeptText, Text, text_hash
from recycle_gpt2.training import StageConfig
from tests.recycle_gpt2.conftest import SHARES, contents, invent

_opened: Counter[str] = Counter()


def _count(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], (str, Path)):
        _opened[str(arguments[0])] += 1


@pytest.fixture(scope="module")
def _hook():
    sys.addaudithook(_count)  # for as long as the process lives


@pytest.fixture
def opened(_hook, monkeypatch):
    """How often each file was opened, by anything in Python; files are settled as soon as they are written."""
    monkeypatch.setattr(texts, "SETTLED", -1)
    _opened.clear()
    return _opened


def times(opened: Counter[str], *folders: Path) -> set[int]:
    """How often the files in the folders were opened, the counter set back."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = {opened[str(file)] for file in files}
    opened.clear()
    return found


def test_the_hash_computed_while_reading_is_that_of_the_files(tmp_path, dutch):
    import pyarrow

    folder = tmp_path / "text"
    folder.mkdir()
    content = "\n\n".join(dutch).encode()
    (folder / "a.txt").write_bytes(content)
    (folder / "b.txt.gz").write_bytes(gzip.compress(content))
    (folder / "c.txt.xz").write_bytes(lzma.compress(content))
    (folder / "d.txt.bz2").write_bytes(bz2.compress(content))
    with pyarrow.output_stream(folder / "e.txt.zst", compression="zstd") as stream:
        stream.write(content)
    (folder / "f.csv").write_text("text\nkat\n")
    (folder / "utf16.txt").write_bytes("kat\n".encode("utf-16") * 1000)  # given up at its first line
    (folder / "cut.txt.gz").write_bytes(gzip.compress(content)[:-100])
    (folder / "g.html").write_text("<p>kat")
    options = TextOptions(bad_share=0.5)
    hashes = FileHashes()
    list(texts.read_with_positions([folder], options, opened=hashes.opened))
    files = sorted(folder.iterdir())
    assert sorted(hashes.found) == files
    assert text_hash([folder], known=hashes.found) == text_hash([folder])
    assert text_hash([folder], known=dict.fromkeys(files, b"another")) != text_hash([folder])


def test_kept_documents_are_those_of_the_text(tmp_path, text):
    kept = KeptText([text], TextOptions(), tmp_path / "kept")
    assert [document for document, _ in kept.documents()] == [document for document, _ in Text([text]).documents()]
    assert kept.hash() == text_hash([text])
    name = os.fsencode(text) + b"/n\xff.txt"  # a name that is not UTF-8
    Path(os.fsdecode(name)).write_text("kat")
    again = KeptText([text], TextOptions(), tmp_path / "kept")
    assert [document for document, _ in again.documents()] == [document for document, _ in Text([text]).documents()]


def test_a_kept_text_is_opened_again_only_if_a_file_has_changed(tmp_path, text, opened):
    def kept(*paths: Path, column: str = "text") -> KeptText:
        return KeptText(paths or [text], TextOptions(column=column), tmp_path / "kept")

    number = len(list(kept().documents()))
    assert times(opened, text) == {1}
    assert len(list(kept().documents())) == number and kept().hash() == kept().keep()
    assert times(opened, text) == {0}
    os.utime(text / "stories.txt", ns=(1, 1))
    list(kept().documents())
    assert times(opened, text) == {1}  # hashed, and found the same
    list(kept().documents())
    assert times(opened, text) == {0}
    stat = (text / "stories.txt").stat()
    with open(text / "stories.txt", "r+b") as file:  # as long, and made to look as old
        file.write(b"DE")
    os.utime(text / "stories.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = (tmp_path / "kept" / texts.KEPT).read_bytes()
    assert [document for document, _ in kept().documents()] == [document for document, _ in Text([text]).documents()]
    assert (tmp_path / "kept" / texts.KEPT).read_bytes() != before
    (tmp_path / "kept" / texts.KEPT).write_bytes(gzip.compress(b"{"))
    with pytest.raises(UserError, match="documents.jsonl.gz' is damaged .*: delete it, and the text is read again"):
        list(kept().documents())
    (tmp_path / "kept" / texts.KEPT).unlink()
    assert len(list(kept().documents())) == number
    (tmp_path / "rows.jsonl").write_text('{"text": "kat", "body": "hond"}\n')
    for column, expected in (("text", "kat"), ("body", "hond")):
        assert [found.text for found, _ in kept(tmp_path / "rows.jsonl", column=column).documents()] == [expected]


def test_a_file_that_was_changed_just_now_is_not_trusted(tmp_path, text, monkeypatch):
    monkeypatch.setattr(texts, "SETTLED", 3600 * 10**9)
    KeptText([text], TextOptions(), tmp_path / "kept").keep()
    monkeypatch.setattr(texts, "text_hash", None)
    with pytest.raises(TypeError):  # it would be hashed
        KeptText([text], TextOptions(), tmp_path / "kept").hash()


def test_a_corpus_of_a_kept_text_has_the_same_bytes(tmp_path, text, tokenizer, built):
    kept = KeptText([text], TextOptions(), tmp_path / "kept")
    other = build_corpus(kept, tokenizer, tmp_path / "other", block=32, shares=SHARES, chunk=4000, progress=False)
    assert contents(other) == contents(built)


@pytest.mark.slow
def test_a_run_opens_each_file_of_its_text_once(tmp_path, text, english_models, opened):
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "a.txt").write_text("\n\n".join(invent("english", 60)))
    config = RunConfig(
        text=(text,),
        out=tmp_path / "out",
        language="nld",
        small=str(english_models[0]),
        block=32,
        shares=(0.8, 0.1, 0.1),
        kept=EnglishConfig(extend=20, english=(tmp_path / "english",), replay=0.2),
        finetune_share=0.5,
        stage=StageConfig(tokens=512, batch_size=8, lr=3e-3),
        runtime=RuntimeConfig(device="cpu"),
    )
    opened.clear()
    recycle(config)
    assert times(opened, text, tmp_path / "english") == {1}
    recycle(config)
    assert times(opened, text, tmp_path / "english") == {0}
    shutil.rmtree(tmp_path / "out.stages" / "text")  # of a finished model
    recycle(config)
    assert times(opened, text, tmp_path / "english") == {1} and not (tmp_path / "out.stages" / "text").exists()
