"""Target classes of targeted attacks, drawn once per attack call; random ones come from counters, not generators.

A rule takes labels (N,) int64, the number of classes K >= 2, the counters, and the logits (N, K) of the clean images in the
attack's own BN mode where it is chosen from them; it returns (N,) int64.
"""

from __future__ import annotations

import torch

from distributed_at import rng
from distributed_at.attacks.counters import Counters
from distributed_at.catalogue.attacks import ATTACK_TARGETS, Target
from distributed_at.errors import ConfigError


def choose_targets(
    rule: str | Target,
    labels: torch.Tensor,
    num_classes: int,
    *,
    seed: int,
    epoch: int,
    sample_ids: torch.Tensor,
    logits: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return one target class an image, (N,) int64, or None for an untargeted rule.

    Args:
        rule: an entry of ``ATTACK_TARGETS`` or its name.
        labels: (N,) int64.
        num_classes: K >= 2.
        seed, epoch, sample_ids: counters; sample_ids (N,) int64.
        logits: (N, K) of the clean images in the attack's own BN mode, for rules that choose from them.
    """
    entry = ATTACK_TARGETS[rule] if isinstance(rule, str) else rule
    if not entry.targeted:
        return None
    if num_classes < 2:
        raise ConfigError(f"attack.target {rule!r} needs at least 2 classes, got {num_classes}")
    if entry.from_logits and logits is None:
        raise ConfigError(f"attack.target {rule!r} is chosen from the clean logits; pass logits")
    counters = Counters(seed=seed, epoch=epoch, sample_ids=sample_ids)
    return entry.load()(labels, num_classes, counters, logits)


def random_other(
    labels: torch.Tensor, num_classes: int, counters: Counters, logits: torch.Tensor | None
) -> torch.Tensor:
    """Return a class uniform over the wrong ones: label + integer in {1..K-1} modulo K (Xie & Yuille's code)."""
    return (labels + 1 + _below(num_classes - 1, counters)) % num_classes


def random_any(labels: torch.Tensor, num_classes: int, counters: Counters, logits: torch.Tensor | None) -> torch.Tensor:
    """Return a class uniform over all, the label among them (Xie & Yuille 2020, section 3, and AdvProp's code)."""
    return _below(num_classes, counters)


def most_confusing(
    labels: torch.Tensor, num_classes: int, counters: Counters, logits: torch.Tensor | None
) -> torch.Tensor:
    """Return the class of the largest wrong logit of the clean image (Wang & Zhang, "Bilateral AT", section 4.2)."""
    return _wrong(labels, num_classes, logits, float("-inf")).argmax(dim=1)


def least_likely(
    labels: torch.Tensor, num_classes: int, counters: Counters, logits: torch.Tensor | None
) -> torch.Tensor:
    """Return the class of the smallest wrong logit of the clean image (Kurakin et al. 2017)."""
    return _wrong(labels, num_classes, logits, float("inf")).argmin(dim=1)


def _below(bound: int, counters: Counters) -> torch.Tensor:
    return rng.below(bound, counters.seed, rng.Purpose.TARGET, counters.epoch, counters.sample_ids, 1)[:, 0]


def _wrong(labels: torch.Tensor, num_classes: int, logits: torch.Tensor | None, instead: float) -> torch.Tensor:
    """Return the logits with the label's replaced."""
    assert logits is not None
    own = labels[:, None] == torch.arange(num_classes, device=labels.device)
    finite = torch.nan_to_num(logits)  # so that the label's infinity is never tied
    return finite.masked_fill(own, instead)
