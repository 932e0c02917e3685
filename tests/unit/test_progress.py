"""Running means between two log rows, and when training stops early, against sums and rounds counted by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from distributed_at.config import EvaluationConfig, TrainConfig, evaluation_entry
from distributed_at.engine.progress import EarlyStopping, Meters
from distributed_at.objectives import Terms

CPU = torch.device("cpu")


def terms(loss, terms=None, logits=None):
    return Terms(torch.tensor(loss), terms or {}, logits or {})


def one_hot(classes, count=3):
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def filled():
    """Five samples in two micro-batches: losses 2 and 7, three and one right."""
    meters = Meters(CPU)
    first = terms(2.0, terms={"kl": torch.tensor(0.5)}, logits={"adv": one_hot([0, 1, 2, 0])})
    meters.add(first, torch.tensor([0, 1, 2, 1]))
    meters.add(terms(7.0, terms={"kl": torch.tensor(3.0)}, logits={"adv": one_hot([2])}), torch.tensor([1]))
    return meters


EXPECTED = {"loss": (4 * 2 + 7) / 5, "kl": (4 * 0.5 + 3) / 5, "adv_accuracy": 3 / 5}


def test_a_row_holds_the_means_over_samples_not_over_micro_batches():
    row, images = filled().collect(lambda t: t)
    assert row == pytest.approx(EXPECTED)
    assert images == 5


def test_a_row_sums_over_ranks_before_it_divides():
    seen = []
    row, images = filled().collect(lambda t: seen.append(t.clone()) or 2 * t)
    assert row == pytest.approx(EXPECTED)
    assert images == 10
    # adv_accuracy, kl, loss; the images of each; images
    assert seen[0].tolist() == pytest.approx([3.0, 7 - 2.0, 15.0, 5.0, 5.0, 5.0, 5.0])


def test_a_row_starts_anew_after_the_last():
    meters = filled()
    meters.collect(lambda t: t)
    meters.add(terms(1.0), torch.tensor([0, 0]))
    assert meters.collect(lambda t: t) == ({"loss": 1.0}, 2)


def test_no_image_since_the_last_row_gives_no_number():
    assert Meters(CPU).collect(lambda t: t) == ({}, 0)
    assert filled().collect(torch.zeros_like) == ({}, 0)


def test_numbers_of_a_branch_that_keeps_some_images_are_over_these_alone():
    meters = Meters(CPU)
    logits, kept = {"adv": one_hot([0, 1]), "clean": one_hot([1])}, torch.tensor([1])
    meters.add(
        Terms(torch.tensor(1.0), {"clean_loss": torch.tensor(2.0)}, logits, kept, {"clean_loss": 1}),
        torch.tensor([0, 1]),
    )
    meters.add(terms(4.0, logits={"adv": one_hot([0])}), torch.tensor([2]))  # keeps none
    row, images = meters.collect(lambda t: t)
    assert row == pytest.approx({"loss": 2.0, "clean_loss": 2.0, "adv_accuracy": 2 / 3, "clean_accuracy": 1.0})
    assert images == 3


def test_images_before_a_resume_are_in_the_means_and_not_in_the_rate():
    back = Meters(CPU)
    back.load([filled().state()], 0, 1)
    back.start_at(7)
    back.add(terms(10.0), torch.tensor([0]))
    row, images = back.collect(lambda t: t)
    assert row["loss"] == pytest.approx((15 + 10) / 6)
    assert images == 1


def test_sums_are_saved_exactly_and_each_rank_takes_back_its_own():
    meters = filled()
    meters.add(terms(1 / 3), torch.tensor([0]))
    state, empty = meters.state(), Meters(CPU).state()
    for rank in range(2):
        back = Meters(CPU)
        back.load([empty, state], rank, world_size=2)
        assert back.state() == (empty, state)[rank]


def test_at_another_world_size_the_first_rank_takes_all_sums_and_the_others_none():
    state = filled().state()
    for world_size in (1, 3):
        taken = [Meters(CPU) for _ in range(world_size)]
        for rank, meters in enumerate(taken):
            meters.load([state, state], rank, world_size)
        assert taken[0].state()["counts"] == dict.fromkeys(EXPECTED, 10)
        assert taken[0].collect(lambda t: t)[0] == pytest.approx(EXPECTED)
        assert all(m.state() == Meters(CPU).state() for m in taken[1:])


def test_infinite_sums_are_saved_too():
    meters = Meters(CPU)
    meters.add(terms(math.inf), torch.tensor([0]))
    back = Meters(CPU)
    back.load([meters.state()], 0, 1)
    assert back.collect(lambda t: t)[0] == {"loss": math.inf}


def test_steps_are_counted_from_the_last_row_or_the_resumed_step():
    meters = Meters(CPU)
    assert [meters.steps_since(3), meters.steps_since(7), meters.steps_since(8)] == [4, 4, 1]
    meters.start_at(20)
    assert meters.steps_since(21) == 2


def result(correct, name="pgd"):
    return SimpleNamespace(correct=correct, total=10, accuracy=correct / 10, protocol=SimpleNamespace(name=name))


def stopping(patience=None, validation=True, drop=None):
    attacks = (evaluation_entry(kind="clean"),) if validation else ()
    train = TrainConfig(epochs=9, batch_size=4, patience_epochs=patience, stop_on_drop=drop)
    return EarlyStopping(train, EvaluationConfig(validation=attacks))


def test_the_last_protocol_selects_and_only_a_better_count_is_the_best():
    early = stopping()
    assert early.update(5, [result(9, "clean"), result(4, "pgd")], 5)
    assert early.best == {"step": 5, "protocol": "pgd", "correct": 4, "total": 10, "accuracy": 0.4}
    assert not early.update(10, [result(10, "clean"), result(4)], 5)
    assert early.best["step"] == 5
    assert early.update(15, [result(0, "clean"), result(5)], 5)
    assert early.best["step"] == 15
    assert not early.update(20, [result(3)], 5)
    assert early.best["correct"] == 5


def test_nothing_is_selected_without_validation_or_results():
    assert not stopping(validation=False).update(5, [result(9)], 5)
    early = stopping()
    assert not early.update(5, [], 5)
    assert early.best is None


def test_patience_counts_epochs_since_the_best_round():
    early = stopping(patience=2)
    early.update(5, [result(4)], 5)
    early.update(14, [result(4)], 5)
    assert not early.should_stop
    early.update(15, [result(3)], 5)
    assert early.should_stop


def test_no_patience_never_stops():
    early = stopping()
    early.update(5, [result(4)], 5)
    early.update(500, [result(3)], 5)
    assert early.should_stop is False


def test_a_fall_between_two_rounds_ends_the_run_and_the_best_before_it_stays():
    """Wong et al.'s code: robust accuracy drops by more than 0.2 from one look to the next; slow falls are none."""
    early = stopping(drop=0.2)
    for step, correct in ((5, 6), (10, 5), (15, 3), (20, 1)):  # by 0.1, 0.2, 0.2
        early.update(step, [result(9, "clean"), result(correct)], 5)
        assert (early.should_stop, early.collapse) == (False, None)
    early.update(25, [result(5)], 5)
    assert not early.update(30, [result(2)], 5)
    assert early.should_stop
    assert (early.collapse, early.ending) == ((0.5, 0.2), "collapsed")
    assert early.best["step"] == 5
    calm = stopping()
    calm.update(5, [result(9)], 5)
    calm.update(10, [result(0)], 5)
    assert not calm.should_stop


