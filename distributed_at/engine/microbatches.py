"""Turns the ids of a step into this rank's micro-batches on the device, read ahead of the attack.

Which ids, which group and which weight: all from counters and the batch plan; the pixels come from ``data``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from distributed_at.batch import Batch
from distributed_at.data.order import Order
from distributed_at.data.prefetch import Prefetcher
from distributed_at.data.source import ImageSource
from distributed_at.engine.batching import BatchPlan


@dataclass(frozen=True)
class MicroBatch:
    """One forward's images and their share of the step's loss.

    ``weight`` is the number of its samples over the samples of the global batch; 0 marks a stand-in that keeps the
    collectives of an incomplete last batch equal on all ranks and contributes nothing.
    """

    batch: Batch
    weight: float


@dataclass(frozen=True)
class _Request:
    step: int
    epoch: int
    ids: np.ndarray
    group_ids: np.ndarray
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    labelled_share: float


def request(plan: BatchPlan, order: Order, rank: int, step: int) -> _Request:
    """Return what ``rank`` reads for optimiser step ``step``."""
    epoch, index = divmod(step, order.steps_per_epoch)
    ids = order.ids(epoch, index)
    length = len(ids)
    bounds = plan.micro_bounds(rank, None if length == plan.batch_size else length)
    weights = [(high - low) / length for low, high in bounds]
    positions = [np.arange(low, high) for low, high in bounds]
    while len(positions) < plan.accumulation:
        positions.append(np.arange(min(plan.micro_batch, length)))
        weights.append(0.0)
    where = np.concatenate(positions)
    groups = order.batch(index) * plan.groups_per_step + where // plan.group_size
    share = order.labelled_share(epoch, index)
    return _Request(step, epoch, ids[where], groups, tuple(map(len, positions)), tuple(weights), share)


class MicroBatches:
    """Iterates over this rank's micro-batches, step after step, from ``first_step`` on."""

    def __init__(
        self,
        source: ImageSource,
        order: Order,
        plan: BatchPlan,
        *,
        rank: int,
        device: torch.device,
        seed: int,
        first_step: int,
        last_step: int,
        prefetch: int,
    ) -> None:
        self._device = device
        self._source, self._seed = source, seed
        self._repeats, self._step = order.repeats, first_step
        self._held: list[MicroBatch] = []
        begun = first_step // order.repeats * order.repeats  # the batch of the first step may be used already
        steps = (request(plan, order, rank, step) for step in range(begun, last_step, order.repeats))
        self._ahead = Prefetcher(steps, self._read, depth=prefetch)
        self._results = iter(self._ahead)

    def _read(self, wanted: _Request) -> tuple[_Request, torch.Tensor, torch.Tensor, list[int]]:
        images, labels = self._source.read(wanted.ids, epoch=wanted.epoch, train=True, seed=self._seed)
        bare = [int((part < 0).sum()) for part in labels.split(wanted.sizes)]  # here, where they are on the host
        if self._device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        return wanted, images, labels, bare

    def next_step(self) -> list[MicroBatch]:
        """Return the micro-batches of the next step, images float32 in [0, 1] on the device."""
        repeat = self._step % self._repeats
        if repeat == 0 or not self._held:
            self._held = self._next_batch()
        step, self._step = self._step, self._step + 1
        return [replace(micro, batch=replace(micro.batch, step=step, repeat=repeat)) for micro in self._held]

    def _next_batch(self) -> list[MicroBatch]:
        wanted, images, labels, bare = next(self._results)
        images = images.to(self._device, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        ids = self._on_device(wanted.ids)
        groups = self._on_device(wanted.group_ids)
        origins = self._source.origins(wanted.ids)
        origin = None if origins is None else self._on_device(origins).split(wanted.sizes)
        result, place = [], 0
        pieces = zip(*(t.split(wanted.sizes) for t in (ids, images, labels, groups)), strict=True)
        for k, ((i, x, y, g), weight) in enumerate(zip(pieces, wanted.weights, strict=True)):
            batch = Batch(
                ids=i,
                images=x.to(torch.float32).div_(255.0),
                labels=y,
                epoch=wanted.epoch,
                step=wanted.step,
                group_ids=g,
                origin=None if origin is None else origin[k],
                place=place if weight else None,
                unlabelled=bare[k],
                labelled_share=wanted.labelled_share if self._source.unlabelled else 1.0,
            )
            place += len(i)
            result.append(MicroBatch(batch, weight))
        return result

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, non_blocking=True)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        while True:
            try:
                yield self.next_step()
            except StopIteration:
                return

    def close(self) -> None:
        """Stop the reading thread."""
        self._ahead.close()
