"""Per-sample objectives that an attack maximises. Nothing here averages over a batch: attacks sum, never mean.

Each function takes logits (N, K) and returns (N,). An untargeted objective grows as the image leaves its label; a
targeted one grows as it nears its target. So the attack always ascends and no sign is flipped anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Goal(NamedTuple):
    """What an attack aims at.

    Attributes:
        labels: (N,) int64, the true classes.
        targets: (N,) int64, the classes aimed at; None = untargeted.
        reference: (N, K) log-probabilities of the clean images, for losses that are measured from them.
        soft_labels: (N, K) what each image stands for in place of its label; None = the label.
        clean: (N, C, H, W) where each step is to look at the clean images anew for ``reference``.
    """

    labels: torch.Tensor
    targets: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    soft_labels: torch.Tensor | None = None
    clean: torch.Tensor | None = None


LossFunction = Callable[[torch.Tensor, Goal], torch.Tensor]


def _at(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _largest_other(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(N,) the largest logit of any class but the given one."""
    own = classes[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill(own, float("-inf")).amax(dim=1)


def ce(logits: torch.Tensor, goal: Goal) -> torch.Tensor:
    """Cross-entropy to the label, or the soft label (Madry et al. 2018, eq. 2.1); minus that to the target (Xie & Yuille, section 3)."""
    if goal.targets is None:
        aim = goal.labels if goal.soft_labels is None else goal.soft_labels.to(logits.dtype)
        return F.cross_entropy(logits, aim, reduction="none")
    return -F.cross_entropy(logits, goal.targets, reduction="none")


def kl(logits: torch.Tensor, goal: Goal) -> torch.Tensor:
    """KL(p_clean || p_adv) (Zhang et al., "TRADES", 2019, eq. 3 and its code). It is flat at the clean image."""
    assert goal.reference is not None  # PGD computes it before the first iteration
    reference = goal.reference.to(logits.dtype)
    return (reference.exp() * (reference - F.log_softmax(logits, dim=1))).sum(dim=1)


def margin(logits: torch.Tensor, goal: Goal) -> torch.Tensor:
    """Largest wrong logit minus the true one (Carlini & Wagner 2017), or z_target - z_label (MultiTargeted, Gowal 2019)."""
    if goal.targets is None:
        return _largest_other(logits, goal.labels) - _at(logits, goal.labels)
    return _at(logits, goal.targets) - _at(logits, goal.labels)


def dlr(logits: torch.Tensor, goal: Goal) -> torch.Tensor:
    """Difference of logits ratio, invariant to shift and scale (Croce & Hein 2020, eq. 6; targeted: eq. 7).

    Needs three classes, targeted four.
    """
    ranked = logits.sort(dim=1, descending=True).values
    true = _at(logits, goal.labels)
    if goal.targets is None:
        return -(true - _largest_other(logits, goal.labels)) / (ranked[:, 0] - ranked[:, 2] + 1e-12)
    spread = ranked[:, 0] - 0.5 * (ranked[:, 2] + ranked[:, 3]) + 1e-12
    return -(true - _at(logits, goal.targets)) / spread
