"""Objectives: building from recipes, state, group sizes, corner cases. Their mathematics is in tests/conformance."""

from __future__ import annotations

import typing

import pytest
import torch
import torch.nn.functional as F

from distributed_at import config as schema
from distributed_at.objectives import OBJECTIVES, build_objective
from distributed_at.objectives.mixture import kept_count
from tests.conformance.checks_objectives import Recorder, batch_of
from tests.conformance.networks import CLASSES

CONFIGS = {
    "standard": schema.StandardConfig(),
    "pgd_at": schema.PgdAtConfig(),
    "trades": schema.TradesConfig(),
    "mixture": schema.MixtureConfig(),
}


def build(config, **options):
    return build_objective(config, num_classes=CLASSES, seed=0, **options)


def test_every_objective_of_the_schema_can_be_built() -> None:
    union = typing.get_args(schema.ObjectiveConfig)[0]
    names = {member.model_fields["name"].default for member in typing.get_args(union)}
    assert names == set(OBJECTIVES) == set(CONFIGS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_of_its_class_finite_and_stateless(name: str) -> None:
    objective, (batch, adv) = build(CONFIGS[name]), batch_of()
    assert isinstance(objective, OBJECTIVES[name])
    assert objective.needs_attack == (name != "standard")
    terms = objective.loss(Recorder(), batch, adv if objective.needs_attack else None)
    assert terms.loss.shape == ()
    assert torch.isfinite(terms.loss)
    assert all(not t.requires_grad and t.shape == () for t in terms.terms.values())
    assert all(not z.requires_grad for z in terms.logits.values())
    assert set(terms.logits) <= {"clean", "adv"}
    assert objective.state_dict() == {}
    objective.load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state"):
        objective.load_state_dict({"counter": 1})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_docstring_cites_its_paper(name: str) -> None:
    text = OBJECTIVES[name].__doc__ or ""
    assert any(word in text for word in ("section", "eq.", "table")), text


@pytest.mark.parametrize("name", ["pgd_at", "trades", "mixture"])
def test_forgotten_attack_is_refused(name: str) -> None:
    batch, adv = batch_of()
    for wrong in (None, adv[:5]):
        with pytest.raises(ValueError, match="adversarial images"):
            build(CONFIGS[name]).loss(Recorder(), batch, wrong)


def test_standard_is_cross_entropy_on_the_clean_branch() -> None:
    batch, _ = batch_of()
    recorder = Recorder()
    terms = build(CONFIGS["standard"]).loss(recorder, batch, None)
    assert [c["branch"] for c in recorder.calls] == ["clean"]
    assert torch.allclose(terms.loss, F.cross_entropy(recorder.model(batch.images), batch.labels))


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 0), (0.2, 6), (0.4, 13), (0.6, 19), (0.8, 26), (1.0, 32)])
def test_share_of_clean_images_is_exact_in_every_group(ratio: float, kept: int) -> None:
    batch, adv = batch_of(64, group=32)
    objective = build(schema.MixtureConfig(clean_ratio=ratio))
    rows = objective.clean_rows(batch)
    assert torch.bincount(batch.group_ids[rows], minlength=2).tolist() == [kept, kept]
    assert kept == kept_count(32, ratio)
    recorder = Recorder()
    terms = objective.loss(recorder, batch, adv)
    assert len(recorder.calls[0]["x"]) == 64 + 2 * kept == 2 * objective.bn_group_sizes(32)["adv"]
    labels = terms.labels_of("clean", batch.labels)
    assert ("clean" in terms.logits) == (kept > 0)
    if kept:
        assert len(labels) == len(terms.logits["clean"])


def test_no_clean_image_means_plain_adversarial_training() -> None:
    batch, adv = batch_of()
    mixed = build(schema.MixtureConfig(clean_ratio=0.0)).loss(Recorder(), batch, adv).loss
    assert torch.allclose(mixed, build(CONFIGS["pgd_at"]).loss(Recorder(), batch, adv).loss)


@pytest.mark.parametrize("norm", ["mbn", "gn"])
def test_branches_have_their_own_group_sizes(norm: str) -> None:
    assert build(schema.MixtureConfig(clean_ratio=0.5), norm=norm).bn_group_sizes(32) == {"clean": 16, "adv": 32}
    assert build(CONFIGS["trades"]).bn_group_sizes(32) == {"clean": 32, "adv": 32}


def test_clean_labels_follow_the_kept_rows() -> None:
    batch, adv = batch_of(20, group=10)
    objective = build(schema.MixtureConfig(clean_ratio=0.3), norm="mbn")
    recorder = Recorder()
    terms = objective.loss(recorder, batch, adv)
    assert torch.equal(terms.labels_of("clean", batch.labels), batch.labels[objective.clean_rows(batch)])
    assert torch.equal(terms.labels_of("adv", batch.labels), batch.labels)
    expected = recorder.model(batch.images[objective.clean_rows(batch)])
    assert torch.allclose(terms.logits["clean"], expected)


def test_attack_branch_is_handed_on() -> None:
    objective = build(CONFIGS["pgd_at"], attack_branch="clean")
    batch, adv = batch_of()
    recorder = Recorder()
    objective.loss(recorder, batch, adv)
    assert objective.attack_branch == recorder.calls[0]["branch"] == "clean"
