"""Batch arithmetic: how a recipe's global batch is cut into ranks, micro-batches and batch-norm groups.

Pure integers, no tensors and no processes: the trainer, ``plan`` and the tests all ask the same ``BatchPlan``.
World size W, micro-batch m and accumulation k always satisfy ``W * m * k == batch_size``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distributed_at.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One resolved cut of the global batch; build it with :meth:`resolve`.

    Attributes:
        batch_size: images per optimiser step over all ranks (B).
        world_size: ranks (W).
        share: images per rank and step, B / W.
        micro_batch: images per forward on one rank (m).
        accumulation: forwards per rank and step (k), W * m * k == B.
        group_size: images whose batch-norm statistics are taken together.
        group_free: True where the recipe leaves the group size to the machine (``bn_group_size: null``): it is then
            the micro-batch, and two world sizes are two different protocols.
        ranks_per_group: ranks that one batch-norm group spans (1 unless a share is smaller than a group).
        keeps_places: an incomplete batch leaves each image on the rank that has its place in a full one.
    """

    batch_size: int
    world_size: int
    share: int
    micro_batch: int
    accumulation: int
    group_size: int
    group_free: bool
    ranks_per_group: int
    keeps_places: bool = False

    @classmethod
    def resolve(
        cls,
        *,
        batch_size: int,
        world_size: int,
        micro_batch_size: int | None = None,
        bn_group_size: int | None = None,
    ) -> BatchPlan:
        """Cut ``batch_size`` images over ``world_size`` ranks.

        ``micro_batch_size`` is the most one forward takes; a rank whose share is smaller takes its share at once.

        Raises:
            ConfigError: the world size does not divide; names the nearest ones that do.
        """
        plan = cls._try(batch_size, world_size, micro_batch_size, bn_group_size)
        if isinstance(plan, cls):
            return plan
        valid = valid_world_sizes(batch_size, micro_batch_size=micro_batch_size, bn_group_size=bn_group_size)
        raise ConfigError(f"world size {world_size} cannot run this recipe: {plan}.{_nearest_sizes(world_size, valid)}")

    @classmethod
    def _try(cls, batch: int, world: int, micro: int | None, group: int | None) -> BatchPlan | str:
        """Return the plan, or the reason why there is none."""
        if world < 1:
            return f"it must be at least 1, got {world}"
        if batch % world:
            return f"train.batch_size {batch} is not a multiple of {world}"
        share = batch // world
        m = share if micro is None else min(micro, share)
        if share % m:
            return f"a rank's share of {share} images is not a multiple of train.micro_batch_size {micro}"
        ranks_per_group = 1
        if group is not None and share % group:
            if group % share:
                return (
                    f"a rank's share of {share} images neither divides nor is a multiple of train.bn_group_size {group}"
                )
            ranks_per_group = group // share
            if m != share:
                return (
                    f"a batch-norm group of {group} spans {ranks_per_group} ranks, so each must take its whole share of "
                    f"{share} images in one forward, but train.micro_batch_size is {micro}"
                )
        elif group is not None and m % group:
            return f"train.micro_batch_size {micro} is not a multiple of train.bn_group_size {group}"
        return cls(
            batch_size=batch,
            world_size=world,
            share=share,
            micro_batch=m,
            accumulation=share // m,
            group_size=m if group is None else group,
            group_free=group is None,
            ranks_per_group=ranks_per_group,
        )

    def require_whole_groups(self, why: str) -> None:
        """Refuse a world size at which ranks share a batch-norm group; ``why`` says what needs it whole, "" nothing.

        Raises:
            ConfigError: they do; names the most workers at which they do not.
        """
        if why and self.ranks_per_group > 1:
            raise ConfigError(
                f"{why}, but a group of {self.group_size} spans {self.ranks_per_group} ranks here: use at most "
                f"{self.batch_size // self.group_size} workers"
            )

    @property
    def groups_per_step(self) -> int:
        """Batch-norm groups of a full step over all ranks."""
        return self.batch_size // self.group_size

    @property
    def groups_per_micro_batch(self) -> int:
        """Batch-norm groups that one full forward on one rank holds whole; 1 where a group spans ranks."""
        return max(1, self.micro_batch // self.group_size)

    def group_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks that share ``rank``'s batch-norm group, itself included."""
        first = rank // self.ranks_per_group * self.ranks_per_group
        return tuple(range(first, first + self.ranks_per_group))

    def rank_bounds(self, rank: int, length: int | None = None) -> tuple[int, int]:
        """Half-open range of positions within the step's batch that belong to ``rank``.

        A full batch is cut into equal shares. The incomplete last batch of an epoch (``length`` < batch_size) keeps
        its groups: consecutive runs of ``group_size`` whatever the world size is, handed out whole and evenly, so a
        rank may get nothing. Inside a group that spans ranks (or is free) the images are split evenly. With
        ``keeps_places`` the shares are those of a full batch, and the last ranks get less or nothing.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside world size {self.world_size}")
        if length is None or length == self.batch_size:
            return rank * self.share, (rank + 1) * self.share
        if not 0 < length < self.batch_size:
            raise ValueError(f"a batch holds 1 to {self.batch_size} images, got {length}")
        if self.keeps_places:
            return min(rank * self.share, length), min((rank + 1) * self.share, length)
        if self.group_free:
            return _even(length, self.world_size, rank)
        if self.ranks_per_group > 1:
            start = rank // self.ranks_per_group * self.group_size
            stop = min(start + self.group_size, length)
            if start >= length:
                return length, length
            low, high = _even(stop - start, self.ranks_per_group, rank % self.ranks_per_group)
            return start + low, start + high
        groups = -(-length // self.group_size)
        first, last = _even(groups, self.world_size, rank)
        return min(first * self.group_size, length), min(last * self.group_size, length)

    def micro_bounds(self, rank: int, length: int | None = None) -> list[tuple[int, int]]:
        """The rank's range cut into forwards of at most ``micro_batch`` images, in order."""
        start, stop = self.rank_bounds(rank, length)
        return [(low, min(low + self.micro_batch, stop)) for low in range(start, stop, self.micro_batch)]

    def epoch_group(self, step_in_epoch: int, position: int) -> int:
        """Number, within the epoch, of the batch-norm group that holds batch position ``position``.

        The same at every world size where the recipe fixes the group size; it keys per-group random choices.
        """
        return step_in_epoch * self.groups_per_step + position // self.group_size

    def steps_per_epoch(self, num_samples: int, *, drop_last: bool) -> int:
        """Optimiser steps in one pass over ``num_samples`` images."""
        return steps_per_epoch(num_samples, self.batch_size, drop_last=drop_last)


def steps_per_epoch(num_samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Steps of one pass: 50 000 images in batches of 128 make 391, or 390 with ``drop_last``.

    Raises:
        ConfigError: not one full batch, so ``drop_last`` would leave nothing to train on.
    """
    steps = num_samples // batch_size if drop_last else -(-num_samples // batch_size)
    if steps < 1:
        raise ConfigError(
            f"train.batch_size {batch_size} is larger than the {num_samples} training images and train.drop_last is "
            f"{str(drop_last).lower()}: an epoch has no step. Use a batch of at most {num_samples}, or drop_last: false"
        )
    return steps


def total_steps(epochs: float, per_epoch: int) -> int:
    """Optimiser steps of a run; a fraction of an epoch is rounded to whole steps, at least one."""
    return max(1, round(epochs * per_epoch))


def valid_world_sizes(
    batch_size: int, *, micro_batch_size: int | None = None, bn_group_size: int | None = None
) -> tuple[int, ...]:
    """Every world size that this batch allows, rising."""
    divisors = {d for i in range(1, math.isqrt(batch_size) + 1) if batch_size % i == 0 for d in (i, batch_size // i)}
    return tuple(
        w
        for w in sorted(divisors)
        if isinstance(BatchPlan._try(batch_size, w, micro_batch_size, bn_group_size), BatchPlan)
    )


def largest_world_size(
    limit: int, *, batch_size: int, micro_batch_size: int | None = None, bn_group_size: int | None = None
) -> int:
    """Largest allowed world size that is at most ``limit`` (devices at hand), for ``--workers auto``.

    Raises:
        ConfigError: none is; names the smallest one.
    """
    valid = valid_world_sizes(batch_size, micro_batch_size=micro_batch_size, bn_group_size=bn_group_size)
    fitting = [w for w in valid if w <= limit]
    if not fitting:
        smallest = f"the smallest world size is {valid[0]}" if valid else "no world size is possible"
        raise ConfigError(
            f"{limit} workers cannot run batch_size {batch_size} with micro_batch_size {micro_batch_size} and "
            f"bn_group_size {bn_group_size}: {smallest}"
        )
    return fitting[-1]


def _even(length: int, parts: int, index: int) -> tuple[int, int]:
    """Part ``index`` of ``length`` items cut into ``parts`` runs whose sizes differ by at most one."""
    return index * length // parts, (index + 1) * length // parts


def _nearest_sizes(world_size: int, valid: tuple[int, ...]) -> str:
    below = [w for w in valid if w < world_size][-1:]
    above = [w for w in valid if w > world_size][:1]
    if not below and not above:
        return " No world size can run it: change train.micro_batch_size or train.bn_group_size"
    return f" The nearest that can: {' and '.join(str(w) for w in below + above)}"
