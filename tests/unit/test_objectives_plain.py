"""The numbers of the mixture's parts, and what its recipe refuses, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from distributed_at import rng
from distributed_at.objectives.mixture import Mixture, kept_count, mixed_mean, mixture_loss, pairing_loss
from tests.conformance.kit import batch_of, build
from tests.conformance.product import REAL

CLEAN, ADV = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0, 7.0])


def test_losses_are_mixed_by_alpha_or_by_the_number_of_images():
    assert mixed_mean(CLEAN, ADV, 0.25, weighting="alpha").item() == 0.25 * 2.5 + 0.75 * 4.0
    assert mixed_mean(CLEAN, ADV, 0.25, weighting="samples").item() == pytest.approx(17 / 5)
    for weighting in ("alpha", "samples"):
        assert mixed_mean(CLEAN[:0], ADV, 0.25, weighting=weighting).item() == 4.0
    logits, labels = torch.tensor([[0.0, math.log(3.0)]] * 3), torch.tensor([0, 1, 1])
    ce = [math.log(4.0), math.log(4.0 / 3.0), math.log(4.0 / 3.0)]
    found = mixture_loss(logits[:2], logits, labels[:2], labels)
    assert found.item() == pytest.approx(0.5 * sum(ce[:2]) / 2 + 0.5 * sum(ce) / 3)


def test_logits_are_paired_by_the_mean_over_all_or_by_the_sum_over_classes():
    clean, adv = torch.tensor([[1.0, 2.0], [0.0, 5.0]]), torch.tensor([[0.0, 4.0], [3.0, 5.0]])
    assert pairing_loss(clean, adv, "mse_mean").item() == (1 + 4 + 9 + 0) / 4
    assert pairing_loss(clean, adv, "l2_sum").item() == (1 + 4 + 9 + 0) / 2


def test_the_clean_images_kept_of_a_group_are_the_nearest_number_with_halves_up():
    assert [kept_count(10, ratio) for ratio in (0.0, 0.04, 0.05, 0.5, 0.94, 0.95, 1.0)] == [0, 0, 1, 5, 9, 10, 10]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_the_clean_images_kept_are_those_of_smallest_draw_in_their_group(ratio):
    objective = build(REAL, Mixture.Config(clean_ratio=ratio))
    batch, _ = batch_of()
    draws = rng.words(objective.context.seed, rng.Purpose.CLEAN_SUBSET, batch.epoch, batch.ids, 1)[:, 0].tolist()
    groups, ids = batch.group_ids.tolist(), batch.ids.tolist()
    by_hand = []
    for group in set(groups):
        members = sorted((draws[row], ids[row], row) for row in range(len(batch)) if groups[row] == group)
        by_hand += [row for _, _, row in members[: math.floor(len(members) * ratio + 0.5)]]
    assert objective.clean_rows(batch).tolist() == sorted(by_hand)


@pytest.mark.parametrize(("norm", "sizes"), [("bn", (12, 12)), ("mbn", (4, 8))])
def test_batch_norm_sees_the_mixture_or_each_branch(norm, sizes):
    objective = build(REAL, Mixture.Config(clean_ratio=0.5), norm=norm)
    assert objective.bn_group_sizes(8) == dict(zip(("clean", "adv"), sizes, strict=True))
    none_kept = build(REAL, Mixture.Config(clean_ratio=0.0), norm="mbn")
    assert none_kept.bn_group_sizes(8) == {"clean": 1, "adv": 8}


def test_pairing_needs_every_clean_image():
    assert Mixture.Config(logit_pairing=0.5).clean_ratio == 1.0
    assert Mixture.Config(logit_pairing=0.0, clean_ratio=0.5).alpha == 0.5
    with pytest.raises(ValidationError, match=r"clean_ratio must be 1, got 0\.5"):
        Mixture.Config(logit_pairing=0.5, clean_ratio=0.5)


def test_what_a_mixture_says_of_itself_follows_its_ratio():
    full, part, none = (Mixture.Config(clean_ratio=r) for r in (1.0, 0.5, 0.0))
    assert [Mixture.trains(c) for c in (full, part, none)] == [Mixture.branches, Mixture.branches, ("adv",)]
    assert [bool(Mixture.needs(c).whole_groups) for c in (full, part, none)] == [False, True, True]
    assert [Mixture.clean_share(c) for c in (full, part, none)] == [1.0, 0.5, 0.0]
    assert Mixture.passes(part).trained == {"clean": 0.5, "adv": 1.0}
    assert [Mixture.extras(c) for c in (full, Mixture.Config(logit_pairing=0.1))] == [(), ("ALP",)]


@pytest.mark.parametrize(
    ("norm", "groups", "shares"),
    [
        ("bn", [(8, 4), (4, 0)], (8 / 12, 4 / 12)),
        ("mbn", [(8, 4), (4, 0)], (8 / 12,)),  # a clean branch sees groups with clean images alone
        ("mbn", [(8, 4), (4, 2)], (8 / 12, 4 / 12)),
        ("mbn", [(8, 4)], None),
    ],
)
def test_groups_move_statistics_by_their_part_of_the_batch(norm, groups, shares):
    assert build(REAL, Mixture.Config(clean_ratio=0.5), norm=norm)._shares(groups) == shares


def test_equal_draws_keep_the_clean_images_of_smaller_id(monkeypatch):
    monkeypatch.setattr(rng, "words", lambda seed, purpose, epoch, ids, count: torch.zeros(len(ids), count))
    batch, _ = batch_of()
    kept = build(REAL, Mixture.Config(clean_ratio=0.5)).clean_rows(batch)
    smallest = batch.ids.argsort()[: len(batch) // 2]
    assert kept.tolist() == sorted(smallest.tolist())
