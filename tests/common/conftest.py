"""What tests of training share: a run that was let alone."""

from __future__ import annotations

import pytest

from tests.common.regression import Regression, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Regression:
    return train(tmp_path_factory.mktemp("whole"), 18)
