"""MART: its code's loss with every constant, in float64 and by another way, and the order of its forwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distributed_at.objectives.mart import Mart, mart_loss
from tests.conformance.kit import Recorder, agrees, batch_of, build
from tests.conformance.product import Mutation, Product

SETTINGS: list[dict] = [{}, {"clean_bn": "batch"}]


def published(clean: torch.Tensor, adv: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """Image by image, class by class: Wang et al. 2020, eq. 11, and the constants of their code."""
    total = torch.zeros((), dtype=torch.float64)
    for z, z_adv, y in zip(clean, adv, labels.tolist(), strict=True):
        p, q = torch.softmax(z, 0), torch.softmax(z_adv, 0)
        ranked = q.argsort(descending=True).tolist()
        second = ranked[1] if ranked[0] == y else ranked[0]
        boosted = -torch.log(q[y]) - torch.log(1.0001 - q[second] + 1e-12)
        divergence = sum(p[k] * (torch.log(p[k]) - torch.log(q[k] + 1e-12)) for k in range(len(p)))
        total = total + boosted + beta * divergence * (1.0000001 - p[y])
    return total / len(labels)


def mart_is_the_published_loss(product: Product) -> None:
    batch, _ = batch_of()
    adv = 1.0 - batch.images
    recorder = Recorder()
    terms = build(product, Mart.Config(beta=6.0)).loss(recorder, batch, adv)
    clean, bad = (recorder.model(x).detach().requires_grad_() for x in (batch.images, adv))
    expected = published(clean, bad, batch.labels, 6.0)
    assert agrees(terms.loss, expected)
    assert agrees(mart_loss(clean, bad, batch.labels, beta=6.0), expected)
    found = torch.autograd.grad(terms.loss, [c["logits"] for c in recorder.calls])
    for own, wanted in zip(found, torch.autograd.grad(expected, [clean, bad]), strict=True):
        assert agrees(own, wanted), "a gradient is cut off, or of another formula"


def certain_and_wrong_images_stay_finite(product: Product) -> None:
    """Where the softmax is exactly one-hot the constants alone keep the logarithms finite."""
    labels = torch.tensor([0, 0])
    sure = torch.tensor([[300.0, 0.0, 0.0], [0.0, 300.0, 0.0]], dtype=torch.float64)
    for clean in (sure, sure.flip(0)):
        assert torch.isfinite(mart_loss(clean, sure, labels))
    known = mart_loss(sure[:1], sure[:1], labels[:1], beta=0.0)
    assert agrees(known, -torch.log(torch.tensor(1.0001 + 1e-12, dtype=torch.float64)))


def mart_forwards_are_the_stated_ones(product: Product) -> None:
    batch, adv = batch_of()
    for config, modes in ((Mart.Config(), ["train", "train"]), (Mart.Config(clean_bn="batch"), ["batch", "train"])):
        recorder = Recorder()
        build(product, config, norm="mbn").loss(recorder, batch, adv)
        assert [c["branch"] for c in recorder.calls] == ["clean", "adv"]
        assert [c["bn"] for c in recorder.calls] == modes


def entropy_is_the_boosted_term_alone_at_beta_0(product: Product) -> None:
    batch, _ = batch_of()
    logits = torch.randn(len(batch), 4, generator=torch.Generator().manual_seed(0))
    labels = batch.labels % 4
    plain = F.cross_entropy(logits, labels)
    assert mart_loss(logits, logits, labels, beta=0.0) > plain


CHECKS = [
    mart_is_the_published_loss, certain_and_wrong_images_stay_finite, mart_forwards_are_the_stated_ones,
    entropy_is_the_boosted_term_alone_at_beta_0,
]  # fmt: skip

FILE = "objectives/mart.py"
MUTATIONS = [
    Mutation(
        "the boosted term looks at the true class too", FILE, "adv.scatter(1, labels[:, None], -1.0).amax(dim=1)",
        "adv.amax(dim=1)", "mart_is_the_published_loss",
    ),
    Mutation(
        "images are weighed by what the network knows", FILE, "weight = _WEIGHT_ABOVE_ONE - clean.gather(",
        "weight = clean.gather(", "mart_is_the_published_loss",
    ),
    Mutation(
        "the weight is no longer a part of the gradient", FILE,
        "clean.gather(1, labels[:, None]).squeeze(1)\n", "clean.detach().gather(1, labels[:, None]).squeeze(1)\n",
        "mart_is_the_published_loss",
    ),
    Mutation(
        "another constant above one", FILE, "_ABOVE_ONE, _TINY = 1.0001, 1e-12", "_ABOVE_ONE, _TINY = 1.001, 1e-12",
        "mart_is_the_published_loss",
    ),
    Mutation(
        "MART's clean forward moves BN against the recipe", FILE, '"train" if self.config.clean_bn == "update" else "batch"',
        '"train"', "mart_forwards_are_the_stated_ones",
    ),
]  # fmt: skip
