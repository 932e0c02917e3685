"""The learning rate schedules that a recipe can name: their facts, one entry each. The formulas are in ``engine/schedules.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distributed_at.registry import Registry, load_attribute

# (step, *, schedule, base_lr, steps_per_epoch, num_steps) -> the rate of a step (from 0) after warm-up
Rate = Callable[..., float]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the rest of the package asks about a schedule.

    Attributes:
        title: for pages and messages.
        rate: (step, *, schedule, base_lr, steps_per_epoch, num_steps) -> float, or "module:function": a pure function.
            What a plug-in's takes beyond the common fields stands in ``schedule.options``.
        milestones: it drops at ``schedule.milestones``, which it needs and no other one may have.
        changes_throughout: worth printing also in the middle of a stage.
    """

    title: str
    rate: str | Rate
    milestones: bool = False
    changes_throughout: bool = True

    def formula(self) -> Rate:
        """Return the function."""
        found: Rate = load_attribute(self.rate) if isinstance(self.rate, str) else self.rate
        return found


_RATES = "distributed_at.engine.schedules"
SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    field="schedule.name",
    entry=Schedule,
    builtin={
        "constant": Schedule(title="one rate", rate=f"{_RATES}:constant", changes_throughout=False),
        "piecewise": Schedule(
            title="drops at milestones", rate=f"{_RATES}:piecewise", milestones=True, changes_throughout=False
        ),
        "cosine": Schedule(title="half a cosine", rate=f"{_RATES}:cosine"),
        "cyclic": Schedule(title="one triangle (Wong et al. 2020)", rate=f"{_RATES}:cyclic"),
        "exponential": Schedule(title="a staircase of equal drops", rate=f"{_RATES}:exponential"),
    },
)
