"""AutoAttack is at least as strong as PGD, repeatable, resumable, and believed only about images inside the ball."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from distributed_at.config import AttackConfig, evaluation_entry
from distributed_at.evaluation import build_protocol, evaluation_ids, weights_hash
from distributed_at.evaluation.attacked import ThreatViolationError, inside_ball, perturbation_size
from distributed_at.evaluation.kinds import autoattack
from distributed_at.evaluation.rows import COLUMNS
from tests.evaluation_kit import measure, source, trained

EPS = 30.0


@pytest.fixture(scope="module")
def model():
    return trained(eps=EPS / 255, steps=150)


def protocol_for(model, data, *, eps: float = EPS, num_steps: int = 8, num_queries: int = 40, **changes):
    version = changes.pop("version", "standard")
    norm = changes.pop("norm", "linf")
    config = evaluation_entry(
        kind="autoattack", version=version, attack=AttackConfig(norm=norm, eps=eps, num_steps=1, step_size=eps / 2)
    )
    return build_protocol(
        config,
        weights=weights_hash(model),
        ids=evaluation_ids(data),
        num_classes=data.num_classes,
        **{"num_steps": num_steps, "num_queries": num_queries, "chunk_size": 16, "seed": 1, **changes},
    )


def assert_same(a, b) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a.rows, name), getattr(b.rows, name), err_msg=name)


def test_autoattack_leaves_no_more_right_than_pgd(model) -> None:
    data = source(size=80)
    pgd = measure(
        model, data, evaluation_entry(kind="pgd", attack=AttackConfig(eps=EPS, num_steps=10, step_size=EPS / 4))
    )
    auto = measure(model, data, protocol_for(model, data, num_steps=25))
    assert 0 < auto.correct <= pgd.correct < pgd.clean_correct
    assert sum(auto.broken_by().values()) == auto.clean_correct - auto.correct
    assert auto.broken_by()["apgd-ce"] > 0


def test_natural_model_falls_to_zero() -> None:
    natural, data = trained(), source(size=40)
    result = measure(natural, data, protocol_for(natural, data, eps=80.0, version="fast", num_steps=20))
    assert result.clean_accuracy > 0.9
    assert result.correct == 0


def test_resumed_equals_uninterrupted_and_batch_size_does_not_matter(model, tmp_path: Path) -> None:
    data = source(size=50)
    protocol = protocol_for(model, data)
    whole = measure(model, data, protocol)
    measure(model, source(size=50), protocol, folder=tmp_path)
    (rows,) = tmp_path.glob("*/rows-*.jsonl")
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:25]) + lines[25][:30])  # the second chunk lost half of its rows
    again = source(size=50)
    resumed = measure(model, again, protocol, folder=tmp_path, batch_size=3)
    assert resumed.computed == 50 - 24
    assert again.sample_ids[0] not in again.read_ids  # the finished chunk was left alone
    assert_same(whole, resumed)


def test_every_adversarial_image_lies_in_ball_and_box_and_fools(model) -> None:
    data = source(size=32)
    for norm, eps in (("linf", EPS), ("l2", 250.0)):
        protocol = protocol_for(model, data, norm=norm, eps=eps)
        seen = []
        network = copy.deepcopy(model).eval()
        x, y = data.images.float() / 255, data.all_labels
        right = network(x).argmax(1) == y

        def watch(adv, clean, *, eps, norm, seen=seen):
            out = inside_ball(adv, clean, eps=eps, norm=norm)
            seen.append((out, clean))
            return out

        with mock.patch("distributed_at.evaluation.attacked.inside_ball", watch):
            outcome = autoattack.run_autoattack(
                network, x[right], y[right], chunk_ids=data.sample_ids, protocol=protocol
            )
        assert outcome.broken.any()
        for adv, clean in seen:
            assert (perturbation_size(adv, clean, norm=norm) <= eps / 255).all()
            assert adv.min() >= 0
            assert adv.max() <= 1


def test_images_outside_the_ball_are_refused_and_not_counted(model, monkeypatch) -> None:
    data = source(size=16)
    protocol = protocol_for(model, data)
    monkeypatch.setattr(autoattack, "_run_one", lambda tools, name, x, y, restarts: 1 - x)
    with pytest.raises(ThreatViolationError, match="radius"):
        measure(model, data, protocol)


def test_claims_of_the_attack_are_not_believed(model, monkeypatch) -> None:
    data = source(size=16)
    monkeypatch.setattr(autoattack, "_run_one", lambda tools, name, x, y, restarts: x)  # "adversarial" = clean
    result = measure(model, data, protocol_for(model, data))
    assert result.correct == result.clean_correct > 0


def test_rounding_is_removed_but_a_real_excess_is_an_error() -> None:
    x = torch.full((2, 1, 4, 4), 0.9)
    inside = inside_ball(x + 8 / 255, x, eps=8 / 255, norm="linf")
    assert (perturbation_size(inside, x, norm="linf") <= 8 / 255).all()
    for bad in (x + 8.01 / 255, torch.full_like(x, float("nan"))):
        with pytest.raises(ThreatViolationError):
            inside_ball(bad, x, eps=8 / 255, norm="linf")
    with pytest.raises(ThreatViolationError, match="box"):
        inside_ball(x + 0.11, x, eps=0.2, norm="linf")


def test_input_outside_the_pixel_box_is_refused(model) -> None:
    data = source(size=16)
    x = data.images.float() / 255 * 2 - 1
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        autoattack.run_autoattack(
            model, x, data.all_labels, chunk_ids=data.sample_ids, protocol=protocol_for(model, data)
        )


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_few_classes_are_attacked_without_crash_and_broken(num_classes: int) -> None:
    model = trained(num_classes, steps=40)
    data = source(num_classes, size=24)
    result = measure(model, data, protocol_for(model, data, eps=110.0, num_steps=10))
    assert result.correct < result.clean_correct


def test_plus_keeps_its_restarts_in_every_chunk(model, monkeypatch) -> None:
    used = []
    from pyautoattack.fab_pt import FABAttack_PT

    original = FABAttack_PT.perturb

    def spy(self, x, y):
        used.append((self.targeted, self.n_restarts, self.n_target_classes))
        return original(self, x, y)

    monkeypatch.setattr(FABAttack_PT, "perturb", spy)
    data = source(size=32)
    measure(model, data, protocol_for(model, data, version="plus", num_steps=2, num_queries=2))
    assert used == [(False, 5, 9), (True, 1, 9)] * 2


def test_seed_depends_on_the_chunk_and_not_on_what_ran_before() -> None:
    a = autoattack.chunk_seed(0, np.array([1, 2, 3]))
    assert a == autoattack.chunk_seed(0, np.array([3, 2, 1]))
    assert len({a, autoattack.chunk_seed(1, np.array([1, 2, 3])), autoattack.chunk_seed(0, np.array([1, 2]))}) == 3
    assert 0 <= a < 2**63


def test_another_seed_is_another_run(model) -> None:
    data = source(size=32)
    results = [measure(model, data, protocol_for(model, data, seed=s)) for s in (0, 1)]
    assert (results[0].rows.loss != results[1].rows.loss).any()


def test_trace_function_and_logger_survive(model) -> None:
    def trace(frame, event, argument):
        return None

    logger = logging.getLogger("auto-attack")
    before, level = sys.gettrace(), logger.level
    sys.settrace(trace)
    try:
        data = source(size=8)
        measure(model, data, protocol_for(model, data, num_steps=1, num_queries=1))
        assert sys.gettrace() is trace
        assert logger.level == level
    finally:
        sys.settrace(before)


def test_budget_of_the_protocol_is_what_runs(model) -> None:
    data = source(size=32)
    weak = protocol_for(model, data, version="fast", num_steps=1)
    strong = dataclasses.replace(weak, num_steps=25)
    assert measure(model, data, strong).correct < measure(model, data, weak).correct


def test_verdicts_belong_to_the_samples_whose_images_were_judged(model, monkeypatch) -> None:
    data = source(size=48)
    network = copy.deepcopy(model).eval()

    def one_step(tools, name, x, y, restarts):
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(network(x), y, reduction="sum"), x)
        return (x + EPS / 255 * gradient.sign()).clamp(0, 1).detach()

    monkeypatch.setattr(autoattack, "_run_one", one_step)
    rows = measure(model, data, protocol_for(model, data, version="fast")).rows
    x, y = data.images.float() / 255, data.all_labels
    prediction = network(one_step(None, "", x, y, 1)).argmax(1).numpy()
    broken = rows.correct_clean & (prediction != rows.label)
    assert 0 < broken.sum() < rows.correct_clean.sum()
    np.testing.assert_array_equal(rows.correct_adv, rows.correct_clean & ~broken)
    np.testing.assert_array_equal(rows.adv_prediction[broken], prediction[broken])
    np.testing.assert_array_equal(rows.attack[broken], "apgd-ce")


def test_chunks_draw_different_noise_from_seeds_of_their_own(model, monkeypatch) -> None:
    seeds = []
    monkeypatch.setattr(autoattack, "_run_one", lambda tools, name, x, y, restarts: seeds.append(tools.apgd.seed) or x)
    data = source(size=32)
    protocol = protocol_for(model, data, version="fast")
    measure(model, data, protocol)
    expected = [autoattack.chunk_seed(protocol.seed, ids) for ids in (data.sample_ids[:16], data.sample_ids[16:])]
    assert seeds == [expected[0]] * 2 + [expected[1]] * 2
