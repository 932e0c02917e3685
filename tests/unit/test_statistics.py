"""Intervals and tests against published values and against counting."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from distributed_at.statistics import format_interval, format_percent, mcnemar, wilson


def test_wilson_agrees_with_newcombes_published_intervals() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for correct, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = wilson(correct, total)
        assert found == pytest.approx((low, high), abs=5e-5)


def test_interval_holds_the_share_and_the_borders_are_exact() -> None:
    for correct, total in ((0, 10), (10, 10), (5, 10), (1, 50000)):
        low, high = wilson(correct, total)
        assert 0 <= low <= correct / total <= high <= 1
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="correct"):
        wilson(11, 10)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
def test_the_ends_of_the_interval_are_the_shares_that_the_score_test_just_accepts(confidence: float) -> None:
    """Wilson's definition: |share - p| = z sqrt(p (1 - p) / n) at both ends."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    for correct, total in ((1, 3), (2, 3), (7, 10), (45, 100), (9_999, 10_000)):
        low, high = wilson(correct, total, confidence=confidence)
        assert low < correct / total < high
        for end in (low, high):
            assert abs(correct / total - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total), rel=1e-9)


def test_counts_and_confidences_at_the_border_are_taken_and_beyond_it_refused() -> None:
    assert wilson(0, 0, confidence=0.5) == (0, 1)
    assert wilson(1, 1)[0] == pytest.approx(1 / (1 + NormalDist().inv_cdf(0.975) ** 2))
    for correct, total in ((-1, 10), (0, -1), (1, 0)):
        with pytest.raises(ValueError, match="correct must lie"):
            wilson(correct, total)
    for confidence in (0.0, 1.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="confidence must lie"):
            wilson(1, 2, confidence=confidence)
    for counts in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            mcnemar(*counts)


def test_mcnemar_is_the_sum_of_the_tails_for_every_small_pair() -> None:
    for first in range(8):
        for second in range(8):
            found, total = mcnemar(first, second), first + second
            assert (found.only_first, found.only_second) == (first, second)
            tail = sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total
            assert found.p_value == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_is_the_exact_two_sided_binomial() -> None:
    assert mcnemar(1, 9).p_value == pytest.approx(2 * (math.comb(10, 0) + math.comb(10, 1)) / 2**10)
    assert mcnemar(0, 0).p_value == 1
    assert mcnemar(5, 5).p_value == 1


def test_percent_and_interval_read_as_in_papers() -> None:
    assert format_percent(0.45201) == "45.20"
    assert format_interval(0.442, 0.462) == "44.2–46.2"
    assert format_percent(0.45201, digits=3) == "45.201"
    assert format_interval(0.4423, 0.4617, digits=2) == "44.23–46.17"
