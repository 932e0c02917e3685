"""What a look at a few images tells of a network before any attack: does it answer twice alike, and has it a gradient?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distributed_at.evaluation.source import Source
from distributed_at.evaluation.verdicts import Verdict, randomised, vanishing_gradients

LOOKED_AT = 32  # images
_AT_ONCE = 8


def examine(
    forward: Callable[[torch.Tensor], torch.Tensor], source: Source, *, device: torch.device | str = "cpu"
) -> list[Verdict]:
    """Return what is suspicious of a network on evenly spread images of a split; evaluations make it once per weights.

    ``forward``: images (N, C, H, W) in [0, 1] -> logits (N, K), in eval mode.
    """
    ids = np.sort(np.asarray(source.sample_ids, dtype=np.int64))
    ids = ids[np.linspace(0, len(ids) - 1, min(LOOKED_AT, len(ids))).astype(int)]
    images, labels = source.read(ids, epoch=0, train=False, seed=0)
    x, y = images.to(device).float().div_(255.0), labels.to(device)
    found = [randomised(forward, x[:_AT_ONCE]), vanishing_gradients(forward, x, y, at_once=_AT_ONCE)]
    return [verdict for verdict in found if verdict is not None]
