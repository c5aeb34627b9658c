"""Whole or not at all: files, directories, and who may write there."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from common.checks import UserError
from common.files import (
    LOCK,
    MARKER,
    claimed,
    clear_leftovers,
    hash_content,
    require_own_directory,
    whole_directory,
    whole_file,
)


def fill(directory, **files):
    with whole_directory(directory) as partial:
        for name, text in files.items():
            (partial / name).write_text(text)


def content(directory):
    return {path.name: path.read_text() for path in directory.iterdir() if path.name != MARKER}


def test_a_file_appears_whole_and_a_symlink_stays_one(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "link", "w") as file:
        file.write("half")
        raise RuntimeError
    assert (tmp_path / "real").read_text() == "old"
    with whole_file(tmp_path / "link", "w") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_directory_is_replaced_by_what_is_written_next(tmp_path):
    fill(tmp_path / "model", a="1", b="2")
    fill(tmp_path / "model", a="3")
    assert content(tmp_path / "model") == {"a": "3"}
    assert json.loads((tmp_path / "model" / MARKER).read_text()) == {"files": ["a"]}
    assert os.listdir(tmp_path) == ["model"]


def test_an_error_leaves_the_directory_as_it_was(tmp_path):
    fill(tmp_path / "model", a="1")
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "model") as partial:
        (partial / "a").write_text("2")
        raise RuntimeError
    assert content(tmp_path / "model") == {"a": "1"} and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("foreign", ["notes.txt", ".git/config", "config.json"])
def test_what_is_not_ours_is_never_replaced(tmp_path, foreign):
    own = foreign != "config.json"
    if own:
        fill(tmp_path / "model", a="1")
    path = tmp_path / "model" / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="was not written by this command") as error:
        fill(tmp_path / "model", a="2")
    assert repr(foreign) in str(error.value) and path.read_text() == "mine"


def test_neither_a_file_nor_a_broken_marker_opens_the_way(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError, match="place of a file"):
        require_own_directory(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MARKER).write_text('{"files": 3}')
    (tmp_path / "other" / "x").write_text("mine")
    with pytest.raises(UserError, match="'x'"):
        require_own_directory(tmp_path / "other")


def test_a_directory_behind_a_symlink_is_written_where_it_lies(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    fill(tmp_path / "model", a="1")
    fill(tmp_path / "model", a="2")
    assert (tmp_path / "model").is_symlink() and content(tmp_path / "disk") == {"a": "2"}


def test_a_swap_that_was_cut_short_is_taken_up(tmp_path):
    fill(tmp_path / "model", a="1")
    os.replace(tmp_path / "model", tmp_path / ".model.before")  # where a kill between the two steps leaves it
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "model"):
        raise RuntimeError
    assert content(tmp_path / "model") == {"a": "1"} and os.listdir(tmp_path) == ["model"]


def test_a_users_own_partial_directory_stays(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "notes").write_text("mine")
    with pytest.raises(FileExistsError):
        fill(tmp_path / "model", a="1")
    assert (tmp_path / ".model.partial" / "notes").read_text() == "mine"


HOLD = textwrap.dedent("""
    import sys, time
    from common.files import claimed
    with claimed(sys.argv[1]):
        print("in", flush=True)
        time.sleep(60)
