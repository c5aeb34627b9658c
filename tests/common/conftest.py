"""What tests share: a training that was let alone, and signals as in a terminal."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.common.regression import Regression, train


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals that nohup, or a script that runs its commands in the background, has Python ignore."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Regression:
    return train(tmp_path_factory.mktemp("whole"), 18)
