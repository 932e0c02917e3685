"""Rows that several ranks made are those of code written by hand, and what is not whole is not reported as if it were."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distributed_at.config import AttackConfig, EvaluationEntry, evaluation_entry
from distributed_at.evaluation import EvaluationResult, Ledger
from distributed_at.observe.record import load_run
from tests.distributed.launch import run_ranks
from tests.strangers import autoattack, pgd
from tests.strangers.asking import arrays, ask, ask_autoattack, subject
from tests.strangers.checking import assert_same_rows

ATTACK: dict[str, Any] = {"eps": 8.0, "num_steps": 3, "step_size": 4.0, "restarts": 2}
TARGETED = {**ATTACK, "target": "random_other"}
AUTOATTACK: dict[str, Any] = {"version": "fast", "eps": 5.0, "seed": 9, "num_steps": 5, "chunk_size": 12}


def entry(**attack: Any) -> EvaluationEntry:
    return evaluation_entry(kind="pgd", attack=AttackConfig(**attack))


def on_one_of_two() -> dict[str, EvaluationResult]:
    """Evaluate three protocols on this rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    network, source = subject("untrained")
    return {
        "pgd": ask(network, source, entry(**ATTACK), seed=9, batch_size=5),
        "targeted": ask(network, source, entry(**TARGETED), seed=9, batch_size=3),
        "autoattack": ask_autoattack(network, source, **AUTOATTACK),
    }


def test_rows_of_two_ranks_are_those_of_code_written_by_hand() -> None:
    ranks = run_ranks(on_one_of_two, 2)
    network, source = subject("untrained")
    x, y, ids = arrays(source)
    broken_by: list[str] = []
    for start in range(0, len(x), 12):
        part = slice(start, start + 12)
        plain = autoattack.run(
            network, x[part], y[part], eps=5 / 255, seed=autoattack.seed_of(9, ids[part]), version="custom",
            attacks=["apgd-ce", "apgd-t"], restarts=1, num_steps=5,
        )  # fmt: skip
        broken_by += plain.broken_by.tolist()
    for rank in ranks:
        for name, values in (("pgd", ATTACK), ("targeted", TARGETED)):
            assert_same_rows(rank[name], pgd.attack(network, pgd.Plan(**values, seed=9), x, y, ids), source)
            assert rank[name].complete
        rows = rank["autoattack"].rows
        np.testing.assert_array_equal(rows.sample_id, ids)
        np.testing.assert_array_equal(rows.attack, broken_by)
        np.testing.assert_array_equal(rows.correct_adv, np.array(broken_by) == "")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group, though another test may have left one."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


class Stopped(Exception):
    pass


def reported(folder: Path) -> list[tuple[int | None, int | None]]:
    """What a report of the run folder would count."""
    (folder / "recipe.yaml").write_text("name: run\n")
    return [(m.correct, m.total) for m in load_run(folder).measurements]


@pytest.mark.usefixtures("alone")
def test_a_part_of_the_samples_is_never_reported_as_the_whole(tmp_path: Path) -> None:
    network, source = subject("untrained")
    x, y, ids = arrays(source)
    expected = pgd.attack(network, pgd.Plan(**ATTACK, seed=9), x, y, ids)
    right = np.array([row.correct_adv for row in expected])

    def stop(done: int, total: int) -> None:
        assert total == 28
        if done >= 10:
            raise Stopped

    arguments: dict[str, Any] = {"seed": 9, "batch_size": 5, "folder": tmp_path / "evaluations"}
    with pytest.raises(Stopped):
        ask(network, source, entry(**ATTACK), on_progress=stop, **arguments)
    assert reported(tmp_path) == []
    # one of two jobs that share nothing but the folder: ten samples are there, and its pieces are 0, 2 and 4
    first = ask(network, source, entry(**ATTACK), rank=0, world_size=2, **arguments)
    there = [*range(15), *range(20, 25)]
    assert not first.complete
    assert (first.computed, first.total, first.expected) == (10, 20, 28)
    assert (first.correct, first.accuracy) == (right[there].sum(), right[there].mean())
    assert reported(tmp_path) == []
    # rows of samples that the protocol does not cover are no part of it, and those written twice count once
    ledger = Ledger.open(tmp_path / "evaluations" / first.protocol.folder_name, first.protocol)
    foreign = first.rows.take(np.arange(3))
    object.__setattr__(foreign, "sample_id", foreign.sample_id + 1)
    for rows in (foreign, first.rows.take(np.arange(4))):
        ledger.append(rows)
    second = ask(network, source, entry(**ATTACK), rank=1, world_size=2, **arguments)
    assert second.complete
    assert_same_rows(second, expected, source)
    assert second.computed == 8
    assert reported(tmp_path) == [(right.sum(), 28)]
    (summary,) = tmp_path.glob("evaluations/*/summary.json")
    assert json.loads(summary.read_text())["accuracy"] == right.mean()
