"""AutoAttack in an evaluation is, image by image and call by call, plain pyautoattack with the published budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distributed_at.evaluation import EvaluationResult
from tests.strangers import autoattack
from tests.strangers.asking import Witness, arrays, ask_autoattack, subject
from tests.strangers.checking import assert_inside
from tests.strangers.pgd import cross_entropy, logits_of

SMALL = {"num_steps": 9, "num_queries": 50}
SEED = 3
RADIUS = {"trained": 50.0, "untrained": 6.0}
# what the product is asked for, and the same said to pyautoattack
VERSIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "standard": ({"version": "standard"}, {"version": "standard"}),
    "plus": ({"version": "plus"}, {"version": "plus"}),
    "rand": ({"version": "rand"}, {"version": "rand"}),
    "fast": ({"version": "fast"}, {"version": "custom", "attacks": ["apgd-ce", "apgd-t"], "restarts": 1}),
}
ALONE = {
    "apgd-ce": ("standard", 1),
    "apgd-t": ("standard", 1),
    "fab-t": ("standard", 1),
    "square": ("standard", 1),
    "apgd-dlr": ("plus", 5),
    "fab": ("plus", 5),
}


def compare(
    name: str,
    asked: dict[str, Any],
    told: dict[str, Any],
    *,
    eps: float,
    norm: str = "linf",
    num_classes: int = 10,
    size: int = 24,
    **budget: int,
) -> tuple[EvaluationResult, autoattack.Verdicts]:
    """Run both on one chunk; check verdicts, kept images, and what each attack asked of the network."""
    network, source = subject(name, num_classes=num_classes, size=size)
    x, y, ids = arrays(source)
    seed = autoattack.seed_of(SEED, ids)
    if num_classes < 10:  # pyautoattack aims at 9 classes unless it is told that there are fewer
        told = {**told, "num_targets": num_classes - 1}
    plain = autoattack.run(network, x, y, eps=eps / 255, norm=norm, seed=seed, **told, **budget)
    network.forget()
    with autoattack.watched(network) as noted:
        result = ask_autoattack(network, source, eps=eps, norm=norm, seed=SEED, **asked, **budget)
    rows = result.rows
    np.testing.assert_array_equal(rows.attack, plain.broken_by)
    np.testing.assert_array_equal(rows.correct_adv, plain.robust)
    np.testing.assert_array_equal(rows.adv_prediction[~plain.robust], plain.prediction[~plain.robust])
    np.testing.assert_array_equal(rows.adv_prediction[plain.robust], y[plain.robust])
    np.testing.assert_allclose(rows.loss, _losses(network, x, y, plain), rtol=1e-5, atol=1e-6)
    assert_same_attacks(noted, plain.attacks)
    assert_same_images(network, noted, x, plain, eps, norm)
    return result, plain


def _losses(network: Witness, x: np.ndarray, y: np.ndarray, plain: autoattack.Verdicts) -> list[float]:
    """Cross-entropy at the image that broke a sample, the highest of all images returned where none did."""
    found = [cross_entropy(z, label) for z, label in zip(logits_of(network, plain.adv), y, strict=True)]
    tried: dict[int, list[float]] = {}
    for one in plain.attacks:
        for i, z in zip(autoattack.positions(one.x, x), logits_of(network, one.adv), strict=True):
            tried.setdefault(i, []).append(cross_entropy(z, y[i]))
    return [max(tried[i]) if robust else found[i] for i, robust in enumerate(plain.robust)]


def assert_same_attacks(noted: list[autoattack.Attack], plain: list[autoattack.Attack]) -> None:
    """Same attacks in the same order, on the same images, with the same number of calls, images and results."""
    for one, other in zip(noted, plain, strict=True):
        assert (one.name, one.seed, one.calls, one.images) == (other.name, other.seed, other.calls, other.images)
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.adv, other.adv, err_msg=one.name)


def assert_same_images(
    network: Witness, noted: list[autoattack.Attack], x: np.ndarray, plain: autoattack.Verdicts, eps: float, norm: str
) -> None:
    """The image that broke each sample is pyautoattack's, inside ball and box, and on the ball's surface for one."""
    kept = np.full_like(x, np.nan)
    for one in noted:
        at = np.array(autoattack.positions(one.x, x))
        broke = plain.broken_by[at] == one.name
        kept[at[broke]] = network.seen[one.asked_next].numpy()[broke]
    broken = ~plain.robust & (plain.broken_by != "clean")
    np.testing.assert_allclose(kept[broken], plain.adv[broken], rtol=0, atol=3e-7)
    used = assert_inside(kept[broken], x[broken], norm, eps)
    if norm == "linf" and any(name.startswith("apgd") for name in plain.broken_by):
        assert used > 1 - 1e-6


@pytest.mark.parametrize("name", ["trained", "untrained"])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_is_plain_pyautoattack(version: str, name: str) -> None:
    asked, told = VERSIONS[version]
    num_classes = 10 if version == "standard" and name == "trained" else 5
    result, plain = compare(name, asked, told, eps=RADIUS[name], num_classes=num_classes, **SMALL)
    assert 0 < result.correct < result.clean_correct
    assert name == "untrained" or sum(count > 0 for count in result.broken_by().values()) > 1
    assert {one.name for one in plain.attacks} == set(result.protocol.attacks)


@pytest.mark.parametrize("attack", ALONE)
def test_each_attack_alone_is_that_of_plain_pyautoattack(attack: str) -> None:
    version, restarts = ALONE[attack]
    asked = {"version": version, "attacks": (attack,)}
    told = {"version": "custom", "attacks": [attack], "restarts": restarts}
    result, _ = compare("trained", asked, told, eps=RADIUS["trained"], num_classes=5, **SMALL)
    assert 0 < result.correct < result.clean_correct


def test_l2_is_plain_pyautoattack() -> None:
    result, _ = compare("trained", *VERSIONS["standard"], eps=180.0, norm="l2", num_classes=5, **SMALL)
    assert 0 < result.correct < result.clean_correct


@pytest.mark.parametrize(
    ("num_classes", "attacks"),
    [
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (2, ["apgd-ce", "fab-t", "square"]),
    ],
)
def test_few_classes_are_all_aimed_at(num_classes: int, attacks: list[str]) -> None:
    told = {"version": "custom", "attacks": attacks, "restarts": 1}
    result, _ = compare("untrained", {"version": "standard"}, told, eps=6.0, num_classes=num_classes, **SMALL)
    assert 0 < result.correct < result.clean_correct


def test_budgets_that_nobody_named_are_the_published_ones() -> None:
    """100 steps and 5000 queries: nothing but the number of classes is told to either side."""
    result, plain = compare("untrained", *VERSIONS["standard"], eps=8.0, num_classes=4, size=6)
    assert [one.calls for one in plain.attacks if one.name == "square"] == [5003]
    assert result.protocol.name == "AutoAttack linf 8/255"


def test_each_chunk_is_a_run_of_its_own_with_a_seed_of_its_own() -> None:
    network, source = subject("trained", num_classes=5)
    x, y, ids = arrays(source)
    told: dict[str, Any] = {"version": "custom", "attacks": ["apgd-ce"], "restarts": 1, "num_steps": 3}
    eps, asked = RADIUS["trained"], {"version": "standard", "attacks": ("apgd-ce",), "num_steps": 3}
    result = ask_autoattack(network, source, eps=eps, seed=SEED, chunk_size=9, batch_size=4, **asked)
    for start in range(0, len(x), 9):
        part = slice(start, start + 9)
        seed = autoattack.seed_of(SEED, ids[part])
        plain = autoattack.run(network, x[part], y[part], eps=eps / 255, seed=seed, **told)
        np.testing.assert_array_equal(result.rows.attack[part], plain.broken_by)
        np.testing.assert_array_equal(result.rows.correct_adv[part], plain.robust)
