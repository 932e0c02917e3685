"""What the section ``attack`` of a recipe can name: balls, losses, targets, starts, update and step rules; facts, one entry each.

The mathematics is in ``attacks/``; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from distributed_at.registry import Registry, load_attribute

if TYPE_CHECKING:
    import torch

    from distributed_at.attacks.balls import Ball
    from distributed_at.attacks.losses import LossFunction
    from distributed_at.attacks.starts import Draw
    from distributed_at.attacks.updates import UpdateRule

T = TypeVar("T")
# (labels, number of classes, Counters, clean logits or None) -> targets, as ``attacks/targets.py`` says
Choose = Callable[..., "torch.Tensor"]
_ATTACKS = "distributed_at.attacks"


def _loaded(place: str | T) -> T:
    found: T = load_attribute(place) if isinstance(place, str) else place
    return found


@dataclass(frozen=True, kw_only=True)
class BallEntry:
    """A norm that measures perturbations.

    Attributes:
        title: for pages and messages.
        ball: the geometry, or "module:object".
        per_pixel: a length is that of the pixel which moved most, so radius, step and the pixel box compare.
    """

    title: str
    ball: str | Ball
    per_pixel: bool = False

    def load(self) -> Ball:
        """Return the geometry."""
        return _loaded(self.ball)


@dataclass(frozen=True, kw_only=True)
class AttackLoss:
    """What an attack maximises.

    Attributes:
        title, source: for pages and messages.
        function: (logits (N, K), goal) -> (N,), or "module:function".
        from_clean: it is measured from the prediction on the clean image (``goal.reference``), not from labels. Such a
            loss is flat at the clean image, and belongs to objectives that name it.
        targeted: it can aim at a class.
        soft_labels: it can be measured from a distribution over classes (``goal.soft_labels``).
        min_classes: fewest classes that it is defined for, and with a target.
    """

    title: str
    source: str
    function: str | LossFunction
    from_clean: bool = False
    targeted: bool = True
    soft_labels: bool = False
    min_classes: tuple[int, int] = (2, 2)

    def load(self) -> LossFunction:
        """Return the function."""
        return _loaded(self.function)

    def refuse(self, name: str, *, targeted: bool, num_classes: int | None = None) -> str | None:
        """Return why it does not go with a target or so many classes, as a sentence; None = it does."""
        if targeted and not self.targeted:
            return f"loss {name!r} has no target to aim at; use target: none, or loss: ce"
        needed = self.min_classes[targeted]
        if num_classes is not None and num_classes < needed:
            return f"loss {name!r} needs at least {needed} classes here, got {num_classes}; use loss: margin"
        return None


@dataclass(frozen=True, kw_only=True)
class Target:
    """How the class that an attack aims at is chosen.

    Attributes:
        title, source: for pages and messages.
        choose: returns (N,) int64 classes, or "module:function"; None = the attack is untargeted.
        from_logits: chosen from the logits of the clean image.
        at_random: drawn among the classes, whose number must be known.
    """

    title: str
    source: str = ""
    choose: str | Choose | None = None
    from_logits: bool = False
    at_random: bool = False

    @property
    def targeted(self) -> bool:
        """Whether there is a class to aim at."""
        return self.choose is not None

    def load(self) -> Choose:
        """Return the rule."""
        assert self.choose is not None
        return _loaded(self.choose)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where an attack begins.

    Attributes:
        title, source: for pages and messages.
        draw: returns the point, before it is projected, or "module:function".
        clean: it is the clean image.
        spread: its width is ``attack.start_std``.
        mixes: some images may begin at the clean image instead (``attack.start_clean_probability``).
    """

    title: str
    source: str
    draw: str | Draw
    clean: bool = False
    spread: bool = False
    mixes: bool = True

    def load(self) -> Draw:
        """Return the law."""
        return _loaded(self.draw)


@dataclass(frozen=True, kw_only=True)
class Update:
    """How a gradient moves the image.

    Attributes:
        title, source: for pages and messages.
        rule: what begins and steps, or "module:object"; None = the ball's own step of steepest ascent, which belongs to
            the iteration and so is compiled and captured with it.
    """

    title: str
    source: str
    rule: str | UpdateRule | None = None

    def load(self) -> UpdateRule | None:
        """Return the rule."""
        return _loaded(self.rule)


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """How long a step is.

    Attributes:
        title: for pages and messages.
        size: (step_size, eps, num_steps) -> the step, all lengths in one unit.
        follows_num_steps: it depends on the number of steps.
    """

    title: str
    size: Callable[[float, float, int], float]


