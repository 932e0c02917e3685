"""A rank's share of the processor cores, under every launcher and limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed_at import cores
from distributed_at.config import DataConfig
from distributed_at.cores import allowed_cores, core_share, cpu_quota
from distributed_at.data import sources
from distributed_at.data.machine import decoder_threads
from distributed_at.engine.processes import launch
from distributed_at.engine.processes.launch import run_workers, worker_environment

TASK = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a quota nor a launcher nor SLURM around the tests."""
    monkeypatch.setattr(cores, "cpu_quota", lambda root: None)
    for name in [n for n in os.environ if "SLURM" in n or n in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")]:
        monkeypatch.delenv(name)


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
            96,
            {**TASK, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1",
             "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "16", "SLURM_CPUS_ON_NODE": "16"}, 4,
            id="torchrun inside srun, unbound",
        ),
        pytest.param(
            12,
            {**TASK, "RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "8",
             "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}, 12,
            id="srun's tasks are the ranks, bound, and a script exports torchrun's variables",
        ),
        pytest.param(
            96, {"SLURM_PROCID": "0", "SLURM_CPUS_ON_NODE": "16", "LOCAL_WORLD_SIZE": "4"}, 4,
            id="our launcher in a batch script, unbound",
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
                "proc/self/cgroup": "4:cpuacct,cpu:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "700000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            7,
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


@pytest.mark.parametrize(
    ("own", "launchers", "share"),
    [
        pytest.param(12, 96, 12, id="each rank to cores of its own"),
        pytest.param(48, 96, 12, id="each rank to its half of the machine"),
        pytest.param(8, 96, 8, id="each rank to fewer than its part"),
        pytest.param(96, 96, 12, id="unbound"),
    ],
)
def test_ranks_that_their_launcher_bound_do_not_divide_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: int, launchers: int, share: int
) -> None:
    parent = os.getppid()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range({0: own, parent: launchers}[process])))
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        assert core_share({"RANK": "3", "WORLD_SIZE": "8", variable: "8"}, root=tmp_path) == share


@pytest.mark.usefixtures("free")
def test_launcher_divides_its_own_cores_not_those_of_the_shell_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96 if process else 4)))
    environ = worker_environment(0, 2, 20001, {"PATH": "/bin"})
    assert environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.usefixtures("free")
def test_backend_is_chosen_by_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(sources, "dali_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = DataConfig(dataset="imagenet", path="nowhere", image_size=224)
    for ranks, backend in (("4", "dali_cpu"), ("8", "dali_gpu")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert sources.choose_backend(config) == backend


@pytest.mark.parametrize(("told", "threads"), [({}, 3), ({"OMP_NUM_THREADS": "2"}, 12)])
def test_ranks_whose_launcher_sets_no_threads_compute_with_their_share(told: dict[str, str], threads: int) -> None:
    program = """
import os
os.sched_getaffinity = lambda process: set(range(12))
import torch
torch.set_num_threads(12)  # as many as a library finds on such a machine
from distributed_at import cores
from distributed_at.engine.processes import world
cores.cpu_quota = lambda root: None
world.detect_rank = lambda: None
world.initialise_world()
print(torch.get_num_threads())
"""
    environ = {k: v for k, v in os.environ.items() if "SLURM" not in k and "_NUM_THREADS" not in k}
    environ |= {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "4", **told}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(threads)


@pytest.mark.usefixtures("free")
def test_self_launched_worker_takes_its_share_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    environ = worker_environment(1, 8, 20001, {"PATH": "/bin"})
    assert (environ["LOCAL_WORLD_SIZE"], environ["OMP_NUM_THREADS"]) == ("8", "12")
    assert worker_environment(1, 8, 20001, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decoder_threads() == 12
    assert decoder_threads(5) == 5


def test_two_self_launched_workers_see_half_of_the_allowed_cores_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Real processes of the real launcher; in the command's place stands a script that writes what it sees."""
    program = """
import json, os, sys
from pathlib import Path
from distributed_at.data.machine import decoder_threads
seen = [decoder_threads(), os.environ["OMP_NUM_THREADS"], os.environ["LOCAL_WORLD_SIZE"]]
(Path(sys.argv[1]) / os.environ["RANK"]).write_text(json.dumps(seen))
"""
    command = tmp_path / "command"
    (tmp_path / "seen.py").write_text(program)
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{tmp_path}/seen.py' '{tmp_path}'\n")
    command.chmod(0o755)
    for name in [n for n in os.environ if "SLURM" in n or n in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parents[3]))
    monkeypatch.setattr(sys, "executable", str(command))
    assert run_workers(["train"], 2, tmp_path / "log") == 0
    half = max(1, allowed_cores() // 2)
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[half, str(half), "2"]] * 2
