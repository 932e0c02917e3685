"""Ranks from launchers' environments, and local workers that leave nothing behind."""

import os
import signal
import subprocess
import sys

import pytest

from distributed_at.cores import allowed_cores
from distributed_at.engine.processes.launch import (
    _wait,
    available_workers,
    check_workers,
    detect_rank,
    export_rendezvous,
    run_workers,
    worker_environment,
)
from distributed_at.errors import EXIT_HANG, ConfigError
from tests.patience import end_of, wait_until

SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.4",
}  # fmt: skip


def test_a_command_typed_by_hand_has_no_rank():
    assert detect_rank({}) is None


def test_a_batch_script_itself_is_no_rank():
    assert detect_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}) is None


def test_srun_gives_the_rank_and_the_rendezvous_of_its_launching_node():
    env = dict(SLURM)
    rank = detect_rank(env)
    assert (rank.rank, rank.local_rank, rank.world_size, rank.launcher) == (5, 1, 8, "srun")
    export_rendezvous(rank, env)
    assert env["MASTER_ADDR"] == "10.0.0.4"
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", "1")


def test_a_requeued_job_meets_at_another_port():
    ports = set()
    for restart in range(4):
        env = {**SLURM, "SLURM_RESTART_COUNT": str(restart)}
        export_rendezvous(detect_rank(env), env)
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 4


def test_torchrun_inside_an_allocation_wins_over_slurm():
    rank = detect_rank({**SLURM, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    assert (rank.rank, rank.world_size, rank.launcher) == (2, 4, "torchrun")


def test_local_rank_is_not_the_rank():
    rank = detect_rank({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"})
    assert (rank.rank, rank.local_rank) == (9, 1)


def test_auto_uses_what_slurm_gave():
    assert available_workers(SLURM) == 8


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_workers_must_be_a_positive_number(text):
    with pytest.raises(ConfigError, match="--workers"):
        check_workers(text)


def test_workers_share_the_cores_unless_told_otherwise():
    assert worker_environment(1, 2, 29500, {"PATH": "/bin"})["OMP_NUM_THREADS"] == str(max(1, allowed_cores({}) // 2))
    assert worker_environment(1, 2, 29500, {"PATH": "/bin", "OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_the_exit_code_of_a_failing_rank_is_the_run_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_workers(["eval", "nothing-here"], 2, tmp_path / "log") == 2
    assert "no run folder" in (tmp_path / "log" / "rank0001.txt").read_text()


class Ended:
    """A worker that has left with a code."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([0, 2, 0], 2),
        ([EXIT_HANG, 4, EXIT_HANG], 4),  # the others lost the rank that says what was wrong
        ([EXIT_HANG, -9], EXIT_HANG),  # killed: the one that noticed says more
        ([-9, -15], 128 + 9),
        ([85, 85], 85),
        ([-9, 85], 128 + 9),  # killed while the run was set up; the other left because the launcher said so
        ([7, 85], 7),
    ],
)
def test_the_code_of_several_failing_ranks_is_the_one_that_explains_most(codes, expected):
    assert _wait([Ended(code) for code in codes]) == expected


def test_an_ended_launcher_leaves_no_worker(tmp_path):
    program = (
        "import sys; from distributed_at.engine.processes import launch\n"
        "real = launch.subprocess.Popen\n"
        "def sleeping(command, **kw): return real([sys.executable, '-c', 'import time; time.sleep(3600)'], **kw)\n"
        "launch.subprocess.Popen = sleeping\n"
        "print('ready', flush=True); sys.exit(launch.run_workers(['x'], 2, None))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert launcher.stdout.readline().strip() == "ready"
    children: list[str] = []

    def two() -> bool:
        children[:] = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        return len(children) == 2

    wait_until(two, "the launcher has started two workers", processes=[launcher.pid], pause=0.05)
    launcher.send_signal(signal.SIGTERM)
    code = end_of(launcher)
    assert code == 128 + signal.SIGTERM
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
