"""A rank's share of the processor cores, under every launcher and limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_at.cores import core_share, cpu_quota
from distributed_at.data.machine import decoder_threads
from distributed_at.engine.processes.launch import worker_environment

TASK = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}


def limited(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("affinity", "environ", "share"),
    [
        pytest.param(96, {}, 96, id="by hand, alone"),
        pytest.param(96, {"RANK": "0", "LOCAL_WORLD_SIZE": "8"}, 12, id="torchrun or our launcher, 8 ranks a node"),
        pytest.param(96, {"RANK": "0", "LOCAL_SIZE": "8"}, 12, id="DeepSpeed's launcher"),
        pytest.param(2, {"RANK": "0", "LOCAL_WORLD_SIZE": "8"}, 1, id="more ranks than cores"),
        pytest.param(12, {**TASK, "SLURM_STEP_TASKS_PER_NODE": "8(x16)", "SLURM_CPUS_ON_NODE": "96"}, 12, id="srun, bound"),
        pytest.param(96, {**TASK, "SLURM_STEP_TASKS_PER_NODE": "8(x16)", "SLURM_CPUS_ON_NODE": "96"}, 12, id="srun, unbound"),
        pytest.param(
            96, {**TASK, "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x3),2", "SLURM_CPUS_ON_NODE": "96"}, 48,
            id="srun, the last node has fewer tasks",
        ),
        pytest.param(96, {**TASK, "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "10"}, 10, id="srun, cores a task"),
        pytest.param(
            16, {**TASK, "RANK": "0", "LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "16"}, 4, id="torchrun inside srun"
        ),
        pytest.param(
            32, {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291x", "SLURM_CPUS_PER_TASK": "4"}, 32, id="a batch script"
        ),
        pytest.param(8, {"RANK": "0", "LOCAL_WORLD_SIZE": ""}, 8, id="an empty variable"),
    ],
)  # fmt: skip
def test_share_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, affinity: int, environ: dict[str, str], share: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    assert core_share(environ, root=tmp_path) == share


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "650000 100000\n"}, 6),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
            },
            1,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/job\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_quota_of_the_control_group_and_those_above_it(
    tmp_path: Path, files: dict[str, str], quota: int | None
) -> None:
    assert cpu_quota(limited(tmp_path, **files)) == quota


def test_ranks_of_a_container_share_its_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    limited(tmp_path, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"})
    assert core_share({"LOCAL_WORLD_SIZE": "4"}, root=tmp_path) == 4


def test_self_launched_worker_takes_its_share_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    environ = worker_environment(1, 8, 20001, {"PATH": "/bin"})
    assert (environ["LOCAL_WORLD_SIZE"], environ["OMP_NUM_THREADS"]) == ("8", "12")
    assert worker_environment(1, 8, 20001, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decoder_threads() == 12
    assert decoder_threads(5) == 5


def test_real_workers_see_half_of_this_machine_each() -> None:
    cores = len(os.sched_getaffinity(0))
    program = "from distributed_at.data.machine import decoder_threads; print(decoder_threads())"
    for rank in range(2):
        environ = worker_environment(rank, 2, 20001, {k: v for k, v in os.environ.items() if "SLURM" not in k})
        done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
        assert int(done.stdout) == max(1, min(cores, cpu_quota() or cores) // 2)
