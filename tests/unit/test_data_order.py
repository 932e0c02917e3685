"""The order of an epoch, its sharing between ranks, splits and the prefetcher."""

import threading
import time

import numpy as np
import pytest

from distributed_at.config import DataConfig
from distributed_at.data import open_split
from distributed_at.data.order import StepOrder
from distributed_at.data.prefetch import Prefetcher
from distributed_at.data.split import carve_validation, fixed_test_ids, limit_ids
from distributed_at.errors import ConfigError
from tests.patience import wait_until


def test_an_epoch_shows_each_image_exactly_once():
    order = StepOrder(103, 10, seed=5, drop_last=False)
    ids = np.concatenate([order.ids(3, s) for s in range(order.steps_per_epoch)])
    assert order.steps_per_epoch == 11
    assert sorted(ids.tolist()) == list(range(103))
    assert [order.length(s) for s in (0, 9, 10)] == [10, 10, 3]


def test_drop_last_leaves_out_only_the_incomplete_batch():
    order = StepOrder(103, 10, seed=5, drop_last=True)
    assert order.steps_per_epoch == 10
    kept = StepOrder(103, 10, seed=5, drop_last=False)
    for step in range(10):
        np.testing.assert_array_equal(order.ids(0, step), kept.ids(0, step))


def test_order_depends_on_seed_and_epoch_and_on_nothing_that_ran_before():
    order = StepOrder(200, 16, seed=1)
    late = order.ids(7, 3)
    np.testing.assert_array_equal(StepOrder(200, 16, seed=1).ids(7, 3), late)
    assert not np.array_equal(order.ids(8, 3), late)
    assert not np.array_equal(StepOrder(200, 16, seed=2).ids(7, 3), late)


def test_returned_ids_may_be_changed_without_changing_the_order():
    order = StepOrder(20, 4, seed=1)
    first = order.ids(0, 0)
    expected = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(order.ids(0, 0), expected)


def test_order_maps_to_the_ids_of_a_split():
    ids = np.array([3, 8, 9, 50, 77])
    order = StepOrder(5, 2, seed=0, drop_last=False, sample_ids=ids)
    assert sorted(np.concatenate([order.ids(0, s) for s in range(3)]).tolist()) == ids.tolist()


def test_batch_larger_than_the_split_is_refused_when_dropped():
    with pytest.raises(ConfigError, match="drop_last"):
        StepOrder(5, 8, seed=0, drop_last=True)


def test_locate_counts_steps_through_epochs():
    order = StepOrder(100, 10, seed=0)
    assert [order.locate(s) for s in (0, 9, 10, 25)] == [(0, 0), (0, 9), (1, 0), (2, 5)]


def test_validation_is_disjoint_from_train_and_stable():
    ids = np.arange(1000) * 2
    train, held = carve_validation(ids, size=100, seed=0)
    assert len(held) == 100
    assert sorted([*train.tolist(), *held.tolist()]) == ids.tolist()
    np.testing.assert_array_equal(held, carve_validation(ids, size=100, seed=0)[1])
    assert not np.array_equal(held, carve_validation(ids, size=100, seed=1)[1])


def test_the_first_images_are_held_out_as_by_gowal_et_al():
    """Their code's comment skips the first 1,024 of the training images."""
    train, held = carve_validation(np.arange(50_000)[::-1], size=1024, seed=0, choice="first")
    assert held.tolist() == list(range(1024))
    assert train.tolist() == list(range(1024, 50_000))


def test_the_held_out_images_of_rice_et_al_are_those_of_their_code():
    """generate_validation.py: seed 0, a permutation of 50,000, of which the first 1,000 are the validation set."""
    np.random.seed(0)
    theirs = np.random.permutation(50_000)[:1000]
    assert theirs[:5].tolist() == [11841, 19602, 45519, 25747, 42642]  # numpy has never changed this stream
    train, held = carve_validation(np.arange(50_000), size=1000, seed=0, choice="numpy")
    assert held.tolist() == sorted(theirs.tolist())
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(50_000))
    assert carve_validation(np.arange(50_000), size=1000, seed=1, choice="numpy")[1].tolist() != held.tolist()


