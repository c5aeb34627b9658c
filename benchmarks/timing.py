"""CPU seconds of several ways to do the same, in turns, so that a busy machine slows all; the least of each counts."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping


def with_children() -> float:
    """CPU seconds so far of this process and of those that it has started and that have ended, user and system."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def in_turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Least CPU seconds, by `clock`, of each way, each run once in every round."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, work in ways.items():
            begin = clock()
            work()
            best[name] = min(best[name], clock() - begin)
    return best


def cpu_seconds(work: Callable[[], object], repeats: int = 1, clock: Callable[[], float] = time.process_time) -> float:
    """Least CPU seconds, by `clock`, of `repeats` runs."""
    return in_turns({"": work}, repeats, clock)[""]
