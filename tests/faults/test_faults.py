"""What goes wrong on clusters, done on purpose through the real worker: the run ends as the undisturbed one, or says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.faults.faults import FAULTS, SILENT, Fault, Undisturbed
from tests.faults.harness import plan
from tests.faults.kill_many import MOST_REPEATED, kill_many
from tests.faults.table import can_mount, do, names_in_docs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] if fault.slow else []) for fault in FAULTS],
)
def test_fault(fault: Fault, undisturbed: Undisturbed, tmp_path: Path):
    if fault.root and not can_mount():
        pytest.skip("no file system can be mounted here")
    seen = do(fault, tmp_path / "fault", undisturbed)
    assert seen.message
    assert seen.message != SILENT or seen.exit_code == "0" or "-9" in seen.exit_code or "143" in seen.exit_code


def test_documentation_lists_every_fault_once():
    assert names_in_docs() == [fault.name for fault in FAULTS]
    assert len(set(names_in_docs())) == len(FAULTS) >= 30


def test_killed_ranks_at_random_moments_end_in_the_uninterrupted_state(tmp_path):
    count = kill_many(4, seed=1, root=tmp_path)
    assert count.kills == 4
    assert count.equal == count.runs
    assert not count.failures
    assert count.most_repeated <= MOST_REPEATED


def test_plan_is_a_function_of_its_seed_with_weight_on_checkpoints():
    assert plan(3, 100, 2) == plan(3, 100, 2)
    assert plan(3, 100, 2) != plan(4, 100, 2)
    assert sum(kill.moment == "in_checkpoint" for kill in plan(3, 1000, 2)) > 400
