"""PGD in an evaluation is, image by image, the PGD that the papers describe: the same verdicts, losses and images."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from distributed_at.config import AttackConfig, evaluation_entry
from tests.strangers import pgd
from tests.strangers.asking import arrays, ask, ask_entry, ask_pgd, subject
from tests.strangers.checking import assert_inside, assert_same_rows, judged_images

NETWORKS = ("trained", "untrained")
LINF: dict[str, Any] = {"eps": 44.0, "num_steps": 5, "step_size": 14.0}
L2: dict[str, Any] = {"norm": "l2", "eps": 200.0, "num_steps": 5, "step_size": 60.0}
CASES: dict[str, dict[str, Any]] = {
    "linf": LINF,
    "linf, ten short steps": {**LINF, "num_steps": 10, "step_size": 6.0},
    "linf from the clean image": {**LINF, "start": "zero"},
    "linf from Gaussian noise that is not clipped": {
        **LINF,
        "start": "gaussian",
        "start_std": 0.05,
        "clip_start": False,
    },
    "linf, a third of the images from the clean one": {**LINF, "start_clean_probability": 0.33, "num_steps": 2},
    "linf, start not clipped": {**LINF, "clip_start": False, "num_steps": 2},
    "the start alone": {**LINF, "num_steps": 0, "clip_start": False},
    "linf, four restarts": {**LINF, "restarts": 4, "num_steps": 2},
    "linf, margin": {**LINF, "loss": "margin"},
    "linf, dlr": {**LINF, "loss": "dlr", "restarts": 2},
    "linf, kl": {**LINF, "loss": "kl", "restarts": 2},
    "linf, random other target": {**LINF, "target": "random_other", "restarts": 3},
    "linf, any random target": {**LINF, "target": "random_any"},
    "linf, most confusing target, margin": {**LINF, "target": "most_confusing", "loss": "margin"},
    "linf, least likely target, dlr": {**LINF, "target": "least_likely", "loss": "dlr", "eps": 70.0, "restarts": 2},
    "l2": L2,
    "l2, three restarts": {**L2, "restarts": 3, "num_steps": 2},
    "l2 from Gaussian noise, kl": {**L2, "start": "gaussian", "start_std": 0.1, "loss": "kl", "num_steps": 3},
    "l2 from the clean image, dlr": {**L2, "start": "zero", "loss": "dlr", "num_steps": 2},
    "l2, random other target, margin": {**L2, "target": "random_other", "loss": "margin", "eps": 350.0},
    "l2, least likely target": {
        **L2,
        "target": "least_likely",
        "eps": 500.0,
        "restarts": 2,
        "start_clean_probability": 0.5,
    },
}
GENTLE = (
    "the start alone",
    "linf, start not clipped",
    "l2 from Gaussian noise, kl",
)  # break nothing, but move the loss
SEED = 21
SCALE = {"trained": 1.0, "untrained": 0.2}  # of radii and steps: untrained answers change sooner
CLOSE = {"linf": 5e-7, "l2": 2e-5}  # of pixels in [0, 1]: sums of squares are rounded in another order


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("case", CASES)
def test_each_row_is_that_of_a_pgd_written_by_hand(case: str, name: str) -> None:
    values = {**CASES[case], **{key: CASES[case][key] * SCALE[name] for key in ("eps", "step_size")}}
    network, source = subject(name)
    x, y, ids = arrays(source)
    plan = pgd.Plan(**values, seed=SEED)
    network.forget()
    result = ask_pgd(network, source, seed=SEED, **values)
    judged = judged_images(network.seen, x, plan.norm)
    expected = pgd.attack(network, plan, x, y, ids)
    assert any(not row.correct_adv for row in expected if row.correct_clean) or case in GENTLE
    assert_same_rows(result, expected, source)
    largest = 0.0
    for i, row in enumerate(expected):
        if plan.start_clean_probability == 0:
            assert len(judged[i]) == len(row.judged), f"image {i} was judged another number of times"
        for adv, mine in zip(judged[i], row.judged, strict=False):
            largest = max(largest, assert_inside(adv[None], x[i : i + 1], plan.norm, plan.eps))
            np.testing.assert_allclose(adv, mine, rtol=0, atol=CLOSE[plan.norm], err_msg=f"image {i}")
    if plan.norm == "linf" and plan.num_steps > 1:
        assert largest > 0.9999  # the whole radius was used


@pytest.mark.parametrize("target", ["none", "random_other"])
def test_each_number_of_steps_of_one_pass_is_that_of_a_pgd_written_by_hand(target: str) -> None:
    counts, values = (1, 2, 4), {**LINF, "num_steps": 7, "step_size": 9.0, "target": target}
    network, source = subject("trained")
    x, y, ids = arrays(source)
    entry = evaluation_entry(kind="pgd", attack=AttackConfig(**values), checkpoints=counts)
    found = ask_entry(network, source, entry, seed=SEED, batch_size=5)
    expected = pgd.along(network, pgd.Plan(**values, seed=SEED), x, y, ids, (*counts, 7))
    assert [one.protocol.num_steps for one in found] == [1, 2, 4, 7]
    for one in found:
        assert_same_rows(one, expected[one.protocol.num_steps], source)
    losses = [one.rows.loss for one in found]
    assert all((a != b).any() for a, b in itertools.pairwise(losses))


def test_step_rule_of_xie_and_yuille_lengthens_short_steps_and_leaves_long_ones() -> None:
    network, source = subject("trained")
    x, y, ids = arrays(source)
    for step_size, used in ((1.0, 44 / 5), (14.0, 14.0)):
        values = {**LINF, "step_size": step_size}
        result = ask_pgd(network, source, seed=SEED, step_rule="at_least_eps_over_steps", **values)
        plan = pgd.Plan(**{**values, "step_size": used}, seed=SEED)
        assert_same_rows(result, pgd.attack(network, plan, x, y, ids), source)


def test_clean_accuracy_is_what_the_network_says_of_the_untouched_images() -> None:
    for name in NETWORKS:
        network, source = subject(name)
        x, y, ids = arrays(source)
        plan = pgd.Plan(eps=0.0, num_steps=0, step_size=1.0, start="zero")
        rows = pgd.attack(network, plan, x, y, ids)
        network.forget()
        result = ask(network, source, evaluation_entry(kind="clean"), batch_size=9)
        assert_same_rows(result, rows, source)
        assert network.asked == {"calls": -(-len(x) // 9), "images": len(x)}
        assert 0 < result.correct < len(x)
