"""A run that is stopped anywhere resumes with the rows that it had finished."""

import json

import pytest

from common.checks import UserError
from common.journal import Journal

SETTINGS = {"model": "tiny", "beams": 5}


def is_row(row):
    return isinstance(row.get("text"), str)


def begun(path, rows=3):
    with Journal(path, SETTINGS, is_row) as journal:
        for number in range(rows):
            journal.add(f"caf\udce9 {number}", {"text": f"é {number}"})
    return path.read_bytes()


def test_every_cut_keeps_the_whole_lines_before_it(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    content = begun(path)
    header = content.index(b"\n") + 1
    for cut in range(header, len(content) + 1):
        path.write_bytes(content[:cut])
        with Journal(path, SETTINGS, is_row) as journal:
            done = content[header:cut].count(b"\n")
            assert list(journal.rows) == [f"caf\udce9 {number}" for number in range(done)]
            for number in range(done, 3):
                journal.add(f"caf\udce9 {number}", {"text": f"é {number}"})
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line", [b"[3]\n", b'{"text": "x"}\n', b'{"key": "a", "text": 3}\n', b"\xff\n", b"[" * 9999 + b"\n"]
)
def test_lines_that_are_no_rows_go(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    content = begun(path)
    path.write_bytes(content + line + content)
    with Journal(path, SETTINGS, is_row) as journal:
        assert len(journal.rows) == 3
    assert path.read_bytes() == content


def test_other_settings_and_other_files_are_refused_and_kept(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = begun(path)
    with pytest.raises(UserError, match="begun with beams 5, now it is 4"):
        Journal(path, SETTINGS | {"beams": 4}, is_row)
    assert path.read_bytes() == content
    for other in (b"notes\n", json.dumps(SETTINGS).encode() + b"\n", b"\x00"):
        path.write_bytes(other)
        with pytest.raises(UserError, match="not written by this command"):
            Journal(path, SETTINGS, is_row)
        assert path.read_bytes() == other


def test_a_journal_without_rows_leaves_nothing(tmp_path):
    Journal(tmp_path / "journal.jsonl", SETTINGS, is_row).close()
    assert not list(tmp_path.iterdir())
