"""What each rank reads for a step: the same samples, groups and weights at every world size."""

import numpy as np
import pytest

from distributed_at.data.order import StepOrder
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.microbatches import request


def requests_of(world_size, step, *, num_samples=210, batch_size=64, group=8, micro=None):
    plan = BatchPlan.resolve(batch_size=batch_size, world_size=world_size, micro_batch_size=micro, bn_group_size=group)
    order = StepOrder(num_samples, batch_size, seed=3, drop_last=False)
    return plan, order, [request(plan, order, rank, step) for rank in range(world_size)]


def contributions(world_size, step, **kwargs):
    """Sample id -> (group, weight of one sample) over all ranks."""
    plan, order, found = requests_of(world_size, step, **kwargs)
    result = {}
    for wanted in found:
        assert len(wanted.sizes) == plan.accumulation, "collectives differ between ranks"
        start = 0
        for size, weight in zip(wanted.sizes, wanted.weights, strict=True):
            for i in range(start, start + size):
                if weight:
                    assert wanted.ids[i] not in result
                    result[int(wanted.ids[i])] = (int(wanted.group_ids[i]), weight / size)
            start += size
    return result, order


@pytest.mark.parametrize("step", [0, 3, 5, 7])  # step 3 and 7 are incomplete: 210 = 3 * 64 + 18
@pytest.mark.parametrize("micro", [None, 16])
def test_every_world_size_trains_on_the_same_samples_groups_and_weights(step, micro):
    reference, order = contributions(1, step)
    assert sorted(reference) == sorted(order.ids(*order.locate(step)).tolist())
    assert sum(w for _, w in reference.values()) == pytest.approx(1.0)
    for world_size in (1, 2, 4, 8):
        found, _ = contributions(world_size, step, micro=micro)
        assert found.keys() == reference.keys()
        for sample, (group, weight) in found.items():
            assert group == reference[sample][0]
            assert weight == pytest.approx(reference[sample][1])


def test_stand_ins_of_an_incomplete_batch_weigh_nothing():
    _, _, found = requests_of(8, 3)  # 18 samples, 8 ranks of 8
    weights = np.array([w for wanted in found for w in wanted.weights])
    assert (weights == 0).sum() == 5
    assert weights.sum() == pytest.approx(1.0)
