"""Mixtures of clean and adversarial images: branches, joint forwards, weights, the kept share, logit pairing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distributed_at.batch import Batch
from distributed_at.objectives.mixture import Mixture, mixture_loss
from tests.conformance.kit import Recorder, agrees, batch_of, build
from tests.conformance.networks import network
from tests.conformance.product import Mutation, Product

SETTINGS: list[dict] = [
    {"clean_ratio": 0.5},
    {},
    {"clean_ratio": 0.0},
    {"weighting": "samples"},
    {"logit_pairing": 0.5},
]


def mixture_branches_carry_their_names(product: Product) -> None:
    batch, adv = batch_of()
    for norm in ("mbn", "gn"):
        recorder = Recorder(shift_adv=1.0)
        terms = build(product, Mixture.Config(), norm=norm).loss(recorder, batch, adv)
        shown = {c["branch"]: c["x"] for c in recorder.calls}
        assert torch.equal(shown["clean"], batch.images), "branches are swapped"
        assert torch.equal(shown["adv"], adv)
        assert agrees(terms.logits["clean"], recorder.model(batch.images))
        assert agrees(terms.logits["adv"], recorder.model(adv) + 1.0)


def mixture_with_one_bn_is_one_forward(product: Product) -> None:
    batch, adv = batch_of(12, group=6)
    recorder = Recorder()
    terms = build(product, Mixture.Config()).loss(recorder, batch, adv)
    assert len(recorder.calls) == 1, f"{len(recorder.calls)} forwards: BN does not see the mixture"
    shown = recorder.calls[0]["x"]
    expected = torch.cat([batch.images[:6], adv[:6], batch.images[6:], adv[6:]])
    assert torch.equal(shown, expected), "a BN group does not hold its own clean and adversarial images"
    assert agrees(terms.logits["clean"], recorder.model(batch.images))
    assert agrees(terms.logits["adv"], recorder.model(adv))


def mixture_loss_is_the_stated_mean(product: Product) -> None:
    batch, adv = batch_of(20, group=10)
    model = network(dtype=torch.float64)
    for weighting in ("alpha", "samples"):
        for ratio in (1.0, 0.4):
            objective = build(product, Mixture.Config(clean_ratio=ratio, weighting=weighting, alpha=0.3))
            terms = objective.loss(Recorder(), batch, adv)
            rows = objective.clean_rows(batch)
            assert torch.bincount(batch.group_ids[rows], minlength=2).tolist() == [int(10 * ratio)] * 2
            clean = F.cross_entropy(model(batch.images[rows]), batch.labels[rows], reduction="none")
            bad = F.cross_entropy(model(adv), batch.labels, reduction="none")
            mean = 0.3 * clean.mean() + 0.7 * bad.mean() if weighting == "alpha" else torch.cat([clean, bad]).mean()
            assert agrees(terms.loss, mean), f"{weighting} {ratio}"
            logits, names = (model(batch.images[rows]), model(adv)), (batch.labels[rows], batch.labels)
            assert agrees(mixture_loss(*logits, *names, 0.3, weighting=weighting), mean), f"{weighting} {ratio}"


def clean_subset_depends_on_counters_alone(product: Product) -> None:
    batch, _ = batch_of(24, group=8)
    objective = build(product, Mixture.Config(clean_ratio=0.5))
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
            config = Mixture.Config(logit_pairing=0.5, logit_pairing_form=form)
            loss = build(product, config, norm=norm).loss(Recorder(), batch, adv).loss
            assert agrees(loss, base + 0.5 * distance), f"{form} {norm}"


CHECKS = [
    mixture_branches_carry_their_names, mixture_with_one_bn_is_one_forward, mixture_loss_is_the_stated_mean, clean_subset_depends_on_counters_alone, logit_pairing_pairs_the_same_image,
]  # fmt: skip

FILE = "objectives/mixture.py"
MUTATIONS = [
    Mutation(
        "clean and adv branches swapped", FILE,
        'return forward(clean, branch="clean", shares=shares, ids=batch.ids[rows]), forward(adv, branch="adv")',
        'return forward(clean, branch="adv", shares=shares), forward(adv, branch="clean")', "mixture_branches_carry_their_names",
    ),
    Mutation(
        "BN sees clean and adversarial images apart", FILE, '        if not self.context.shared_statistics:\n            return forward',
        "        if True:\n            return forward", "mixture_with_one_bn_is_one_forward",
    ),
    Mutation(
        "BN groups mixed up in the joint forward", FILE, "order = torch.argsort(places, stable=True)",
        "order = torch.arange(len(places))", "mixture_with_one_bn_is_one_forward",
    ),
    Mutation(
        "alpha on the wrong side", FILE, "alpha * clean_losses.mean() + (1.0 - alpha) * adv_losses.mean()",
        "alpha * adv_losses.mean() + (1.0 - alpha) * clean_losses.mean()", "mixture_loss_is_the_stated_mean",
    ),
    Mutation(
        "clean subset from the global generator", FILE,
        "draw = rng.words(self.context.seed, rng.Purpose.CLEAN_SUBSET, batch.epoch, batch.ids, 1)[:, 0]",
        "draw = torch.randint(0, 2**31, batch.ids.shape)", "clean_subset_depends_on_counters_alone",
    ),
    Mutation(
        "clean subset is always the first images", FILE,
        "draw = rng.words(self.context.seed, rng.Purpose.CLEAN_SUBSET, batch.epoch, batch.ids, 1)[:, 0]", "draw = batch.ids",
        "clean_subset_depends_on_counters_alone",
    ),
    Mutation(
        "logits paired with another image", FILE, "pairing_loss(clean_logits, adv_logits[rows], ",
        "pairing_loss(clean_logits, adv_logits.roll(1, 0)[rows], ", "logit_pairing_pairs_the_same_image",
    ),
]  # fmt: skip
