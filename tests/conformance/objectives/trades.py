"""TRADES: the published loss and the order of its forwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distributed_at.objectives.trades import Trades, trades_loss
from tests.conformance.kit import Recorder, agrees, batch_of, build
from tests.conformance.product import Mutation, Product

SETTINGS: list[dict] = [{}, {"clean_forwards": "twice"}, {"clean_bn": "batch"}]


def trades_is_the_published_loss(product: Product) -> None:
    batch, _ = batch_of()
    adv = 1.0 - batch.images  # far away, where the two directions of the KL differ
    recorder = Recorder()
    terms = build(product, Trades.Config(beta=6.0)).loss(recorder, batch, adv)
    clean, bad = recorder.model(batch.images), recorder.model(adv)
    kl = F.kl_div(F.log_softmax(bad, 1), F.softmax(clean, 1), reduction="sum") / len(batch)
    assert agrees(terms.loss, F.cross_entropy(clean, batch.labels) + 6.0 * kl)
    assert agrees(trades_loss(clean, bad, batch.labels, beta=6.0), terms.loss)
    gradients = torch.autograd.grad(6.0 * terms.loss, [c["logits"] for c in recorder.calls])
    only_ce = torch.autograd.grad(
        F.cross_entropy(recorder.calls[0]["logits"], batch.labels) * 6.0, recorder.calls[0]["logits"]
    )[0]
    assert not torch.allclose(gradients[0], only_ce), "the KL is cut off from the clean logits"
    assert gradients[1].abs().sum() > 0, "the KL is cut off from the adversarial logits"


def trades_forwards_are_the_stated_ones(product: Product) -> None:
    batch, adv = batch_of()
    for config, branches, modes in (
        (Trades.Config(), ["clean", "adv"], ["train", "train"]),
        (Trades.Config(clean_forwards="twice"), ["clean", "adv", "clean"], ["train"] * 3),
        (Trades.Config(clean_bn="batch"), ["clean", "adv"], ["batch", "train"]),
    ):
        recorder = Recorder()
        build(product, config, norm="mbn").loss(recorder, batch, adv)
        assert [c["branch"] for c in recorder.calls] == branches
        assert [c["bn"] for c in recorder.calls] == modes, f"{config}: {[c['bn'] for c in recorder.calls]}"


CHECKS = [
    trades_is_the_published_loss, trades_forwards_are_the_stated_ones,
]  # fmt: skip

FILE = "objectives/trades.py"
MUTATIONS = [
    Mutation(
        "KL in the wrong direction", FILE, "return (clean.exp() * (clean - adv)).sum(dim=1)",
        "return (adv.exp() * (adv - clean)).sum(dim=1)", "trades_is_the_published_loss",
    ),
    Mutation(
        "KL cut off from the clean logits", FILE, "F.log_softmax(clean_logits, dim=1), F.log",
        "F.log_softmax(clean_logits.detach(), dim=1), F.log", "trades_is_the_published_loss",
    ),
    Mutation(
        "KL divided by classes too", FILE, "divergence = kl_divergence(paired, adv_logits).mean()\n",
        "divergence = kl_divergence(paired, adv_logits).mean() / adv_logits.shape[1]\n", "trades_is_the_published_loss",
    ),
    Mutation(
        "clean forward moves BN against the recipe", FILE,
        'bn: Literal["train", "batch"] = "train" if c.clean_bn == "update" else "batch"',
        'bn: Literal["train", "batch"] = "train"', "trades_forwards_are_the_stated_ones",
    ),
]  # fmt: skip
