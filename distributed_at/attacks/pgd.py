"""Projected gradient descent (Madry et al. 2018) with counter-based starts and targets; usable alone on any network.

    from distributed_at.attacks import PGD, Threat
    adv = PGD(threat=Threat("linf", 8 / 255), num_steps=10, step_size=2 / 255).perturb(model, x, y)

It never touches weights' gradients, buffers, flags or generators, and never waits for the device inside its loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar, get_args

import torch

from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.counters import Counters
from distributed_at.attacks.inputs import check_soft_labels, checked_images
from distributed_at.attacks.iteration import (
    Gradient,
    Iteration,
    Model,
    at_least_float32,
    clean_logits,
    functional_input_gradient,
    input_gradient,
    make_iteration,
)
from distributed_at.attacks.losses import Goal, LossFunction
from distributed_at.attacks.modes import evaluation_mode
from distributed_at.attacks.results import AttackResult, Trajectory
from distributed_at.attacks.targets import choose_targets
from distributed_at.attacks.threat import Threat
from distributed_at.attacks.updates import UpdateRule
from distributed_at.catalogue.attacks import (
    ATTACK_LOSSES,
    ATTACK_STARTS,
    ATTACK_TARGETS,
    ATTACK_UPDATES,
    BALLS,
    STEP_RULES,
    AttackLoss,
    Start,
    Target,
    Update,
)
from distributed_at.config import AttackConfig
from distributed_at.config.attack import CleanStartScope, ReferenceForward, schedule_problem
from distributed_at.errors import ConfigError, DataError, did_you_mean
from distributed_at.logits import check_labels, checked_logits, predicted_classes
from distributed_at.ops.reference import sign
from distributed_at.registry import Registry
from distributed_at.rng import EVALUATION_EPOCH, Purpose

T = TypeVar("T")


def _entry(registry: Registry[T], value: str | T) -> T:
    """Return the entry that a name, or an entry itself, stands for."""
    return registry[value] if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class PGD:
    """PGD in a ball cut with the pixel box. All lengths are in [0, 1] pixel units.

    ``loss``, ``target``, ``start`` and ``update`` are names of ``catalogue/attacks.py``, or entries of its types made on
    the spot: ``loss=AttackLoss(title="mine", source="", function=my_loss)``.

    Attributes:
        threat: ball and box.
        num_steps: gradient steps of one restart; 0 returns the projected start.
        step_size: length of a step: per element for linf, of the whole image's vector for l2.
        step_rule: "at_least_eps_over_steps" uses max(step_size, threat.eps / num_steps), as Xie & Yuille's code does.
            The step does not follow an ``eps`` given per call: warm-up changes the radius alone.
        step_schedule: (step, factor) pairs: from that step on, counted from 0, steps are ``factor`` times as long, and
            factors multiply. Gowal et al.'s code: ((5, 0.1),).
        update: "steepest", the ball's own step; or "adam".
        step_noise: standard deviation of Gaussian noise that every step adds before it is projected, of counters as a start
            (Zhang et al., "Friendly AT", 2020: omega of their code, 0.001); for "steepest" in "linf".
        start: "uniform", "zero" or "gaussian"; the laws stand in ``starts.py`` and ``balls.py``.
        start_std: standard deviation of "gaussian" (TRADES: 0.001).
        clip_start: clip the start to the box (Xie & Yuille's and TRADES' codes do not).
        start_clean_probability: share of images, or groups, that start at the clean image.
        start_clean_scope: one coin per "sample" or per "group" (of ``group_ids``).
        loss: "ce", "kl", "margin" or "dlr".
        reference_forward: a loss measured from the clean prediction takes it "once" a call, or looks at the clean images
            anew at "each_step", after the adversarial ones, as TRADES' code; with statistics that move, the two differ.
        target: how target classes are chosen, once a call and the same in all restarts; "none" = untargeted.
        restarts: runs with fresh starts; per image the best is kept, by misclassification, then by loss.
        final_forward: look at the images once more after the steps of each restart, as Pang et al.'s and Rice et al.'s
            codes do: it matters where forwards move statistics.
        early_stop: an image is moved no more once so many of the attack's forwards, the start's being the first, gave it
            another class than its label (Zhang et al., "Friendly AT", 2020, algorithm 1: tau + 1); None = never.
        first_draw: number of the first restart among the starts that counters give; restart r uses first_draw + r.
        num_classes: needed for random targets.
        loss_scale: power of two on the summed loss that keeps 16-bit gradients from underflowing (Xie & Yuille: 128).
        gradient: what finds the gradient; None = autograd. An estimate from queries alone makes it a black-box attack.
        check_input: refuse images outside the box, before the loop (this waits for the device once).
        fused: use the compiled kernels where they exist; the bits are the same (l2: to 2^-22). Off, nothing is compiled.
    """

    threat: Threat
    num_steps: int
    step_size: float
    step_rule: str = "explicit"
    step_schedule: tuple[tuple[int, float], ...] = ()
    update: str | Update = "steepest"
    step_noise: float = 0.0
    start: str | Start = "uniform"
    start_std: float = 0.001
    clip_start: bool = True
    start_clean_probability: float = 0.0
    start_clean_scope: CleanStartScope = "sample"
    loss: str | AttackLoss = "ce"
    reference_forward: ReferenceForward = "once"
    target: str | Target = "none"
    restarts: int = 1
    final_forward: bool = False
    early_stop: int | None = None
    first_draw: int = 0
    num_classes: int | None = None
    loss_scale: float = 1.0
    gradient: Gradient | None = None
    check_input: bool = True
    fused: bool = False

    def __post_init__(self) -> None:
        STEP_RULES[self.step_rule]
        _check_literal("start_clean_scope", self.start_clean_scope, get_args(CleanStartScope))
        _check_literal("reference_forward", self.reference_forward, get_args(ReferenceForward))
        start, target, loss = self._start_entry, self._target_entry, self._loss_entry
        refusal = loss.refuse(loss_name(self.loss), targeted=target.targeted, num_classes=self.num_classes)
        if refusal is not None:
            raise ConfigError(f"attack.{refusal}")
        _entry(ATTACK_UPDATES, self.update)
        if self.step_noise and (not BALLS[self.threat.norm].per_pixel or self._rule() is not None):
            raise ConfigError("step_noise belongs to steps of the sign: norm 'linf' and update 'steepest'")
        if not self.step_noise >= 0:
            raise ConfigError(f"step_noise must be at least 0, got {self.step_noise}")
        if self.num_steps < 0:
            raise ConfigError(f"num_steps must be at least 0, got {self.num_steps}")
        if not self.step_size > 0:
            raise ConfigError(f"step_size must be above 0, got {self.step_size}")
        if self.restarts < 1:
            raise ConfigError(f"restarts must be at least 1, got {self.restarts}")
        if self.first_draw < 0:
            raise ConfigError(f"first_draw must be at least 0, got {self.first_draw}")
        if not 0 <= self.start_clean_probability <= 1:
            raise ConfigError(f"start_clean_probability must be in [0, 1], got {self.start_clean_probability}")
        if self.early_stop is not None and self.early_stop < 1:
            raise ConfigError(
                f"early_stop counts forwards and must be at least 1, or None for never, got {self.early_stop}"
            )
        problem = schedule_problem(self.step_schedule)
        if problem is not None:
            raise ConfigError(problem)
        if target.at_random and self.num_classes is None:
            raise ConfigError(f"target {self.target!r} draws among classes: give num_classes")
        if loss.from_clean and (start.clean or self.start_clean_probability > 0):
            raise ConfigError(
                f"loss {loss_name(self.loss)!r} has zero gradient at the clean image: start must be 'gaussian' or 'uniform'"
            )

    @classmethod
    def from_config(
        cls, config: AttackConfig, *, num_classes: int, check_input: bool = False, fused: bool = True
    ) -> PGD:
        """Build the attack of a recipe, whose lengths are in /255; the engine's images need no range check."""
        return cls(
            threat=Threat(config.norm, config.eps / 255.0),
            num_steps=config.num_steps,
            step_size=config.step_size / 255.0,
            step_rule=config.step_rule,
            step_schedule=config.step_schedule,
            update=config.update,
            step_noise=config.step_noise,
            start=config.start,
            start_std=config.start_std,
            clip_start=config.clip_start,
            start_clean_probability=config.start_clean_probability,
            start_clean_scope=config.start_clean_scope,
            loss=config.loss,
            reference_forward="each_step" if config.looks_again else "once",
            target=config.target,
            restarts=config.restarts,
            final_forward=config.looks_last,
            early_stop=config.early_stop,
            num_classes=num_classes,
            loss_scale=128.0 if config.dtype == "fp16" else 1.0,
            check_input=check_input,
            fused=fused,
        )

    @property
    def effective_step_size(self) -> float:
        """The first step after ``step_rule``, in [0, 1] pixel units; ``step_schedule`` changes later ones."""
        return STEP_RULES[self.step_rule].size(self.step_size, self.threat.eps, self.num_steps)

    @property
    def keeps_state(self) -> bool:
        """Whether a step is more than the ball's own, so that an iteration gives the gradient alone."""
        return self._rule() is not None or self.step_noise > 0

    def iteration(self, model: Model, *, functional: bool = False) -> Iteration:
        """Return this attack's one iteration on ``model`` as a pure function, to be compiled and handed to perturb."""
        autograd = functional_input_gradient if functional else input_gradient
        return make_iteration(
            model,
            self.objective,
            None if self.keeps_state else self.threat.stepper(fused=self.fused),
            gradient=self.gradient or autograd,
            loss_scale=self.loss_scale,
        )

    @property
    def takes_soft_labels(self) -> bool:
        """Whether the loss can be measured from a distribution over classes."""
        return self._loss_entry.soft_labels

    @property
    def objective(self) -> LossFunction:
        """What is maximised: (logits (N, K) float32 or wider, ``Goal``) -> (N,)."""
        return self._loss_entry.load()

    def goal(
        self,
        model: Model,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        sample_ids: torch.Tensor,
        epoch: int = EVALUATION_EPOCH,
        seed: int = 0,
        targets: torch.Tensor | None = None,
        soft_labels: torch.Tensor | None = None,
    ) -> Goal:
        """Return what the attack aims at, as ``perturb`` does: targets and the clean prediction, once a call.

        Where ``reference_forward`` is "each_step", the goal holds the clean images in place of their prediction.
        """
        loss, rule = self._loss_entry, self._target_entry
        again = loss.from_clean and self.reference_forward == "each_step"
        choosing = targets is None and rule.from_logits
        once = loss.from_clean and not again
        clean = clean_logits(model, x) if choosing or once else None
        if targets is None:
            classes = self.num_classes if clean is None else clean.shape[1]
            targets = choose_targets(rule, y, classes or 0, seed=seed, epoch=epoch, sample_ids=sample_ids, logits=clean)
        return Goal(
            labels=y,
            targets=targets,
            reference=torch.log_softmax(clean, dim=1) if once and clean is not None else None,
            soft_labels=soft_labels,
            clean=x if again else None,
        )

    def perturb(
        self,
        model: Model,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        sample_ids: torch.Tensor | None = None,
        epoch: int = EVALUATION_EPOCH,
        seed: int = 0,
        group_ids: torch.Tensor | None = None,
        eps: float | torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        soft_labels: torch.Tensor | None = None,
        iteration: Iteration | None = None,
    ) -> torch.Tensor:
        """Return adversarial images (N, C, H, W), detached, inside ball and box; with one restart, the last iterate.

        Args:
            model: images -> logits (N, K). An ``nn.Module`` that is training is held in eval mode meanwhile.
            x: (N, C, H, W) float32 or float64 in the box, any memory format.
            y: (N,) int64 labels.
            sample_ids: (N,) int64 keys of all random draws; None = 0..N-1, the position in this batch. Give real ids
                where results must not depend on the batching.
            epoch, seed: the other keys.
            group_ids: (N,) int64, needed where ``start_clean_scope`` is "group" and its probability above 0.
            eps: radius of this call in place of ``threat.eps``, a float or a 0-dim tensor (eps warm-up).
            targets: (N,) int64 classes to aim at, in place of the rule ``target``.
            soft_labels: (N, K) distributions in place of the labels, for losses that take them; whether an image is
                still right is judged by ``y``.
            iteration: a compiled form of ``self.iteration(model)``.

        Raises:
            DataError: shapes, dtypes or pixels that cannot be attacked.
        """
        result = self._attack(
            model, x, y, sample_ids, epoch, seed, group_ids, eps, targets, soft_labels, iteration, (), self.restarts > 1
        )
        return result if isinstance(result, torch.Tensor) else result.adv

    def perturb_with_info(
        self,
        model: Model,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        sample_ids: torch.Tensor | None = None,
        epoch: int = EVALUATION_EPOCH,
        seed: int = 0,
        group_ids: torch.Tensor | None = None,
        eps: float | torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        soft_labels: torch.Tensor | None = None,
        iteration: Iteration | None = None,
        checkpoints: tuple[int, ...] = (),
    ) -> AttackResult:
        """Like ``perturb``, with one more forward a restart, and what came of each image.

        ``checkpoints`` are numbers of steps, rising, in [0, num_steps]: along one trajectory they record at no further
        cost whether each image still holds. PGD-10, -100 and -2000 at one step size are then one attack.
        """
        if list(checkpoints) != sorted(set(checkpoints)) or not all(0 <= c <= self.num_steps for c in checkpoints):
            raise ConfigError(f"checkpoints must rise and lie in [0, num_steps = {self.num_steps}], got {checkpoints}")
        result = self._attack(
            model, x, y, sample_ids, epoch, seed, group_ids, eps, targets, soft_labels, iteration, checkpoints, True
        )
        assert isinstance(result, AttackResult)
        return result

    def _attack(
        self,
        model: Model,
        x: torch.Tensor,
        y: torch.Tensor,
        sample_ids: torch.Tensor | None,
        epoch: int,
        seed: int,
        group_ids: torch.Tensor | None,
        eps: float | torch.Tensor | None,
        targets: torch.Tensor | None,
        soft_labels: torch.Tensor | None,
        iteration: Iteration | None,
        checkpoints: tuple[int, ...],
        judge: bool,
    ) -> torch.Tensor | AttackResult:
        if isinstance(eps, float | int):
            replace(self.threat, eps=float(eps))  # what a call overrides is checked like what the ball was made with
        if self.start_clean_scope == "group" and self.start_clean_probability > 0 and group_ids is None:
            raise DataError("start_clean_scope 'group' draws one coin a BN group: give group_ids")
        loss = self._loss_entry
        if targets is not None:
            refusal = loss.refuse(loss_name(self.loss), targeted=True, num_classes=self.num_classes)
            if refusal is not None:
                raise ConfigError(f"attack.{refusal}")
        if soft_labels is not None:
            check_soft_labels(soft_labels, x, loss, loss_name(self.loss))
        rows = {"labels": y, "sample_ids": sample_ids, "group_ids": group_ids, "targets": targets}
        x = checked_images(x, rows, box=self.threat.box, look=self.check_input)
        ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
        coin_ids = group_ids if self.start_clean_scope == "group" else None
        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model):
            goal = self.goal(
                model, x, y, sample_ids=ids, epoch=epoch, seed=seed, targets=targets, soft_labels=soft_labels
            )
            classes = self.num_classes
            if classes is None and self.check_input and x.is_cuda and len(x):
                classes = int(checked_logits(model(x[:1]), x[:1]).shape[1])  # a device would fail without a word
            self._check_classes(x, y, targets, classes)
            bounds = self.threat.bounds(x, eps=eps)
            iterate = iteration if iteration is not None else self.iteration(model)
            best: AttackResult | None = None
            for restart in range(self.restarts):
                adv = self.threat.random_start(
                    x,
                    seed=seed,
                    epoch=epoch,
                    sample_ids=ids,
                    draw=self.first_draw + restart,
                    kind=self.start,
                    std=self.start_std,
                    clean_probability=self.start_clean_probability,
                    coin_ids=coin_ids,
                    clip=self.clip_start or self.num_steps == 0,  # what is returned is in the box in any case
                    eps=eps,
                    fused=self.fused,
                )
                counters = Counters(seed=seed, epoch=epoch, sample_ids=ids, draw=self.first_draw + restart)
                adv, seen = self._descend(model, iterate, adv, bounds, goal, set(checkpoints), counters)
                if not judge:
                    if self.final_forward:
                        model(adv)
                    return adv
                found = self._judge(model, adv, goal, seen, checkpoints)
                best = found if best is None else best.better_of(found)
        assert best is not None
        return best

    def _descend(
        self,
        model: Model,
        iterate: Iteration,
        adv: torch.Tensor,
        bounds: Bounds,
        goal: Goal,
        record: set[int],
        counters: Counters,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Make the steps; return the last iterate and the logits at the recorded numbers of steps."""
        rule, ball = self._rule(), self.threat.ball
        state = None if rule is None else rule.begin(adv)
        factors = dict(self.step_schedule)
        length = self.effective_step_size
        step_size = torch.full((), length, dtype=adv.dtype, device=adv.device)
        wrong = torch.zeros(len(adv), dtype=torch.int64, device=adv.device)
        seen: dict[int, torch.Tensor] = {}
        for done in range(self.num_steps):
            if done in factors:
                length *= factors[done]
                step_size = torch.full((), length, dtype=adv.dtype, device=adv.device)
            # not the images themselves, but the gradient, where the rule keeps a state
            if done:
                moved, logits = iterate(adv, step_size, bounds, goal)
            else:
                moved, logits = self._first_iterate(model, iterate, adv, step_size, bounds, goal)
            if rule is not None:
                grad = moved if self.loss_scale == 1.0 else moved / self.loss_scale
                moved, state = rule.step(adv, grad, state, step_size=length, bounds=bounds, ball=ball)
            elif self.step_noise:
                many = adv[0].numel() if len(adv) else 0
                drawn = counters.of_step(done, self.num_steps).normal(many, purpose=Purpose.STEP_NOISE)
                noise = self.step_noise * drawn.to(adv.dtype).reshape(adv.shape)
                ahead = adv + step_size * sign(moved, adv.dtype) + noise
                moved = ball.project(ahead, bounds)
            if self.early_stop is not None:
                wrong += predicted_classes(logits) != goal.labels
                moving = (wrong < self.early_stop).view(-1, *([1] * (adv.dim() - 1)))
                moved = torch.where(moving, moved, adv)
            if done in record:
                seen[done] = logits  # of the image before this step, so after ``done`` steps
            adv = moved
        return adv, seen

    def _judge(
        self,
        model: Model,
        adv: torch.Tensor,
        goal: Goal,
        seen: dict[int, torch.Tensor],
        checkpoints: tuple[int, ...],
    ) -> AttackResult:
        logits = model(adv)
        if goal.clean is not None:
            goal = goal._replace(reference=torch.log_softmax(clean_logits(model, goal.clean), dim=1))
        trajectory = None
        if checkpoints:
            at_checkpoints = [at_least_float32(seen.get(c, logits)) for c in checkpoints]
            trajectory = Trajectory(
                checkpoints=checkpoints,
                correct=torch.stack([predicted_classes(z) == goal.labels for z in at_checkpoints]),
                loss=torch.stack([self.objective(z, goal) for z in at_checkpoints]),
            )
        predictions = predicted_classes(logits)
        return AttackResult(
            adv=adv,
            loss=self.objective(at_least_float32(logits), goal),
            correct=predictions == goal.labels,
            predictions=predictions,
            targets=goal.targets,
            steps=self.num_steps,
            trajectory=trajectory,
        )

    def _check_classes(
        self, x: torch.Tensor, y: torch.Tensor, targets: torch.Tensor | None, classes: int | None
    ) -> None:
        """Refuse labels and targets that the network has no logit for; some losses would ignore them.

        ``classes``: None where nobody said how many there are: then what is below 0 is refused. Off where inputs are not
        checked.
        """
        if self.check_input and not x.is_meta:
            for name, value in (("label", y), ("target", targets)):
                if value is not None:
                    check_labels(value, classes, name=name)

    def _first_iterate(
        self, model: Model, iterate: Iteration, adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the first iteration, which says how many classes there are."""
        try:
            moved, logits = iterate(adv, step_size, bounds, goal)
        except (IndexError, RuntimeError):
            # what torch says of a label without a logit; one image tells whether it was that
            if self.check_input and self.num_classes is None and not adv.is_meta and len(adv):
                with torch.no_grad():
                    classes = checked_logits(model(adv[:1]), adv[:1]).shape[1]
                self._check_classes(adv, goal.labels, goal.targets, int(classes))
            raise
        if self.num_classes is None:
            self._check_classes(adv, goal.labels, goal.targets, int(logits.shape[1]))
        return moved, logits

    @property
    def _loss_entry(self) -> AttackLoss:
        return _entry(ATTACK_LOSSES, self.loss)

    @property
    def _target_entry(self) -> Target:
        return _entry(ATTACK_TARGETS, self.target)

    @property
    def _start_entry(self) -> Start:
        return _entry(ATTACK_STARTS, self.start)

    def _rule(self) -> UpdateRule | None:
        return _entry(ATTACK_UPDATES, self.update).load()


def loss_name(loss: str | AttackLoss) -> str:
    """Return what messages call a loss."""
    return loss if isinstance(loss, str) else loss.title


def _check_literal(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field} is {value!r}; allowed are {', '.join(allowed)}.{did_you_mean(value, allowed)}")
