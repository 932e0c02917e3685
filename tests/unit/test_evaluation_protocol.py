"""Two numbers are comparable exactly when their protocols' hashes agree."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from distributed_at.config import AttackConfig, EvaluationEntry, evaluation_entry
from distributed_at.errors import ConfigError
from distributed_at.evaluation import KINDS, Protocol, build_protocol, ids_hash, weights_hash
from distributed_at.evaluation.kinds.autoattack import AutoAttackProtocol, autoattack_plan
from distributed_at.evaluation.kinds.clean import CleanProtocol
from distributed_at.evaluation.kinds.pgd import PgdProtocol
from distributed_at.evaluation.legacy import _FORMAT_1, format_1_hash
from tests.evaluation_kit import TinyNet

COMMON = {"weights": "w", "data_ids": "d", "num_samples": 10}
BASE = {
    "clean": CleanProtocol(kind="clean", **COMMON),
    "pgd": PgdProtocol(kind="pgd", **COMMON, eps=8, step_size=2, num_steps=20, loss="ce", attacks=("pgd",)),
    "autoattack": AutoAttackProtocol(kind="autoattack", **COMMON, eps=8, version="standard", num_steps=100),
}
# Hashes of the protocols above. Rows on disk are found by them and papers may quote them: they never change.
RELEASED = {
    "clean": "ab38b8d8bf8b",
    "pgd": "ac8d8960ebf2",
    "autoattack": "77ed8dd69b7d",
}
# Values that mean "as it was before this field existed". A released default never changes, or equal hashes would mean
# different things; a new field joins with the value that says what was done before.
DEFAULTS = {
    "clean": {
        "model": "", "branch": "adv", "dataset": "", "split": "", "preprocessing": "", "pixel_box": (0.0, 1.0),
        "num_classes": 0, "dtype": "fp32", "scope": "clean_correct", "target": "none", "attacks": (), "title": "",
    },
    "pgd": {
        "norm": "linf", "eps": 0.0, "seed": 0, "step_size": 0.0, "num_steps": 0, "restarts": 0, "start": "",
        "start_std": 0.0, "clip_start": True, "start_clean_probability": 0.0, "loss": "", "bn_mode": "eval",
    },
    "autoattack": {
        "norm": "linf", "eps": 0.0, "seed": 0, "version": "", "num_targets": 0, "num_steps": 0, "num_queries": 0,
        "restarts": 0, "eot_steps": 1, "chunk_size": 0, "libraries": (),
    },
}  # fmt: skip


def other_value(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, ("extra", "1")) if not value or isinstance(value[0], tuple) else tuple(f"{v}1" for v in value)
    return f"{value}x"


FIELDS = [
    (kind, f.name) for kind, base in BASE.items() for f in dataclasses.fields(base) if f.name not in ("title", "kind")
]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_hash_changes_with_every_field_that_matters(kind: str, name: str) -> None:
    base = BASE[kind]
    value = (0.0, 2.0) if name == "pixel_box" else other_value(getattr(base, name))
    changed = dataclasses.replace(base, **{name: value})
    assert changed.hash != base.hash
    assert changed != base


@pytest.mark.parametrize("kind", list(BASE))
def test_new_field_of_any_kind_moves_no_hash_and_its_other_values_do(kind: str) -> None:
    """A field is added to the kind as a later version would add it."""
    grown = dataclasses.make_dataclass(
        "Grown", [("later_knob", float, 0.0)], bases=(type(BASE[kind]),), frozen=True, kw_only=True
    )
    values = {f.name: getattr(BASE[kind], f.name) for f in dataclasses.fields(BASE[kind])}
    assert grown(**values).hash == BASE[kind].hash
    assert grown(**values, later_knob=0.5).hash != BASE[kind].hash


def test_kinds_have_different_hashes_and_every_registered_kind_is_tested() -> None:
    assert len({base.hash for base in BASE.values()}) == len(BASE)
    assert set(BASE) == set(KINDS.builtin)
    assert all(type(base) is KINDS[kind].Record for kind, base in BASE.items())


def test_hash_changes_with_the_attacks_and_their_order() -> None:
    hashes = {dataclasses.replace(BASE["pgd"], attacks=a).hash for a in ((), ("a",), ("a", "b"), ("b", "a"))}
    assert len(hashes) == 4


def test_hash_changes_with_nothing_else() -> None:
    base = BASE["pgd"]
    assert dataclasses.replace(base, title="shown in a table").hash == base.hash
    assert dataclasses.replace(base, eps=8.0, pixel_box=(0, 1)).hash == base.hash


@pytest.mark.parametrize("kind", list(BASE))
def test_protocol_comes_back_from_its_record(kind: str) -> None:
    assert Protocol.from_dict(json.loads(json.dumps(BASE[kind].to_dict()))) == BASE[kind]


@pytest.mark.parametrize("kind", list(BASE))
def test_released_hashes_and_defaults_never_change(kind: str) -> None:
    assert BASE[kind].short_hash == RELEASED[kind]
    now = {f.name: f.default for f in dataclasses.fields(BASE[kind]) if f.default is not dataclasses.MISSING}
    released = {**DEFAULTS["clean"], **DEFAULTS[kind]}
    assert {name: now[name] for name in released} == released


def test_protocol_of_an_earlier_version_is_read_and_recognised() -> None:
    """Its hash held every field of every kind; the number is the one that version printed for this very protocol."""
    earlier = {
        **_FORMAT_1, "kind": "pgd", **COMMON, "norm": "linf", "eps": 8.0, "step_size": 2.0,
        "num_steps": 20, "name": "PGD-20", "hash": "5c4650d813c6", "format": 1,
    }  # fmt: skip
    read = Protocol.from_dict(json.loads(json.dumps(earlier)))
    assert read == PgdProtocol(kind="pgd", **COMMON, eps=8, step_size=2, num_steps=20)
    assert str(format_1_hash(read)).startswith("5c4650d813c6")


def test_protocol_that_says_more_than_earlier_versions_could_is_none_of_theirs() -> None:
    grown = dataclasses.make_dataclass(
        "Grown", [("later_knob", float, 0.0)], bases=(PgdProtocol,), frozen=True, kw_only=True
    )
    values = {f.name: getattr(BASE["pgd"], f.name) for f in dataclasses.fields(BASE["pgd"])}
    assert format_1_hash(grown(**values)) == format_1_hash(BASE["pgd"])
    assert format_1_hash(grown(**values, later_knob=1.0)) is None


def build(config: EvaluationEntry, **changes) -> Protocol:
    values = {"weights": "w", "ids": np.arange(5), "num_classes": 10, **changes}
    return build_protocol(config, **values)


def test_order_of_ids_and_batch_size_are_not_part_of_a_protocol() -> None:
    attack = AttackConfig(eps=8.0, num_steps=20, step_size=2.0)
    small, large = (evaluation_entry(kind="pgd", attack=attack, batch_size=b) for b in (1, 512))
    assert build(small).hash == build(large, ids=np.arange(5)[::-1]).hash
    assert ids_hash(np.arange(5)) != ids_hash(np.arange(6))


def test_names_are_what_papers_write() -> None:
    def pgd(**changes) -> str:
        values = {"eps": 8.0, "num_steps": 20, "step_size": 2.0, **changes}
        return build(evaluation_entry(kind="pgd", attack=AttackConfig(**values))).name

    assert pgd() == "PGD-20 linf 8/255"
    assert pgd(restarts=5, loss="margin") == "PGD-20x5 margin linf 8/255"
    assert pgd(norm="l2", eps=128.0, step_size=15.0) == "PGD-20 l2 128/255"
    assert pgd(target="random_other", eps=16.0, num_steps=100) == "PGD-100 targeted linf 16/255"
    auto = AttackConfig(eps=8.0, num_steps=1, step_size=1.0)
    assert build(evaluation_entry(kind="autoattack", attack=auto)).name == "AutoAttack linf 8/255"
    assert build(evaluation_entry(kind="autoattack", version="fast", attack=auto)).name == "AutoAttack-fast linf 8/255"
    assert build(evaluation_entry(kind="autoattack", attack=auto), num_queries=9).name.endswith("(reduced budget)")
    assert build(evaluation_entry(kind="clean")).name == "clean"
    assert build(evaluation_entry(kind="clean", name="mine")).name == "mine"


def test_attack_is_inherited_from_training_and_its_absence_is_an_error() -> None:
    config = evaluation_entry(kind="autoattack")
    assert build(config, training_attack=AttackConfig(eps=4.0, num_steps=2, step_size=2.0)).eps == 4
    with pytest.raises(ConfigError, match="needs attack"):
        build(config)


def test_step_rule_is_resolved_in_the_protocol() -> None:
    attack = AttackConfig(eps=16.0, num_steps=10, step_size=1.0, step_rule="at_least_eps_over_steps")
    assert build(evaluation_entry(kind="pgd", attack=attack)).step_size == pytest.approx(1.6)


def test_autoattack_library_version_is_part_of_its_protocol_alone() -> None:
    attack = AttackConfig(eps=8.0, num_steps=1, step_size=1.0)
    assert build(evaluation_entry(kind="autoattack", attack=attack)).libraries[0][0] == "pyautoattack"
    assert "pyautoattack" not in build(evaluation_entry(kind="pgd", attack=attack)).canonical()


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


def test_folder_of_an_evaluation_is_readable_and_has_the_short_hash() -> None:
    assert BASE["pgd"].folder_name == f"pgd-20-linf-8-255-{BASE['pgd'].short_hash}"


def test_what_a_kind_says_of_itself_is_the_classes_own() -> None:
    """Plans, reports and tables ask it, where nothing is measured."""
    pgd, auto = KINDS["pgd"], KINDS["autoattack"]
    attack = AttackConfig(eps=8.0, num_steps=20, step_size=2.0)
    aimed = AttackConfig(eps=8.0, num_steps=20, step_size=2.0, target="random_other")
    plain, targeted = (evaluation_entry(kind="pgd", attack=a) for a in (attack, aimed))
    assert pgd.short_name(plain) == "pgd20"
    assert [pgd.is_targeted(entry) for entry in (plain, targeted)] == [False, True]
    assert [pgd.paper_names({"num_steps": 20, "restarts": r}) for r in (0, 1, 5)] == [{"pgd20"}, {"pgd20"}, {"pgd20x5"}]
    name = "AutoAttack linf 8/255"
    assert auto.paper_names({"version": "standard", "name": name}) == {"aa", "autoattack"}
    assert auto.paper_names({"version": "standard", "name": f"{name} (reduced budget)"}) == set()
    assert auto.paper_names({"version": "fast", "name": name}) == set()
    assert auto.forward_units(evaluation_entry(kind="autoattack", attack=attack)) is None


@pytest.mark.parametrize("counts", [(0,), (-1, 4), (4, 2), (2, 2), (8,), (4, 9)])
def test_step_counts_off_the_trajectory_are_refused_with_the_range(counts: tuple[int, ...]) -> None:
    attack = AttackConfig(eps=8.0, num_steps=8, step_size=2.0)
    with pytest.raises(ValueError, match=r"between 1 and num_steps - 1 = 7, got \["):
        evaluation_entry(kind="pgd", attack=attack, checkpoints=counts)
