"""The processor time of each test function, with its subprocesses: reported beside the mark `slow`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

SLOW = 1.0
"""Seconds of processor time, of set-up and call of all its cases together, from which a test should be marked slow:
`make quick` leaves it out."""
SHOWN = 15
elsewhere = 0.0
"""Seconds of processes that are no children of this one, which who starts them adds."""


def _used() -> float:
    """Seconds of processor time of this process and those that it waited for."""
    return sum(os.times()[:4]) + elsewhere


class Costs:
    """Each phase's cost goes with its report, from xdist's processes too."""

    def __init__(self) -> None:
        self.before = 0.0
        self.costs: Counter[str] = Counter()
        self.slow: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Files with slow tests come first, so that no process is alone with them in the end."""
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)

    def pytest_runtest_logstart(self) -> None:
        self.before = _used()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        now = _used()
        report.cost, self.before = now - self.before, now
        report.slow = item.get_closest_marker("slow") is not None
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("[")[0]  # of the function, whatever its parameters
        if report.when != "teardown":
            self.costs[name] += report.cost
        if report.slow:
            self.slow.add(name)

    def unmarked(self, seconds: float) -> list[str]:
        """Tests that cost that much without the mark, most expensive first."""
        return [name for name, cost in self.costs.most_common() if cost >= seconds and name not in self.slow]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"processor time: {sum(self.costs.values()):.0f} s")
        for name, cost in self.costs.most_common(SHOWN):
            if cost >= SLOW:
                terminalreporter.line(f"{cost:6.1f} s  {name}")
        for name in self.unmarked(SLOW)[:SHOWN]:
            line = f"{SLOW:.0f} s or more, make it cheaper or mark it slow: {name} ({self.costs[name]:.1f} s)"
            terminalreporter.line(line)
