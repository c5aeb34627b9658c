"""A user's mistake is one line and exit code 2; our bugs keep their traceback."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.checks import (
    UserError,
    printable,
    require_above,
    require_at_least,
    require_between,
    require_directory,
    require_file,
    require_language,
    require_one_of,
    require_place,
    require_share,
    require_temperature,
    require_text,
    require_usable,
    run_command,
)
from common.commands import Subcommand, run_cli
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
def test_signals_unwind_a_command_as_ctrl_c_does(name, code, capsys, heard):
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


def test_numbers_must_be_finite():
    for check in (
        lambda value: require_at_least("n", value, 0),
        lambda value: require_above("n", value, 0),
        lambda value: require_between("n", value, 0, 5),
        lambda value: require_share("n", value),
        require_temperature,
    ):
        check(1.0)
        for value in (math.nan, math.inf, -math.inf, -1.0):
            with pytest.raises(UserError, match=f"is {value}: use"):
                check(value)
    with pytest.raises(UserError, match="n is 6: use at most 5"):
        require_between("n", 6, 0, 5)
    with pytest.raises(UserError, match="n is 0: use a number above 0"):
        require_above("n", 0, 0)
    with pytest.raises(UserError, match="temperature is 1e-320"):
        require_temperature(1e-320)


def test_names_cannot_write_to_the_terminal():
    assert printable("\x1b[31mred\x07\r\n\x9b") == r"\x1b[31mred\x07\r\n\x9b"
    assert printable("a\u202eb\u2066\u2028\udcff\ufeff") == r"a\u202eb\u2066\u2028\udcff\ufeff"
    for kept in ("één kat 😀", "👩\u200d🚀", "می\u200cخواهم", "東京\u3000", "a\\b 'c'"):
        assert printable(kept) == kept
    assert printable("a\tb\nc\r", lines=True) == "a\tb\nc\\r"
    assert printable(Path("x")) == "x"


def test_an_error_shows_a_hostile_name_escaped(capsys):
    assert run_command(raising(UserError("image \x1b[2Jx\u202e is missing."))) == 2
    assert capsys.readouterr().err == "error: image \\x1b[2Jx\\u202e is missing.\n"


@pytest.mark.parametrize("check", [require_file, require_directory])
@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "d/" * 3000 + "x"])
def test_a_name_that_no_file_can_have_is_a_users_mistake(check, name):
    with pytest.raises(UserError, match="cannot be opened"):
        check(name, "image")


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    require_place(tmp_path / "new" / "deep" / "x.json")
    require_place(tmp_path / "file")
    require_place(tmp_path, directory=True)
    require_place(tmp_path / "new", directory=True)
    for path, directory, words in (
        (tmp_path, False, "is a directory"), (tmp_path / "file", True, "is a file"),
        (tmp_path / "file" / "x", False, "below the file"), (tmp_path / "file" / "x", True, "below the file"),
        (tmp_path / ("n" * 256), False, "name of 256 characters"), (tmp_path / ("n" * 256) / "x", True, "256"),
        ("/dev/null", False, "a pipe, a socket or a device"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            require_place(path, directory=directory)


def test_codes_of_languages():
    for code in ("nl", "nld", "pt-BR", "zh_Hant_TW"):
        require_language(code)
    for code in ("", "n", "dutch", "Dutch", "x-klingon", "nld ", "n1", "../x"):
        with pytest.raises(
            UserError, match=f"language is {re.escape(repr(code))}: give a code of two or three letters"
        ):
            require_language(code)


def test_text_that_is_not_unicode():
    require_text("prompt", "één 😀")
    with pytest.raises(UserError, match="prompt is .* not UTF-8"):
        require_text("prompt", "a\udcff")


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0


@dataclass(frozen=True)
class Outer:
    """A command's settings."""

    name: str = ""
    """A name."""
    seed: int = 0
    """A seed."""
    shares: tuple[float, ...] = (1.0,)
    """Shares."""
    inner: Inner = field(default_factory=Inner)


def echo(config: Outer) -> None:
    print(config.name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Outer(name="a\0b"), "name is 'a.x00b': leave out the NUL"),
        (Outer(seed=10**26), r"seed is 1e\+26: use a number below"),
        (Outer(shares=(0.5, math.nan)), "shares is nan: use a finite number"),
        (Outer(inner=Inner(math.inf)), "rate is inf: use a finite number"),
    ],
)
def test_what_can_be_no_setting_is_refused_whatever_it_is_for(config, message):
    require_usable(Outer())
    with pytest.raises(UserError, match=message):
        require_usable(config)


def test_every_command_asks_this_and_prints_any_name(capsys):
    commands = {"echo": Subcommand(__name__, "Outer", "echo", "say it")}
    assert run_cli("x", "says it", commands, ["echo", "--seed", "1" + 26 * "0"]) == 2
    assert capsys.readouterr().err == f"error: seed is 1e+26: use a number below {2**63}.\n"
    assert run_cli("x", "says it", commands, ["echo", "--rate", "nan"]) == 2
    assert run_cli("x", "says it", commands, ["echo", "--name", "caf\udce9"]) == 0
    assert capsys.readouterr().out == "caf\\udce9\n"