""")


def test_a_directory_is_one_runs_until_it_ends_or_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "in\n"
            with pytest.raises(UserError, match=f"in use by process {other.pid} on "), claimed(tmp_path):
                raise AssertionError("two at once")
        finally:
            other.send_signal(signal.SIGKILL)
    for _ in range(2):
        with claimed(tmp_path):
            assert (tmp_path / LOCK).exists()
    assert os.listdir(tmp_path) == []


def test_a_file_cannot_be_claimed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="mine' is a file: give the path of a directory"), claimed(tmp_path / "mine"):
        raise AssertionError("a file was taken for a directory")


def test_many_that_want_it_at_once_go_one_by_one(tmp_path):
    code = HOLD.replace(
        "time.sleep(60)",
        "open(sys.argv[1] + '/order', 'a').write('<'); time.sleep(0.05); open(sys.argv[1] + '/order', 'a').write('>')",
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(4)
    ]
    assert 0 in [other.wait() for other in others]
    order = (tmp_path / "order").read_text()
    assert order == "<>" * (len(order) // 2)


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import save_file
from common.checks import run_command
from common.files import whole_directory, whole_file, write_json

place = Path(sys.argv[2])
big = 100_000

def weights():
    with whole_directory(place) as partial:
        save_file({"a": torch.zeros(big)}, partial / "model.safetensors")

def checkpoint():
    with whole_file(place) as file:
        torch.save({"a": torch.zeros(big)}, file)

def array():
    with whole_file(place) as file:
        np.save(file, np.zeros(big))

def text():
    write_json(place, ["x"] * big)

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
raise SystemExit(run_command({"weights": weights, "checkpoint": checkpoint, "array": array, "text": text}[sys.argv[1]]))
"""


@pytest.mark.parametrize("what", ["weights", "checkpoint", "array", "text"])
@pytest.mark.slow
def test_a_full_disk_is_one_line_that_names_the_place(forks, tmp_path, what):
    place = tmp_path / "place"
    if what == "weights":
        fill(place, a="before")
    else:
        place.write_text("before")
    done = forks.run(FULL, what, place)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("error: ") and str(place) in last and "free disk space" in last
    assert (content(place) == {"a": "before"}) if what == "weights" else place.read_text() == "before"
    assert os.listdir(tmp_path) == ["place"]


def test_a_claim_clears_what_a_kill_left_and_nothing_else(tmp_path):
    for name in (".last.ckpt.abc_ef12.tmp", ".notes.tmp", "last.ckpt.abcdef12.tmp", ".last.ckpt.ABCDEF12.tmp"):
        (tmp_path / name).touch()
    with claimed(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [
            ".last.ckpt.ABCDEF12.tmp",
            ".lock",
            ".notes.tmp",
            "last.ckpt.abcdef12.tmp",
        ]


def test_an_empty_directory_of_a_call_that_was_killed_at_once_is_used_again(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / f".{MARKER}.abcdefgh.tmp").write_text("half a mark")
    fill(tmp_path / "model", a="1")
    assert content(tmp_path / "model") == {"a": "1"} and os.listdir(tmp_path) == ["model"]


def test_clearing_leaves_a_file_that_is_being_written(tmp_path):
    dead = tmp_path / ".tokens.npy.abcdefgh.tmp"
    dead.write_bytes(b"half")
    with whole_file(tmp_path / "tokens.npy") as file:
        file.write(b"whole")
        clear_leftovers(tmp_path)  # as a second process of the same run does
        assert not dead.exists() and len(list(tmp_path.glob(".*.tmp"))) == 1
    assert (tmp_path / "tokens.npy").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_a_file_cleared_away_before_it_is_locked_is_begun_again(tmp_path, monkeypatch):
    lock, calls = fcntl.flock, []

    def cleared_first(handle, operation):
        if not calls:
            clear = next(tmp_path.glob(".*.tmp"))
            clear.unlink()
        calls.append(operation)
        return lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", cleared_first)
    with whole_file(tmp_path / "a.bin") as file:
        file.write(b"whole")
    assert (tmp_path / "a.bin").read_bytes() == b"whole" and len(calls) == 2


def test_a_hash_is_of_all_that_is_left_of_a_file_whatever_its_size(tmp_path):
    content, told = os.urandom((2 << 20) + 5), []
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        file.seek(3)
        found = hash_content(file, hashlib.blake2b(b"before", digest_size=8), told.append)
    assert found.digest() == hashlib.blake2b(b"before" + content[3:], digest_size=8).digest()
    assert sum(told) == len(content) - 3 and len(told) == 3