@pytest.mark.parametrize("choice", ["counters", "first", "numpy"])
def test_every_choice_of_held_out_images_reaches_the_splits_of_a_recipe(choice):
    config = DataConfig(dataset="digits", image_size=8, validation_size=40, validation_choice=choice)
    published = open_split(DataConfig(dataset="digits", image_size=8), "train", seed=0).sample_ids
    train, held = (open_split(config, split, seed=7).sample_ids for split in ("train", "validation"))
    expected = carve_validation(published, size=40, seed=0, choice=choice)
    assert (train.tolist(), held.tolist()) == (expected[0].tolist(), expected[1].tolist())


def test_a_seed_that_a_choice_of_held_out_images_has_no_use_for_is_refused():
    with pytest.raises(ValueError, match="validation_seed 3 has no effect"):
        DataConfig(dataset="digits", image_size=8, validation_choice="first", validation_seed=3)
    with pytest.raises(ValueError, match="below 2"):
        DataConfig(dataset="digits", image_size=8, validation_choice="numpy", validation_seed=2**32)


def test_validation_that_takes_everything_is_refused():
    with pytest.raises(ConfigError, match="validation_size"):
        carve_validation(np.arange(10), size=10, seed=0)


def test_limit_draws_over_the_whole_split():
    chosen = limit_ids(np.arange(1000), 100, seed=0)  # a sorted listing: the first 100 would be one class
    assert len(set(chosen.tolist())) == 100
    assert 350 < chosen.mean() < 650


def test_fixed_test_part_is_always_the_same():
    train, test = fixed_test_ids(50, 10)
    assert len(test) == 10
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(50))
    np.testing.assert_array_equal(test, fixed_test_ids(50, 10)[1])


def test_draws_of_a_split_never_change():
    """A run that goes on under a later version must hold out, keep and order the same images."""
    ids = np.arange(20)
    assert carve_validation(ids, size=4, seed=0)[1].tolist() == [0, 8, 11, 18]
    assert limit_ids(ids, 4, seed=0).tolist() == [1, 3, 8, 17]
    assert fixed_test_ids(20, 4)[1].tolist() == [2, 8, 9, 14]
    assert StepOrder(20, 4, seed=0).ids(1, 2).tolist() == [4, 15, 9, 11]


def test_a_limit_that_leaves_nothing_out_returns_the_ids_as_they_are():
    ids = np.array([5, 3, 9])
    for limit in (None, 3, 4):
        assert limit_ids(ids, limit, seed=0).tolist() == [5, 3, 9]
    assert len(limit_ids(ids, 2, seed=0)) == 2


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_step_of_every_small_epoch_has_the_length_that_it_says(drop_last):
    for images in range(1, 14):
        for batch in range(1, images + (1 if drop_last else 3)):
            order = StepOrder(images, batch, 0, drop_last)
            steps = range(order.steps_per_epoch)
            assert [order.length(s) for s in steps] == [len(order.ids(0, s)) for s in steps]
            assert order.steps_per_epoch == (images // batch if drop_last else -(-images // batch))
            for outside in (-1, order.steps_per_epoch):
                with pytest.raises(ValueError, match="step_in_epoch"):
                    order.ids(0, outside)


def test_an_order_of_nothing_is_refused():
    for images, batch in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match=">= 1"):
            StepOrder(images, batch, 0)
    with pytest.raises(ValueError, match="2 entries for num_samples 3"):
        StepOrder(3, 1, 0, sample_ids=np.arange(2))


def test_the_last_incomplete_batch_is_dropped_unless_kept():
    assert StepOrder(5, 2, 0).steps_per_epoch == 2


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetcher_keeps_the_order(depth):
    with Prefetcher(range(20), lambda k: k * k, depth) as items:
        assert list(items) == [k * k for k in range(20)]


def test_prefetcher_reads_at_most_depth_ahead():
    started = []
    with Prefetcher(range(100), lambda k: started.append(k) or k, 3) as items:
        next(items)
        wait_until(lambda: len(started) >= 4, "three more are read ahead")
        time.sleep(0.05)
        assert started == [0, 1, 2, 3]


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetcher_raises_a_reader_error_in_the_consumer_after_the_items_before_it(depth):
    def read(k):
        if k == 2:
            raise OSError("disk gone")
        return k

    with Prefetcher(range(5), read, depth) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(OSError, match="disk gone"):
            next(items)


def test_prefetcher_close_joins_its_thread_and_ends_iteration():
    before = threading.active_count()
    items = Prefetcher(iter(int, 1), lambda k: k, 4)  # endless requests
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    assert list(items) == []
