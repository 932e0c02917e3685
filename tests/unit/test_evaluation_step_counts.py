"""PGD at several numbers of steps in one pass gives, sample by sample, what each number of steps gives alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from distributed_at.config import AttackConfig, EvaluationEntry, evaluation_entry
from distributed_at.evaluation.kinds.pgd import Pgd
from distributed_at.evaluation.rows import COLUMNS
from tests.evaluation_kit import measure, measure_entry, source, trained

COUNTS = (1, 2, 4)


def entry(*, checkpoints=COUNTS, name="pgd8", **changes) -> EvaluationEntry:
    attack = AttackConfig(**{"eps": 40.0, "num_steps": 8, "step_size": 8.0, **changes})
    return evaluation_entry(kind="pgd", name=name, attack=attack, checkpoints=checkpoints)


@pytest.fixture(scope="module")
def model():
    return trained()


def assert_equal_rows(a, b) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("target", ["none", "random_other"])
def test_each_number_of_steps_is_bitwise_the_attack_of_that_length(model, target) -> None:
    along = measure_entry(model, source(), entry(target=target), batch_size=100)
    assert [r.protocol.num_steps for r in along] == [1, 2, 4, 8]
    for found in along:
        what = entry(target=target, num_steps=found.protocol.num_steps, checkpoints=(), name=None)
        alone = measure(model, source(), what, batch_size=100)
        assert found.protocol.hash == alone.protocol.hash
        assert_equal_rows(found.rows, alone.rows)
        assert found.attack_success_rate == alone.attack_success_rate
    assert along[0].correct > along[-1].correct, "the steps change nothing, so the comparison shows nothing"


def test_one_pass_reads_every_image_once(model) -> None:
    data = source()
    measure_entry(model, data, entry())
    assert sorted(data.read_ids) == sorted(data.sample_ids.tolist())


def test_interrupted_pass_is_completed_with_the_same_rows(model, tmp_path) -> None:
    whole = measure_entry(model, source(), entry(), folder=tmp_path / "whole", batch_size=40)
    torn = tmp_path / "torn"
    shutil.copytree(tmp_path / "whole", torn)
    for folder in torn.iterdir():
        (folder / "summary.json").unlink()
        for path in folder.glob("rows-*.jsonl"):
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines[: 1 + (60 if "pgd-2-" in folder.name else 80)]))
    again = measure_entry(model, source(), entry(), folder=torn, batch_size=40)
    for first, second in zip(whole, again, strict=True):
        assert second.complete
        assert_equal_rows(first.rows, second.rows)
    summaries = [json.loads(p.read_text()) for p in torn.glob("*/summary.json")]
    assert sorted(s["protocol"]["num_steps"] for s in summaries) == [1, 2, 4, 8]


def test_finished_pass_is_read_and_not_repeated(model, tmp_path) -> None:
    measure_entry(model, source(), entry(), folder=tmp_path)
    data = source()
    assert [r.computed for r in measure_entry(model, data, entry(), folder=tmp_path)] == [0, 0, 0, 0]
    assert data.read_ids == []


def test_names_carry_the_number_of_steps() -> None:
    assert [one.name for one in Pgd.single_entries(entry())] == ["pgd1", "pgd2", "pgd4", "pgd8"]
    assert [one.name for one in Pgd.single_entries(entry(name="targeted"))] == [
        "targeted-1",
        "targeted-2",
        "targeted-4",
        "targeted",
    ]
    assert [one.name for one in Pgd.single_entries(entry(name=None))] == [None] * 4


def test_steps_of_another_size_are_refused_with_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"PGD-10 steps by 1\.6/255 .* PGD-2000 by 1/255"):
        entry(eps=16, step_size=1, step_rule="at_least_eps_over_steps", num_steps=2000, checkpoints=(10, 20), name=None)
    entry(eps=16, step_size=1, step_rule="at_least_eps_over_steps", num_steps=2000, checkpoints=(20, 500), name=None)


@pytest.mark.parametrize("checkpoints", [(2, 1), (0, 2), (2, 8), (2, 2)])
def test_checkpoints_rise_and_end_before_the_last_step(checkpoints) -> None:
    with pytest.raises(ValueError, match="checkpoints must rise"):
        entry(checkpoints=checkpoints)


def test_restarts_and_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="restarts must be 1"):
        entry(restarts=2)
    with pytest.raises(ValueError, match="checkpoints"):
        evaluation_entry(kind="clean", checkpoints=(1,))
