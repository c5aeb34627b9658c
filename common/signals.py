"""Signals that ask a process to end: Ctrl-C, SIGTERM (docker stop, SLURM, systemd) and SIGHUP (a closed terminal)."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked this process to end; as with KeyboardInterrupt, what handles errors does not hold it up."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {name_of(signum)}")
        self.signum = signum


def name_of(signum: int) -> str:
    """What people call a signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


class StopRequest:
    """Within a `with` block, the first of `signals` raises Stopped, at once or when the block looks for it.

    Further ones are ignored: a process may be sent the same signal twice, by its group and by its launcher, and what is
    being saved should be saved. Signals that are ignored outside of the block (nohup) stay so. In processes forked
    within the block, and in threads other than the main one, nothing changes.

    Attributes:
        signum: the signal that came; 0 for none.
        at_once: whether a signal raises Stopped as it comes; without it, `signum` must be looked at.
    """

    def __init__(self, signals: tuple[int, ...] = STOPS) -> None:
        self.signals, self.signum, self.at_once = signals, 0, True
        self._before: dict[int, Any] = {}
        self._process = 0

    def __enter__(self) -> StopRequest:
        self.signum, self.at_once, self._process = 0, True, os.getpid()
        if threading.current_thread() is threading.main_thread():
            before = {signum: signal.getsignal(signum) for signum in self.signals}
            self._before = {signum: handler for signum, handler in before.items() if handler != signal.SIG_IGN}
        self.install()
        return self

    def install(self) -> None:
        """Take the signals, again where another library has taken them within the block."""
        for signum in self._before:
            signal.signal(signum, self._handle)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _handle(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)
        elif not self.signum:
            self.signum = signum
            if self.at_once:
                raise Stopped(signum)
