"""What goes wrong on clusters, done on purpose through the real worker: the run ends as the undisturbed one, or says why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from distributed_at.errors import EXIT_HANG, EXIT_NO_CHECKPOINT, EXIT_OK, EXIT_REQUEUE, CheckpointError, DivergedError
from distributed_at.objectives.pgd_at import PgdAt
from distributed_at.observe.events import read_events
from tests.faults.harness import Start, plan
from tests.faults.kill_many import kill_many
from tests.training_kit import RECIPE, TINY, state_digest, train, training_rows

SAVING = ["checkpoint.every_steps=2", "checkpoint.asynchronous=false"]  # of 9 steps


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(folder, SAVING) == EXIT_OK
    return folder


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    assert training_rows(folder) == training_rows(undisturbed)
    assert state_digest(folder) == state_digest(undisturbed)


def events(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_events(folder, raw=True) if row["event"] == kind]


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step_*"))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _swap(path: Path) -> None:
    """Put the older checkpoint's file of this name in its place: whole, of the right size, of another step."""
    older = min((path.parents[1]).glob("step_*")) / path.name
    shutil.copyfile(older, path)


DAMAGES = {"truncated": _truncate, "flipped": _flip, "missing": Path.unlink, "swapped": _swap}
FILES = ("__0_0.distcp", ".metadata", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(damage, name, undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, SAVING, stop_at=5) == EXIT_REQUEUE
    path = newest(folder) / name
    before = path.read_bytes()
    DAMAGES[damage](path)
    if path.exists() and path.read_bytes() == before:
        pytest.skip("both checkpoints hold the same file")
    assert train(folder, SAVING) == EXIT_OK
    assert events(folder, "restart")[0]["step"] == 4
    told = [row["message"] for row in events(folder, "warning") if row["code"] == "checkpoint_bad"]
    assert len(told) == 1
    assert "step_00000005" in told[0]
    assert list((folder / "checkpoints").glob(".bad-*"))
    assert_as_undisturbed(folder, undisturbed)


def test_when_every_checkpoint_is_damaged_the_command_refuses_to_begin_anew(tmp_path):
    folder = tmp_path / "run"
    train(folder, SAVING, stop_at=5)
    for path in (folder / "checkpoints").glob("step_*"):
        _flip(path / "__0_0.distcp")
    command = [sys.executable, "-m", "distributed_at", "train", str(RECIPE), *TINY, *SAVING, "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run-folder", str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == EXIT_NO_CHECKPOINT
    assert "step_00000005" in done.stderr
    assert "--fresh" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_full_disk_is_told_training_goes_on_and_the_end_is_not_passed_over(undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        folder, filler = disk / "run", disk / "filler"
        assert train(folder, SAVING, stop_at=3) == EXIT_REQUEUE
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(b"x" * (free - 24 * 1024))  # room for rows, not for a checkpoint
        with pytest.raises(CheckpointError, match="last checkpoint could not be written"):
            train(folder, SAVING)
        assert "checkpoint_failed" in {row.get("code") for row in events(folder, "warning")}
        assert newest(folder).name == "step_00000003"
        assert not list((folder / "checkpoints").glob(".tmp-*"))
        filler.unlink()
        assert train(folder, SAVING) == EXIT_OK
        assert_as_undisturbed(folder, undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_clock_that_jumps_changes_nothing(undisturbed, tmp_path):
    folder = tmp_path / "run"
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (3600 if calls[0] % 3 else -3600)

    with mock.patch("time.time", jumping):
        assert train(folder, SAVING, stop_at=5) == EXIT_REQUEUE
        assert train(folder, SAVING) == EXIT_OK
    assert_as_undisturbed(folder, undisturbed)


def test_wandb_out_of_reach_changes_nothing(undisturbed, tmp_path):
    folder = tmp_path / "run"
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    with mock.patch.dict(os.environ, away):
        assert train(folder, [*SAVING, "log.wandb=online"]) == EXIT_OK
    assert_as_undisturbed(folder, undisturbed)


def nan_at(*steps: int):
    """Make the loss of these optimiser steps NaN, every time that they are computed."""
    loss = PgdAt.loss

    def broken(self, forward, batch, adv):
        terms = loss(self, forward, batch, adv)
        if batch.step in steps:
            object.__setattr__(terms, "loss", terms.loss * float("nan"))
        return terms

    return mock.patch.object(PgdAt, "loss", broken)


ROLLBACK = [*SAVING, "train.on_nonfinite=rollback"]


def test_rollback_goes_back_passes_over_the_step_and_a_resume_does_the_same(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with nan_at(5):
        assert train(whole, ROLLBACK) == EXIT_OK
        assert train(parts, ROLLBACK, stop_at=7) == EXIT_REQUEUE
    found = events(whole, "nonfinite")
    assert [row["at_step"] for row in found] == [5]
    assert len(found[0]["sample_ids"]) == 24
    assert events(whole, "rollback")[0]["step"] == 4
    assert train(parts, ROLLBACK) == EXIT_OK  # sound again, but the step stays passed over
    assert state_digest(parts) == state_digest(whole)
    clean = tmp_path / "clean"
    train(clean, ROLLBACK)
    assert state_digest(clean) != state_digest(whole)


def test_rollback_ends_when_going_back_does_not_help(tmp_path):
    with nan_at(*range(4, 9)), pytest.raises(DivergedError, match="not finite at step 6"):
        train(tmp_path / "run", [*ROLLBACK, "train.max_nonfinite_steps=3"])
    assert newest(tmp_path / "run").name == "step_00000006"  # two steps passed over: the weights of step 4


def test_stop_skips_bad_steps_in_place_and_ends_after_too_many(tmp_path):
    with nan_at(5):
        assert train(tmp_path / "one", [*SAVING]) == EXIT_OK
    with nan_at(5, 6), pytest.raises(DivergedError, match="2 steps in a row"):
        train(tmp_path / "two", [*SAVING, "train.max_nonfinite_steps=2"])


def test_jump_of_the_loss_is_a_bad_step_where_the_recipe_says_so(tmp_path):
    words = [*ROLLBACK, "train.spike_factor=50", "train.epochs=5"]
    loss = PgdAt.loss

    def jumping(self, forward, batch, adv):
        terms = loss(self, forward, batch, adv)
        if batch.step == 11:
            object.__setattr__(terms, "loss", terms.loss * 1000)
        return terms

    with mock.patch.object(PgdAt, "loss", jumping):
        assert train(tmp_path / "run", words) == EXIT_OK
    assert [row["what"] for row in events(tmp_path / "run", "nonfinite")] == ["jump of the loss"]


@pytest.fixture
def two_ranks_undisturbed(tmp_path) -> Path:
    folder = tmp_path / "two"
    start = Start(folder, 2, SAVING)
    assert set(start.wait().values()) == {0}, start.text()
    return folder


def test_stopped_rank_is_noticed_with_stacks_and_the_run_goes_on_at_the_next_start(two_ranks_undisturbed, tmp_path):
    folder = tmp_path / "hung"
    words = [*SAVING, "parallel.timeout_seconds=10"]
    start = Start(folder, 2, words)
    while not (folder / "checkpoints" / "step_00000002").exists() and start.alive():
        time.sleep(0.002)
    start.signal(1, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while 0 not in start.codes and time.monotonic() < deadline:
        start.alive()
        time.sleep(0.05)
    start.signal(None)
    start.wait()
    assert start.codes[0] == EXIT_HANG, start.text()
    written = [p.name for p in (folder / "log").glob("*-rank0.txt")]
    assert set(written) & {"stacks-rank0.txt", "failure-rank0.txt"}
    again = Start(folder, 2, words)
    assert set(again.wait().values()) == {0}, again.text()
    assert_as_undisturbed(folder, two_ranks_undisturbed)


def test_signal_to_one_rank_stops_all_with_a_checkpoint(two_ranks_undisturbed, tmp_path):
    folder = tmp_path / "impatient"
    start = Start(folder, 2, SAVING)
    while not (folder / "checkpoints" / "step_00000002").exists() and start.alive():
        time.sleep(0.002)
    start.signal(0, signal.SIGUSR1)  # to one rank: all stop at one step
    assert set(start.wait().values()) <= {EXIT_REQUEUE, EXIT_OK}, start.text()
    again = Start(folder, 2, SAVING)
    assert set(again.wait().values()) == {0}, again.text()
    assert_as_undisturbed(folder, two_ranks_undisturbed)


def test_killed_ranks_at_random_moments_end_in_the_uninterrupted_state(tmp_path):
    count = kill_many(4, seed=1, root=tmp_path)
    assert count.kills == 4
    assert count.equal == count.runs
    assert not count.failures
    assert count.most_repeated <= 4  # the interval, and the step that was being logged


def test_plan_is_a_function_of_its_seed_with_weight_on_checkpoints():
    assert plan(3, 100, 2) == plan(3, 100, 2)
    assert plan(3, 100, 2) != plan(4, 100, 2)
    assert sum(kill.moment == "in_checkpoint" for kill in plan(3, 1000, 2)) > 400
