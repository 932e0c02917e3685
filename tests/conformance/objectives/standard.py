"""Natural training: plain cross-entropy of clean images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distributed_at.objectives.standard import Standard, standard_loss
from tests.conformance.kit import Recorder, agrees, batch_of, build
from tests.conformance.product import Mutation, Product

SETTINGS: list[dict] = [{}, {"label_smoothing": 0.1}]


def natural_loss_is_cross_entropy_of_clean_images(product: Product) -> None:
    batch, adv = batch_of()
    recorder = Recorder(shift_adv=1.0)
    terms = build(product, Standard.Config()).loss(recorder, batch, adv)
    assert [c["branch"] for c in recorder.calls] == ["clean"]
    assert torch.equal(recorder.calls[0]["x"], batch.images), "the loss is not that of the clean images"
    assert agrees(terms.loss, F.cross_entropy(recorder.model(batch.images), batch.labels))
    assert agrees(standard_loss(recorder.model(batch.images), batch.labels), terms.loss)
    assert terms.loss.requires_grad
    assert not terms.logits["clean"].requires_grad


CHECKS = [natural_loss_is_cross_entropy_of_clean_images]

FILE = "objectives/standard.py"
MUTATIONS = [
    Mutation(
        "natural training on the adversarial branch", FILE, 'branch="clean")', 'branch="adv")',
        "natural_loss_is_cross_entropy_of_clean_images",
    ),
    Mutation(
        "natural loss summed over the batch", FILE, "mean_cross_entropy(logits, batch, self.config)",
        "mean_cross_entropy(logits, batch, self.config) * len(batch)", "natural_loss_is_cross_entropy_of_clean_images",
    ),
]  # fmt: skip
