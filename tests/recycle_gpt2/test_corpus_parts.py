"""A corpus that several processes build: the bytes of one process, and a lost shard written alone."""

from dataclasses import replace

import pytest

from common.parts import Part, ProcessesConfig
from recycle_gpt2.corpus import CorpusConfig, build_corpus, read_manifest, run
from recycle_gpt2.tokenizer import save_tokenizer
from tests.recycle_gpt2.conftest import SHARES, contents


@pytest.mark.parametrize(("world", "duplicates"), [(2, "paragraphs"), (3, "documents"), (40, "documents")])
def test_parts_complete_the_bytes_of_one_process(text, tokenizer, dutch, tmp_path, capsys, world, duplicates):
    (text / "again.txt").write_text("\n\n".join([*dutch[:30], dutch[7].split("\n")[0] + "\nnieuw"]))
    options = dict(block=32, shares=SHARES, chunk=4000, duplicates=duplicates, progress=False)
    one = build_corpus([text], tokenizer, tmp_path / "one", **options)
    for rank in reversed(range(world)):
        assert not (tmp_path / "many" / "manifest.json").exists()
        many = build_corpus([text], tokenizer, tmp_path / "many", part=Part(rank, world), **options)
    assert contents(many) == contents(one)
    shards = len(read_manifest(one)["shards"])
    missing = [int(line.split()[6]) for line in capsys.readouterr().err.splitlines()]
    assert missing == [shards - sum(number % world >= rank for number in range(shards)) for rank in range(world)[:0:-1]]


def test_a_shard_that_is_lost_is_written_alone(text, tokenizer, tmp_path, monkeypatch, capsys):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    one, many = tmp_path / "one", tmp_path / "many"
    config = CorpusConfig(text=(text,), tokenizer=tmp_path / "tokenizer", out=one, block=16, shares=SHARES)
    monkeypatch.setitem(build_corpus.__kwdefaults__, "chunk", 4000)
    assert run(config) == 0
    printed = capsys.readouterr().out

    def build(rank):
        with monkeypatch.context() as patch:
            for name, value in {"RANK": rank, "WORLD_SIZE": 2}.items():
                patch.setenv(name, str(value))
            assert run(replace(config, out=many, processes=ProcessesConfig(num_nodes=2))) == 0
        return capsys.readouterr().out

    assert build(0) == ""
    written = {path.name: path.stat().st_mtime_ns for path in (many / "shards").iterdir()}
    (many / "shards" / "000002.json").unlink()
    assert build(1) == "" and build(0) == printed and contents(many) == contents(one)
    kept = {path.name: path.stat().st_mtime_ns for path in (many / "shards").iterdir()}
    assert {name for name in written if written[name] != kept[name]} == {
        name for name in written if name.startswith("000002")
    }
