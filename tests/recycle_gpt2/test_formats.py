"""Text in every format comes out the same, and what is bad in it is left out, named, up to a share."""

from __future__ import annotations

import bz2
import json

import pytest

from common.checks import UserError
from recycle_gpt2.bad_rows import BadRows, TextOptions
from recycle_gpt2.documents import read_documents
from recycle_gpt2.lexicon import require_direction

TEXTS = ["een\ntwee", "drie, vier", 'vijf "zes"']
ROWS = [{"text": text, "body": text.upper(), "genre": "g"} for text in TEXTS]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def write(folder, name):
    """A file with ROWS in the format that its name says."""
    import pyarrow
    from pyarrow import parquet

    path = folder / name
    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    if ".parquet" in name:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif ".csv" in name or ".tsv" in name:
        sign = "\t" if ".tsv" in name else ","
        rows = [list(ROWS[0]), *(map(quoted, row.values()) for row in ROWS)]
        path.write_text("\n".join(sign.join(row) for row in rows), encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps({"version": 1, "data": ROWS} if name.startswith("b") else ROWS))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(lines))
    elif name.endswith(".zst"):
        with pyarrow.output_stream(path, compression="zstd") as stream:
            stream.write(lines)
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "b.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.bz2", "a.jsonl.zst"]
)
def test_every_format_holds_the_same_rows(name, tmp_path):
    path = write(tmp_path, name)
    for given in (path, tmp_path):
        assert [(found.text, found.genre) for found in read_documents([given])] == [(text, "g") for text in TEXTS]
    upper = read_documents([path], TextOptions(column="body"))
    assert [found.text for found in upper] == [text.upper() for text in TEXTS]
    with pytest.raises(UserError, match='"absent"'):
        list(read_documents([path], TextOptions(column="absent")))


def test_markdown_is_its_running_text(tmp_path):
    (tmp_path / "a.md").write_text(
        "---\ntitle: x\n---\n# Kop\nEen zin\nover twee regels.\n\n- punt een\n- punt twee\n\n```\ncode\n\n```\n> citaat\n"
    )
    (tmp_path / "README.md").write_text("of the data set")
    (found,) = read_documents([tmp_path])
    assert found.text == "Kop\nEen zin over twee regels.\npunt een\npunt twee\ncitaat"
    (tmp_path / "b.md").write_text("Kop\n===\ntekst")
    assert [found.text for found in read_documents([tmp_path / "b.md"])] == ["Kop\ntekst"]


BAD = {"a latin-1 line": b"sl\xe9cht", "a NUL": b"slecht\0"}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_in_a_thousand_is_left_out_and_named(kind, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"goed\n\n" * 500 + BAD[kind] + b"\nbeter\n\n" + b"goed\n\n" * 500)
    found = [document.text for document in read_documents([tmp_path])]
    assert found.count("goed") == 1000 and found[500] == "beter" and len(found) == 1001
    said = capsys.readouterr().err
    assert "left out: 1 of 1,002 rows and 0 of 1 files:" in said and "line 1001" in said
    with pytest.raises(UserError, match=r"line 1001.* 1 of 1,002 rows .* are bad, more than bad_share 0: raise it"):
        list(read_documents([tmp_path], TextOptions(bad_share=0)))


def test_a_null_in_a_thousand_rows_is_left_out(tmp_path, capsys):
    rows = [{"text": f"goed {number}"} for number in range(300)] + [{"text": None}, {"tekst": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    assert len(list(read_documents([tmp_path]))) == 300
    said = capsys.readouterr().err
    assert "3 of 303 rows" in said and "line 303 is not JSON" in said and said.count('has no "text"') == 2


def test_a_damaged_file_in_many_is_left_out(tmp_path, capsys):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"goed {number}")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    assert len(list(read_documents([tmp_path], TextOptions(bad_share=0.2)))) == 10
    assert "2 of 12 files" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cut.parquet' is damaged .* 2 of 12 files are bad"):
        list(read_documents([tmp_path]))


def test_files_of_kinds_that_are_not_read_are_named(tmp_path, capsys):
    for name in ("a.txt", "b.pdf", "deep/c.PDF", "d.docx", "README.md", "Makefile", ".hidden.pdf", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("goed")
    assert len(list(read_documents([tmp_path]))) == 1
    expected = "left out: files of kinds that are not read: 1 .docx, 2 .pdf, 1 README.md, 1 without a suffix.\n"
    assert capsys.readouterr().err == expected
    assert len(list(read_documents([tmp_path / "b.pdf"]))) == 1  # named itself, it is read as text
    assert capsys.readouterr().err == ""


def test_of_many_bad_rows_the_first_are_named(capsys):
    bad = BadRows(1)
    bad.rows = 20
    for number in range(15):
        bad.bad_row(f"row {number}")
    bad.settle()
    said = capsys.readouterr().err
    assert "row 9" in said and "row 10" not in said and "and 5 more" in said
    with pytest.raises(UserError, match="bad_share is 1.5"):
        BadRows(1.5)


def test_the_test_split_of_a_dataset_is_for_scores_only(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    assert [found.text for found in read_documents([tmp_path / "all"])] == ["train", "validation"]
    assert "left out: split 'test' of dataset" in capsys.readouterr().err
    assert [found.text for found in read_documents([tmp_path / "all"], held_out=True)] == ["test"]


def test_a_dictionary_the_wrong_way_round_is_noticed(tmp_path):
    pairs = [("kat", "cat"), ("huis", "house"), ("water", "water"), ("zeldzaam", "rare")]
    dutch, english = ["Kat", "huis", "water"], ["cat", "House", "water"]
    require_direction(pairs, tmp_path, dutch, english)
    turned = [(second, first) for first, second in pairs]
    with pytest.raises(UserError, match="wrong way round: 0 of its 3 pairs .* 2 the reverse: put the new language's"):
        require_direction(turned, tmp_path, dutch, english)
