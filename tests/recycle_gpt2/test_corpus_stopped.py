"""Builds of a corpus that are killed or stopped: the next one ends in the same bytes, and no process stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.checks import UserError
from recycle_gpt2 import shards
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.corpus import (
    build_corpus,
)
from recycle_gpt2.tokenizer import save_tokenizer
from tests.recycle_gpt2.conftest import SHARES, contents

KILLED = """
import os, signal, sys
from pathlib import Path
from recycle_gpt2 import corpus
from recycle_gpt2.tokenizer import load_tokenizer
real, written = os.replace, []
def replace(source, target):
    if len(written) == {after}:
        Path("{marker}").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(target)
    real(source, target)
os.replace = replace
corpus.build_corpus([Path("{text}")], load_tokenizer(Path("{tokenizer}")), Path("{out}"), block=32,
    shares={shares}, chunk=4000, progress=False)
"""


@pytest.mark.slow
def test_killed_build_goes_on_to_the_same_bytes(forks, built, text, tokenizer, tmp_path, monkeypatch):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    out, marker = tmp_path / "killed", tmp_path / "marker"
    script = KILLED.format(after=7, marker=marker, text=text, tokenizer=tmp_path / "tokenizer", out=out, shares=SHARES)
    done = forks.run(script)
    assert done.returncode == -signal.SIGKILL and marker.exists()
    ready = sorted((out / "shards").glob("*.json"))
    assert ready and not (out / "manifest.json").exists() and list((out / "shards").glob(".*.tmp"))
    with pytest.raises(UserError, match=r"no manifest\.json"):
        TokenBlocks(out, "train")
    written = []
    plain = shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", lambda *args: written.append(args[2]) or plain(*args))
    build_corpus([text], tokenizer, out, block=32, shares=SHARES, chunk=4000, progress=False)
    assert contents(out) == contents(built)
    assert written and min(written) == len(ready)  # what was there was not made again


def test_a_build_that_was_stopped_vouches_for_nothing_it_has_overwritten(built, text, tokenizer, monkeypatch):
    """Another tokenizer of the same sizes: only the record of a shard tells what is in its files."""
    options = dict(block=32, shares=SHARES, chunk=4000, progress=False)
    before = contents(built)

    def stopped(path, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            changed = (text / "stories.txt").read_text().replace("kat", "tak")
            (text / "other.txt").write_text(changed)
            build_corpus([text / "other.txt"], tokenizer, built, **options)
    assert not (built / "manifest.json").exists() and not (built / "shards" / "000000.json").exists()
    (text / "other.txt").unlink()
    build_corpus([text], tokenizer, built, **options)
    assert contents(built) == before


ENDLESS = """
import itertools, sys, time
from recycle_gpt2 import cli, corpus
from recycle_gpt2.formats import Document
from recycle_gpt2.texts import Text
def documents(self):
    for number in itertools.count():
        yield Document(f"{number} de kat en het huis zijn op een mat", "endless.txt", "prose"), number
        time.sleep(0.001)
Text.documents = documents
corpus.build_corpus.__kwdefaults__["chunk"] = 1000
sys.exit(cli.main(["corpus", "--text", sys.argv[1], "--tokenizer", sys.argv[2], "--out", sys.argv[3], "--workers", "2"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_ends_its_workers(stop, forks, text, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    process = forks.start(ENDLESS, text, tmp_path / "tokenizer", tmp_path / "out")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def workers() -> list[int]:
        found = map(int, children.read_text().split())
        return [pid for pid in found if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    deadline = time.monotonic() + 250
    while not (len(workers()) == 2 and list((tmp_path / "out").glob("shards/*"))):
        assert time.monotonic() < deadline and process.poll() is None, process.wait()
        time.sleep(0.02)
    pids = workers()
    os.kill(process.pid, stop)
    assert process.wait(60).returncode == 128 + stop
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def is_alive(pid: int) -> bool:
    """Whether a process runs: it exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_workers_leave_with_a_killed_parent(text, tokenizer, tmp_path, root):
    """Processes that wait for work would else stay for ever."""
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "from recycle_gpt2 import shards\n"
        "from recycle_gpt2.tokenizer import load_tokenizer\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    tokenizer = load_tokenizer(Path({str(tmp_path / 'tokenizer')!r}))\n"
        "    setup = (tokenizer.backend_tokenizer.to_str(), 0, 'uint16')\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, initializer=shards._begin_worker, initargs=setup)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{worker}/stat") as status:
            if status.read().split()[2] == "Z":
                return
        time.sleep(0.1)
    pytest.fail("the worker is still there")
