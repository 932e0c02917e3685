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
        fields: those of ``schedule`` that it reads and not every one does; None = it may read any (a plug-in's). What a
            schedule does not read may not be given, and is not inherited by it.
        needs: those of them that have no default.
        height: of one that rises to a peak and falls: the same arguments -> share of the way up, 0 to 1, which
            ``schedule.momentum_at_peak`` follows; or "module:function".
        changes_throughout: worth printing also in the middle of a stage.
    """

    title: str
    rate: str | Rate
    fields: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()
    height: str | Rate | None = None
    changes_throughout: bool = True

    def formula(self) -> Rate:
        """Return the function."""
        found: Rate = load_attribute(self.rate) if isinstance(self.rate, str) else self.rate
        return found

    def share_of_peak(self) -> Rate | None:
        """Return how far up a cycle a step is, as a function; None where there is no peak."""
        found: Rate | None = load_attribute(self.height) if isinstance(self.height, str) else self.height
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
        "constant": Schedule(title="one rate", rate=f"{_RATES}:constant", fields=(), changes_throughout=False),
        "piecewise": Schedule(
            title="drops at milestones",
            rate=f"{_RATES}:piecewise",
            fields=("milestones", "factor", "factors", "boundary"),
            needs=("milestones",),
            changes_throughout=False,
        ),
        "points": Schedule(
            title="straight lines between points",
            rate=f"{_RATES}:points",
            fields=("points", "boundary"),
            needs=("points",),
        ),
        "cosine": Schedule(title="half a cosine", rate=f"{_RATES}:cosine", fields=("final_lr", "changes")),
        "cyclic": Schedule(
            title="one triangle (Wong et al. 2020)",
            rate=f"{_RATES}:cyclic",
            fields=("final_lr", "peak_epoch", "momentum_at_peak", "changes"),
            height=f"{_RATES}:triangle",
        ),
        "onecycle": Schedule(
            title="half a cosine up and one down (Smith & Topin 2018, as torch has it)",
            rate=f"{_RATES}:onecycle",
            fields=("final_lr", "peak_epoch", "start_divisor", "momentum_at_peak", "changes"),
            height=f"{_RATES}:two_cosines",
        ),
        "exponential": Schedule(
            title="equal factors at equal distances, in stairs or smoothly",
            rate=f"{_RATES}:exponential",
            fields=("factor", "decay_every", "staircase", "changes"),
        ),
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
