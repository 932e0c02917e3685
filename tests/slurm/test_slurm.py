"""The project's own sbatch files, unmodified, under a real SLURM of two nodes: whatever happens, the end is the same.

Without SLURM (Debian: ``apt-get install slurm-wlm munge``) these tests are skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from distributed_at.observe.events import read_events
from tests.slurm.cluster import MISSING, ROOT, Cluster, steps_done, wait_steps
from tests.training_kit import TINY, state_digest, training_rows, with_words

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed here: no {', '.join(MISSING)}"),
]
STEPS = 150
RECIPE = [
    "digits/adversarial.yaml",
    *with_words(
        TINY,
        "train.epochs=50",  # three steps each
        "checkpoint.every_steps=20",
        "parallel.timeout_seconds=60",
    ),
]
TWO = ("--nodes=2", "--ntasks-per-node=1", "--time=30")


@pytest.fixture(scope="module")
def cluster():
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    found = Cluster(root)
    try:
        yield found.start()
    finally:
        found.stop()
        shutil.rmtree(root, ignore_errors=True)


def train_alone(folder: Path, words: list[str]) -> Path:
    """Train on two workers without SLURM and without any event."""
    command = [sys.executable, "-m", "distributed_at", "train", *words, "--workers", "2", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--run-folder", str(folder)], cwd=ROOT, env=environment, check=True, timeout=560)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return train_alone(tmp_path_factory.mktemp("undisturbed") / "run", RECIPE)


def start(cluster: Cluster, folder: Path, *options: str, recipe: Sequence[str] = RECIPE, **variables: str) -> str:
    words = [f"--job-name={folder.name}", *(options or TWO), "slurm/train.sbatch", *recipe]
    return cluster.submit(*words, RUNS=str(folder.parent), PYTHON=sys.executable, **variables)


def assert_as_undisturbed(folder: Path, undisturbed: Path, *, steps: int = STEPS) -> None:
    assert steps_done(folder) == steps
    assert training_rows(folder) == training_rows(undisturbed)
    assert state_digest(folder) == state_digest(undisturbed)


def restarts(folder: Path) -> list[int]:
    """Steps at which the run was taken up again."""
    return [row["step"] for row in read_events(folder, raw=True) if row["event"] == "restart"]


def test_signalled_run_requeues_itself_and_ends_as_an_undisturbed_one(cluster, undisturbed, tmp_path):
    folder = tmp_path / "signalled"
    job = start(cluster, folder)
    wait_steps(folder, 30)
    cluster.command("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1 does before the time limit
    cluster.wait_restarts(job, 1)
    cluster.ends(job)
    assert_as_undisturbed(folder, undisturbed)
    text = cluster.output(job)
    assert "SIGUSR1: time is nearly up" in text
    assert re.search(r"restart 0\] step ended with exit code 85\n.*requeued at step (\d+)", text)
    saved = restarts(folder)
    assert len(saved) == 1
    assert saved[0] % 20, "a checkpoint of that very step, not the last periodic one"
    # the same job again leaves at once, and so does the rest of a chain
    again = start(cluster, folder)
    cluster.wait_state(again, "COMPLETED")
    assert "nothing to do" in cluster.output(again)


@pytest.mark.slow
def test_signal_to_one_rank_stops_all_and_requeues(cluster, undisturbed, tmp_path):
    folder = tmp_path / "one-rank"
    job = start(cluster, folder)
    wait_steps(folder, 25)
    _signal_rank(folder, 1, signal.SIGUSR1)
    cluster.wait_restarts(job, 1)
    cluster.ends(job)
    assert_as_undisturbed(folder, undisturbed)


@pytest.mark.slow
def test_controller_that_is_away_while_the_job_saves_itself_is_asked_again(cluster, undisturbed, tmp_path):
    folder = tmp_path / "controller"
    job = start(cluster, folder)
    wait_steps(folder, 25)
    cluster.command("scancel", "--signal=USR1", "--batch", job)
    cluster.stop_controller()
    time.sleep(30)
    assert "step ended with exit code 85" in cluster.output(job), "it had saved itself meanwhile"
    cluster.start_controller()
    cluster.wait_restarts(job, 1)
    cluster.ends(job)
    assert_as_undisturbed(folder, undisturbed)
    assert "was cancelled" not in cluster.output(job)


@pytest.mark.slow
def test_node_without_scontrol_says_so_and_the_same_command_goes_on(cluster, undisturbed, tmp_path):
    folder = tmp_path / "without"
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name != "scontrol":
            (programs / program.name).symlink_to(program)
    job = start(cluster, folder, PATH=str(programs))
    wait_steps(folder, 25)
    cluster.command("scancel", "--signal=USR1", "--batch", job)
    cluster.ends(job, "FAILED")
    text = cluster.output(job)
    assert "there is no scontrol on this node: this job cannot requeue itself" in text
    assert "slurm/chain.sh" in text
    assert "not requeued: the scheduler could not be asked by scontrol whether this job still runs" in text
    assert "was cancelled" not in text
    cluster.ends(start(cluster, folder))
    assert_as_undisturbed(folder, undisturbed)


@pytest.mark.slow
def test_requeue_by_the_operator_happens_once(cluster, undisturbed, tmp_path):
    folder = tmp_path / "operator"
    job = start(cluster, folder)
    wait_steps(folder, 25)
    cluster.command("scontrol", "requeue", job)
    cluster.wait_state(job, "PENDING")
    cluster.ends(job)
    assert cluster.field(job, "Restarts") == "1"
    assert "not requeued: the job was cancelled, or the scheduler requeues it" in cluster.output(job)
    assert_as_undisturbed(folder, undisturbed)


@pytest.mark.slow
def test_preempted_job_saves_and_goes_on(cluster, undisturbed, tmp_path):
    folder = tmp_path / "preempted"
    job = start(cluster, folder, *TWO, "--partition=low")
    wait_steps(folder, 25)
    other = cluster.submit(
        "--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--wrap", "sleep 5"
    )
    cluster.wait_state(other, "COMPLETED")
    cluster.ends(job)
    assert_as_undisturbed(folder, undisturbed)
    assert restarts(folder)[0] >= 20


@pytest.mark.slow
def test_dead_node_loses_at_most_the_steps_since_the_last_checkpoint(cluster, undisturbed, tmp_path):
    folder = tmp_path / "node"
    job = start(cluster, folder)
    wait_steps(folder, 45)
    cluster.kill_node("l2")
    try:
        cluster.wait_state(job, "PENDING", seconds=120)
    finally:
        cluster.start_node("l2")
    cluster.ends(job)
    assert_as_undisturbed(folder, undisturbed)
    assert restarts(folder)[0] >= 40


@pytest.mark.slow
def test_time_limit_is_met_with_a_checkpoint_and_a_requeue(cluster, tmp_path):
    recipe = with_words(RECIPE, "train.epochs=600", "log.every_steps=7")  # longer than a minute
    whole, folder = train_alone(tmp_path / "whole", recipe), tmp_path / "limit"
    # one minute is the shortest limit, and SLURM may send the signal at any second of it
    options = ("--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=B:USR1@20")
    job = start(cluster, folder, *options, recipe=recipe)
    cluster.wait_restarts(job, 1)
    # one limit is enough: on a busy machine a minute is hardly longer than the start
    cluster.command("scontrol", "update", f"jobid={job}", "timelimit=30")
    cluster.ends(job, seconds=900)
    assert int(cluster.field(job, "Restarts")) >= 1
    assert "SIGUSR1: time is nearly up" in cluster.output(job)
    assert_as_undisturbed(folder, whole, steps=1800)


@pytest.mark.slow
def test_twenty_requeues_in_a_row_need_no_hand(cluster, tmp_path):
    recipe = with_words(RECIPE, "train.epochs=300")
    whole, folder = train_alone(tmp_path / "whole", recipe), tmp_path / "twenty"
    job = start(cluster, folder, "--nodes=2", "--ntasks-per-node=1", "--time=60", recipe=recipe)
    for number in range(1, 21):
        wait_steps(folder, steps_done(folder) + 10)
        cluster.command("scancel", "--signal=USR1", "--batch", job)
        cluster.wait_restarts(job, number)
        cluster.wait_state(job, "RUNNING")
    cluster.ends(job, seconds=400)
    assert len(restarts(folder)) == 20
    assert_as_undisturbed(folder, whole, steps=900)


@pytest.mark.slow
def test_cancelled_job_saves_and_stays_cancelled(cluster, tmp_path):
    folder = tmp_path / "cancelled"
    job = start(cluster, folder)
    wait_steps(folder, 25)
    cluster.command("scancel", job)
    cluster.ends(job, "CANCELLED", seconds=60)
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED"
    assert "not requeued: the job was cancelled" in cluster.output(job)


@pytest.mark.slow
def test_crashes_without_progress_end_the_job_and_crashes_with_progress_do_not(cluster, undisturbed, tmp_path):
    folder = tmp_path / "crash"
    job = start(cluster, folder)
    for number, step in enumerate((25, 45), start=1):
        wait_steps(folder, step)
        _signal_rank(folder, 1, signal.SIGKILL)
        cluster.wait_restarts(job, number)
        cluster.wait_state(job, "RUNNING")
    cluster.ends(job)
    assert "nodes that failed twice cannot be left out, too few are left: l2" in cluster.output(job)
    assert_as_undisturbed(folder, undisturbed)
    hopeless = tmp_path / "hopeless"
    hopeless.mkdir()
    job = start(cluster, hopeless, *TWO, PYTHONPATH=str(_broken_start(tmp_path)))
    cluster.ends(job, "FAILED", seconds=280)
    assert "3 starts without a newer checkpoint" in cluster.output(job)
    assert cluster.field(job, "Restarts") == "3"


@pytest.mark.slow
def test_wrong_recipe_is_told_at_once_and_not_requeued(cluster, tmp_path):
    job = start(cluster, tmp_path / "typo", recipe=[RECIPE[0], "optimizer.lrr=1"])
    cluster.ends(job, "FAILED", seconds=60)
    assert "optimizer.lr" in cluster.output(job)
    assert cluster.field(job, "Restarts") == "0"


@pytest.mark.slow
def test_smaller_allocation_goes_on_with_the_largest_world_that_divides(cluster, tmp_path):
    folder = tmp_path / "elastic"
    job = start(cluster, folder)
    wait_steps(folder, 25)
    cluster.command("scancel", job)
    cluster.wait_state(job, "CANCELLED", seconds=60)
    job = start(cluster, folder, "--nodes=1", "--ntasks-per-node=1", "--time=30")
    cluster.ends(job)
    assert steps_done(folder) == STEPS


@pytest.mark.slow
def test_sweep_evaluation_chain_and_preflight(cluster, tmp_path):
    short = with_words(RECIPE, "train.epochs=2", "schedule.warmup_epochs=0", "evaluation.final=[{kind: clean}]")
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(shlex.join([*short, f"seed={seed}"]) + "\n" for seed in (1, 2)))
    runs = {"RUNS": str(tmp_path), "PYTHON": sys.executable}
    array = cluster.submit("--job-name=sweep", "--array=1-2%1", "--time=30", "slurm/sweep.sbatch", str(lines), **runs)
    for task in (1, 2):
        cluster.ends(f"{array}_{task}")
        assert steps_done(tmp_path / "sweep" / f"{task:03d}") == 6
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", "--time=30", "slurm/eval.sbatch", str(tmp_path / "sweep/001"), **runs
    )
    cluster.ends(job)
    assert "evaluating" in cluster.output(job)
    job = cluster.submit("--job-name=fit", *TWO, "slurm/train.sbatch", *short, **{**runs, "PREFLIGHT": "yes"})
    cluster.ends(job)
    assert "all-reduce" in cluster.output(job)
    assert steps_done(tmp_path / "fit") == 6


def _signal_rank(folder: Path, rank: int, number: int) -> None:
    """Signal the process of one rank of the run in ``folder``."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environ = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = b"distributed_at" in words and str(folder).encode() in words
        if mine and b"srun" not in words[0] and f"SLURM_PROCID={rank}".encode() in environ:
            os.kill(int(path.name), number)
            return
    raise AssertionError(f"no process of rank {rank} found")


def _broken_start(folder: Path) -> Path:
    """A folder for PYTHONPATH that makes every worker die before its first step."""
    path = folder / "broken"
    path.mkdir()
    (path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('SLURM_STEP_ID', '').isdigit():\n    os._exit(1)\n"
    )
    return path
