"""Two numbers are comparable exactly when their protocols' hashes agree."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from distributed_at.config import AttackConfig, EvalAttackConfig
from distributed_at.errors import ConfigError
from distributed_at.evaluation import Protocol, build_protocol, ids_hash, weights_hash
from distributed_at.evaluation.protocol import autoattack_plan
from tests.evaluation_kit import TinyNet

BASE = Protocol(kind="pgd", weights="w", data_ids="d", num_samples=10, norm="linf", eps=8, step_size=2, num_steps=20)


def other_value(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, ("extra", "1")) if not value or isinstance(value[0], tuple) else tuple(v + 1 for v in value)
    return f"{value}x"


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Protocol) if f.name not in ("title", "attacks")])
def test_hash_changes_with_every_field(name: str) -> None:
    changed = dataclasses.replace(BASE, **{name: other_value(getattr(BASE, name))})
    assert changed.hash != BASE.hash
    assert changed != BASE


def test_hash_changes_with_the_attacks_and_their_order() -> None:
    hashes = {dataclasses.replace(BASE, attacks=a).hash for a in ((), ("a",), ("a", "b"), ("b", "a"))}
    assert len(hashes) == 4


def test_hash_changes_with_nothing_else() -> None:
    assert dataclasses.replace(BASE, title="shown in a table").hash == BASE.hash
    assert dataclasses.replace(BASE, eps=8.0, pixel_box=(0, 1)).hash == BASE.hash
    assert Protocol.from_dict(json.loads(json.dumps(BASE.to_dict()))) == BASE


def test_hash_is_stable_between_versions_of_this_code() -> None:
    # ledgers on disk are keyed by it: a change here makes every stored evaluation start anew
    assert json.loads(BASE.canonical())["format"] == 1
    assert BASE.short_hash == "5c4650d813c6"


def build(config: EvalAttackConfig, **changes) -> Protocol:
    values = {"weights": "w", "ids": np.arange(5), "num_classes": 10, **changes}
    return build_protocol(config, **values)


def test_order_of_ids_and_batch_size_are_not_part_of_a_protocol() -> None:
    attack = AttackConfig(eps=8.0, num_steps=20, step_size=2.0)
    small, large = (EvalAttackConfig(kind="pgd", attack=attack, batch_size=b) for b in (1, 512))
    assert build(small).hash == build(large, ids=np.arange(5)[::-1]).hash
    assert ids_hash(np.arange(5)) != ids_hash(np.arange(6))


def test_names_are_what_papers_write() -> None:
    def pgd(**changes) -> str:
        values = {"eps": 8.0, "num_steps": 20, "step_size": 2.0, **changes}
        return build(EvalAttackConfig(kind="pgd", attack=AttackConfig(**values))).name

    assert pgd() == "PGD-20 linf 8/255"
    assert pgd(restarts=5, loss="margin") == "PGD-20x5 margin linf 8/255"
    assert pgd(norm="l2", eps=128.0, step_size=15.0) == "PGD-20 l2 128/255"
    assert pgd(target="random_other", eps=16.0, num_steps=100) == "PGD-100 targeted linf 16/255"
    auto = AttackConfig(eps=8.0, num_steps=1, step_size=1.0)
    assert build(EvalAttackConfig(kind="autoattack", attack=auto)).name == "AutoAttack linf 8/255"
    assert build(EvalAttackConfig(kind="autoattack", version="fast", attack=auto)).name == "AutoAttack-fast linf 8/255"
    assert build(EvalAttackConfig(kind="autoattack", attack=auto), num_queries=9).name.endswith("(reduced budget)")
    assert build(EvalAttackConfig(kind="clean")).name == "clean"
    assert build(EvalAttackConfig(kind="clean", name="mine")).name == "mine"


def test_attack_is_inherited_from_training_and_its_absence_is_an_error() -> None:
    config = EvalAttackConfig(kind="autoattack")
    assert build(config, training_attack=AttackConfig(eps=4.0, num_steps=2, step_size=2.0)).eps == 4
    with pytest.raises(ConfigError, match="needs attack"):
        build(config)


def test_step_rule_is_resolved_in_the_protocol() -> None:
    attack = AttackConfig(eps=16.0, num_steps=10, step_size=1.0, step_rule="at_least_eps_over_steps")
    assert build(EvalAttackConfig(kind="pgd", attack=attack)).step_size == pytest.approx(1.6)


def test_autoattack_library_version_is_part_of_its_protocol_alone() -> None:
    attack = AttackConfig(eps=8.0, num_steps=1, step_size=1.0)
    assert build(EvalAttackConfig(kind="autoattack", attack=attack)).libraries[0][0] == "pyautoattack"
    assert build(EvalAttackConfig(kind="pgd", attack=attack)).libraries == ()


@pytest.mark.parametrize(
    ("version", "classes", "attacks", "targets"),
    [
        ("standard", 1000, ("apgd-ce", "apgd-t", "fab-t", "square"), 9),
        ("standard", 10, ("apgd-ce", "apgd-t", "fab-t", "square"), 9),
        ("standard", 4, ("apgd-ce", "apgd-t", "fab-t", "square"), 3),
        ("standard", 3, ("apgd-ce", "apgd-dlr", "fab-t", "square"), 2),
        ("standard", 2, ("apgd-ce", "fab-t", "square"), 1),
        ("plus", 3, ("apgd-ce", "apgd-dlr", "fab", "square", "fab-t"), 2),
        ("rand", 10, ("apgd-ce", "apgd-dlr"), 0),
        ("fast", 5, ("apgd-ce", "apgd-t"), 4),
    ],
)
def test_autoattack_fits_the_number_of_classes(version, classes, attacks, targets) -> None:
    assert autoattack_plan(version, classes) == (attacks, targets)


def test_weights_hash_sees_every_weight_and_buffer_and_no_wrapper() -> None:
    model = TinyNet()
    before = weights_hash(model)
    assert weights_hash(nn.DataParallel(model)) == before
    assert weights_hash(model.to(memory_format=torch.channels_last)) == before
    model.norm.num_batches_tracked += 1
    assert weights_hash(model) == before
    for tensor in (model.first.weight, model.head.bias, model.norm.running_var):
        with torch.no_grad():
            old = tensor.flatten()[0].item()
            tensor.view(-1)[0] = old + 1e-6 if tensor is not model.first.weight else -old
            assert weights_hash(model) != before
            tensor.view(-1)[0] = old
    assert weights_hash(model) == before
    assert weights_hash(model.double()) != before
