"""Which labelled and which extra images a training step uses: two streams without replacement, each at its own pace.

Nothing here keeps state, or an order of all extra images in memory: any step can be asked for alone, on any world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distributed_at.data.order import batches_per_epoch, epoch_order
from distributed_at.data.uses import UseNumbers
from distributed_at.errors import ConfigError
from distributed_at.rng import Purpose, permuted

_TOLERANCE = 1e-6  # of products of epochs and shares, far below one batch or image


@dataclass(frozen=True)
class Phase:
    """What every batch holds from one on.

    Attributes:
        first_batch: from which the phase holds, counted from 0 through the run.
        distinct: different labelled images of a batch.
        labelled: labelled images of a batch, copies counted.
        extra: extra images of a batch.
    """

    first_batch: int
    distinct: int
    labelled: int
    extra: int


def phases(
    ratios: Sequence[tuple[float, float]], *, batch_size: int, copies: int, batches_per_epoch: int
) -> tuple[Phase, ...]:
    """Return what batches hold, phase by phase.

    A batch is ``copies`` equal parts, and each part holds the same labelled images: the share of a part, rounded to the
    nearest whole image (halves up), and as in Gowal et al.'s code at least one and not all of it where the share lies
    between 0 and 1.

    Args:
        ratios: (epoch from which it holds, share of labelled images); the first begins at 0.
        batch_size: B, a multiple of ``copies``.
        copies: how often each labelled image stands in a batch.
        batches_per_epoch: of an epoch.
    """
    if batch_size % copies:
        raise ConfigError(f"train.batch_size {batch_size} is not a multiple of data.labelled_copies {copies}")
    part, found = batch_size // copies, []
    for epoch, share in ratios:
        distinct = int(share * part + 0.5 + _TOLERANCE)
        if 0 < share < 1 and part > 1:
            distinct = min(max(distinct, 1), part - 1)
        first = int(np.ceil(epoch * batches_per_epoch - _TOLERANCE))
        found.append(Phase(first, distinct, distinct * copies, (part - distinct) * copies))
    return tuple(found)


class MixedOrder:
    """Batches of labelled images, each perhaps several times, and extra images.

    Labelled images come in the order of ``StepOrder``'s epochs, pass after pass without a gap; extra ones in an order of
    their own, pass after pass. A batch takes from each stream what its phase says, so neither restarts with an epoch, and
    a batch may hold the end of one pass and the begin of the next. An epoch is as many batches as the labelled images
    would fill alone ("CIFAR-equivalent"), whatever the share.

    Within each of a batch's ``copies`` parts labelled and extra images alternate as evenly as can be, so that every BN
    group and micro-batch holds its share of both; the copies of an image lie one part apart.

    What ``ids`` returns are numbers of uses (``uses.py``), not of images.
    """

    def __init__(
        self,
        labelled_ids: np.ndarray,
        num_extra: int,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = True,
        repeats: int = 1,
        copies: int = 1,
        ratios: Sequence[tuple[float, float]] = ((0.0, 1.0),),
    ) -> None:
        """Describe an order.

        Args:
            labelled_ids: (N,) int64, the ids of the labelled split.
            num_extra: extra images, which are rows 0 to ``num_extra - 1``.
            batch_size: global batch B, over all ranks.
            seed: the run's seed.
            drop_last: whether an epoch's number of batches is rounded down or up; all are full.
            repeats: steps in a row that show the same batch.
            copies: how often each labelled image stands in a batch.
            ratios: (epoch, share of labelled images) pairs.

        Raises:
            ConfigError: an epoch without a step, a batch that does not divide into copies, or too many uses of an image.
        """
        self.labelled_ids = np.asarray(labelled_ids, dtype=np.int64)
        self.num_extra, self.batch_size, self.seed = num_extra, batch_size, seed
        self.repeats, self.copies = repeats, copies
        self._per_epoch = batches_per_epoch(len(self.labelled_ids), batch_size, drop_last=drop_last)
        self.steps_per_epoch = repeats * self._per_epoch
        self._phases = phases(ratios, batch_size=batch_size, copies=copies, batches_per_epoch=self._per_epoch)
        if num_extra == 0 and any(phase.extra for phase in self._phases):
            raise ConfigError("a batch is to hold extra images, and there are none")
        self.numbers = UseNumbers(span=int(self.labelled_ids.max()) + 1, num_extra=num_extra)
        distinct, extra = (max(getattr(p, name) for p in self._phases) for name in ("distinct", "extra"))
        self.numbers.require_room(
            self._passes(distinct, len(self.labelled_ids)) * copies, self._passes(extra, num_extra) if extra else 0
        )

    def _passes(self, each: int, images: int) -> int:
        """Return the most passes over a stream that one epoch can touch."""
        return -(-each * self._per_epoch // images) + 1

    def batch(self, step_in_epoch: int) -> int:
        """Return the number, within the epoch, of the batch that a step shows."""
        return step_in_epoch // self.repeats

    def length(self, step_in_epoch: int) -> int:
        """Return the number of samples of a step: every batch is full."""
        return self.batch_size

    def phase(self, epoch: int, step_in_epoch: int) -> Phase:
        """Return what the batch of a step holds."""
        number = epoch * self._per_epoch + self.batch(step_in_epoch)
        return max((p for p in self._phases if p.first_batch <= number), key=lambda p: p.first_batch)

    def labelled_share(self, epoch: int, step_in_epoch: int) -> float:
        """Return the share of labelled images of a step's batch."""
        return self.phase(epoch, step_in_epoch).labelled / self.batch_size

    def ids(self, epoch: int, step_in_epoch: int) -> np.ndarray:
        """Return the (B,) int64 numbers of uses of a step over all ranks, in the order that its groups are cut from."""
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise ValueError(f"step_in_epoch must be in [0, {self.steps_per_epoch}), got {step_in_epoch}")
        phase = self.phase(epoch, step_in_epoch)
        start = epoch * self._per_epoch
        number = start + self.batch(step_in_epoch)
        part = np.arange(self.batch_size // self.copies)
        is_labelled = np.tile(
            (part + 1) * phase.distinct // len(part) > part * phase.distinct // len(part), self.copies
        )
        ids = np.empty(self.batch_size, dtype=np.int64)
        ids[is_labelled] = self._labelled(
            self._taken("distinct", start), self._taken("distinct", number), phase.distinct
        )
        ids[~is_labelled] = self._extra(self._taken("extra", start), self._taken("extra", number), phase.extra)
        return ids

    def _taken(self, what: str, number: int) -> int:
        """Return how many images all batches before batch ``number`` have taken from a stream."""
        ends = [p.first_batch for p in self._phases[1:]] + [number]
        return sum(
            getattr(p, what) * max(0, min(end, number) - p.first_batch)
            for p, end in zip(self._phases, ends, strict=True)
        )

    def _labelled(self, epoch_start: int, start: int, count: int) -> np.ndarray:
        """Return the numbers of ``count`` labelled images from a place of their stream on, ``copies`` times."""
        images = len(self.labelled_ids)
        passes, places = np.divmod(np.arange(start, start + count, dtype=np.int64), images)
        ids = np.empty(count, dtype=np.int64)
        for turn in np.unique(passes):
            of_turn = passes == turn
            ids[of_turn] = self.labelled_ids[epoch_order(self.seed, int(turn), images)[places[of_turn]]]
        uses = (passes - epoch_start // images) * self.copies
        return np.concatenate([self.numbers.of_labelled(ids, uses + copy) for copy in range(self.copies)])

    def _extra(self, epoch_start: int, start: int, count: int) -> np.ndarray:
        """Return the numbers of ``count`` extra images from a place of their stream on."""
        if not count:
            return np.empty(0, dtype=np.int64)
        passes, places = np.divmod(np.arange(start, start + count, dtype=np.int64), self.num_extra)
        rows = np.empty(count, dtype=np.int64)
        for turn in np.unique(passes):
            of_turn = passes == turn
            rows[of_turn] = permuted(places[of_turn], self.num_extra, self.seed, int(turn), purpose=Purpose.EXTRA_MIX)
        return self.numbers.of_extra(rows, passes - epoch_start // self.num_extra)
