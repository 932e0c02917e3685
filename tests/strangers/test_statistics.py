"""Intervals, tests, worst cases and suspicions beside scipy and plain counting."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from distributed_at.bench.precision import _mean
from distributed_at.evaluation import EvaluationResult, Protocol, Rows, judge, worst_cases
from distributed_at.evaluation.verdicts import autoattack_gap, query_attack_helps, single_step_gap, stronger_is_weaker
from distributed_at.evaluation.worst_case import worst_case
from distributed_at.statistics import mcnemar, wilson


def made_up(
    right: np.ndarray, *, ids: np.ndarray | None = None, attack: str = "pgd", hit: Any = False, **protocol: Any
):
    """A result in which sample ``ids[i]`` is right where ``right[i]`` is; the clean prediction is right on all."""
    ids = np.arange(len(right)) if ids is None else ids
    values = {"kind": "pgd", "eps": 8, "num_steps": 10, "attacks": ("pgd",), **protocol}
    rows = Rows(
        sample_id=ids,
        label=np.zeros(len(ids)),
        clean_prediction=np.zeros(len(ids)),
        adv_prediction=~right,
        correct_clean=np.ones(len(ids)),
        correct_adv=right,
        loss=np.zeros(len(ids)),
        target_hit=np.zeros(len(ids)) + hit,
        attack=np.where(right, "", attack),
    )
    # which leaves out what belongs to another kind
    made = Protocol.from_dict({"weights": "w", "data_ids": "d", "num_samples": len(ids), **values})
    return EvaluationResult(protocol=made, rows=rows, seconds=1.0, computed=len(ids), expected=len(ids))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_intervals_are_scipys_wilson_intervals(confidence: float) -> None:
    for total in (1, 2, 3, 7, 20, 100, 263, 1000, 50_000):
        for correct in sorted({0, 1, total // 3, total // 2, total - 1, total}):
            low, high = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
            assert wilson(correct, total, confidence=confidence) == pytest.approx((low, high), rel=1e-10, abs=1e-12)


def test_the_test_of_two_models_is_scipys_binomial_test() -> None:
    pairs = [*itertools.product(range(9), repeat=2), (40, 60), (0, 200), (499, 501), (3000, 3200)]
    for first, second in pairs:
        if first + second:
            expected = stats.binomtest(first, first + second).pvalue
            assert mcnemar(first, second).p_value == pytest.approx(expected, rel=1e-9)


def test_a_result_counts_its_rows() -> None:
    right = np.arange(37) % 3 == 0
    result = made_up(right, target="random_other", hit=np.arange(37) % 5 == 0)
    low, high = stats.binomtest(13, 37).proportion_ci(0.95, method="wilson")
    assert (result.correct, result.total, result.accuracy) == (13, 37, 13 / 37)
    assert (result.low, result.high) == pytest.approx((low, high))
    assert result.clean_correct == 37
    assert result.broken_by() == {"pgd": 24}
    told = result.event()
    assert (told["correct"], told["total"], told["accuracy"]) == (13, 37, 13 / 37)
    assert (told["low"], told["high"]) == pytest.approx((low, high))
    assert told["attack_success_rate"] == 8 / 37
    assert result.summary()["broken_by"] == {"pgd": 24}


def test_suspicion_of_a_stronger_attack_rests_on_the_samples_that_both_saw() -> None:
    generator = np.random.default_rng(4)
    spoken = set()
    for trial in range(40):
        ids = [np.sort(generator.choice(300, 240, replace=False)) for _ in range(2)]
        shares = (0.5, 0.5 + 0.008 * trial)
        weak, strong = (
            made_up(generator.random(240) < s, ids=i, num_steps=n)
            for s, i, n in zip(shares, ids, (10, 50), strict=True)
        )
        left = {
            n: dict(zip(r.rows.sample_id, r.rows.correct_adv, strict=True)) for n, r in (("w", weak), ("s", strong))
        }
        both = left["w"].keys() & left["s"].keys()
        more = sum(left["s"][i] and not left["w"][i] for i in both)
        less = sum(left["w"][i] and not left["s"][i] for i in both)
        p = stats.binomtest(more, more + less, alternative="greater").pvalue
        found = stronger_is_weaker(weak, strong)
        assert (found is not None) == (p < 0.01)
        spoken.add(found is not None)
        if found is not None:
            assert found.numbers["p"] == pytest.approx(p)
            assert found.numbers["weaker"] == pytest.approx(np.mean([left["w"][i] for i in both]))
            assert found.numbers["stronger"] == pytest.approx(np.mean([left["s"][i] for i in both]))
            assert [v.code for v in judge([strong, weak])] == ["stronger_attack_is_weaker"]
    assert spoken == {True, False}


def first(count: int, total: int = 1000, **protocol: Any) -> EvaluationResult:
    return made_up(np.arange(total) < count, **protocol)


def test_gaps_between_attacks_are_spoken_of_above_their_thresholds_alone() -> None:
    auto = {"kind": "autoattack", "attacks": ("apgd-ce", "square")}
    assert autoattack_gap(first(600), first(480, **auto)) is None
    assert autoattack_gap(first(600), first(479, **auto)).numbers == {"pgd": 0.6, "autoattack": 0.479}
    assert single_step_gap(first(600, num_steps=1), first(350)) is None
    assert single_step_gap(first(600, num_steps=1), first(349)).numbers == {"single": 0.6, "multi": 0.349}
    assert query_attack_helps(first(998, **auto, attack="square")) is None
    assert query_attack_helps(first(997, **auto, attack="square")).numbers == {"square": pytest.approx(0.003)}
    assert query_attack_helps(first(900, **auto, attack="apgd-ce")) is None


def test_worst_case_is_the_intersection_of_sets() -> None:
    generator = np.random.default_rng(8)
    results = [made_up(generator.random(200) < 0.8, num_steps=n) for n in (5, 10, 20)]
    sets = [set(r.rows.sample_id[r.rows.correct_adv].tolist()) for r in results]
    found = worst_case(results)
    assert set(found.survivors.tolist()) == sets[0] & sets[1] & sets[2]
    assert found.remaining == (len(sets[0]), len(sets[0] & sets[1]), len(sets[0] & sets[1] & sets[2]))
    assert (found.correct, found.total) == (len(sets[0] & sets[1] & sets[2]), 200)
    assert found.accuracy == found.correct / 200
    assert found.interval == pytest.approx(tuple(stats.binomtest(found.correct, 200).proportion_ci(method="wilson")))
    # a second attack on the survivors alone says as much as one on all
    standing = np.sort(np.array(list(sets[0])))
    later = made_up(np.isin(standing, list(sets[1])), ids=standing, num_steps=10)
    assert set(worst_case([results[0], later]).survivors.tolist()) == sets[0] & sets[1]


def test_worst_cases_never_mix_models_balls_branches_or_data() -> None:
    for changed in (
        {"eps": 4},
        {"norm": "l2"},
        {"branch": "clean"},
        {"split": "validation"},
        {"model": "wide"},
        {"dataset": "svhn"},
    ):
        assert worst_cases([first(10), first(20, num_steps=3, **changed)]) == [], changed
    (found,) = worst_cases([first(10, kind="clean", eps=0), first(20), first(15, num_steps=3)])
    assert (found.correct, len(found.protocols)) == (15, 2)


def test_bootstrap_of_a_mean_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(2).exponential(size=150)
    mine = _mean(values)
    other = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    assert mine.value == pytest.approx(values.mean())
    assert (mine.low, mine.high) == pytest.approx(tuple(other.confidence_interval), rel=0.03)
