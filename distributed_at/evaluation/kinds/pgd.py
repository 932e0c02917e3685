"""PGD as an evaluation: fixed counters, restarts as draws over what is left, several step counts in one pass.

The steps themselves are ``attacks.PGD``, the same code that training uses; only the counters differ, so that no
evaluation repeats a start of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distributed_at.catalogue.attacks import ATTACK_STARTS, ATTACK_TARGETS
from distributed_at.config.attack import AttackConfig
from distributed_at.config.evaluation import EvaluationEntry
from distributed_at.evaluation.kinds.base import EvaluationKind
from distributed_at.evaluation.protocol import AttackProtocol
from distributed_at.lazy import F, torch

if TYPE_CHECKING:
    import numpy as np

    from distributed_at.attacks import PGD
    from distributed_at.attacks.balls import Bounds
    from distributed_at.attacks.iteration import Iteration
    from distributed_at.attacks.losses import Goal
    from distributed_at.evaluation.attacked import AttackedSamples
    from distributed_at.evaluation.kinds.base import Forward


@dataclass(frozen=True, kw_only=True)
class PgdProtocol(AttackProtocol):
    """What a PGD number depends on. ``step_size`` is in /255, ``start_std`` in [0, 1]."""

    step_size: float = 0.0
    num_steps: int = 0
    restarts: int = 0
    start: str = ""
    start_std: float = 0.0
    clip_start: bool = True
    start_clean_probability: float = 0.0
    loss: str = ""
    bn_mode: str = "eval"
    update: str = "steepest"
    step_schedule: tuple[tuple[int, float], ...] = ()
    early_stop: int | None = None

    _floats: ClassVar[tuple[str, ...]] = ("eps", "step_size", "start_std", "start_clean_probability")

    @property
    def default_name(self) -> str:
        parts = [f"PGD-{self.num_steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")]
        usual = AttackConfig.model_fields
        parts += [own for own, name in ((self.loss, "loss"), (self.update, "update")) if own != usual[name].default]
        parts += ["targeted"] if self.targeted else []
        return " ".join([*parts, f"{self.norm} {self.eps:g}/255"])


class Pgd(EvaluationKind):
    """Robust accuracy under PGD (Madry et al. 2018), targeted or not, with restarts."""

    class Config(EvaluationEntry):
        """PGD, which names its whole attack."""

        kind: Literal["pgd"] = "pgd"
        checkpoints: tuple[int, ...] = Field(
            default=(),
            description="fewer numbers of steps, read off the same pass: [20, 100] beside num_steps: 2000 measures "
            "PGD-20 and PGD-100 too; their steps must be of the same size",
        )

        @model_validator(mode="after")
        def _needs_attack(self) -> Pgd.Config:
            if self.attack is None:
                raise ValueError("kind 'pgd' needs attack: {eps, num_steps, step_size, ...}")
            if self.checkpoints:
                _check_one_pass(self.attack, list(self.checkpoints))
            return self

    Record = PgdProtocol

    @classmethod
    def settings(cls, entry: EvaluationEntry, attack: AttackConfig | None, num_classes: int) -> dict[str, Any]:
        assert attack is not None
        return {
            "step_size": attack.effective_step_size,
            "num_steps": attack.num_steps,
            "restarts": attack.restarts,
            "start": attack.start,
            "start_std": attack.start_std if ATTACK_STARTS[attack.start].spread else 0.0,
            "clip_start": attack.clip_start,
            "start_clean_probability": attack.start_clean_probability,
            "target": attack.target,
            "loss": attack.loss,
            "update": attack.update,
            "step_schedule": attack.step_schedule,
            "early_stop": attack.early_stop,
            # A targeted attack may turn a mistake into a hit, and published targeted numbers are over all images
            # (Xie & Yuille 2020, section 3), so there nothing may be skipped.
            "scope": "all" if ATTACK_TARGETS[attack.target].targeted else "clean_correct",
            "attacks": ("pgd",),
        }

    @classmethod
    def short_name(cls, entry: EvaluationEntry) -> str:
        assert entry.attack is not None
        return f"pgd{entry.attack.num_steps}"

    @classmethod
    def paper_names(cls, details: Mapping[str, Any]) -> set[str]:
        restarts = int(details.get("restarts") or 1)
        return {f"pgd{details.get('num_steps')}" + (f"x{restarts}" if restarts > 1 else "")}

    @classmethod
    def single_entries(cls, entry: EvaluationEntry) -> list[EvaluationEntry]:
        """Return one entry a number of steps, rising.

        A name that holds the number of steps gets each one's own (``pgd2000`` -> ``pgd20``); others get it appended.
        """
        assert isinstance(entry, Pgd.Config)
        assert entry.attack is not None
        if not entry.checkpoints:
            return [entry]
        steps, name = str(entry.attack.num_steps), entry.name
        shared = {"step_size": entry.attack.effective_step_size, "step_rule": "explicit"}
        found: list[EvaluationEntry] = []
        for count in entry.checkpoints:
            own = None if name is None else name.replace(steps, str(count)) if steps in name else f"{name}-{count}"
            attack = entry.attack.model_copy(update={**shared, "num_steps": count})
            found.append(entry.model_copy(update={"checkpoints": (), "name": own, "attack": attack}))
        return [*found, entry.model_copy(update={"checkpoints": ()})]

    @classmethod
    def is_targeted(cls, entry: EvaluationEntry) -> bool:
        return entry.attack is not None and ATTACK_TARGETS[entry.attack.target].targeted

    @classmethod
    def forward_units(cls, entry: EvaluationEntry) -> float:
        from distributed_at.cost import attack_units

        assert entry.attack is not None
        attack = entry.attack.model_copy(update={"bn_mode": "eval"})
        return 1.0 + attack_units(attack)

    @classmethod
    def attack(
        cls,
        forward: Forward,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        ids: torch.Tensor,
        piece: np.ndarray,
        protocol: PgdProtocol,
        on_the_way: dict[int, AttackedSamples],
    ) -> AttackedSamples:
        return run_pgd(forward, x, y, ids=ids, protocol=protocol, on_the_way=on_the_way)


def _check_one_pass(attack: AttackConfig, counts: list[int]) -> None:
    """Check that PGD at every number of steps is the beginning of one and the same attack."""
    if counts != sorted(set(counts)) or counts[0] < 1 or counts[-1] >= attack.num_steps:
        raise ValueError(
            f"checkpoints must rise and lie between 1 and num_steps - 1 = {attack.num_steps - 1}, got {counts}"
        )
    if attack.restarts > 1:
        raise ValueError(f"checkpoints are read off one pass: restarts must be 1, got {attack.restarts}")
    for count in counts:
        alone = attack.model_copy(update={"num_steps": count}).effective_step_size
        if alone != attack.effective_step_size:
            raise ValueError(
                f"checkpoints: PGD-{count} steps by {alone:g}/255 under step_rule '{attack.step_rule}', PGD-"
                f"{attack.num_steps} by {attack.effective_step_size:g}/255: give PGD-{count} an entry of its own"
            )


def build_attack(protocol: PgdProtocol) -> PGD:
    """Return the attack that a PGD protocol describes, with all its restarts."""
    from distributed_at.attacks import PGD

    config = AttackConfig.model_validate(
        {
            "norm": protocol.norm,
            "eps": protocol.eps,
            "num_steps": protocol.num_steps,
            "step_size": protocol.step_size,
            "start": protocol.start,
            "start_std": protocol.start_std or 0.001,
            "clip_start": protocol.clip_start,
            "start_clean_probability": protocol.start_clean_probability,
            "target": protocol.target,
            "loss": protocol.loss,
            "update": protocol.update,
            "step_schedule": protocol.step_schedule,
            "early_stop": protocol.early_stop,
            "restarts": protocol.restarts,
            "dtype": "fp32" if protocol.dtype == "tf32" else protocol.dtype,
        }
    )
    return PGD.from_config(config, num_classes=protocol.num_classes)


def run_pgd(
    forward: Forward,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    ids: torch.Tensor,
    protocol: PgdProtocol,
    on_the_way: dict[int, AttackedSamples] | None = None,
) -> AttackedSamples:
    """Attack samples by PGD; restart r uses draw r and, for untargeted attacks, only samples that still stand.

    A targeted restart runs on every sample, because its success rate counts all of them. Per sample the verdict is
    that of ``PGD(restarts=R)``; only the work on samples that are already broken is spared.

    Args:
        forward: x -> logits, normalisation inside, in eval mode.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64 labels.
        ids: (N,) int64 sample ids, on the device of ``x``: what starts and targets are drawn from.
        on_the_way: keys are fewer numbers of steps, whose outcomes are filled in; needs one restart.
    """
    from distributed_at.evaluation.attacked import AttackedSamples, inside_ball
    from distributed_at.rng import EVALUATION_EPOCH

    outcome = AttackedSamples.unbroken(y)
    attack = build_attack(protocol)
    targeted = protocol.targeted
    fewer = {} if on_the_way is None else on_the_way
    counters: dict[str, Any] = {"epoch": EVALUATION_EPOCH, "seed": protocol.seed}
    for restart in range(protocol.restarts):
        left = torch.arange(len(y), device=y.device) if targeted else torch.nonzero(~outcome.broken).squeeze(1)
        if not len(left):
            break
        once = replace(attack, first_draw=restart, restarts=1)
        targets = None
        seen: dict[int, torch.Tensor] = {}
        if fewer:
            counters["iteration"] = _snapshots(once.iteration(forward), set(fewer), seen)
        if targeted:
            result = once.perturb_with_info(forward, x[left], y[left], sample_ids=ids[left], **counters)
            seen[protocol.num_steps], targets = result.adv, result.targets
        else:
            seen[protocol.num_steps] = once.perturb(forward, x[left], y[left], sample_ids=ids[left], **counters)
        for count, adv in seen.items():
            adv = inside_ball(adv, x[left], eps=attack.threat.eps, norm=attack.threat.norm)
            with torch.no_grad():
                logits = forward(adv)
                loss = F.cross_entropy(logits, y[left], reduction="none")
            found = fewer.get(count, outcome)
            found.record(left, logits, loss, y[left], 0, targets=targets)
    return outcome


def _snapshots(iterate: Iteration, counts: set[int], seen: dict[int, torch.Tensor]) -> Iteration:
    """Return the iteration that also keeps the images after each of ``counts`` steps."""
    done = 0

    def watched(
        adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal done
        if done in counts:
            seen[done] = adv.detach().clone()
        done += 1
        return iterate(adv, step_size, bounds, goal)

    return watched
