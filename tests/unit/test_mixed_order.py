"""Labelled and extra images in a batch: two streams without replacement, shares by phase, copies, numbers of uses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distributed_at.batch import EXTRA, LABELLED
from distributed_at.data.mixed_order import MixedOrder, phases
from distributed_at.data.order import StepOrder
from distributed_at.data.uses import FIRST_EXTRA, UseNumbers
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.microbatches import request
from distributed_at.errors import ConfigError
from distributed_at.rng import Purpose, permuted

IDS = np.arange(50) * 3 + 2  # labelled ids with gaps, as after held-out images


def steps(order: MixedOrder, count: int) -> list[np.ndarray]:
    return [order.ids(*divmod(step, order.steps_per_epoch)) for step in range(count)]


def split(order: MixedOrder, ids: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the labelled ids and the extra rows of a batch, in its order."""
    beside = order.numbers.origins(ids) == EXTRA
    return order.numbers.labelled_ids(ids[~beside]).tolist(), order.numbers.extra_rows(ids[beside]).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 64, 65, 100, 1000, 4097])
def test_a_permutation_by_places_shows_each_number_once(size):
    order = permuted(np.arange(size), size, seed=3, epoch=2, purpose=Purpose.EXTRA_MIX)
    assert sorted(order.tolist()) == list(range(size))
    some = np.random.default_rng(0).integers(0, size, 7)
    np.testing.assert_array_equal(permuted(some, size, 3, 2, purpose=Purpose.EXTRA_MIX), order[some])


def test_a_permutation_by_places_is_another_for_every_seed_and_pass_and_never_changes():
    whole = np.arange(1000)
    found = [permuted(whole, 1000, seed, turn, purpose=Purpose.EXTRA_MIX) for seed in (0, 1) for turn in (0, 1)]
    assert len({order.tobytes() for order in found}) == 4
    # a run that goes on under a later version must show the same images
    assert permuted(whole, 1000, 0, 0, purpose=Purpose.EXTRA_MIX)[:6].tolist() == PINNED
    assert permuted(np.arange(3), 50_000_000, 0, 1, purpose=Purpose.EXTRA_MIX).tolist() == PINNED_LARGE


PINNED = [738, 542, 985, 178, 241, 577]
PINNED_LARGE = [6019760, 35328814, 49501739]


def test_every_image_is_as_likely_at_every_place_and_beside_every_other():
    size, draws = 6, 1500
    places, pairs = np.zeros((size, size)), np.zeros((size, size))
    for seed in range(draws):
        order = permuted(np.arange(size), size, seed, 0, purpose=Purpose.EXTRA_MIX)
        places[np.arange(size), order] += 1
        pairs[order[0], order[1]] += 1
    expected = draws / size
    assert ((places - expected) ** 2 / expected).sum() < 60  # chi-squared of 25 degrees: 60 is 1 in 10,000
    expected = draws / (size * (size - 1))
    off = pairs[~np.eye(size, dtype=bool)]
    assert ((off - expected) ** 2 / expected).sum() < 65  # of 29 degrees


def test_fifty_million_images_are_ordered_without_an_order_of_fifty_million(monkeypatch):
    monkeypatch.setattr("distributed_at.data.mixed_order.epoch_order", lambda seed, epoch, count: np.arange(count))
    order = MixedOrder(np.arange(50_000), 50_000_000, 1024, seed=0, ratios=((0.0, 0.3),))
    seen = np.concatenate([order.numbers.extra_rows(ids[ids >= FIRST_EXTRA]) for ids in steps(order, 20)])
    assert len(set(seen.tolist())) == 20 * (1024 - 307)
    assert 20e6 < seen.mean() < 30e6


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_both_streams_show_each_image_once_a_pass_at_their_own_pace(ratio):
    order = MixedOrder(IDS, 30, 10, seed=4, drop_last=False, ratios=((0.0, ratio),))
    assert order.steps_per_epoch == 5
    labelled, extra = [], []
    for ids in steps(order, 30):
        own, beside = split(order, ids)
        assert (len(own), len(beside)) == (round(10 * ratio), 10 - round(10 * ratio))
        labelled += own
        extra += beside
    for stream, all_of_it in ((labelled, IDS.tolist()), (extra, list(range(30)))):
        for start in range(0, len(stream), len(all_of_it)):
            of_pass = stream[start : start + len(all_of_it)]
            assert len(set(of_pass)) == len(of_pass)
            assert len(of_pass) < len(all_of_it) or sorted(of_pass) == all_of_it


def test_extra_images_come_in_another_order_in_every_pass():
    order = MixedOrder(IDS, 30, 10, seed=4, ratios=((0.0, 0.0),))
    first, second = (np.concatenate([split(order, ids)[1] for ids in steps(order, 6)[s : s + 3]]) for s in (0, 3))
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(30))


def test_labelled_images_alone_come_as_without_extra_ones():
    order = MixedOrder(IDS, 30, 10, seed=4, ratios=((0.0, 1.0),))
    plain = StepOrder(50, 10, seed=4, sample_ids=IDS)
    for step in range(15):
        place = divmod(step, 5)
        np.testing.assert_array_equal(order.ids(*place), plain.ids(*place))


