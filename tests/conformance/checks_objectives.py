"""Checks of what a training step's objective asks of the network and what it makes of the answers."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from distributed_at.batch import Batch
from distributed_at.config import MixtureConfig, PgdAtConfig, TradesConfig
from tests.conformance.networks import CLASSES, ids, images, labels, network
from tests.conformance.product import Product


class Recorder:
    """A forward as the engine lends it, with a small network behind it; keeps every call."""

    def __init__(self, *, shift_adv: float = 0.0) -> None:
        self.model = network(dtype=torch.float64)
        self.calls: list[dict] = []
        self.shift_adv = shift_adv

    def __call__(self, x, branch="adv", bn="train", grad=True):
        with torch.set_grad_enabled(grad):
            logits = self.model(x) + (self.shift_adv if branch == "adv" else 0.0)
        if grad:
            logits.retain_grad()
        self.calls.append({"x": x, "branch": branch, "bn": bn, "grad": grad, "logits": logits})
        return logits

    @property
    def moving(self) -> list[dict]:
        return [c for c in self.calls if c["bn"] == "train"]


def batch_of(n: int = 12, group: int = 12) -> tuple[Batch, torch.Tensor]:
    x = images(n, dtype=torch.float64)
    adv = (x + 8 / 255).clamp(0, 1)
    return Batch(ids(n), x, labels(n), 3, 7, torch.arange(n) // group), adv


def build(product: Product, config, **options):
    return product.objectives.build_objective(config, num_classes=CLASSES, seed=0, **options)


def adversarial_training_moves_bn_once(product: Product) -> None:
    batch, adv = batch_of()
    for clean_updates, before, after in ((0, 1, 0), (1, 1, 1), (2, 2, 1)):
        recorder = Recorder()
        objective = build(product, PgdAtConfig(bn_clean_updates_per_step=clean_updates))
        objective.loss(recorder, batch, adv)
        assert len(recorder.moving) == before, f"{len(recorder.moving)} train-mode forwards, the recipe says {before}"
        assert torch.equal(recorder.calls[0]["x"], adv), "the loss is not that of the adversarial images"
        assert all(not c["grad"] for c in recorder.calls[1:]), "a forward for statistics builds a graph"
        objective.after_step(recorder, batch)
        assert len(recorder.moving) == before + after


def adversarial_loss_is_plain_cross_entropy(product: Product) -> None:
    batch, adv = batch_of()
    recorder = Recorder()
    terms = build(product, PgdAtConfig()).loss(recorder, batch, adv)
    assert torch.allclose(terms.loss, F.cross_entropy(recorder.model(adv), batch.labels))
    assert terms.loss.requires_grad
    assert not terms.logits["adv"].requires_grad


def attack_gets_no_training_gradient(product: Product) -> None:
    """Images from an attack that kept its graph must not carry the training loss back into it."""
    batch, adv = batch_of()
    attached = adv.clone().requires_grad_()
    for config in (PgdAtConfig(), TradesConfig(), MixtureConfig()):
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
        config = PgdAtConfig(label_smoothing=0.3, label_smoothing_form=form)
        assert torch.allclose(build(product, config).loss(Recorder(), batch, adv).loss, value, atol=1e-6), form


def trades_is_the_published_loss(product: Product) -> None:
    batch, _ = batch_of()
    adv = 1.0 - batch.images  # far away, where the two directions of the KL differ
    recorder = Recorder()
    terms = build(product, TradesConfig(beta=6.0)).loss(recorder, batch, adv)
    clean, bad = recorder.model(batch.images), recorder.model(adv)
    kl = F.kl_div(F.log_softmax(bad, 1), F.softmax(clean, 1), reduction="sum") / len(batch)
    assert torch.allclose(terms.loss, F.cross_entropy(clean, batch.labels) + 6.0 * kl)
    gradients = torch.autograd.grad(6.0 * terms.loss, [c["logits"] for c in recorder.calls])
    only_ce = torch.autograd.grad(
        F.cross_entropy(recorder.calls[0]["logits"], batch.labels) * 6.0, recorder.calls[0]["logits"]
    )[0]
    assert not torch.allclose(gradients[0], only_ce), "the KL is cut off from the clean logits"
    assert gradients[1].abs().sum() > 0, "the KL is cut off from the adversarial logits"


def trades_forwards_are_the_stated_ones(product: Product) -> None:
    batch, adv = batch_of()
    for config, branches, modes in (
        (TradesConfig(), ["clean", "adv"], ["train", "train"]),
        (TradesConfig(clean_forwards="twice"), ["clean", "adv", "clean"], ["train"] * 3),
        (TradesConfig(clean_bn="batch"), ["clean", "adv"], ["batch", "train"]),
    ):
        recorder = Recorder()
        build(product, config, norm="mbn").loss(recorder, batch, adv)
        assert [c["branch"] for c in recorder.calls] == branches
        assert [c["bn"] for c in recorder.calls] == modes, f"{config}: {[c['bn'] for c in recorder.calls]}"


def mixture_branches_carry_their_names(product: Product) -> None:
    batch, adv = batch_of()
    for norm in ("mbn", "gn"):
        recorder = Recorder(shift_adv=1.0)
        terms = build(product, MixtureConfig(), norm=norm).loss(recorder, batch, adv)
        shown = {c["branch"]: c["x"] for c in recorder.calls}
        assert torch.equal(shown["clean"], batch.images), "branches are swapped"
        assert torch.equal(shown["adv"], adv)
        assert torch.allclose(terms.logits["clean"], recorder.model(batch.images))
        assert torch.allclose(terms.logits["adv"], recorder.model(adv) + 1.0)


def mixture_with_one_bn_is_one_forward(product: Product) -> None:
    batch, adv = batch_of(12, group=6)
    recorder = Recorder()
    terms = build(product, MixtureConfig()).loss(recorder, batch, adv)
    assert len(recorder.calls) == 1, f"{len(recorder.calls)} forwards: BN does not see the mixture"
    shown = recorder.calls[0]["x"]
    expected = torch.cat([batch.images[:6], adv[:6], batch.images[6:], adv[6:]])
    assert torch.equal(shown, expected), "a BN group does not hold its own clean and adversarial images"
    assert torch.allclose(terms.logits["clean"], recorder.model(batch.images))
    assert torch.allclose(terms.logits["adv"], recorder.model(adv))


def mixture_loss_is_the_stated_mean(product: Product) -> None:
    batch, adv = batch_of(20, group=10)
    model = network(dtype=torch.float64)
    for weighting in ("alpha", "samples"):
        for ratio in (1.0, 0.4):
            objective = build(product, MixtureConfig(clean_ratio=ratio, weighting=weighting, alpha=0.3))
            terms = objective.loss(Recorder(), batch, adv)
            rows = objective.clean_rows(batch)
            assert torch.bincount(batch.group_ids[rows], minlength=2).tolist() == [int(10 * ratio)] * 2
            clean = F.cross_entropy(model(batch.images[rows]), batch.labels[rows], reduction="none")
            bad = F.cross_entropy(model(adv), batch.labels, reduction="none")
            mean = 0.3 * clean.mean() + 0.7 * bad.mean() if weighting == "alpha" else torch.cat([clean, bad]).mean()
            assert torch.allclose(terms.loss, mean), f"{weighting} {ratio}"


def clean_subset_depends_on_counters_alone(product: Product) -> None:
    batch, _ = batch_of(24, group=8)
    objective = build(product, MixtureConfig(clean_ratio=0.5))
    whole = set(batch.ids[objective.clean_rows(batch)].tolist())
    torch.manual_seed(3)
    parts = set()
    for first in (0, 8, 16):
        cut = slice(first, first + 8)
        part = Batch(batch.ids[cut], batch.images[cut], batch.labels[cut], 3, 7, batch.group_ids[cut])
        parts |= set(part.ids[objective.clean_rows(part)].tolist())
    assert len(whole) == 12
    assert whole == parts, "the kept clean images change with the micro-batch"
    later = Batch(batch.ids, batch.images, batch.labels, 4, 7, batch.group_ids)
    assert set(batch.ids[objective.clean_rows(later)].tolist()) != whole, "the same images are kept in every epoch"


def logit_pairing_pairs_the_same_image(product: Product) -> None:
    batch, adv = batch_of(12, group=6)
    model = network(dtype=torch.float64)
    clean, bad = model(batch.images), model(adv)
    base = (0.5 * F.cross_entropy(clean, batch.labels) + 0.5 * F.cross_entropy(bad, batch.labels)).detach()
    for form, distance in (("mse_mean", F.mse_loss(clean, bad)), ("l2_sum", (clean - bad).square().sum() / 12)):
        for norm in ("bn", "mbn"):
            config = MixtureConfig(logit_pairing=0.5, logit_pairing_form=form)
            loss = build(product, config, norm=norm).loss(Recorder(), batch, adv).loss
            assert torch.allclose(loss, base + 0.5 * distance), f"{form} {norm}"


def objectives_leave_the_batch_as_it_was(product: Product) -> None:
    batch, adv = batch_of()
    kept = copy.deepcopy(batch), adv.clone()
    for config in (PgdAtConfig(), TradesConfig(), MixtureConfig(clean_ratio=0.5)):
        build(product, config).loss(Recorder(), batch, adv)
    assert torch.equal(kept[0].images, batch.images)
    assert torch.equal(kept[1], adv)


CHECKS = [
    adversarial_training_moves_bn_once, adversarial_loss_is_plain_cross_entropy, attack_gets_no_training_gradient,
    smoothing_follows_its_convention, trades_is_the_published_loss, trades_forwards_are_the_stated_ones,
    mixture_branches_carry_their_names, mixture_with_one_bn_is_one_forward, mixture_loss_is_the_stated_mean,
    clean_subset_depends_on_counters_alone, logit_pairing_pairs_the_same_image, objectives_leave_the_batch_as_it_was,
]  # fmt: skip
