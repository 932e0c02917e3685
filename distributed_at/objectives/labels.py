"""Soft labels for training losses. Attacks never use them: every code we follow attacks the hard label."""

from __future__ import annotations

from typing import Literal, get_args

from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.lazy import F, torch

SmoothingForm = Literal["uniform", "other_classes"]
FORMS: tuple[str, ...] = get_args(SmoothingForm)


def smooth_labels(
    labels: torch.Tensor,
    num_classes: int,
    smoothing: float,
    *,
    form: SmoothingForm = "uniform",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the class distribution that a smoothed label stands for.

    Args:
        labels: (N,) int64 in [0, num_classes).
        num_classes: K.
        smoothing: s in [0, 1).
        form: "uniform" gives s/K to every class and 1 - s more to the true one (Szegedy et al., "Rethinking the
            Inception architecture", section 7; TensorFlow and torch). "other_classes" gives s/(K-1) to each wrong
            class and 1 - s to the true one (Pang et al., "Bag of tricks for AT", section 3.4 and its code).
        dtype: of the result; None = float32.

    Returns:
        (N, K), rows sum to 1.
    """
    if form not in FORMS:
        raise ConfigError(
            f"label_smoothing_form is {form!r}; allowed are {', '.join(FORMS)}.{did_you_mean(form, FORMS)}"
        )
    if not 0 <= smoothing < 1:
        raise ConfigError(f"label_smoothing must be in [0, 1), got {smoothing}")
    is_true = labels[:, None] == torch.arange(num_classes, device=labels.device)  # (N, K)
    if form == "uniform":
        wrong, true = smoothing / num_classes, 1.0 - smoothing + smoothing / num_classes
    else:
        wrong, true = smoothing / (num_classes - 1), 1.0 - smoothing
    dtype = torch.float32 if dtype is None else dtype
    return torch.where(
        is_true,
        torch.tensor(true, device=labels.device, dtype=dtype),
        torch.tensor(wrong, device=labels.device, dtype=dtype),
    )


def smoothed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, *, form: SmoothingForm = "uniform"
) -> torch.Tensor:
    """Return (N,) cross-entropy of logits (N, K) to smoothed labels (N,); plain cross-entropy where smoothing is 0."""
    if smoothing == 0:
        return F.cross_entropy(logits, labels, reduction="none")
    soft = smooth_labels(labels, logits.shape[1], smoothing, form=form, dtype=logits.dtype)
    return -(soft * F.log_softmax(logits, dim=1)).sum(dim=1)
