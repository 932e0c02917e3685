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


# (step, steps_per_epoch, epochs of warm-up) -> share of the full value at a step (from 0), None once it is over
Share = Callable[[int, int, float], float | None]


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """How a learning rate, or an attack's radius, grows at the beginning.

    Attributes:
        title, source: for pages and messages.
        share: (step, steps_per_epoch, epochs) -> share of the full value, None once warm-up is over; or "module:function".
        from_start: the rate may begin at ``schedule.warmup_start`` in place of 0.
    """

    title: str
    source: str
    share: str | Share
    from_start: bool = False

    def load(self) -> Share:
        """Return the function."""
        found: Share = load_attribute(self.share) if isinstance(self.share, str) else self.share
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

WARMUPS: Registry[Warmup] = Registry(
    "form of warm-up",
    field="schedule.warmup_form",
    entry=Warmup,
    builtin={
        "linear": Warmup(
            title="a straight line up to the full value",
            source="Goyal et al., Accurate, large minibatch SGD, 2017, section 2.2",
            share=f"{_RATES}:linear_share",
            from_start=True,
        ),
        "overshoot": Warmup(
            title="(t + 1) / n, which ends above the full value",
            source="Pang et al., Bag of tricks for adversarial training, 2021: their code",
            share=f"{_RATES}:overshoot_share",
        ),
    },
)
