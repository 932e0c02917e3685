"""What a step minimises, on one batch-norm group: loss, the numbers that are logged, and the logits for accuracies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_at import rng
from distributed_at.rng import Purpose

# (images, branch, bn: "train" or "batch") -> logits
Network = Callable[[Tensor, str, str], Tensor]


@dataclass
class Outcome:
    """Of one group: the loss, its parts by name, how many images each branch got right, and how many were clean.

    ``delta``: the perturbation shown, where it is to move by the loss's gradient; ``climb``: where it has one of its own.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    correct: dict[str, int]
    clean: int | None = None  # of a mixture
    delta: Tensor | None = None
    climb: Tensor | None = None


def cross_entropy(logits: Tensor, y: Tensor, section: dict) -> Tensor:
    """Return (N,) cross-entropy to smoothed labels."""
    s, k = section["label_smoothing"], logits.shape[1]
    true = F.one_hot(y, k).to(logits.dtype)
    if section["label_smoothing_form"] == "uniform":  # Szegedy et al. 2016, section 7
        labels = (1 - s) * true + s / k
    elif section["label_smoothing_form"] == "other_classes":  # Pang et al.'s code
        labels = (1 - s) * true + s / (k - 1) * (1 - true)
    else:
        raise NotImplementedError("the reference knows no such form of label smoothing")
    return -(labels * F.log_softmax(logits, dim=1)).sum(dim=1)


def _right(logits: Tensor, y: Tensor) -> int:
    return int((logits.argmax(dim=1) == y).sum())


def standard(network: Network, x: Tensor, adv: Tensor | None, y: Tensor, section: dict, **_: object) -> Outcome:
    """Cross-entropy of clean images."""
    logits = network(x, "clean", "train")
    loss = cross_entropy(logits, y, section).mean()
    return Outcome(loss, {"clean_loss": loss}, {"clean": _right(logits, y)})


def pgd_at(network: Network, x: Tensor, adv: Tensor, y: Tensor, section: dict, *, branch: str, **_: object) -> Outcome:
    """Madry et al. 2018: cross-entropy of adversarial images."""
    logits = network(adv, branch, "train")
    loss = cross_entropy(logits, y, section).mean()
    correct = {"adv": _right(logits, y)}
    if section["bn_clean_updates_per_step"] == 2:  # Pang et al.'s code looks at the clean images before the step too
        correct["clean"] = _right(network(x, branch, "train"), y)
    return Outcome(loss, {"adv_loss": loss}, correct)


def trades(network: Network, x: Tensor, adv: Tensor, y: Tensor, section: dict, **_: object) -> Outcome:
    """Zhang et al. 2019: cross-entropy of clean images + beta KL(p_clean || p_adv), the gradient through both."""
    bn = {"update": "train", "batch": "batch"}[section["clean_bn"]]
    clean = network(x, "clean", bn)
    moved = network(adv, "adv", "train")
    again = network(x, "clean", bn) if section["clean_forwards"] == "twice" else clean
    loss = cross_entropy(clean, y, section).mean()
    p = F.softmax(again, dim=1)
    kl = (p * (F.log_softmax(again, dim=1) - F.log_softmax(moved, dim=1))).sum(dim=1).mean()
    correct = {"clean": _right(clean, y), "adv": _right(moved, y)}
    return Outcome(loss + section["beta"] * kl, {"clean_loss": loss, "kl": kl}, correct)


def mart(network: Network, x: Tensor, adv: Tensor, y: Tensor, section: dict, **_: object) -> Outcome:
    """Wang et al. 2020, eq. 11, with the constants of their code."""
    clean = network(x, "clean", {"update": "train", "batch": "batch"}[section["clean_bn"]])
    moved = network(adv, "adv", "train")
    p, q = F.softmax(clean, dim=1), F.softmax(moved, dim=1)
    order = q.argsort(dim=1)
    wrong = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    rows = torch.arange(len(y))
    # smoothing, which no code has, is of the cross-entropy alone
    boosted = (cross_entropy(moved, y, section) - torch.log(1.0001 - q[rows, wrong] + 1e-12)).mean()
    kl = (p * (torch.log(p) - torch.log(q + 1e-12))).sum(dim=1)
    weighted = (kl * (1.0000001 - p[rows, y])).mean()
    terms = {"adv_loss": boosted, "weighted_kl": weighted}
    return Outcome(boosted + section["beta"] * weighted, terms, {"clean": _right(clean, y), "adv": _right(moved, y)})


