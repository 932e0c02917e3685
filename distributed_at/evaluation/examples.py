"""A few adversarial examples beside their originals, kept for the report; never used for a number."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distributed_at.attacks import PGD
from distributed_at.config import AttackConfig
from distributed_at.data.source import ImageSource
from distributed_at.evaluation.isolation import borrowed
from distributed_at.logits import predicted_classes
from distributed_at.models.branches import on_branch
from distributed_at.rng import EVALUATION_EPOCH

NUM_EXAMPLES = 12


def save_examples(
    path: Path,
    network: nn.Module,
    source: ImageSource,
    attack: AttackConfig,
    *,
    seed: int,
    device: torch.device,
    num_examples: int = NUM_EXAMPLES,
) -> None:
    """Write ``examples.npz``: clean uint8 (N, H, W, 3), adv float32 in [0, 1], labels and both predictions.

    The samples are evenly spread over the split, not chosen by outcome.
    """
    ids = source.sample_ids[np.linspace(0, source.num_samples - 1, min(num_examples, source.num_samples)).astype(int)]
    images, labels = source.read(ids, epoch=0, train=False, seed=seed)
    x, y = images.to(device).float().div_(255.0), labels.to(device)
    with borrowed(network), on_branch(network, attack.branch):
        adv = PGD.from_config(attack, num_classes=source.num_classes).perturb(
            network,
            x,
            y,
            sample_ids=torch.from_numpy(ids).to(device),
            epoch=EVALUATION_EPOCH,
            seed=seed,
        )
        with torch.no_grad():
            clean_predictions = predicted_classes(network(x))
            adv_predictions = predicted_classes(network(adv))
    aside = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez_compressed(
        aside,
        clean=images.permute(0, 2, 3, 1).numpy(),
        adv=adv.permute(0, 2, 3, 1).float().cpu().numpy(),
        labels=labels.numpy(),
        clean_predictions=clean_predictions.cpu().numpy(),
        adv_predictions=adv_predictions.cpu().numpy(),
        eps=np.float64(attack.eps / 255.0),
        class_names=np.array(list(source.class_names)),
    )
    os.replace(aside, path)
