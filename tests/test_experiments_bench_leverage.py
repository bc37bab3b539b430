"""The efficiency-leverage law reproduces what its paper claims, which fixes the bases of its logarithms."""

import pytest

from experiments.bench.leverage import best_granularity, efficiency_leverage


@pytest.mark.parametrize(
    ("activation", "granularity", "compute", "leverage"),
    [
        (0.031, 12, 1e22, 7.25),
        (0.047, 2, 1e20, 2.95),
        (0.078, 2, 1e20, 2.53),
        (0.031, 2, 1e18, 2.08),
        (0.008, 2, 3e20, 4.92),
        (1.0, 2, 1e20, 0.994),
    ],
)
def test_published_values(activation, granularity, compute, leverage):
    assert efficiency_leverage(activation, granularity, compute) == pytest.approx(leverage, abs=0.006)


def test_best_granularity_is_about_twelve_and_a_peak():
    best = best_granularity()
    assert best == pytest.approx(11.3, abs=0.05)
    at = [efficiency_leverage(0.05, granularity, 1e21) for granularity in (best / 2, best, best * 2)]
    assert at[1] == max(at)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.1; got 1.5"):
        efficiency_leverage(1.5, 2, 1e20)
    with pytest.raises(ValueError, match="compute above 1 FLOP"):
        efficiency_leverage(0.5, 2, 0)
