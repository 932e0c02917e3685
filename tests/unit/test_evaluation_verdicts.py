"""Intervals, worst cases and verdicts say what the rows say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distributed_at.config import AttackConfig, evaluation_entry
from distributed_at.evaluation import EvaluationResult, Protocol, Rows, judge, wilson
from distributed_at.evaluation.verdicts import vanishing_gradients
from distributed_at.evaluation.worst_case import IncomparableError, worst_case, worst_cases
from tests.evaluation_kit import measure, source, trained


def result(correct: int, *, total: int = 500, by: str = "pgd", **changes) -> EvaluationResult:
    """A result in which the first ``correct`` of ``total`` samples survive."""
    values = {"kind": "pgd", "norm": "linf", "eps": 8, "num_steps": 20, "loss": "ce", "attacks": ("pgd",), **changes}
    content = {"weights": "w", "data_ids": "d", "num_samples": total, **values}
    protocol = Protocol.from_dict(content)  # which leaves out what belongs to another kind
    right = np.arange(total) < correct
    rows = Rows(
        sample_id=np.arange(total),
        label=np.zeros(total),
        clean_prediction=np.zeros(total),
        adv_prediction=~right,
        correct_clean=np.ones(total),
        correct_adv=right,
        loss=np.zeros(total),
        target_hit=np.zeros(total),
        attack=np.where(right, "", by),
    )
    return EvaluationResult(protocol=protocol, rows=rows, seconds=1.0, computed=total, expected=total)


def codes(*results: EvaluationResult) -> list[str]:
    return [verdict.code for verdict in judge(results)]


def test_wilson_agrees_with_published_intervals() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="correct"):
        wilson(3, 2)


def test_a_sound_set_of_results_raises_no_suspicion() -> None:
    auto = result(242, kind="autoattack", attacks=("apgd-ce", "apgd-t", "fab-t", "square"), by="apgd-t")
    assert codes(result(295, num_steps=1), result(268), result(262, num_steps=100), auto) == []


def test_stronger_attack_that_breaks_less_is_suspected_beyond_chance_alone() -> None:
    assert codes(result(250), result(270, num_steps=100)) == ["stronger_attack_is_weaker"]
    assert codes(result(250), result(252, num_steps=100)) == []
    assert codes(result(250), result(290, kind="autoattack")) == ["stronger_attack_is_weaker"]


def test_gaps_and_query_attacks_are_suspected() -> None:
    assert codes(result(400, num_steps=1, step_size=8), result(10)) == ["single_step_masking"]
    assert codes(result(400, num_steps=1, step_size=2), result(10)) == []  # too short a step to tell anything
    assert codes(result(300), result(100, kind="autoattack")) == ["pgd_overestimates"]
    square = result(250, kind="autoattack", attacks=("apgd-ce", "square"), by="square")
    assert "query_attack_beats_gradients" in codes(square)


def test_results_of_other_balls_are_not_compared() -> None:
    assert codes(result(100), result(400, eps=4, num_steps=100)) == []


def test_vanished_gradients_are_seen() -> None:
    data, model = source(size=32), trained().eval()
    x, y = data.images.float() / 255, data.all_labels
    assert vanishing_gradients(model, x, y) is None
    assert vanishing_gradients(lambda x: 1e4 * model(x), x, model(x).argmax(1)).code == "vanishing_gradients"
    assert vanishing_gradients(lambda x: model((x > 0.5).float()) + 0 * x.sum(), x, y).numbers["share"] == 1


def test_worst_cases_are_one_a_ball_over_what_every_attack_left() -> None:
    strong = result(200, num_steps=100)
    right = np.arange(500) >= 400  # another 100 survivors than PGD-20's 250
    auto = replace(result(0, kind="autoattack", num_steps=0, by="apgd-t"), rows=replace(strong.rows, correct_adv=right))
    clean = result(480, kind="clean", eps=0, num_steps=0)
    single, other = result(300, eps=4), result(30, eps=16, branch="clean")
    (found,) = worst_cases([clean, result(250), strong, single, other])
    assert (found.correct, found.total, found.remaining) == (200, 500, (250, 200))
    (found,) = worst_cases([clean, result(250), auto])
    assert found.correct == 0
    assert found.name == "PGD-20 linf 8/255 + AutoAttack- linf 8/255 (reduced budget)"
    assert worst_cases([clean, single]) == []


def test_results_that_do_not_belong_together_are_not_intersected() -> None:
    with pytest.raises(IncomparableError, match="the ball"):
        worst_case([result(100), result(90, eps=4)])
    with pytest.raises(IncomparableError, match="left out"):
        worst_case([result(100), result(90, total=95)])


def test_low_precision_is_part_of_the_protocol_and_runs() -> None:
    model, data = trained(), source(size=40)
    attack = AttackConfig(eps=40.0, num_steps=3, step_size=15.0, dtype="bf16")
    low = measure(model, data, evaluation_entry(kind="pgd", attack=attack))
    full = measure(model, data, evaluation_entry(kind="pgd", attack=attack.model_copy(update={"dtype": "fp32"})))
    assert low.protocol.dtype == "bf16"
    assert low.protocol.hash != full.protocol.hash
    assert not torch.equal(torch.from_numpy(low.rows.loss), torch.from_numpy(full.rows.loss))
    assert abs(low.accuracy - full.accuracy) < 0.15


def test_worst_case_of_one_attack_is_that_attack() -> None:
    assert worst_case([result(3, total=5)]).correct == 3