BALLS: Registry[BallEntry] = Registry(
    "norm of perturbations",
    field="attack.norm",
    entry=BallEntry,
    builtin={
        "linf": BallEntry(title="Linf", ball=f"{_ATTACKS}.balls:LINF", per_pixel=True),
        "l2": BallEntry(title="L2", ball=f"{_ATTACKS}.balls:L2_BALL"),
    },
)

ATTACK_LOSSES: Registry[AttackLoss] = Registry(
    "attack loss",
    field="attack.loss",
    entry=AttackLoss,
    builtin={
        "ce": AttackLoss(
            title="cross-entropy",
            source="Madry et al., Towards deep learning models resistant to adversarial attacks, 2018, eq. 2.1",
            function=f"{_ATTACKS}.losses:ce",
            soft_labels=True,
        ),
        "kl": AttackLoss(
            title="divergence from the clean prediction",
            source="Zhang et al., Theoretically principled trade-off (TRADES), 2019, eq. 3",
            function=f"{_ATTACKS}.losses:kl",
            from_clean=True,
            targeted=False,
        ),
        "margin": AttackLoss(
            title="margin of the logits",
            source="Carlini & Wagner, Towards evaluating the robustness of neural networks, 2017, section V",
            function=f"{_ATTACKS}.losses:margin",
        ),
        "dlr": AttackLoss(
            title="difference of logits ratio",
            source="Croce & Hein, Reliable evaluation (AutoAttack), 2020, eq. 6 and 7",
            function=f"{_ATTACKS}.losses:dlr",
            min_classes=(3, 4),
        ),
    },
)

UNTARGETED = "none"  # as records write it
ATTACK_TARGETS: Registry[Target] = Registry(
    "rule of targets",
    field="attack.target",
    entry=Target,
    builtin={
        UNTARGETED: Target(title="untargeted"),
        "random_other": Target(
            title="a random wrong class",
            source="Xie & Yuille, Intriguing properties of AT at scale, 2020: their code",
            choose=f"{_ATTACKS}.targets:random_other",
            at_random=True,
        ),
        "random_any": Target(
            title="a random class, the label among them",
            source="Xie & Yuille, Intriguing properties of AT at scale, 2020, section 3",
            choose=f"{_ATTACKS}.targets:random_any",
            at_random=True,
        ),
        "most_confusing": Target(
            title="the likeliest wrong class",
            source="Wang & Zhang, Bilateral AT, 2019, section 4.2",
            choose=f"{_ATTACKS}.targets:most_confusing",
            from_logits=True,
        ),
        "least_likely": Target(
            title="the unlikeliest wrong class",
            source="Kurakin et al., Adversarial machine learning at scale, 2017, section 3.1",
            choose=f"{_ATTACKS}.targets:least_likely",
            from_logits=True,
        ),
    },
)

ATTACK_STARTS: Registry[Start] = Registry(
    "start",
    field="attack.start",
    entry=Start,
    builtin={
        "uniform": Start(
            title="uniform in the ball",
            source="Madry et al. 2018, section 2.1; L2: Pang et al.'s code",
            draw=f"{_ATTACKS}.starts:uniform",
        ),
        "zero": Start(
            title="the clean image", source="Kurakin et al. 2017, section 2", draw=f"{_ATTACKS}.starts:zero", clean=True
        ),
        "gaussian": Start(
            title="Gaussian noise",
            source="Zhang et al. (TRADES), 2019: their code",
            draw=f"{_ATTACKS}.starts:gaussian",
            spread=True,
            mixes=False,
        ),
    },
)

ATTACK_UPDATES: Registry[Update] = Registry(
    "update rule",
    field="attack.update",
    entry=Update,
    builtin={
        "steepest": Update(
            title="the sign of the gradient (Linf), its unit vector (L2)", source="Madry et al. 2018, section 2.1"
        ),
        "adam": Update(
            title="Adam",
            source="Gowal et al., Uncovering the limits of AT, 2020: their code, whose inner optimiser it is",
            rule=f"{_ATTACKS}.updates:ADAM",
        ),
    },
)

STEP_RULES: Registry[StepRule] = Registry(
    "step rule",
    field="attack.step_rule",
    entry=StepRule,
    builtin={
        "explicit": StepRule(title="the step as given", size=lambda step, eps, steps: step),
        "at_least_eps_over_steps": StepRule(
            title="max(step, eps / num_steps) (Xie & Yuille's code)",
            size=lambda step, eps, steps: max(step, eps / steps) if steps else step,
        ),
    },
)


def clean_forwards(attack: Any) -> int:
    """Return how often an attack (a section ``attack``) looks at the clean image before or during its steps."""
    loss, target = ATTACK_LOSSES[attack.loss], ATTACK_TARGETS[attack.target]
    each_step = loss.from_clean and attack.looks_again
    return int(
        attack.restarts * attack.num_steps * each_step + (target.from_logits or (loss.from_clean and not each_step))
    )
