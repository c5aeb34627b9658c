"""The interval of a share: known values, its ends, and that more trials narrow it."""

import math

import pytest

from common.intervals import wilson_interval


def test_known_values():
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # R, prop.test(correct=FALSE)
    low, high = wilson_interval(7, 10)
    assert (low, high) == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))  # Newcombe 1998's formula
    for share in (low, high):  # the ends are where the score test is at its limit
        assert abs(0.7 - share) == pytest.approx(1.959964 * math.sqrt(share * (1 - share) / 10))


def test_its_ends_and_many_trials():
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1 and wilson_interval(0, 0) == (0, 1)
    narrow, wide = wilson_interval(70, 100), wilson_interval(7, 10)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    low, high = wilson_interval(5 * 10**5, 10**6)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / 10**6), rel=1e-3)
