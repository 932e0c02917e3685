"""What follows a step that is not finite, or whose loss jumps: counts, decisions and whose samples they were."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from distributed_at.config import TrainConfig
from distributed_at.engine.nonfinite import LOSSES_KEPT, LOSSES_NEEDED, NonfiniteGuard, offending_ids, weights_finite
from distributed_at.errors import DivergedError
from distributed_at.objectives import Terms


def guard(weights_stay: bool = True, **fields: object) -> NonfiniteGuard:
    config = TrainConfig.model_validate({"epochs": 1, "batch_size": 8, "max_nonfinite_steps": 3, **fields})
    return NonfiniteGuard(config, weights_stay=weights_stay)


def test_only_bad_steps_in_a_row_end_a_run():
    g = guard()
    for step in range(0, 30, 3):
        assert g.failed(step, "gradient") == g.failed(step + 1, "gradient") == "skip"
        g.passed()
    g.failed(30, "gradient")
    g.failed(31, "gradient")
    with pytest.raises(DivergedError, match="at step 32 \\(3 steps in a row"):
        g.failed(32, "gradient")


def test_weights_that_took_the_step_end_the_run_at_once():
    with pytest.raises(DivergedError):
        guard(weights_stay=False).failed(4, "gradient")
    with pytest.raises(DivergedError):
        guard().failed(4, "weight", weights_stay=False)


def test_a_rollback_passes_over_each_bad_step_and_ends_where_too_many_follow_each_other():
    g = guard(on_nonfinite="rollback")
    assert g.failed(5, "loss") == g.failed(9, "loss") == g.failed(6, "loss") == "rollback"
    assert g.skipped == {5, 6, 9}
    with pytest.raises(DivergedError):
        g.failed(7, "loss")  # 5, 6 and 7


def test_an_older_checkpoint_does_not_make_a_bad_step_good_again():
    g = guard(on_nonfinite="rollback")
    older = json.loads(json.dumps(g.state_dict()))
    g.failed(5, "loss")
    g.load_state_dict(older)
    assert g.skipped == {5}
    g.load_state_dict({"skipped": [2], "in_row": 1, "losses": [0.5]})
    assert g.skipped == {2, 5}
    assert g.state_dict() == {"skipped": [2, 5], "in_row": 1, "losses": [0.5]}


def test_a_run_that_goes_back_to_one_checkpoint_again_and_again_ends():
    g = guard(on_nonfinite="rollback")
    g.failed(5, "loss")
    g.failed(8, "loss")
    g.check_progress(4)
    g.failed(11, "loss")
    g.check_progress(6)  # two since step 6
    with pytest.raises(DivergedError, match="3 steps after step 4"):
        g.check_progress(4)


def jumping(*losses: float) -> list[bool]:
    g = guard(on_nonfinite="rollback", spike_factor=10)
    return [g.jumps(loss) for loss in losses]


def test_a_jump_is_judged_by_the_median_of_enough_recent_losses():
    calm = [1.0] * LOSSES_NEEDED
    assert jumping(*calm, 10.0, 10.1) == [False] * (LOSSES_NEEDED + 1) + [True]
    assert not any(jumping(*calm[1:], 1000.0))  # one too few to judge by
    assert all(jumping(*calm, *[50.0] * LOSSES_KEPT)[LOSSES_NEEDED:]), "jumps became the measure"
    assert jumping(*calm, 9.0, 50.0)[-1], "one large loss became the measure"
    assert not any(guard().jumps(loss) for loss in (*calm, 1e9))  # not asked for


def test_old_and_infinite_losses_are_no_measure():
    assert not any(jumping(*[1.0] * LOSSES_NEEDED, *[5.0] * LOSSES_KEPT, 49.0))
    assert jumping(*[1.0] * LOSSES_NEEDED, *[5.0] * (LOSSES_KEPT // 2 - LOSSES_NEEDED), 49.0)[-1]
    g = guard(on_nonfinite="rollback", spike_factor=10)
    for _ in range(LOSSES_KEPT):
        g.jumps(math.inf)
    assert g.state_dict()["losses"] == []


def terms(loss: float, clean_rows=None, **logits: torch.Tensor) -> Terms:
    return Terms(torch.tensor(loss), {}, logits, clean_rows=clean_rows)


def bad_rows(count: int, *rows: int) -> torch.Tensor:
    logits = torch.zeros(count, 3)
    logits[list(rows), 1] = float("inf")
    return logits


def test_samples_are_named_by_their_logits_of_either_branch():
    ids = [torch.tensor([40, 10, 30, 20]), torch.tensor([7, 5, 6, 8])]
    clean_rows = torch.tensor([1, 3])
    found = offending_ids(
        [terms(1.0, adv=bad_rows(4, 2)), terms(1.0, clean_rows, adv=bad_rows(4), clean=bad_rows(2, 1))], ids
    )
    assert found == [8, 30]  # row 1 of the clean logits is row 3 of the batch


def test_where_no_logit_tells_all_samples_of_the_bad_loss_are_suspects():
    ids = [torch.tensor([4, 1]), torch.tensor([3, 2])]
    assert offending_ids([terms(1.0, adv=bad_rows(2)), terms(math.nan, adv=bad_rows(2))], ids) == [2, 3]


@pytest.mark.parametrize("place", ["weight", "running_var"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_number_that_is_not_finite_is_found_in_weights_and_statistics(place, value):
    norm = nn.BatchNorm1d(3)
    assert weights_finite(nn.Sequential(nn.Linear(2, 3), norm))
    getattr(norm, place).data[1] = value
    assert not weights_finite(nn.Sequential(nn.Linear(2, 3), norm))
