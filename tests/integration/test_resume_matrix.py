"""A run saved in the middle of an epoch and resumed is bitwise the undisturbed run, for everything the registries name.

The matrix reads the registries and the schema, so a new objective, norm, optimiser or schedule is in it from the day it
exists. ``python -m tests.integration.test_resume_matrix`` runs all of it and prints the count.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_at.batch import Batch
from distributed_at.catalogue.norms import NORMS as NORM_REGISTRY
from distributed_at.catalogue.optimizers import OPTIMIZERS as OPTIMIZER_REGISTRY
from distributed_at.catalogue.schedules import SCHEDULES as SCHEDULE_REGISTRY
from distributed_at.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from distributed_at.objectives import OBJECTIVES, Forward, ObjectiveContext, Terms
from distributed_at.objectives.pgd_at import PgdAt
from distributed_at.recipes import load_recipe
from tests.conformance.objectives import settings_of, words_of
from tests.training_kit import RECIPE, TINY, state_digest, train, training_rows

STOP_AT = 4  # of 9 steps, 3 an epoch: the second step of the second epoch is never begun
NORMS = tuple(sorted(NORM_REGISTRY.builtin))
OPTIMIZERS, SCHEDULES = OPTIMIZER_REGISTRY.builtin, SCHEDULE_REGISTRY.builtin

# What an entry of a registry needs beside its name; most need nothing.
SCHEDULE_NEEDS = {
    "piecewise": ["schedule.milestones=[1.4,2]"],
    "exponential": ["schedule.decay_every=0.5"],
    "points": ["schedule.points=[[0,1],[3,0]]"],
}
RATES = {"adam": "0.01", "adamw": "0.01", "rmsprop": "0.001", "rmsprop_tf": "0.001"}
FEATURES = {
    "none": [],
    "ema": ["train.ema={decay: 0.9, dynamic: true, buffers: average}"],
    "freeze_bn_before_the_stop": ["train.freeze_bn_from_epoch=1"],
    "freeze_bn_after_the_stop": ["train.freeze_bn_from_epoch=2"],
    "accumulation": ["train.micro_batch_size=12"],
    "incomplete_last_batch": ["train.drop_last=false", "data.limit_train=69"],
    "zero_stage_0": ["parallel.zero_stage=0"],
    "zero_stage_2": ["parallel.zero_stage=2"],
    "eps_warmup_and_coins": ["attack.eps_warmup_epochs=2", "attack.start_clean_probability=0.3"],
    "attack_moves_statistics": ["attack.bn_mode=train"],
    "augmentation": ["data.augment={crop: pad, pad: 1, flip: true}"],
    "nesterov_no_decay_on_norms": ["optimizer.nesterov=true", "optimizer.weight_decay_rule=no_norm_bias"],
    "momentum_moves": ["schedule={name: cyclic, warmup_epochs: 0, momentum_at_peak: 0.8}"],
    "clipped": ["optimizer.clip_norm=0.1"],
    "noisy_steps": ["attack.step_noise=0.01"],
    "rows_across_the_stop": ["log.every_steps=3"],
    "two_clean_updates": ["objective.bn_clean_updates_per_step=2"],
    "early_stopping": [
        "data.validation_size=30",
        "evaluation.validation=[{kind: clean}]",
        "evaluation.every_epochs=0.34",
        "train.select=best_validation",
        "train.patience_epochs=1",
    ],
}
FEATURES["early_stop_later"] = [*FEATURES["early_stopping"], "train.patience_epochs=1.4"]
Case = tuple[str, str, str, str, str]  # objective, norm, optimiser, schedule, feature
EVERYTHING: list[Case] = [
    *((o, n, p, "cosine", "none") for o, n, p in itertools.product(OBJECTIVES, NORMS, OPTIMIZERS)),
    *((o, "bn", "sgd", "cosine", f) for o in OBJECTIVES for f in ("ema", "freeze_bn_after_the_stop", "accumulation")),
    *(("pgd_at", "bn", "sgd", "cosine", f) for f in FEATURES),
    *(("pgd_at", "bn", "sgd", s, "none") for s in SCHEDULES),
]
# One case for each entry of each registry, and each objective with each norm's own trouble, within a minute.
SHORT: list[Case] = [
    *((o, NORMS[i % len(NORMS)], OPTIMIZERS[i % len(OPTIMIZERS)], "cosine", "none") for i, o in enumerate(OBJECTIVES)),
    ("mixture", "mbn", "sgd", "cosine", "none"),
    *(
        ("pgd_at", "bn", "sgd", "cosine", f)
        for f in ("ema", "freeze_bn_after_the_stop", "rows_across_the_stop", "early_stopping", "early_stop_later")
    ),
    ("pgd_at", "bn", "sgd", "piecewise", "none"),
]


def objective_needs(name: str) -> list[str]:
    """Return what an objective needs beside its name: the first of its settings, and no attack where it sees none."""
    fields = settings_of(name)[0]
    attack = OBJECTIVES[name].needs(OBJECTIVES[name].Config(**fields)).attack
    own = [*(f"objective.{key}={value}" for key, value in fields.items()), *words_of(name)]
    return [*own, *(["attack=null"] * (attack == "none"))]


def overrides(case: Case) -> list[str]:
    objective, norm, optimizer, schedule, feature = case
    return [
        f"objective.name={objective}",
        f"model.norm={norm}",
        f"optimizer.name={optimizer}",
        f"optimizer.lr={RATES.get(optimizer, '0.1')}",
        *(["parallel.zero_stage=0"] if OPTIMIZER_REGISTRY[optimizer].whole_parameters else []),
        f"schedule.name={schedule}",
        *SCHEDULE_NEEDS.get(schedule, []),
        *FEATURES[feature],
        *objective_needs(objective),
    ]


def refused(case: Case) -> bool:
    """Whether the schema refuses the combination (plain adversarial training on a mixture norm)."""
    try:
        load_recipe(str(RECIPE), [*TINY, *overrides(case)])
    except ConfigError:
        return True
    return False


WHOLE = [case for case in dict.fromkeys(EVERYTHING) if not refused(case)]


def check(case: Case, folder: Path) -> None:
    """Train undisturbed, and stopped and resumed; every bit of state and every row must agree."""
    torch.set_num_threads(1)
    words = overrides(case)
    assert train(folder / "whole", words) == EXIT_OK
    assert train(folder / "parts", words, stop_at=STOP_AT) == EXIT_REQUEUE
    assert train(folder / "parts", words) == EXIT_OK
    assert training_rows(folder / "parts") == training_rows(folder / "whole")
    assert state_digest(folder / "parts") == state_digest(folder / "whole")


@pytest.mark.parametrize("case", SHORT, ids="-".join)
def test_resume_in_the_middle_of_an_epoch_is_bitwise_the_undisturbed_run(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in WHOLE if c not in SHORT], ids="-".join)
def test_resume_is_bitwise_for_everything_in_the_registries(case, tmp_path):
    check(case, tmp_path)


def test_matrix_names_everything_in_the_registries():
    assert len(WHOLE) > 0.8 * len(set(EVERYTHING))  # what the schema refuses is the exception
    for place, names in ((0, OBJECTIVES), (1, NORMS), (2, OPTIMIZERS), (3, SCHEDULES)):
        assert {case[place] for case in WHOLE} == set(names)


class Remembering(PgdAt):
    """Stands for objectives that keep something between steps: a running sum for each place, and a count."""

    def __init__(self, config: PgdAt.Config, context: ObjectiveContext) -> None:
        super().__init__(config, context)
        self.steps = 0
        self.sums = torch.zeros(24, 3)

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        terms = super().loss(forward, batch, adv)
        rows = self.sums[: len(batch)]
        rows += batch.images.mean(dim=(2, 3))
        self.steps += 1
        return replace(terms, loss=terms.loss * (1 + rows.mean() / self.steps))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def place_tensors(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums}


@pytest.mark.parametrize("declared", [True, False])
def test_what_an_objective_keeps_between_steps_is_resumed_where_it_is_declared(declared, tmp_path, monkeypatch):
    monkeypatch.setattr("distributed_at.engine.builder.build_objective", Remembering)
    if not declared:  # so that this test would notice a state that nobody saves
        monkeypatch.setattr(Remembering, "place_tensors", PgdAt.place_tensors)
    case = ("pgd_at", "bn", "sgd", "cosine", "none")
    if declared:
        check(case, tmp_path)
        return
    with pytest.raises(AssertionError):
        check(case, tmp_path)


def test_another_seed_or_a_lost_step_would_be_seen(tmp_path):
    case = ("pgd_at", "bn", "sgd", "cosine", "none")
    train(tmp_path / "a", overrides(case))
    train(tmp_path / "b", [*overrides(case), "seed=1"])
    train(tmp_path / "c", overrides(case), stop_at=STOP_AT)
    assert state_digest(tmp_path / "a") != state_digest(tmp_path / "b")
    assert state_digest(tmp_path / "a") != state_digest(tmp_path / "c")
    assert training_rows(tmp_path / "a") != training_rows(tmp_path / "b")


def main() -> int:
    failed = []
    for case in WHOLE:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(case, Path(folder))
            except Exception as error:
                failed.append(case)
                print("-".join(case), "FAILED:", str(error).splitlines()[0] if str(error) else type(error).__name__)
    print(f"resumed bitwise equal: {len(WHOLE) - len(failed)} / {len(WHOLE)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
