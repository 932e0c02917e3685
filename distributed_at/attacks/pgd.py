"""Projected gradient descent (Madry et al. 2018) with counter-based starts and targets; usable alone on any network.

    from distributed_at.attacks import PGD, Threat
    adv = PGD(threat=Threat("linf", 8 / 255), num_steps=10, step_size=2 / 255).perturb(model, x, y)

It never touches weights' gradients, buffers, flags or generators, and never waits for the device inside its loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.iteration import Iteration, Model, at_least_float32, make_iteration
from distributed_at.attacks.losses import LOSSES, AttackLoss, Goal, attack_loss
from distributed_at.attacks.modes import evaluation_mode
from distributed_at.attacks.results import AttackResult, Trajectory
from distributed_at.attacks.targets import FROM_LOGITS, RULES, TargetRule, choose_targets
from distributed_at.attacks.threat import STARTS, StartKind, Threat, check_choice
from distributed_at.config import AttackConfig
from distributed_at.errors import ConfigError, DataError
from distributed_at.rng import EVALUATION_EPOCH

StepRule = Literal["explicit", "at_least_eps_over_steps"]
STEP_RULES = ("explicit", "at_least_eps_over_steps")
SCOPES = ("sample", "group")


@dataclass(frozen=True, kw_only=True)
class PGD:
    """PGD in a ball cut with the pixel box. All lengths are in [0, 1] pixel units.

    Attributes:
        threat: ball and box.
        num_steps: gradient steps of one restart; 0 returns the projected start.
        step_size: length of a step: per element for linf, of the whole image's vector for l2.
        step_rule: "at_least_eps_over_steps" uses max(step_size, threat.eps / num_steps), as Xie & Yuille's code does
            (Xie & Yuille's code). The step does not follow an ``eps`` given per call: warm-up changes the radius alone.
        start: "uniform", "zero" or "gaussian"; the laws stand at ``Threat.random_start``.
        start_std: standard deviation of "gaussian" (TRADES: 0.001).
        clip_start: clip the start to the box (Xie & Yuille's and TRADES' codes do not).
        start_clean_probability: share of images, or groups, that start at the clean image.
        start_clean_scope: one coin per "sample" or per "group" (of ``group_ids``).
        loss: "ce", "kl", "margin" or "dlr".
        target: how target classes are chosen, once a call and the same in all restarts; "none" = untargeted.
        restarts: runs with fresh starts; per image the best is kept, by misclassification, then by loss.
        first_draw: number of the first restart among the starts that counters give; restart r uses first_draw + r.
        num_classes: needed for random targets.
        loss_scale: power of two on the summed loss that keeps 16-bit gradients from underflowing (Xie & Yuille: 128).
        check_input: refuse images outside the box, before the loop (this waits for the device once).
        fused: use the compiled kernels where they exist; the bits are the same (l2: to 2^-22). Off, nothing is compiled.
    """

    threat: Threat
    num_steps: int
    step_size: float
    step_rule: StepRule = "explicit"
    start: StartKind = "uniform"
    start_std: float = 0.001
    clip_start: bool = True
    start_clean_probability: float = 0.0
    start_clean_scope: Literal["sample", "group"] = "sample"
    loss: str = "ce"
    target: TargetRule = "none"
    restarts: int = 1
    first_draw: int = 0
    num_classes: int | None = None
    loss_scale: float = 1.0
    check_input: bool = True
    fused: bool = False

    def __post_init__(self) -> None:
        check_choice("step_rule", self.step_rule, STEP_RULES)
        check_choice("start", self.start, STARTS)
        check_choice("start_clean_scope", self.start_clean_scope, SCOPES)
        check_choice("loss", self.loss, tuple(LOSSES))
        check_choice("target", self.target, RULES)
        attack_loss(self.loss, targeted=self.target != "none", num_classes=self.num_classes)
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
        if self.target.startswith("random") and self.num_classes is None:
            raise ConfigError(f"target {self.target!r} draws among classes: give num_classes")
        if self.loss == "kl" and (self.start == "zero" or self.start_clean_probability > 0):
            raise ConfigError("loss 'kl' has zero gradient at the clean image: start must be 'gaussian' or 'uniform'")

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
            start=config.start,
            start_std=config.start_std,
            clip_start=config.clip_start,
            start_clean_probability=config.start_clean_probability,
            start_clean_scope=config.start_clean_scope,
            loss=config.loss,
            target=config.target,
            restarts=config.restarts,
            num_classes=num_classes,
            loss_scale=128.0 if config.dtype == "fp16" else 1.0,
            check_input=check_input,
            fused=fused,
        )

    @property
    def effective_step_size(self) -> float:
        """The step after ``step_rule``, in [0, 1] pixel units."""
        if self.step_rule == "at_least_eps_over_steps" and self.num_steps:
            return max(self.step_size, self.threat.eps / self.num_steps)
        return self.step_size

    def iteration(self, model: Model, *, functional: bool = False) -> Iteration:
        """Return this attack's one iteration on ``model`` as a pure function, to be compiled and handed to perturb."""
        return make_iteration(
            model,
            self.threat,
            self._loss(),
            loss_scale=self.loss_scale,
            functional=functional,
            fused=self.fused,
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
            iteration: a compiled form of ``self.iteration(model)``.

        Raises:
            DataError: shapes, dtypes or pixels that cannot be attacked.
        """
        result = self._attack(model, x, y, sample_ids, epoch, seed, group_ids, eps, iteration, (), self.restarts > 1)
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
        iteration: Iteration | None = None,
        checkpoints: tuple[int, ...] = (),
    ) -> AttackResult:
        """Like ``perturb``, with one more forward a restart, and what came of each image.

        ``checkpoints`` are numbers of steps, rising, in [0, num_steps]: along one trajectory they record at no further
        cost whether each image still holds. PGD-10, -100 and -2000 at one step size are then one attack.
        """
        if list(checkpoints) != sorted(set(checkpoints)) or not all(0 <= c <= self.num_steps for c in checkpoints):
            raise ConfigError(f"checkpoints must rise and lie in [0, num_steps = {self.num_steps}], got {checkpoints}")
        result = self._attack(model, x, y, sample_ids, epoch, seed, group_ids, eps, iteration, checkpoints, True)
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
        iteration: Iteration | None,
        checkpoints: tuple[int, ...],
        judge: bool,
    ) -> torch.Tensor | AttackResult:
        x = self._checked(x, y, sample_ids, group_ids)
        ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
        coin_ids = group_ids if self.start_clean_scope == "group" else None
        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model):
            goal = self._goal(model, x, y, epoch=epoch, seed=seed, sample_ids=ids)
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
                adv, seen = self._descend(iterate, adv, bounds, goal, set(checkpoints))
                if not judge:
                    return adv
                found = self._judge(model, adv, goal, seen, checkpoints)
                best = found if best is None else best.better_of(found)
        assert best is not None
        return best

    def _descend(
        self, iterate: Iteration, adv: torch.Tensor, bounds: Bounds, goal: Goal, record: set[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Make the steps; return the last iterate and the logits at the recorded numbers of steps."""
        step_size = torch.full((), self.effective_step_size, dtype=adv.dtype, device=adv.device)
        seen: dict[int, torch.Tensor] = {}
        for done in range(self.num_steps):
            adv, logits = iterate(adv, step_size, bounds, goal)
            if done in record:
                seen[done] = logits  # of the image before this step, so after ``done`` steps
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
        trajectory = None
        if checkpoints:
            along = [at_least_float32(seen.get(c, logits)) for c in checkpoints]
            trajectory = Trajectory(
                checkpoints=checkpoints,
                correct=torch.stack([z.argmax(dim=1) == goal.labels for z in along]),
                loss=torch.stack([self._loss()(z, goal) for z in along]),
            )
        predictions = logits.argmax(dim=1)
        return AttackResult(
            adv=adv,
            loss=self._loss()(at_least_float32(logits), goal),
            correct=predictions == goal.labels,
            predictions=predictions,
            targets=goal.targets,
            steps=self.num_steps,
            trajectory=trajectory,
        )

    def _goal(
        self, model: Model, x: torch.Tensor, y: torch.Tensor, *, epoch: int, seed: int, sample_ids: torch.Tensor
    ) -> Goal:
        """Choose targets and, for "kl", the clean log-probabilities: once a call, never once an iteration."""
        clean = None
        if self.target in FROM_LOGITS or self.loss == "kl":
            clean = at_least_float32(model(x))
        classes = self.num_classes if clean is None else clean.shape[1]
        targets = choose_targets(
            self.target, y, classes or 0, seed=seed, epoch=epoch, sample_ids=sample_ids, logits=clean
        )
        reference = torch.log_softmax(clean, dim=1) if self.loss == "kl" and clean is not None else None
        return Goal(labels=y, targets=targets, reference=reference)

    def _loss(self) -> AttackLoss:
        return LOSSES[self.loss]

    def _checked(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        sample_ids: torch.Tensor | None,
        group_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the images detached, or raise a DataError that says what is wrong with them."""
        if x.dtype not in (torch.float32, torch.float64):
            raise DataError(
                f"images are {x.dtype}; the attack works on float32 or float64 in {self.threat.box} "
                "(uint8: divide by 255; 16 bits: autocast inside the model)"
            )
        for name, value in (("labels", y), ("sample_ids", sample_ids), ("group_ids", group_ids)):
            if value is not None and (value.dtype != torch.int64 or value.shape != x.shape[:1]):
                raise DataError(
                    f"{name} must be ({len(x)},) int64, one an image, got {tuple(value.shape)} {value.dtype}"
                )
        if self.start_clean_scope == "group" and self.start_clean_probability > 0 and group_ids is None:
            raise DataError("start_clean_scope 'group' draws one coin a BN group: give group_ids")
        if self.check_input and not x.is_meta and x.numel():
            low, high = self.threat.box
            smallest, largest = (v.item() for v in torch.aminmax(x.detach()))
            if not (smallest >= low and largest <= high):
                raise DataError(
                    f"images lie in [{smallest:.4g}, {largest:.4g}], the pixel box is [{low:g}, {high:g}]; "
                    "normalisation belongs inside the model"
                )
        x = x.detach()
        return x.clone() if x.is_inference() else x
