"""Intervals and tests against published values and against counting."""

from __future__ import annotations

import math

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


def test_mcnemar_is_the_exact_two_sided_binomial() -> None:
    assert mcnemar(1, 9).p_value == pytest.approx(2 * (math.comb(10, 0) + math.comb(10, 1)) / 2**10)
    assert mcnemar(0, 0).p_value == 1
    assert mcnemar(5, 5).p_value == 1


def test_percent_and_interval_read_as_in_papers() -> None:
    assert format_percent(0.45201) == "45.20"
    assert format_interval(0.442, 0.462) == "44.2–46.2"
