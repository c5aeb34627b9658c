"""A user's mistake is one line and exit code 2; our bugs keep their traceback."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading

import pytest

from common.checks import (
    UserError,
    require_at_least,
    require_directory,
    require_file,
    require_one_of,
    run_command,
)
from common.signals import Stopped, StopRequest


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_is_what_the_command_returns(returned, code):
    assert run_command(lambda: returned) == code


def test_user_error_is_one_line_and_exit_code_2(capsys):
    assert run_command(raising(UserError("size is 0:\n  use at least 1."))) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: size is 0: use at least 1.\n"
    assert captured.out == ""


def test_ctrl_c_is_130(capsys):
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_unwind_a_command_as_ctrl_c_does(name, code, capsys):
    signum, kept = signal.Signals[name], []

    def command() -> int:
        try:
            signal.raise_signal(signum)
        finally:
            if name != "SIGINT":
                signal.raise_signal(signum)  # a second one does not stop the keeping
            kept.append(True)
        return 0

    before = signal.getsignal(signum)
    assert run_command(command) == code and kept
    assert signal.getsignal(signum) == before
    shown = "Ctrl-C" if name == "SIGINT" else name
    assert capsys.readouterr().err == f"\nstopped by {shown}; what was saved before is kept.\n"


def test_a_signal_that_is_not_to_stop_at_once_is_noted(tmp_path):
    with StopRequest() as request:
        request.at_once = False
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert request.signum == signal.SIGTERM
    with pytest.raises(Stopped, match="stopped by SIGTERM"), StopRequest():
        signal.raise_signal(signal.SIGTERM)


def test_forked_workers_are_ended_by_signals_as_before():
    """A pool ends its workers by SIGTERM."""
    with StopRequest() as request:
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM and not request.signum


def test_commands_run_in_other_threads():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: 3)))
    thread.start()
    thread.join()
    assert codes == [3]


def test_disk_and_permission_errors_name_the_file(capsys, tmp_path):
    assert run_command(lambda: open(tmp_path / "absent" / "x", "w") and None) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "absent" / "x") in error and error.count("\n") == 1
    assert run_command(raising(OSError(28, "No space left on device"))) == 2
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours"), OSError("a library's own")])
def test_our_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_command(raising(error))


def test_require_file(tmp_path):
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.write_text("x")
    empty.touch()
    assert require_file(str(full), "image") == full
    for path, words in [(empty, "is empty"), (tmp_path, "is a directory"), (tmp_path / "no", "does not exist")]:
        with pytest.raises(UserError, match=words) as caught:
            require_file(path, "image")
        assert str(path) in str(caught.value)


def test_require_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert require_directory(tmp_path, "data") == tmp_path
    for path, words in [(file, "is a file"), (tmp_path / "no", "does not exist")]:
        with pytest.raises(UserError, match=words):
            require_directory(path, "data")


def test_require_at_least():
    require_at_least("n", 1, 1)
    for value in (0, math.nan, -math.inf):
        with pytest.raises(UserError, match="use at least 1"):
            require_at_least("n", value, 1)


def test_require_one_of():
    require_one_of("mode", "a", ("a", "b"))
    with pytest.raises(UserError, match=r"mode is 'c': choose one of a, b\."):
        require_one_of("mode", "c", ("a", "b"))
