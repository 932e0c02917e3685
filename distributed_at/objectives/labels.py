"""Soft labels for training losses. Attacks never use them: every code we follow attacks the hard label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field

from distributed_at.batch import EXTRA
from distributed_at.config.objective import ObjectiveSection
from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.lazy import F, torch

if TYPE_CHECKING:
    from distributed_at.batch import Batch

SmoothingForm = Literal["uniform", "other_classes"]
FORMS: tuple[str, ...] = get_args(SmoothingForm)


class SmoothedSection(ObjectiveSection):
    """Fields of an objective whose cross-entropy may be to smoothed labels."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing_form: SmoothingForm = Field(
        default="uniform",
        description="'uniform' = s/K on every class (TF, torch); 'other_classes' = s/(K-1) on the wrong ones (Pang et al.'s code)",
    )
    extra_label_smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="of images of data.extra (0.1 in Gowal et al.'s code, beside 0 for the others); null = label_smoothing",
    )


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
    """Return (N,) cross-entropy of logits (N, K) to smoothed labels (N,), plain where smoothing is 0; 0 for a label of -1."""
    if smoothing == 0:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    soft = smooth_labels(labels, logits.shape[1], smoothing, form=form, dtype=logits.dtype) * (labels >= 0)[:, None]
    return -(soft * F.log_softmax(logits, dim=1)).sum(dim=1)


def cross_entropies(
    logits: torch.Tensor, labels: torch.Tensor, origin: torch.Tensor | None, section: SmoothedSection
) -> torch.Tensor:
    """Return (N,) cross-entropy of logits (N, K) to labels (N,), smoothed as a section says; 0 where a label is -1.

    ``origin`` (N,): as in ``Batch``; extra images have a smoothing of their own where the section gives one.
    """
    own, extra, form = section.label_smoothing, section.extra_label_smoothing, section.label_smoothing_form
    losses = smoothed_cross_entropy(logits, labels, own, form=form)
    if origin is not None and extra is not None:
        losses = torch.where(origin == EXTRA, smoothed_cross_entropy(logits, labels, extra, form=form), losses)
    return losses


def mean_cross_entropy(logits: torch.Tensor, batch: Batch, section: SmoothedSection) -> torch.Tensor:
    """Return the scalar mean of ``cross_entropies`` over the images of a batch that have a label.

    Where some have none, a micro-batch counts by its share of those that the whole step has, so that the mean over
    micro-batches is the mean over the step's labelled images however the step is cut (Carmon et al.'s code: ignore_index).
    """
    losses = cross_entropies(logits, batch.labels, batch.origin, section)
    if batch.labelled_share == 1:
        return losses.mean()
    return losses.sum() / (len(batch) * batch.labelled_share) if batch.labelled_share else losses.sum()
