"""Kills a scenario at its writes, resumes it, and compares the end with that of a run that was let alone.

A scenario is a function of a directory that writes there, may be called again after a kill, and returns what must be the
same in the end, such as a hash of weights. `kill_everywhere(forks, "tests.common.test_stopping:killed_run", place)`
takes one process that imports the scenario's module and forks for each kill; temporary files have another file system.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forks import Forks

OPERATIONS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "ftruncate")
"""What is waited for beside writes to files."""


def kill_everywhere(
    forks: Forks, scenario: str, place: Path, *, points: int = 20, preload: tuple[str, ...] = ()
) -> None:
    """Assert that a scenario ends the same wherever it was killed.

    Half of the `points` are writes to files, which are then half done, and half are before a file is synced, renamed,
    deleted and the like; both are evenly spread. `preload` are modules that the scenario imports.
    """
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as temporary:
        code = f"from tests.kills import main\nmain({scenario!r}, {str(place)!r}, {points})"
        done = forks.run(code, env={"TMPDIR": temporary}, preload=preload, timeout=850)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["killed"] > 0 and not found["failed"], found
        left = [name for name in os.listdir(temporary) if "wandb" not in name]  # that one makes some at import
        assert not left, f"files for ever in the directory for temporary ones: {left}"


def main(scenario: str, where: str, points: int) -> None:
    """Print, as JSON, how many kills there were and which of them made a difference."""
    module, name = scenario.split(":")
    run: Callable[[Path], str] = getattr(importlib.import_module(module), name)
    place = Path(where).resolve()
    writes = place / "writes"
    whole = _forked(run, place / "whole", writes, 0)
    kinds = writes.read_text().split()
    numbers = _spread([number for number, kind in enumerate(kinds, 1) if kind == "write"], points // 2)
    numbers += _spread([number for number, kind in enumerate(kinds, 1) if kind != "write"], points - points // 2)
    failed = {}
    for number in numbers:
        directory = place / f"{number}"
        first = _forked(run, directory, writes, number)
        second = _forked(run, directory, writes, 0)
        leftovers = [str(path) for path in directory.rglob(".*.tmp")]
        if first != "killed" or second != whole or leftovers:
            failed[f"{number}, {kinds[number - 1]}"] = [first, second, whole, leftovers]
    print(json.dumps({"writes": len(kinds), "killed": len(numbers), "failed": failed}))


def _spread(numbers: list[int], count: int) -> list[int]:
    """`count` of the numbers, evenly spread; all where there are fewer."""
    return [numbers[i * len(numbers) // count] for i in range(count)] if count < len(numbers) else numbers


def _forked(run: Callable[[Path], str], directory: Path, writes: Path, kill_at: int) -> str:
    """What a scenario returns in a process of its own; "killed" when it was."""
    said = directory.with_name(directory.name + ".said")
    said.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            seen = _watch(directory, kill_at)
            result = run(directory)
            os.chdir("/")
            kinds = list(seen)
            said.write_text(result)
            writes.write_text("\n".join(kinds))
        except BaseException:
            said.write_text(traceback.format_exc())
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    return said.read_text()


def _watch(directory: Path, kill_at: int) -> list[str]:
    """Count what is written below `directory` from now on, by kind; the process is killed at number `kill_at`."""
    seen: list[str] = []

    def is_last(kind: str, where: Any) -> bool:
        if isinstance(where, int):
            where = os.readlink(f"/proc/self/fd/{where}")
        if not os.path.abspath(os.fspath(where)).startswith(f"{directory}/"):
            return False
        seen.append(kind)
        return len(seen) == kill_at

    def watched(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(where: Any, *arguments: Any, **options: Any) -> Any:
            if options.get("dir_fd") is None and is_last(name, where):
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(where, *arguments, **options)

        return call

    class Watched:
        """A file whose writes are counted; the last is half done."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> Any:
            if is_last("write", self.file.fileno()):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.file.__exit__(*error)

        def __iter__(self) -> Any:
            return iter(self.file)

    def opening(opener: Callable[..., Any]) -> Callable[..., Any]:
        def call(where: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = opener(where, mode, *arguments, **options)
            return Watched(file) if set(mode) & set("wax+") else file

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(name, getattr(os, name)))
    os.fdopen = opening(os.fdopen)
    builtins.open = io.open = opening(builtins.open)  # type: ignore[assignment]
    return seen
