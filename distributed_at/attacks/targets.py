"""Target classes of targeted attacks, drawn once per attack call; random ones come from counters, not generators."""

from __future__ import annotations

from typing import Literal

import torch

from distributed_at import rng
from distributed_at.errors import ConfigError, did_you_mean

TargetRule = Literal["none", "random_other", "random_any", "most_confusing", "least_likely"]
RULES = ("none", "random_other", "random_any", "most_confusing", "least_likely")
FROM_LOGITS = ("most_confusing", "least_likely")


def choose_targets(
    rule: TargetRule,
    labels: torch.Tensor,
    num_classes: int,
    *,
    seed: int,
    epoch: int,
    sample_ids: torch.Tensor,
    logits: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return one target class an image, (N,) int64, or None for "none".

    Args:
        rule: "random_other" = uniform over the wrong classes, never the label (Xie & Yuille's code: label + uniform
            integer in {1..K-1} modulo K); "random_any" = uniform over all classes, the label included (their text,
            section 3, and AdvProp's code); "most_confusing" = the largest wrong logit of the clean image (Wang &
            Zhang, "Bilateral AT", section 4.2); "least_likely" = the smallest wrong logit (Kurakin et al. 2017).
        labels: (N,) int64.
        num_classes: K >= 2.
        seed, epoch, sample_ids: counters; sample_ids (N,) int64.
        logits: (N, K) of the clean images in the attack's own BN mode, for the last two rules.
    """
    if rule not in RULES:
        raise ConfigError(f"attack.target is {rule!r}; allowed are {', '.join(RULES)}.{did_you_mean(rule, RULES)}")
    if rule == "none":
        return None
    if num_classes < 2:
        raise ConfigError(f"attack.target {rule!r} needs at least 2 classes, got {num_classes}")
    if rule == "random_other":
        offset = 1 + rng.below(num_classes - 1, seed, rng.Purpose.TARGET, epoch, sample_ids, 1)[:, 0]
        return (labels + offset) % num_classes
    if rule == "random_any":
        return rng.below(num_classes, seed, rng.Purpose.TARGET, epoch, sample_ids, 1)[:, 0]
    if logits is None:
        raise ConfigError(f"attack.target {rule!r} is chosen from the clean logits; pass logits")
    own = labels[:, None] == torch.arange(num_classes, device=labels.device)
    finite = torch.nan_to_num(logits)  # so that the label's infinity below is never tied
    if rule == "most_confusing":
        return finite.masked_fill(own, float("-inf")).argmax(dim=1)
    return finite.masked_fill(own, float("inf")).argmin(dim=1)
