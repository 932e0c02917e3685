"""What each rank reads for a step: the same samples, groups and weights at every world size."""

import numpy as np
import pytest
import torch

from distributed_at.data.order import StepOrder
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.microbatches import MicroBatches, request


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


class Source:
    """One pixel an image, of the sample's own grey; the label is the last digit. Notes what it was asked."""

    unlabelled = False

    def __init__(self):
        self.asked = []

    def origins(self, ids):
        return None

    def read(self, ids, *, epoch, train, seed):
        self.asked.append((epoch, train, seed))
        ids = torch.from_numpy(ids)
        return ids.to(torch.uint8).reshape(-1, 1, 1, 1), ids % 10


@pytest.mark.parametrize("rank", [0, 1])
def test_micro_batches_are_the_steps_from_first_to_last_as_pixels_between_0_and_1(rank):
    plan = BatchPlan.resolve(batch_size=16, world_size=2, micro_batch_size=4, bn_group_size=2)
    order, source = StepOrder(40, 16, seed=3, drop_last=False), Source()
    read = MicroBatches(
        source, order, plan, rank=rank, device=torch.device("cpu"), seed=11, first_step=2, last_step=5, prefetch=1
    )
    steps = list(read)
    read.close()
    assert source.asked == [(0, True, 11), (1, True, 11), (1, True, 11)]  # three steps an epoch, of 16, 16 and 8 images
    assert [[m.batch.step for m in step] for step in steps] == [[2, 2], [3, 3], [4, 4]]
    for number, step in zip((2, 3, 4), steps, strict=True):
        epoch, index = divmod(number, 3)
        ids = order.ids(epoch, index).tolist()
        mine = ids[rank * len(ids) // 2 : (rank + 1) * len(ids) // 2]
        for micro in step:
            batch = micro.batch
            assert batch.epoch == epoch
            assert batch.images.dtype == torch.float32
            assert batch.images.flatten().tolist() == pytest.approx([i / 255 for i in batch.ids.tolist()])
            assert batch.labels.tolist() == [i % 10 for i in batch.ids.tolist()]
            places = [ids.index(i) for i in batch.ids.tolist()]
            assert batch.group_ids.tolist() == [index * 8 + place // 2 for place in places]
            assert micro.weight in (0.0, len(batch.ids) / len(ids))
        assert [i for m in step if m.weight for i in m.batch.ids.tolist()] == mine
        assert len(step) == plan.accumulation


def test_a_stand_in_is_the_steps_first_images_so_that_its_shape_is_a_full_forwards():
    _, order, found = requests_of(8, 3)  # 18 samples in groups of 8: three ranks have some
    ids = order.ids(0, 3)
    empty = [wanted for wanted in found if wanted.weights == (0.0,)]
    assert len(empty) == 5
    for wanted in empty:
        assert wanted.sizes == (8,)
        assert wanted.ids.tolist() == ids[:8].tolist()
        assert wanted.group_ids.tolist() == [3 * 8] * 8
