"""Batch arithmetic: what is refused, what is fixed by the recipe whatever the world size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_at.engine.batching import (
    BatchPlan,
    largest_world_size,
    steps_per_epoch,
    total_steps,
    valid_world_sizes,
)
from distributed_at.errors import ConfigError


def test_full_scale_imagenet_batch_is_128_workers_of_32():
    plan = BatchPlan.resolve(batch_size=4096, world_size=128, micro_batch_size=256, bn_group_size=32)
    assert (plan.share, plan.micro_batch, plan.accumulation, plan.groups_per_step) == (32, 32, 1, 128)


def test_one_device_accumulates_the_same_batch():
    plan = BatchPlan.resolve(batch_size=4096, world_size=1, micro_batch_size=256, bn_group_size=32)
    assert (plan.share, plan.micro_batch, plan.accumulation) == (4096, 256, 16)
    assert (plan.groups_per_step, plan.groups_per_micro_batch) == (128, 8)


def test_group_of_128_on_two_ranks_spans_both():
    plan = BatchPlan.resolve(batch_size=128, world_size=2, bn_group_size=128)
    assert (plan.ranks_per_group, plan.accumulation, plan.micro_batch) == (2, 1, 64)
    assert plan.group_ranks(0) == plan.group_ranks(1) == (0, 1)


def test_spanning_groups_are_consecutive_ranks():
    plan = BatchPlan.resolve(batch_size=256, world_size=8, bn_group_size=128)
    assert [plan.group_ranks(rank) for rank in (0, 3, 4, 7)] == [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        ({"batch_size": 128, "world_size": 3}, ["128 is not a multiple of 3", "nearest that can: 2 and 4"]),
        ({"batch_size": 128, "world_size": 200}, ["nearest that can: 128"]),
        ({"batch_size": 128, "world_size": 0}, ["at least 1", "nearest that can: 1"]),
        (
            {"batch_size": 96, "world_size": 3, "bn_group_size": 48},
            ["neither divides nor is a multiple of train.bn_group_size 48", "nearest that can: 2 and 4"],
        ),
        (
            {"batch_size": 96, "world_size": 1, "micro_batch_size": 36},
            ["not a multiple of train.micro_batch_size 36", "nearest that can: 3"],
        ),
        (
            {"batch_size": 128, "world_size": 1, "micro_batch_size": 32, "bn_group_size": 64},
            ["micro_batch_size 32 is not a multiple of train.bn_group_size 64", "nearest that can: 4"],
        ),
        (
            {"batch_size": 128, "world_size": 2, "micro_batch_size": 32, "bn_group_size": 128},
            ["spans 2 ranks", "nearest that can: 4"],
        ),
    ],
)
def test_world_size_that_does_not_divide_is_refused_with_the_nearest(arguments, phrases):
    with pytest.raises(ConfigError) as caught:
        BatchPlan.resolve(**arguments)
    for phrase in phrases:
        assert phrase in str(caught.value)


@given(
    groups=st.integers(1, 12),
    group=st.sampled_from([1, 2, 3, 4, 8, 32]),
    factor=st.sampled_from([None, 1, 2, 4]),
)
def test_every_valid_world_size_satisfies_the_batch_identity_and_keeps_the_groups(groups, group, factor):
    batch, micro = groups * group, None if factor is None else factor * group
    for world in valid_world_sizes(batch, micro_batch_size=micro, bn_group_size=group):
        plan = BatchPlan.resolve(batch_size=batch, world_size=world, micro_batch_size=micro, bn_group_size=group)
        assert plan.world_size * plan.micro_batch * plan.accumulation == batch
        covered = [p for rank in range(world) for low, high in plan.micro_bounds(rank) for p in range(low, high)]
        assert covered == list(range(batch))
        for rank in range(world):
            for low, high in plan.micro_bounds(rank):
                # a forward holds whole groups, or lies inside the one group that its ranks share
                if plan.ranks_per_group == 1:
                    assert low % group == 0
                    assert high % group == 0
                else:
                    assert low // group == (high - 1) // group


@given(length=st.integers(1, 127), world=st.sampled_from([1, 2, 4, 8, 16]))
def test_incomplete_batch_keeps_its_groups_whatever_the_world_size(length, world):
    plan = BatchPlan.resolve(batch_size=128, world_size=world, bn_group_size=8)
    covered, starts = [], set()
    for rank in range(world):
        low, high = plan.rank_bounds(rank, length)
        covered += range(low, high)
        starts.add(low)
    assert covered == list(range(length))
    assert all(start % 8 == 0 or start == length for start in starts)


def test_incomplete_batch_is_split_evenly_inside_a_spanning_group():
    plan = BatchPlan.resolve(batch_size=128, world_size=2, bn_group_size=128)
    assert [plan.rank_bounds(rank, 80) for rank in (0, 1)] == [(0, 40), (40, 80)]


def test_free_group_size_follows_the_machine_and_says_so():
    two, four = (BatchPlan.resolve(batch_size=128, world_size=w) for w in (2, 4))
    assert (two.group_free, two.group_size, four.group_size) == (True, 64, 32)


def test_epoch_group_is_the_same_at_every_world_size():
    one, four = (BatchPlan.resolve(batch_size=128, world_size=w, bn_group_size=32) for w in (1, 4))
    assert one.epoch_group(3, 70) == four.epoch_group(3, 70) == 3 * 4 + 2


def test_largest_world_size_for_auto():
    assert largest_world_size(7, batch_size=128) == 4
    assert largest_world_size(3, batch_size=96, bn_group_size=48) == 2
    with pytest.raises(ConfigError, match="smallest world size is 3"):
        largest_world_size(2, batch_size=96, micro_batch_size=36, bn_group_size=None)


def test_steps_per_epoch_of_the_papers():
    assert steps_per_epoch(50_000, 128, drop_last=False) == 391
    assert steps_per_epoch(50_000, 128, drop_last=True) == 390
    assert steps_per_epoch(1_281_167, 4096, drop_last=False) == 313
    assert total_steps(110, 313) == 34_430
    assert total_steps(0.001, 313) == 1


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="an epoch has no step"):
        steps_per_epoch(100, 128, drop_last=True)