def test_any_step_can_be_asked_for_alone():
    def make():
        return MixedOrder(IDS, 7, 10, seed=4, copies=2, ratios=((0.0, 1.0), (0.5, 0.4), (2.0, 0.0)))

    known = steps(make(), 20)
    for step in (19, 3, 11, 0):
        np.testing.assert_array_equal(make().ids(*divmod(step, 5)), known[step])


def test_no_two_uses_of_an_epoch_have_the_same_number():
    """Batches that use a small pool twice, and a labelled image at a pass's end and the next one's begin."""
    order = MixedOrder(IDS, 7, 10, seed=4, drop_last=False, copies=2, ratios=((0.0, 0.8),))
    twice = 0
    for epoch in range(12):
        numbers = np.concatenate([order.ids(epoch, step) for step in range(order.steps_per_epoch)])
        assert len(set(numbers.tolist())) == len(numbers)
        twice += len(numbers) - len({*order.numbers.extra_rows(numbers[numbers >= FIRST_EXTRA]).tolist()})
    assert twice > 0


def test_each_labelled_image_stands_in_a_batch_once_a_part_with_numbers_of_its_own():
    """As four workers that each take the same labelled images: batch 1024, 30 %, copies 4 make 77 different ones."""
    order = MixedOrder(np.arange(50_000), 1_000_000, 1024, seed=0, copies=4, ratios=((0.0, 0.3),))
    for step in (0, 47):
        ids = order.ids(1, step)
        origins = order.numbers.origins(ids)
        labelled = order.numbers.labelled_ids(ids)
        assert (origins == LABELLED).sum() == 308
        own = Counter(labelled[origins == LABELLED].tolist())
        assert len(own) == 77
        assert set(own.values()) == {4}
        parts = [sorted(labelled[s : s + 256][origins[s : s + 256] == LABELLED].tolist()) for s in range(0, 1024, 256)]
        assert parts[0] == parts[1] == parts[2] == parts[3]
        assert len(set(ids.tolist())) == 1024
        shares = [(origins[s : s + 32] == LABELLED).sum() for s in range(0, 1024, 32)]  # of BN groups of 32
        assert set(shares) == {9, 10}


def test_first_uses_keep_the_images_own_ids():
    order = MixedOrder(IDS, 30, 10, seed=4, ratios=((0.0, 0.5),))
    assert set(order.ids(0, 0)[order.ids(0, 0) < FIRST_EXTRA].tolist()) <= set(IDS.tolist())


def test_phases_begin_with_the_batch_that_their_epoch_begins_with():
    order = MixedOrder(IDS, 30, 10, seed=4, repeats=2, ratios=((0.0, 1.0), (0.5, 0.2), (2.0, 0.0)))
    labelled = [order.phase(*divmod(step, order.steps_per_epoch)).labelled for step in range(30)]
    # five batches an epoch, each shown twice: epoch 0.5 is batch 2.5, so batch 3 is the first of its phase
    assert labelled == [10] * 6 + [2] * 14 + [0] * 10
    assert [order.labelled_share(*divmod(step, 10)) for step in (0, 6, 20)] == [1.0, 0.2, 0.0]
    np.testing.assert_array_equal(order.ids(0, 6), order.ids(0, 7))


def test_a_share_between_nothing_and_all_leaves_at_least_one_image_of_both():
    found = [
        phases(((0.0, r),), batch_size=8, copies=2, batches_per_epoch=1)[0].distinct for r in (0, 0.01, 0.5, 0.99, 1)
    ]
    assert found == [0, 1, 2, 3, 4]
    nearest = [phases(((0.0, r / 10),), batch_size=256, copies=1, batches_per_epoch=1)[0].labelled for r in range(11)]
    assert nearest == [0, 26, 51, 77, 102, 128, 154, 179, 205, 230, 256]


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_is_as_many_batches_as_the_labelled_images_fill(drop_last):
    for ratio in (0.0, 0.3, 1.0):
        order = MixedOrder(np.arange(50_000), 10, 1024, seed=0, drop_last=drop_last, ratios=((0.0, ratio),))
        assert order.steps_per_epoch == (48 if drop_last else 49)
        assert len(order.ids(0, order.steps_per_epoch - 1)) == order.length(0) == 1024


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_read_each_use_of_a_step_once(world_size):
    order = MixedOrder(IDS, 30, 16, seed=4, copies=2, ratios=((0.0, 0.4),))
    plan = BatchPlan.resolve(batch_size=16, world_size=world_size, bn_group_size=2)
    found = [request(plan, order, rank, 4) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate([w.ids for w in found]), order.ids(1, 1))
    groups = np.concatenate([w.group_ids for w in found])
    np.testing.assert_array_equal(groups, 8 + np.arange(16) // 2)
    assert {w.labelled_share for w in found} == {0.375}


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(ConfigError, match=r"is not a multiple of data.labelled_copies 4"):
        MixedOrder(IDS, 30, 10, seed=0, copies=4)
    with pytest.raises(ConfigError, match="hold extra images, and there are none"):
        MixedOrder(IDS, 0, 10, seed=0, ratios=((0.0, 0.5),))
    with pytest.raises(ConfigError, match="larger than the training split"):
        MixedOrder(IDS, 30, 64, seed=0)
    with pytest.raises(ConfigError, match="can be told apart"):
        UseNumbers(span=50_000, num_extra=1 << 30).require_room(2, 3)
    with pytest.raises(ValueError, match="step_in_epoch"):
        MixedOrder(IDS, 30, 10, seed=0).ids(0, 5)
