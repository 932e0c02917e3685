"""Signs that a robust accuracy cannot be trusted, read from results: they suspect, they prove nothing.

After Athalye, Carlini & Wagner 2018 ("Obfuscated gradients give a false sense of security", section 3.1) and Carlini
et al. 2019 ("On evaluating adversarial robustness", section 5). Thresholds are arguments, and a verdict carries the
numbers that it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
import torch.nn.functional as F

from distributed_at.evaluation.result import EvaluationResult


@dataclass(frozen=True)
class Verdict:
    """One suspicion: a stable ``code``, a sentence for people, and the numbers behind it."""

    code: str
    message: str
    numbers: dict[str, float]


def _sign_test(more: int, less: int) -> float:
    """Return the one-sided p-value of ``more`` against ``less`` discordant pairs under equal chances (exact)."""
    n = more + less
    return sum(comb(n, k) for k in range(more, n + 1)) / 2**n if n else 1.0


def _paired(a: EvaluationResult, b: EvaluationResult) -> tuple[np.ndarray, np.ndarray]:
    """Return both results' ``correct_adv`` on the samples that they share, in the same order."""
    _, at_a, at_b = np.intersect1d(a.rows.sample_id, b.rows.sample_id, return_indices=True)
    return a.rows.correct_adv[at_a], b.rows.correct_adv[at_b]


def stronger_is_weaker(
    weaker: EvaluationResult, stronger: EvaluationResult, *, significance: float = 0.01
) -> Verdict | None:
    """Suspect where an attack that should be stronger leaves more samples right, beyond chance (paired sign test)."""
    weak, strong = _paired(weaker, stronger)
    more, less = int((strong & ~weak).sum()), int((weak & ~strong).sum())
    p = _sign_test(more, less)
    if p >= significance:
        return None
    return Verdict(
        "stronger_attack_is_weaker",
        f"{stronger.protocol.name} leaves {strong.mean():.1%} right, more than {weaker.protocol.name} with "
        f"{weak.mean():.1%}: the stronger attack does not converge or is misconfigured",
        {"weaker": float(weak.mean()), "stronger": float(strong.mean()), "p": p},
    )


def autoattack_gap(pgd: EvaluationResult, autoattack: EvaluationResult, *, gap: float = 0.12) -> Verdict | None:
    """Suspect where AutoAttack breaks far more than PGD; adversarially trained networks lose about 5 points."""
    by_pgd, by_auto = _paired(pgd, autoattack)
    if not len(by_pgd) or by_pgd.mean() - by_auto.mean() <= gap:
        return None
    return Verdict(
        "pgd_overestimates",
        f"{pgd.protocol.name} leaves {by_pgd.mean():.1%} right and {autoattack.protocol.name} {by_auto.mean():.1%}: "
        "PGD's gradients mislead here (masking, or a loss that saturates)",
        {"pgd": float(by_pgd.mean()), "autoattack": float(by_auto.mean())},
    )


def single_step_gap(single: EvaluationResult, multi: EvaluationResult, *, gap: float = 0.25) -> Verdict | None:
    """Suspect masking where one step leaves far more samples right than many (catastrophic overfitting looks so)."""
    one, many = _paired(single, multi)
    if not len(one) or one.mean() - many.mean() <= gap:
        return None
    return Verdict(
        "single_step_masking",
        f"{single.protocol.name} leaves {one.mean():.1%} right and {multi.protocol.name} {many.mean():.1%}: the model "
        "resists single steps alone (Wong et al. 2020, catastrophic overfitting)",
        {"single": float(one.mean()), "multi": float(many.mean())},
    )


def query_attack_helps(autoattack: EvaluationResult, *, share: float = 0.002) -> Verdict | None:
    """Suspect masking where Square, which sees no gradient, breaks what the gradient attacks of AutoAttack left."""
    rows = autoattack.rows
    extra = float((rows.attack == "square").mean()) if len(rows) else 0.0
    if autoattack.protocol.attacks[-1:] != ("square",) or extra <= share:
        return None
    return Verdict(
        "query_attack_beats_gradients",
        f"Square broke {extra:.1%} of the samples after every gradient attack had failed on them",
        {"square": extra},
    )


def vanishing_gradients(
    forward: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    floor: float = 1e-12,
    share: float = 0.01,
) -> Verdict | None:
    """Suspect masking where input gradients of the cross-entropy are (nearly) zero on many samples.

    Args:
        forward: x -> logits in eval mode.
        x: (N, C, H, W) in [0, 1]; ``y``: (N,) labels.
        floor: largest absolute gradient entry that still counts as nothing; float32 sign steps need more than 1e-38.
        share: share of samples above which to speak.
    """
    x = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.cross_entropy(forward(x), y, reduction="sum"), x)
    vanished = float((gradient.abs().flatten(1).amax(1) <= floor).float().mean())
    if vanished <= share:
        return None
    return Verdict(
        "vanishing_gradients",
        f"{vanished:.1%} of the samples have no usable input gradient: the cross-entropy saturates or the model hides "
        "its gradient, so gradient attacks stand still",
        {"share": vanished},
    )


def _is_pgd(result: EvaluationResult) -> bool:
    return result.protocol.kind == "pgd" and result.protocol.target == "none"


def judge(results: Sequence[EvaluationResult]) -> list[Verdict]:
    """Return every suspicion that a set of results of one model raises; untargeted attacks of one ball are compared."""
    found: list[Verdict | None] = []
    pgds = sorted((r for r in results if _is_pgd(r)), key=lambda r: (r.protocol.num_steps, r.protocol.restarts))
    autos = [r for r in results if r.protocol.kind == "autoattack"]

    def same_ball(a: EvaluationResult, b: EvaluationResult) -> bool:
        names = ("weights", "branch", "split", "dataset", "norm", "eps")
        return all(getattr(a.protocol, n) == getattr(b.protocol, n) for n in names)

    for i, weak in enumerate(pgds):
        for strong in pgds[i + 1 :]:
            if not same_ball(weak, strong) or weak.protocol.num_steps == strong.protocol.num_steps:
                continue
            found.append(stronger_is_weaker(weak, strong))
            # a single step that cannot reach the ball's surface is weak by itself and tells nothing
            if weak.protocol.num_steps == 1 and weak.protocol.step_size >= weak.protocol.eps:
                found.append(single_step_gap(weak, strong))
    for auto in autos:
        found.append(query_attack_helps(auto))
        for pgd in pgds:
            if same_ball(pgd, auto):
                found.append(stronger_is_weaker(pgd, auto))
                if pgd.protocol.num_steps > 1:
                    found.append(autoattack_gap(pgd, auto))
    return [verdict for verdict in found if verdict is not None]
