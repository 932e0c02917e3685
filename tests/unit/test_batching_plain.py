"""Batch arithmetic for every small case against its definitions, worked out by trying instead of by formula."""

from __future__ import annotations

from itertools import product

import pytest

from distributed_at.engine.batching import (
    BatchPlan,
    largest_world_size,
    steps_per_epoch,
    total_steps,
    valid_world_sizes,
)
from distributed_at.errors import ConfigError

BATCHES = (1, 2, 6, 8, 12, 16, 24)


def can_run(batch, world, micro, group):
    """The rules in words: equal shares, equal forwards of at most ``micro``, whole groups in a forward or whole shares
    in a group that spans ranks."""
    if world < 1 or batch % world:
        return False
    share = batch // world
    forward = share if micro is None else min(micro, share)
    if share % forward:
        return False
    if group is None or forward % group == 0:
        return True
    return group > share and group % share == 0 and forward == share


@pytest.mark.parametrize("batch", BATCHES)
def test_a_plan_exists_exactly_where_the_rules_allow_it_and_holds_what_they_say(batch):
    divisors = [g for g in range(1, batch + 1) if batch % g == 0]  # a recipe's group divides its batch
    for micro, group in product((None, 1, 2, 3, 4, 8), (None, *divisors)):
        check_plans(batch, micro, group)


def check_plans(batch, micro, group):
    allowed = tuple(w for w in range(1, batch + 2) if can_run(batch, w, micro, group))
    assert valid_world_sizes(batch, micro_batch_size=micro, bn_group_size=group) == allowed
    for world in range(batch + 2):
        arguments = {"batch_size": batch, "world_size": world, "micro_batch_size": micro, "bn_group_size": group}
        if world not in allowed:
            with pytest.raises(ConfigError):
                BatchPlan.resolve(**arguments)
            continue
        plan = BatchPlan.resolve(**arguments)
        forward = min(micro or batch, batch // world)
        assert (plan.batch_size, plan.world_size, plan.share) == (batch, world, batch // world)
        assert (plan.micro_batch, plan.accumulation) == (forward, plan.share // forward)
        assert (plan.group_size, plan.group_free) == (group or forward, group is None)
        assert plan.ranks_per_group == max(1, plan.group_size // plan.share)
        assert plan.groups_per_step == batch // plan.group_size
        assert plan.groups_per_micro_batch == (forward // plan.group_size or 1)
        group_of = {rank: rank * plan.share // max(plan.group_size, plan.share) for rank in range(world)}
        for rank in range(world):
            assert plan.group_ranks(rank) == tuple(r for r in range(world) if group_of[r] == group_of[rank])
        assert [plan.epoch_group(3, p) for p in range(batch)] == [
            3 * plan.groups_per_step + p // plan.group_size for p in range(batch)
        ]


def shared_out(items, ranks):
    """How many each rank gets: as even as can be, and what is over goes to later ranks by rounding down."""
    return [(r + 1) * items // ranks - r * items // ranks for r in range(ranks)]


@pytest.mark.parametrize(
    ("batch", "micro", "group"), [(12, None, 2), (12, 2, 2), (16, None, 8), (12, None, None), (8, 2, 1)]
)
def test_an_incomplete_batch_hands_out_whole_groups_evenly(batch, micro, group):
    for world in valid_world_sizes(batch, micro_batch_size=micro, bn_group_size=group):
        plan = BatchPlan.resolve(batch_size=batch, world_size=world, micro_batch_size=micro, bn_group_size=group)
        for length in range(1, batch + 1):
            bounds = [plan.rank_bounds(rank, length) for rank in range(world)]
            sizes = [high - low for low, high in bounds]
            assert [p for low, high in bounds for p in range(low, high)] == list(range(length))
            if length == batch:
                assert sizes == [plan.share] * world
            elif group is None:
                assert sizes == shared_out(length, world)
            elif plan.ranks_per_group > 1:
                whole = [min(max(length - start, 0), group) for start in range(0, batch, group)]
                assert sizes == [s for images in whole for s in shared_out(images, plan.ranks_per_group)]
            else:
                groups = [list(range(s, min(s + group, length))) for s in range(0, length, group)]
                counts = iter(groups)
                assert sizes == [sum(len(next(counts)) for _ in range(n)) for n in shared_out(len(groups), world)]
            for rank, (low, high) in enumerate(bounds):
                pieces = plan.micro_bounds(rank, length)
                assert [p for a, b in pieces for p in range(a, b)] == list(range(low, high))
                assert all(0 < b - a <= plan.micro_batch for a, b in pieces)
                assert all(b - a == plan.micro_batch for a, b in pieces[:-1])


def test_ranks_and_lengths_outside_a_plan_are_refused():
    plan = BatchPlan.resolve(batch_size=8, world_size=2, bn_group_size=2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match="outside world size 2"):
            plan.rank_bounds(rank)
    for length in (-1, 0, 9):
        with pytest.raises(ValueError, match="1 to 8 images"):
            plan.rank_bounds(0, length)
    assert plan.rank_bounds(1) == plan.rank_bounds(1, 8) == (4, 8)


def test_the_largest_world_size_is_the_largest_that_fits():
    for limit in range(1, 30):
        expected = max(w for w in (1, 2, 3, 4, 6, 12) if w <= limit)
        assert largest_world_size(limit, batch_size=12, bn_group_size=1) == expected
    with pytest.raises(ConfigError, match="smallest world size is 1"):
        largest_world_size(0, batch_size=12)


def test_the_nearest_world_sizes_are_the_next_below_and_above():
    with pytest.raises(ConfigError, match=r"nearest that can: 4 and 6$"):
        BatchPlan.resolve(batch_size=12, world_size=5)
    with pytest.raises(ConfigError, match=r"nearest that can: 12$"):
        BatchPlan.resolve(batch_size=12, world_size=13)


def test_steps_of_an_epoch_and_of_a_run():
    for images, batch in product(range(1, 20), range(1, 8)):
        assert steps_per_epoch(images, batch, drop_last=False) == len(range(0, images, batch))
        if images >= batch:
            assert steps_per_epoch(images, batch, drop_last=True) == len(range(0, images - batch + 1, batch))
    assert [total_steps(e, 10) for e in (0.01, 0.1, 0.16, 1, 2.54)] == [1, 1, 2, 10, 25]


def test_groups_are_required_whole_only_where_something_needs_it():
    spanning = BatchPlan.resolve(batch_size=16, world_size=4, bn_group_size=8)
    with pytest.raises(
        ConfigError, match=r"^free adversarial training, but a group of 8 spans 2 ranks here: use at most 2 "
    ):
        spanning.require_whole_groups("free adversarial training")
    spanning.require_whole_groups("")
    for workers in (1, 2):
        whole = BatchPlan.resolve(batch_size=16, world_size=workers, bn_group_size=8)
        whole.require_whole_groups("free adversarial training")
        whole.require_whole_groups("")