def mixture(
    network: Network, x: Tensor, adv: Tensor, y: Tensor, section: dict, *,
    norm: str, ids: Tensor, seed: int, epoch: int, **_: object,
) -> Outcome:  # fmt: skip
    """Xie & Yuille 2020: adversarial images, and a share of the clean ones; adversarial logit pairing (Kannan et al. 2018)."""
    count = int(len(x) * section["clean_ratio"] + 0.5)
    draw = rng.words(seed, Purpose.CLEAN_SUBSET, epoch, ids, 1)[:, 0]
    kept = sorted(range(len(x)), key=lambda i: (int(draw[i]), int(ids[i])))[:count]
    kept = torch.tensor(sorted(kept), dtype=torch.int64)
    if not count:
        moved = network(adv, "adv", "train")
        adv_loss = cross_entropy(moved, y, section).mean()
        return Outcome(adv_loss, {"adv_loss": adv_loss}, {"adv": _right(moved, y)})
    if norm == "bn":  # one batch norm sees the mixture
        both = network(torch.cat([x[kept], adv]), "adv", "train")
        clean, moved = both[:count], both[count:]
    else:
        clean, moved = network(x[kept], "clean", "train"), network(adv, "adv", "train")
    clean_losses, adv_losses = cross_entropy(clean, y[kept], section), cross_entropy(moved, y, section)
    if section["weighting"] == "alpha":  # eq. 1
        loss = section["alpha"] * clean_losses.mean() + (1 - section["alpha"]) * adv_losses.mean()
    else:
        loss = torch.cat([clean_losses, adv_losses]).mean()
    terms = {"clean_loss": clean_losses.mean(), "adv_loss": adv_losses.mean()}
    if section["logit_pairing"]:
        squares = (clean - moved[kept]) ** 2
        terms["logit_pairing"] = (
            squares.mean() if section["logit_pairing_form"] == "mse_mean" else squares.sum(dim=1).mean()
        )
        loss = loss + section["logit_pairing"] * terms["logit_pairing"]
    return Outcome(loss, terms, {"adv": _right(moved, y), "clean": _right(clean, y[kept])}, count)


def free_at(
    network: Network, x: Tensor, adv: Tensor | None, y: Tensor, section: dict, *,
    branch: str, delta: Tensor, attack_bn: str, **_: object,
) -> Outcome:  # fmt: skip
    """Shafahi et al. 2019, algorithm 1: the loss at the perturbation that the place holds."""
    delta = delta.clone().requires_grad_()
    shown = x + delta
    if section["box"] == "images":  # Shafahi et al.'s code: tf.clip_by_value, whose gradient is 0 beyond the box alone
        beyond = (shown < 0) | (shown > 1)
        shown = shown.masked_fill(shown < 0, 0.0).masked_fill(shown > 1, 1.0) if beyond.any() else shown
    climb = None
    if section["gradient"] == "own_pass":
        logits = network(shown, branch, attack_bn)
        (climb,) = torch.autograd.grad(F.cross_entropy(logits, y), delta)
        shown = shown.detach()
    logits = network(shown, branch, "train")
    loss = cross_entropy(logits, y, section).mean()
    return Outcome(loss, {"adv_loss": loss}, {"adv": _right(logits, y)}, delta=delta, climb=climb)


LOSSES = {
    "standard": standard, "pgd_at": pgd_at, "trades": trades, "mart": mart, "mixture": mixture, "free_at": free_at,
}  # fmt: skip
