"""What an attack is called with: images in the box, one row an image beside them. Refused before the first forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distributed_at.catalogue.attacks import ATTACK_LOSSES, AttackLoss
from distributed_at.errors import ConfigError, DataError


def checked_images(
    x: torch.Tensor, rows: Mapping[str, torch.Tensor | None], *, box: tuple[float, float], look: bool
) -> torch.Tensor:
    """Return the images (N, C, H, W) detached.

    Args:
        x: float32 or float64, in the box.
        rows: name -> (N,) int64, or None where it is not given.
        box: lowest and highest pixel.
        look: whether to look at the pixels, which waits for the device.

    Raises:
        DataError: another dtype or shape, or pixels outside the box.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise DataError(
            f"images are {x.dtype}; the attack works on float32 or float64 in {box} "
            "(uint8: divide by 255; 16 bits: autocast inside the model)"
        )
    for name, value in rows.items():
        if value is not None and (value.dtype != torch.int64 or value.shape != x.shape[:1]):
            raise DataError(f"{name} must be ({len(x)},) int64, one an image, got {tuple(value.shape)} {value.dtype}")
    if look and not x.is_meta and x.numel():
        low, high = box
        smallest, largest = (v.item() for v in torch.aminmax(x.detach()))
        if not (smallest >= low and largest <= high):
            raise DataError(
                f"images lie in [{smallest:.4g}, {largest:.4g}], the pixel box is [{low:g}, {high:g}]; "
                "normalisation belongs inside the model"
            )
    x = x.detach()
    return x.clone() if x.is_inference() else x


def check_soft_labels(soft_labels: torch.Tensor, x: torch.Tensor, loss: AttackLoss, loss_name: str) -> None:
    """Refuse distributions that the loss does not take, or that are not (N, K) float for images x (N, C, H, W).

    Raises:
        ConfigError, DataError: as said.
    """
    if not loss.soft_labels:
        able = [name for name in ATTACK_LOSSES if ATTACK_LOSSES[name].soft_labels]
        raise ConfigError(
            f"attack.loss {loss_name!r} is measured from one class an image, not from soft labels; "
            f"losses that take them: {', '.join(able)}"
        )
    if soft_labels.dim() != 2 or len(soft_labels) != len(x) or not soft_labels.is_floating_point():
        raise DataError(
            f"soft_labels must be ({len(x)}, classes) float, got {tuple(soft_labels.shape)} {soft_labels.dtype}"
        )
