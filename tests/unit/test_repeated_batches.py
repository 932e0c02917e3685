"""A batch that is used for several steps, and what a micro-batch says of its images: origin, place, which use it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distributed_at.batch import EXTRA, LABELLED
from distributed_at.config import AugmentConfig
from distributed_at.data.order import StepOrder
from distributed_at.data.source import ArraySource
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.microbatches import MicroBatch, MicroBatches


class Pool(ArraySource):
    """Twenty images of which those from 12 on are extra; counts how often it is read."""

    def __init__(self) -> None:
        images = np.arange(20 * 4 * 4 * 3, dtype=np.uint8).reshape(20, 4, 4, 3)
        super().__init__(
            images, np.arange(20) % 10, name="pool", split="train", sample_ids=np.arange(20), num_classes=10,
            augment=AugmentConfig(), seed=0,
        )  # fmt: skip
        self.reads = 0

    def origins(self, ids: np.ndarray) -> np.ndarray:
        return np.where(ids >= 12, EXTRA, LABELLED).astype(np.int8)

    def read(self, ids: np.ndarray, **kwargs):
        self.reads += 1
        return super().read(ids, **kwargs)


def steps_from(
    first: int, last: int, *, repeats: int, rank: int = 0, world_size: int = 1
) -> tuple[Pool, list[list[MicroBatch]]]:
    source, plan = Pool(), BatchPlan.resolve(batch_size=8, world_size=world_size, micro_batch_size=4, bn_group_size=2)
    order = StepOrder(20, 8, seed=3, drop_last=False, repeats=repeats)
    batches = MicroBatches(
        source, order, plan, rank=rank, device=torch.device("cpu"), seed=0, first_step=first, last_step=last, prefetch=0
    )
    found = [batches.next_step() for _ in range(first, last)]
    batches.close()
    return source, found


def test_order_shows_each_batch_for_as_many_steps_and_each_image_once_an_epoch() -> None:
    once, thrice = (StepOrder(103, 10, seed=5, drop_last=False, repeats=m) for m in (1, 3))
    assert thrice.steps_per_epoch == 3 * once.steps_per_epoch == 33
    for step in range(33):
        np.testing.assert_array_equal(thrice.ids(2, step), once.ids(2, step // 3))
        assert thrice.length(step) == once.length(step // 3) == len(once.ids(2, step // 3))
    assert thrice.locate(34) == (1, 1)
    with pytest.raises(ValueError, match="step_in_epoch"):
        thrice.ids(0, 33)


def test_a_repeated_batch_is_read_once_and_only_its_step_and_use_differ() -> None:
    source, found = steps_from(0, 12, repeats=3)
    _, plain = steps_from(0, 4, repeats=1)
    assert source.reads == 4
    for step, micros in enumerate(found):
        for micro, once in zip(micros, plain[step // 3], strict=True):
            batch = micro.batch
            assert (batch.step, batch.repeat, batch.epoch) == (step, step % 3, step // 9)
            for name in ("ids", "images", "labels", "group_ids", "origin"):
                assert torch.equal(getattr(batch, name), getattr(once.batch, name)), name
            assert micro.weight == once.weight


@pytest.mark.parametrize("last", [12, 10, 7])  # a run may end in the middle of a batch's uses, too
def test_a_run_may_go_on_in_the_middle_of_a_batchs_uses(last: int) -> None:
    _, whole = steps_from(0, 12, repeats=3)
    source, rest = steps_from(5, last, repeats=3)
    assert source.reads == (last - 1) // 3
    for micros, expected in zip(rest, whole[5:last], strict=True):
        assert [m.batch.step for m in micros] == [m.batch.step for m in expected]
        assert [m.batch.repeat for m in micros] == [m.batch.repeat for m in expected]
        assert all(torch.equal(m.batch.ids, e.batch.ids) for m, e in zip(micros, expected, strict=True))


def test_origins_go_with_their_images() -> None:
    _, found = steps_from(0, 3, repeats=1)
    kinds = [micro.batch.origin[i].item() for micros in found for micro in micros for i in range(len(micro.batch))]
    ids = [i for micros in found for micro in micros for i in micro.batch.ids.tolist()]
    assert {micro.batch.origin.dtype for micros in found for micro in micros} == {torch.int8}
    assert [kind == EXTRA for kind in kinds] == [i >= 12 for i in ids]
    assert set(kinds) == {LABELLED, EXTRA}


def test_places_of_a_ranks_share_follow_each_other_and_stand_ins_have_none() -> None:
    _, full = steps_from(0, 1, repeats=1)
    assert [micro.batch.place for micro in full[0]] == [0, 4]
    _, last = steps_from(2, 3, repeats=1)  # 4 of 8 images are left: the second micro-batch stands in
    assert [(micro.batch.place, micro.weight) for micro in last[0]] == [(0, 1.0), (None, 0.0)]
