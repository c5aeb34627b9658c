"""Processes for tests, forked from one that has imported torch, lightning and transformers (11 s of a processor).

`forks.run(code, *arguments)` is `subprocess.run([sys.executable, "-c", code, *arguments])` without those seconds;
`forks.start(...)` does not wait. Modules of `tests` can be imported there.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import costs

ROOT = Path(__file__).resolve().parent.parent
AS_TESTS = f"""
import sys
import types
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(1, {str(ROOT / "tests" / "hooks")!r})
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [{str(ROOT / "tests")!r}]
"""
"""Beginning of a script that imports modules of `tests`; an installed package has that name too."""
PRELOADED = ("lightning", "torch._dynamo", "transformers.models.auto.tokenization_auto", "transformers.models.gpt2")


class Forks:
    """The process that forks others, started with the first; `close` ends it."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def start(
        self, code: str, *arguments: object, env: Mapping[str, str] | None = None, preload: tuple[str, ...] = ()
    ) -> Running:
        """Fork a process that runs `code` as `__main__`, from the repository's root.

        Args:
            code: Python.
            arguments: `sys.argv` after its first.
            env: beside what this process has.
            preload: modules that this and later processes find imported.
        """
        place = tempfile.mkdtemp()
        pid = self._ask(
            "start", code=code, arguments=[str(argument) for argument in arguments], env=dict(env or {}),
            preload=[*PRELOADED, *preload], place=place,
        )  # fmt: skip
        return Running(self, pid, Path(place))

    def run(
        self, code: str, *arguments: object, timeout: float = 280, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """As `start`, and wait for its end."""
        return self.start(code, *arguments, **options).wait(timeout)

    def start_ranks(self, code: str, *arguments: object, launcher: str = "lightning", **options: Any) -> list[Running]:
        """Two processes of one training, as a launcher would start them: the same code, with the variables that tell.

        Args:
            code, arguments: as `start` takes them.
            launcher: "lightning" (as Lightning starts its second process) or "torchrun".
            options: as `start` takes them.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        if launcher == "torchrun":
            shared |= {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        else:
            shared |= {"NODE_RANK": "0"}
        started = []
        for rank in ("0", "1"):
            own = {"LOCAL_RANK": rank} | ({"RANK": rank} if launcher == "torchrun" else {})
            started.append(self.start(code, *arguments, env=shared | own, **options))
        return started

    def run_ranks(self, code: str, *arguments: object, **options: Any) -> list[subprocess.CompletedProcess[str]]:
        """As `start_ranks`, and wait for both to end well; the first process's comes first."""
        running = self.start_ranks(code, *arguments, **options)
        done = []
        for process in running:
            try:
                done.append(process.wait())
            finally:
                if not done or done[-1].returncode:
                    for other in running:
                        other.kill()
        assert not any(process.returncode for process in done), "".join(process.stderr[-2000:] for process in done)
        return done

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate()
            self.server = None

    def _ask(self, what: str, **request: Any) -> Any:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-c", AS_TESTS + "from tests.forks import serve\nserve()"],
                cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps({"what": what} | request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, f"the process that forks others ended with {self.server.wait()}"
        return json.loads(answer)


class Running:
    """A forked process; the leader of a process group, which `kill` ends."""

    def __init__(self, forks: Forks, pid: int, place: Path) -> None:
        self.forks, self.pid, self.place = forks, pid, place
        self.done: subprocess.CompletedProcess[str] | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.done is None:
            self._ended(0)
        return None if self.done is None else self.done.returncode

    def wait(self, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """Its exit code (negative: a signal) and what it said."""
        if self.done is None and not self._ended(timeout):
            self.kill()
            self._ended(60)
            raise AssertionError(f"not done after {timeout} s: {self.done}")
        assert self.done is not None
        return self.done

    def said(self) -> str:
        """What stands on its standard output so far."""
        path = self.place / "out"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self) -> None:
        if self.done is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _ended(self, seconds: float) -> bool:
        answer = self.forks._ask("wait", pid=self.pid, seconds=seconds)
        if answer is None:
            return False
        code, used = answer
        costs.elsewhere += used
        paths = [self.place / name for name in ("out", "err")]
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in paths)
        self.done = subprocess.CompletedProcess([], code, out, err)
        return True


def serve() -> None:
    """Answer requests on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("what") == "start":
            for module in request.pop("preload"):
                importlib.import_module(module)
            pid = os.fork()
            if not pid:
                answers.close()
                _be(**request)
            os.setpgid(pid, pid)
            answer: Any = pid
        else:
            answer = _waited(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _waited(pid: int, seconds: float) -> tuple[int, float] | None:
    until = time.monotonic() + seconds
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() >= until:
            return None
        time.sleep(0.01)


def _be(code: str, arguments: list[str], env: dict[str, str], place: str) -> None:
    """Go on as a process that was started to run `code`."""
    status = 1
    try:
        os.setpgid(0, 0)
        flags = os.O_WRONLY | os.O_CREAT
        for number, opened in enumerate(
            [os.open(os.devnull, os.O_RDONLY), *(os.open(f"{place}/{name}", flags) for name in ("out", "err"))]
        ):
            os.dup2(opened, number)
        sys.stdin = io.StringIO()
        os.environ.update(env)
        tempfile.tempdir = None
        sys.argv = ["-c", *arguments]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<code>", "exec"), main.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
