"""Learning rate and attack radius as pure functions of the optimiser step; nothing here keeps state.

Times in a recipe are epochs. Step s (from 0) of an epoch of n steps happens at epoch s / n; the Bag-of-tricks code
counts (s + 1) / n instead, which is why its drops come one iteration early (``boundary: last_iteration``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distributed_at.catalogue.schedules import WARMUPS
from distributed_at.config import AttackConfig, OptimizerConfig, RunConfig, ScheduleConfig
from distributed_at.engine.batching import total_steps

# Milestones and warm-up ends are products like 99.5 * 391; this absorbs their rounding, far below one step.
_TOLERANCE = 1e-6


def base_learning_rate(optimizer: OptimizerConfig, batch_size: int) -> float:
    """Return the rate after warm-up: ``lr``, or ``lr * batch_size / lr_per`` (Goyal et al. 2017).

    Xie & Yuille's code computes ``0.1 * (batch_size // 256)`` with integer division. Both agree for every multiple
    of 256, which all rows of the paper are; below 256 that code trains with rate 0, and this function does not.
    """
    return optimizer.lr if optimizer.lr_per is None else optimizer.lr * batch_size / optimizer.lr_per


def learning_rate(
    step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int
) -> float:
    """Rate of optimiser step ``step`` (from 0) in a run of ``num_steps`` steps."""
    share = WARMUPS[schedule.warmup_form].load()(step, steps_per_epoch, schedule.warmup_epochs)
    if share is not None:
        start = schedule.warmup_start or 0.0
        return start + (base_lr - start) * share
    return schedule.facts.formula()(
        schedule=schedule, base_lr=base_lr, **_clock(step, schedule, steps_per_epoch, num_steps)
    )


def momentum(
    step: int, *, schedule: ScheduleConfig, base_momentum: float, steps_per_epoch: int, num_steps: int
) -> float | None:
    """Momentum of optimiser step ``step`` (from 0), which falls where the rate rises; None where it never moves.

    torch's CyclicLR and OneCycleLR move it so unless they are told not to: Wong et al.'s code trains with 0.9, 0.8 at the
    peak, 0.9, though their paper does not say it, and the port of Gowal et al.'s with 0.95, 0.85, 0.95.
    """
    height = schedule.facts.share_of_peak()
    if schedule.momentum_at_peak is None or height is None:
        return None
    share = height(schedule=schedule, base_lr=1.0, **_clock(step, schedule, steps_per_epoch, num_steps))
    return base_momentum + (schedule.momentum_at_peak - base_momentum) * share


def _clock(step: int, schedule: ScheduleConfig, steps_per_epoch: int, num_steps: int) -> dict[str, int]:
    """Return the three numbers of a step that a formula is of; for ``changes: epoch`` an epoch counts as one step."""
    if schedule.changes == "epoch":
        whole = math.ceil(num_steps / steps_per_epoch - _TOLERANCE)
        return {"step": step // steps_per_epoch, "steps_per_epoch": 1, "num_steps": whole}
    return {"step": step, "steps_per_epoch": steps_per_epoch, "num_steps": num_steps}


def constant(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """Return the one rate."""
    return base_lr


def piecewise(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """Return the rate, multiplied at each milestone by ``factor``, or by the milestone's own of ``factors``."""
    return base_lr * math.prod(schedule.drop_factors[: _drops(step, schedule, steps_per_epoch)])


