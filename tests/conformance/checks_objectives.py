"""Checks that every objective passes: what reaches the attack, the batch it was given, soft labels' convention."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from distributed_at.objectives.pgd_at import PgdAt
from tests.conformance.kit import Recorder, agrees, batch_of, build
from tests.conformance.networks import CLASSES, network
from tests.conformance.objectives import sections
from tests.conformance.product import Product


def attack_gets_no_training_gradient(product: Product) -> None:
    """Images from an attack that kept its graph must not carry the training loss back into it."""
    batch, adv = batch_of()
    attached = adv.clone().requires_grad_()
    for config in sections():
        terms = build(product, config).loss(Recorder(), batch, attached)
        (found,) = torch.autograd.grad(terms.loss, attached, allow_unused=True)
        assert found is None, f"{config.name}: the training loss reaches the adversarial images"


def smoothing_follows_its_convention(product: Product) -> None:
    batch, adv = batch_of()
    z = network(dtype=torch.float64)(adv)
    log_p = F.log_softmax(z, 1)
    true = log_p.gather(1, batch.labels[:, None]).squeeze(1)
    others = log_p.sum(1) - true
    expected = {
        "uniform": F.cross_entropy(z, batch.labels, label_smoothing=0.3),
        "other_classes": -(0.7 * true + 0.3 / (CLASSES - 1) * others).mean(),
    }
    for form, value in expected.items():
        config = PgdAt.Config(label_smoothing=0.3, label_smoothing_form=form)
        assert agrees(build(product, config).loss(Recorder(), batch, adv).loss, value), form


def objectives_leave_the_batch_as_it_was(product: Product) -> None:
    batch, adv = batch_of()
    kept = copy.deepcopy(batch), adv.clone()
    for config in sections():
        build(product, config).loss(Recorder(), batch, adv)
    assert torch.equal(kept[0].images, batch.images)
    assert torch.equal(kept[1], adv)


CHECKS = [attack_gets_no_training_gradient, smoothing_follows_its_convention, objectives_leave_the_batch_as_it_was]
