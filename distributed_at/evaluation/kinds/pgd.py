"""PGD as an evaluation: fixed counters, restarts as draws over what is left, success of targeted attacks.

The steps themselves are ``attacks.PGD``, the same code that training uses; only the counters differ, so that no
evaluation repeats a start of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from distributed_at.attacks import PGD, Threat
from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.iteration import Iteration
from distributed_at.attacks.losses import Goal
from distributed_at.config import AttackConfig
from distributed_at.evaluation.outcome import Outcome, inside_ball
from distributed_at.evaluation.protocol import Protocol
from distributed_at.rng import EVALUATION_EPOCH

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _ThreatAtDraw(Threat):
    """The same ball, whose random starts begin at another draw: a later restart on its own."""

    first_draw: int = 0

    def random_start(self, x: torch.Tensor, *, draw: int = 0, **arguments: Any) -> torch.Tensor:
        return super().random_start(x, draw=self.first_draw + draw, **arguments)


def build_attack(protocol: Protocol) -> PGD:
    """Return the attack that a PGD protocol describes, with all its restarts."""
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
    protocol: Protocol,
    on_the_way: dict[int, Outcome] | None = None,
) -> Outcome:
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
    outcome = Outcome.unbroken(y)
    attack = build_attack(protocol)
    targeted = protocol.target != "none"
    fewer = {} if on_the_way is None else on_the_way
    counters: dict[str, Any] = {"epoch": EVALUATION_EPOCH, "seed": protocol.seed}
    for restart in range(protocol.restarts):
        left = torch.arange(len(y), device=y.device) if targeted else torch.nonzero(~outcome.broken).squeeze(1)
        if not len(left):
            break
        ball = _ThreatAtDraw(attack.threat.norm, attack.threat.eps, attack.threat.box, first_draw=restart)
        once = replace(attack, threat=ball, restarts=1)
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
