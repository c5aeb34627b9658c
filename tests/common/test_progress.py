"""Progress is a bar on a terminal, and a few plain lines in a log."""

import io

import pytest

from common import progress
from common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(file, count=2000, **options):
    for _ in Progress(range(count), desc="captioning", unit=" images", file=file, **options):
        pass
    return file.getvalue()


def test_a_log_gets_the_last_line_only():
    text = shown(io.StringIO())
    assert "\r" not in text and len(text.splitlines()) == 1
    assert text.startswith("captioning: 100%") and "2000/2000" in text and " images/s" in text


def test_what_a_terminal_would_take_back_is_not_in_a_log():
    assert shown(io.StringIO(), leave=False) == ""
    assert shown(io.StringIO(), delay=60) == ""


def test_a_terminal_gets_tqdms_own_bar():
    text = shown(Terminal(), mininterval=0)
    assert text.count("\r") > 100 and "2000/2000" in text


@pytest.mark.parametrize("refresh", [False, True])  # Lightning refreshes by itself at every few steps
def test_long_work_writes_a_line_now_and_then(monkeypatch, refresh):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    bar = Progress(total=1000, file=file, unit=" steps")
    for step in range(1000):
        now[0] += 1.0
        if refresh:
            bar.n = step + 1
            bar.refresh()
        else:
            bar.mininterval = 0
            bar.update(1)
    bar.close()
    bar.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == pytest.approx(1000 / progress.EVERY + 1, abs=1) and "1000/1000" in lines[-1]
    assert all(" steps/s" in line or "?" in line for line in lines)
