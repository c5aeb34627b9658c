"""A user's mistake is one line and exit code 2; our bugs keep their traceback."""

from __future__ import annotations

import math

import pytest

from common.checks import (
    UserError,
    require_at_least,
    require_directory,
    require_file,
    require_one_of,
    run_command,
)


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