def test_a_fall_over_a_restart_is_seen():
    early, back = stopping(drop=0.2), stopping(drop=0.2)
    early.update(5, [result(6)], 5)
    back.load_state_dict(early.state_dict())
    back.update(10, [result(2)], 5)
    assert (back.should_stop, back.ending) == (True, "collapsed")
    again = stopping(drop=0.2)
    again.load_state_dict(json.loads(json.dumps(back.state_dict())))
    assert (again.should_stop, again.ending) == (True, "collapsed")
    old = stopping(drop=0.2)
    old.load_state_dict({"best": None, "should_stop": False})
    assert old.update(10, [result(2)], 5)


def test_early_stopping_is_resumed_as_it_was():
    early, back = stopping(patience=1), stopping(patience=1)
    early.update(5, [result(4)], 5)
    early.update(10, [result(4)], 5)
    back.load_state_dict(early.state_dict())
    assert (back.best, back.should_stop, back.ending) == (early.best, True, "early")


def test_a_rank_without_samples_reduces_what_the_others_do():
    seen = []
    row, images = Meters(CPU).collect(
        lambda t: seen.append(t.clone()) or t + 2.0, gather=lambda own: [own, ["loss", "kl"], ["kl"]]
    )
    assert seen[0].tolist() == [0.0] * 5  # sums of kl and loss, their counts, images
    assert (row, images) == ({"kl": 1.0, "loss": 1.0}, 2)
