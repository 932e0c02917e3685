"""Adversarial training: what moves BN, and plain cross-entropy of adversarial images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distributed_at.objectives.pgd_at import PgdAt, pgd_at_loss
from tests.conformance.kit import Recorder, agrees, batch_of, build
from tests.conformance.product import Mutation, Product

SETTINGS: list[dict] = [{}, {"bn_clean_updates_per_step": 1}, {"bn_clean_updates_per_step": 2, "label_smoothing": 0.1}]


def adversarial_training_moves_bn_once(product: Product) -> None:
    batch, adv = batch_of()
    for clean_updates, before, after in ((0, 1, 0), (1, 1, 1), (2, 2, 1)):
        recorder = Recorder()
        objective = build(product, PgdAt.Config(bn_clean_updates_per_step=clean_updates))
        objective.loss(recorder, batch, adv)
        assert len(recorder.moving) == before, f"{len(recorder.moving)} train-mode forwards, the recipe says {before}"
        assert torch.equal(recorder.calls[0]["x"], adv), "the loss is not that of the adversarial images"
        assert all(not c["grad"] for c in recorder.calls[1:]), "a forward for statistics builds a graph"
        objective.after_step(recorder, batch)
        assert len(recorder.moving) == before + after


def adversarial_loss_is_plain_cross_entropy(product: Product) -> None:
    batch, adv = batch_of()
    recorder = Recorder()
    terms = build(product, PgdAt.Config()).loss(recorder, batch, adv)
    assert agrees(terms.loss, F.cross_entropy(recorder.model(adv), batch.labels))
    assert agrees(pgd_at_loss(recorder.model(adv), batch.labels), terms.loss)
    assert terms.loss.requires_grad
    assert not terms.logits["adv"].requires_grad


CHECKS = [
    adversarial_training_moves_bn_once, adversarial_loss_is_plain_cross_entropy,
]  # fmt: skip

FILE = "objectives/pgd_at.py"
_ADV = "        adv_logits = forward(adv, branch=branch)\n"
MUTATIONS = [
    Mutation(
        "train-mode clean forward poisons BN statistics", FILE, _ADV,
        _ADV + "        forward(batch.images, branch=branch, grad=False)\n",
        "adversarial_training_moves_bn_once",
    ),
    Mutation(
        "trained on clean images", FILE, "        adv = required_adv(adv, batch)\n", "        adv = batch.images\n",
        "adversarial_training_moves_bn_once",
    ),
    Mutation(
        "sum instead of mean over the batch", FILE, "mean_cross_entropy(adv_logits, batch, c)",
        "mean_cross_entropy(adv_logits, batch, c) * len(batch)", "adversarial_loss_is_plain_cross_entropy",
    ),
]  # fmt: skip
