"""Signs that a robust accuracy cannot be trusted, read from results: they suspect, they prove nothing.

After Athalye, Carlini & Wagner 2018 ("Obfuscated gradients give a false sense of security", section 3.1) and Carlini
et al. 2019 ("On evaluating adversarial robustness", section 5). Thresholds are arguments, and a verdict carries the
numbers that it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from distributed_at.catalogue.attacks import BALLS
from distributed_at.evaluation.kinds.autoattack import AutoAttackProtocol
from distributed_at.evaluation.kinds.pgd import PgdProtocol
from distributed_at.evaluation.result import EvaluationResult
from distributed_at.logits import NO_CLASS

Level = Literal["bad", "note"]

# Every verdict that this package gives: code -> (how grave it is, title). Those of training are found in ``observe``.
TITLES: dict[str, tuple[Level, str]] = {
    "stronger_attack_is_weaker": ("bad", "A stronger attack does less"),
    "pgd_overestimates": ("bad", "PGD overestimates robustness"),
    "single_step_masking": ("bad", "Robust against single steps alone"),
    "query_attack_beats_gradients": ("bad", "An attack without gradients does more"),
    "vanishing_gradients": ("bad", "Input gradients vanish"),
    "randomised": ("bad", "Answers at random"),
    "nonfinite_logits": ("bad", "Logits not finite under attack"),
    "attacks_disagree": ("bad", "Attacks of one ball disagree"),
    "attack_breaks_nothing": ("bad", "An attack breaks nothing"),
    "other_data": ("bad", "Measured on other data"),
    "attack_improves_accuracy": ("bad", "Attack makes it better"),
    "no_better_than_guessing": ("bad", "No better than guessing"),
    "not_robust": ("note", "Not robust"),
    "loss_not_finite": ("bad", "Loss not finite"),
    "robustness_collapsed": ("bad", "Robustness collapsed while training"),
    "robust_overfitting": ("note", "Robust overfitting"),
}


@dataclass(frozen=True)
class Verdict:
    """One suspicion: a stable ``code`` of ``TITLES``, a sentence for people, and the numbers behind it."""

    code: str
    message: str
    numbers: dict[str, float]

    def __post_init__(self) -> None:
        if self.code not in TITLES:
            raise ValueError(f"{self.code!r} is no verdict; add it to TITLES")

    @property
    def level(self) -> Level:
        """'bad' where the number cannot be trusted or the run failed, 'note' otherwise."""
        return TITLES[self.code][0]

    @property
    def title(self) -> str:
        """A few words for headings."""
        return TITLES[self.code][1]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types, as events and ``eval --json`` show them."""
        return {
            "code": self.code,
            "level": self.level,
            "title": self.title,
            "message": self.message,
            "numbers": self.numbers,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Verdict:
        """Rebuild a verdict from ``to_dict``."""
        return cls(str(content["code"]), str(content["message"]), dict(content.get("numbers") or {}))


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
    at_once: int | None = None,
) -> Verdict | None:
    """Suspect masking where input gradients of the cross-entropy are (nearly) zero, or not finite, on many samples.

    Args:
        forward: x -> logits in eval mode.
        x: (N, C, H, W) in [0, 1]; ``y``: (N,) labels.
        floor: largest absolute gradient entry that still counts as nothing; float32 sign steps need more than 1e-38.
        share: share of samples above which to speak.
        at_once: samples of one forward; None = all.
    """
    usable = []
    for part, labels in zip(x.split(at_once or len(x)), y.split(at_once or len(y)), strict=True):
        image = part.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            total = F.cross_entropy(forward(image), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(total, image)
        largest = gradient.abs().flatten(1).amax(1)
        usable.append((largest > floor) & torch.isfinite(largest))
    vanished = float((~torch.cat(usable)).float().mean())
    if vanished <= share:
        return None
    return Verdict(
        "vanishing_gradients",
        f"{vanished:.1%} of the samples have no usable input gradient: the cross-entropy saturates or the model hides "
        "its gradient, so gradient attacks stand still",
        {"share": vanished},
    )


def randomised(
    forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, tolerance: float = 1e-3
) -> Verdict | None:
    """Suspect a network that answers the same images x (N, C, H, W) differently twice: a PGD on it aims at one draw alone.

    ``tolerance``: of the largest logit; kernels that add in no fixed order differ by less.
    """
    with torch.no_grad():
        first, second = forward(x), forward(x)
    apart = float((first - second).abs().max() / first.abs().max().clamp_min(1e-12)) if len(x) else 0.0
    if apart <= tolerance:
        return None
    return Verdict(
        "randomised",
        f"two forwards of the same images differ by {apart:.1%} of their largest logit: dropout or noise is on. Call "
        "eval() on the network, or, where the randomness is a defence, use AutoAttack's version 'rand'",
        {"apart": apart},
    )


def nonfinite_logits(result: EvaluationResult) -> Verdict | None:
    """Suspect a network whose logits stop being finite under attack; such images count as wrong."""
    ids = result.rows.sample_id[result.rows.adv_prediction == NO_CLASS]
    if not len(ids):
        return None
    return Verdict(
        "nonfinite_logits",
        f"under {result.protocol.name} the logits of {len(ids)} images are not finite, which counts as wrong (sample ids "
        f"{', '.join(map(str, ids[:8].tolist()))}{' …' if len(ids) > 8 else ''}): an attack stands still where they are",
        {"images": float(len(ids))},
    )


def attacks_disagree(first: EvaluationResult, second: EvaluationResult, *, gap: float = 0.12) -> Verdict | None:
    """Suspect the attack that leaves far more right than another of the same ball, whatever makes them different."""
    one, other = _paired(first, second)
    if not len(one) or abs(one.mean() - other.mean()) <= gap:
        return None
    weak, strong = (first, second) if one.mean() > other.mean() else (second, first)
    most, least = max(one.mean(), other.mean()), min(one.mean(), other.mean())
    return Verdict(
        "attacks_disagree",
        f"{weak.protocol.name} leaves {most:.1%} right and {strong.protocol.name}, in the same ball, {least:.1%}: the former "
        "says little of this network",
        {"more": float(most), "less": float(least)},
    )


def breaks_nothing(result: EvaluationResult, *, radius: float = 8.0, least: int = 5) -> Verdict | None:
    """Suspect an attack that leaves every image right at a radius where no known network is: ``radius``/255 of each pixel.

    ``least``: images that are right before the attack, below which nothing is said.
    """
    ball, steps = result.protocol.ball, getattr(result.protocol, "num_steps", 1)
    clean = result.clean_correct
    if ball is None or not BALLS[ball[0]].per_pixel or ball[1] < radius or not steps or clean < least:
        return None
    if result.correct < clean:
        return None
    return Verdict(
        "attack_breaks_nothing",
        f"{result.protocol.name} breaks none of the {clean} images that are right without it: it does not see the network, "
        "or its gradients are hidden",
        {"correct": float(clean)},
    )


def judge(results: Sequence[EvaluationResult]) -> list[Verdict]:
    """Return every suspicion that a set of results of one model raises; untargeted attacks of one ball are compared."""
    found: list[Verdict | None] = []
    untargeted = [r for r in results if r.protocol.attacked and not r.protocol.targeted]
    pgds = sorted(
        (r for r in untargeted if isinstance(r.protocol, PgdProtocol)),
        key=lambda r: (r.protocol.num_steps, r.protocol.restarts),  # type: ignore[attr-defined]
    )
    found += [nonfinite_logits(result) for result in results if result.protocol.attacked]
    found += [breaks_nothing(result) for result in untargeted]
    for i, weak in enumerate(pgds):
        for strong in pgds[i + 1 :]:
            found += _compare_pgd(weak, strong)
    for auto in untargeted:
        if isinstance(auto.protocol, AutoAttackProtocol):
            found.append(query_attack_helps(auto))
            for pgd in pgds:
                if _same_ball(pgd, auto):
                    found.append(stronger_is_weaker(pgd, auto))
                    assert isinstance(pgd.protocol, PgdProtocol)
                    if pgd.protocol.num_steps > 1:
                        found.append(autoattack_gap(pgd, auto))
    return [verdict for verdict in found if verdict is not None]


def _same_ball(a: EvaluationResult, b: EvaluationResult) -> bool:
    names = ("weights", "branch", "split", "dataset", "ball")
    return all(getattr(a.protocol, n) == getattr(b.protocol, n) for n in names)


def _compare_pgd(weak: EvaluationResult, strong: EvaluationResult) -> list[Verdict | None]:
    few, many = weak.protocol, strong.protocol
    assert isinstance(few, PgdProtocol)
    assert isinstance(many, PgdProtocol)
    if not _same_ball(weak, strong):
        return []
    if few.num_steps == many.num_steps:
        return [attacks_disagree(weak, strong)]
    found = [stronger_is_weaker(weak, strong)]
    # a single step that cannot reach the ball's surface is weak by itself and tells nothing
    if few.num_steps == 1 and few.step_size >= few.eps:
        found.append(single_step_gap(weak, strong))
    return found