def points(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """Return the rate on straight lines between ``points``, as it is from the last one on where that is passed.

    With ``boundary: last_iteration`` the clock is that of Pang et al.'s and Rice et al.'s codes, (step + 1) / steps an
    epoch; their 'linear', 'superconverge' and "lineardecay" are such lines.
    """
    epoch = (step + (schedule.boundary == "last_iteration")) / steps_per_epoch
    passed = sum(at * steps_per_epoch <= epoch * steps_per_epoch + _TOLERANCE for at, _ in schedule.points)
    begin, low = schedule.points[passed - 1]
    if passed == len(schedule.points):
        return base_lr * low
    end, high = schedule.points[passed]
    return base_lr * (low + (high - low) * max(0.0, epoch - begin) / (end - begin))


def exponential(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """Return the rate, multiplied by ``factor`` every ``decay_every`` epochs: in stairs, or smoothly between."""
    intervals = step / (schedule.decay_every * steps_per_epoch)
    return base_lr * schedule.factor ** (math.floor(intervals + _TOLERANCE) if schedule.staircase else intervals)


def cosine(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """Return the rate on half a cosine from the end of warm-up down to ``final_lr``."""
    first = schedule.warmup_epochs * steps_per_epoch
    progress = min(1.0, (step - first) / max(1.0, num_steps - first))
    return schedule.final_lr + (base_lr - schedule.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _drops(step: int, schedule: ScheduleConfig, steps_per_epoch: int) -> int:
    """Milestones passed. 'after': the first step of the epoch after the milestone is the first to be slower.

    Xie & Yuille: "after completing epoch 35", so the 36th epoch is the first slow one. Bag-of-tricks code
    (lr_schedule): t = epoch + (i + 1) / len(loader), so the last iteration before the milestone is. TRADES' code
    (adjust_learning_rate): epoch >= milestone, and its first epoch is 1.
    """
    shift = 1 if schedule.boundary == "last_iteration" else 0
    return sum(step + shift >= done * steps_per_epoch - _TOLERANCE for done in schedule.drops)


def linear_share(step: int, steps_per_epoch: int, epochs: float) -> float | None:
    """Return step / steps of warm-up: nothing at step 0, everything after the last one (Goyal et al. 2017)."""
    return step / (epochs * steps_per_epoch) if _before(step, steps_per_epoch, epochs) else None


def overshoot_share(step: int, steps_per_epoch: int, epochs: float) -> float | None:
    """Return (t + 1) / n of Pang et al.'s code, t = (step + 1) / steps an epoch: near 1 / n first, (n + 1) / n at last.

    Its clock stands one step later, so it ends one step before a linear warm-up of the same length.
    """
    return ((step + 1) / steps_per_epoch + 1.0) / epochs if _before(step + 1, steps_per_epoch, epochs) else None


def _before(step: int, steps_per_epoch: int, epochs: float) -> bool:
    return step < epochs * steps_per_epoch - _TOLERANCE


def cyclic(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """One triangle from ``final_lr`` up to the rate and back (Wong et al. 2020: 0 -> 0.2 -> 0)."""
    height = triangle(step, schedule=schedule, base_lr=1.0, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    return schedule.final_lr + (base_lr - schedule.final_lr) * height


def triangle(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """Return the share of the way up to the peak of ``cyclic``, on straight lines."""
    peak = num_steps / 2 if schedule.peak_epoch is None else schedule.peak_epoch * steps_per_epoch
    height = step / peak if step < peak else (num_steps - step) / max(1.0, num_steps - peak)
    return min(1.0, max(0.0, height))


def onecycle(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """From the rate / ``start_divisor`` on half a cosine up to the rate, and on another down to ``final_lr``.

    As torch's OneCycleLR: the rate is reached in the last step of ``peak_epoch`` epochs, ``final_lr`` in the run's last.
    """
    low = base_lr / schedule.start_divisor if step < _peak(schedule, steps_per_epoch, num_steps) else schedule.final_lr
    height = two_cosines(step, schedule=schedule, base_lr=1.0, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    return low + (base_lr - low) * height


def two_cosines(step: int, *, schedule: ScheduleConfig, base_lr: float, steps_per_epoch: int, num_steps: int) -> float:
    """Return the share of the way up to the peak of ``onecycle``."""
    peak, last = _peak(schedule, steps_per_epoch, num_steps), num_steps - 1
    away = (peak - step) / peak if step < peak else (step - peak) / max(1.0, last - peak)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, away)))


def _peak(schedule: ScheduleConfig, steps_per_epoch: int, num_steps: int) -> float:
    """Return the step (from 0) in which ``onecycle`` reaches the rate."""
    length = 0.3 * num_steps if schedule.peak_epoch is None else schedule.peak_epoch * steps_per_epoch
    return max(0.0, length - 1.0)


def eps_scale(step: int, *, attack: AttackConfig, steps_per_epoch: int) -> float:
    """Factor on ``attack.eps`` at a training step; may exceed 1 with the 'overshoot' form. The step size stays."""
    share = WARMUPS[attack.eps_warmup_form].load()(step, steps_per_epoch, attack.eps_warmup_epochs)
    return 1.0 if share is None else share


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """A recipe's schedules bound to its number of steps.

    Attributes:
        steps_per_epoch: optimiser steps of one epoch.
        num_steps: optimiser steps of the run.
        base_lr: rate after warm-up and batch scaling.
        base_momentum: momentum where no cycle moves it.
    """

    schedule: ScheduleConfig
    attack: AttackConfig | None
    base_lr: float
    steps_per_epoch: int
    num_steps: int
    base_momentum: float = 0.0

    @classmethod
    def from_config(cls, config: RunConfig, steps_per_epoch: int) -> Schedules:
        """Bind the schedules of ``config`` to ``steps_per_epoch``."""
        return cls(
            schedule=config.schedule,
            attack=config.attack,
            base_lr=base_learning_rate(config.optimizer, config.train.batch_size),
            steps_per_epoch=steps_per_epoch,
            num_steps=total_steps(config.train.epochs, steps_per_epoch),
            base_momentum=config.optimizer.momentum,
        )

    def learning_rate(self, step: int) -> float:
        """Rate of optimiser step ``step`` (from 0)."""
        return learning_rate(
            step,
            schedule=self.schedule,
            base_lr=self.base_lr,
            steps_per_epoch=self.steps_per_epoch,
            num_steps=self.num_steps,
        )

    def momentum(self, step: int) -> float | None:
        """Momentum of optimiser step ``step``; None where no cycle moves it."""
        return momentum(
            step,
            schedule=self.schedule,
            base_momentum=self.base_momentum,
            steps_per_epoch=self.steps_per_epoch,
            num_steps=self.num_steps,
        )

    def eps(self, step: int) -> float:
        """Training radius of optimiser step ``step`` in /255; 0 without an attack."""
        if self.attack is None:
            return 0.0
        return self.attack.eps * eps_scale(step, attack=self.attack, steps_per_epoch=self.steps_per_epoch)

    def early_stop(self, step: int) -> int | None:
        """Misclassifications that stop the attack on an image at step ``step``; None = it is never stopped.

        The clock of 'last_iteration' is that of Pang et al.'s code, (step + 1) / steps an epoch, as for their rates.
        """
        if self.attack is None or self.attack.early_stop is None:
            return None
        clock = step + (self.attack.early_stop_boundary == "last_iteration") + _TOLERANCE
        return self.attack.early_stop + sum(clock >= e * self.steps_per_epoch for e in self.attack.early_stop_epochs)

    def epoch(self, step: int) -> float:
        """Epoch, as a fraction, at which step ``step`` happens."""
        return step / self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps of the learning rate's warm-up."""
        return round(self.schedule.warmup_epochs * self.steps_per_epoch)

    def key_steps(self) -> list[int]:
        """Steps at which the rate is worth printing: the first, the end of warm-up, around each drop, the last."""
        steps = {0, self.warmup_steps, self.num_steps - 1}
        for done in (*self.schedule.drops, *(epoch for epoch, _ in self.schedule.points)):
            first = math.ceil(done * self.steps_per_epoch - _TOLERANCE)
            steps |= {first - 2, first - 1, first}
        if self.schedule.facts.changes_throughout:
            steps |= {round(self.num_steps * share) for share in (0.25, 0.5, 0.75)}
        return sorted(s for s in steps if 0 <= s < self.num_steps)
