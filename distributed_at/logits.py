"""What every network must put out, whoever wrote it: float logits (N, K); anything else is told with its cure."""

from __future__ import annotations

from typing import Any

import torch

from distributed_at.errors import DataError


def checked_logits(
    logits: Any, x: torch.Tensor, num_classes: int | None = None, *, whose: str = "the network"
) -> torch.Tensor:
    """Return ``logits`` where they are a float tensor (N, K) for images x (N, ...).

    Args:
        logits: what a network returned.
        x: the images that it was given.
        num_classes: K, where it is known.
        whose: begins the message.

    Raises:
        DataError: names the type and shape that came, and what to return instead.
    """
    if not isinstance(logits, torch.Tensor):
        cure = "return the logits alone"
        if isinstance(logits, tuple | list):
            cure = "return its logits alone (auxiliary heads switched off, or the first entry)"
        elif isinstance(logits, dict) or hasattr(logits, "logits"):
            cure = "return its entry 'logits' alone"
        raise DataError(f"{whose} returns a {type(logits).__name__}, not a tensor: {cure}")
    shape = tuple(logits.shape)
    if not logits.is_floating_point():
        raise DataError(f"{whose} returns {logits.dtype} of shape {shape}: return float logits, not predicted classes")
    if logits.dim() != 2 or shape[0] != x.shape[0]:
        cure = "pool and flatten its features before the classifier" if logits.dim() > 2 else "return one row an image"
        raise DataError(f"{whose} returns shape {shape} for images {tuple(x.shape)}, not (N, classes): {cure}")
    if num_classes is not None and shape[1] != num_classes:
        raise DataError(
            f"{whose} returns {shape[1]} logits an image, but the data have {num_classes} classes: "
            f"give its last layer {num_classes} outputs"
        )
    return logits


NO_CLASS = -1  # of an image whose logits are not finite: no label, so it is never right


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return the (N,) int64 class of the largest of logits (N, K), ``NO_CLASS`` where any of an image's is not finite.

    The largest of numbers among which one is NaN is that NaN: class 0, if it is the first, and right where the label is 0.
    """
    return torch.where(torch.isfinite(logits).all(dim=1), logits.argmax(dim=1), NO_CLASS)


def check_labels(labels: torch.Tensor, num_classes: int | None, *, name: str = "label") -> None:
    """Refuse labels (N,), or what ``name`` calls them, outside [0, num_classes); looks at them on the host.

    ``num_classes``: None where it is not known yet: then those below 0 alone are refused.

    Raises:
        DataError: names the first one and its place. -100, which losses of torch ignore, would switch an attack off.
    """
    wrong = labels < 0
    if num_classes is not None:
        wrong |= labels >= num_classes
    places = wrong.nonzero()
    if len(places):
        place = int(places[0, 0])
        allowed = "below 0" if num_classes is None else f"outside 0 to {num_classes - 1}"
        raise DataError(f"{name} {int(labels[place])} of image {place} of the batch is {allowed}")
