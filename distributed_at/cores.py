"""How many processor cores one rank may take: its part of what this process is allowed, not of what the machine has."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path


def core_share(environ: Mapping[str, str] = os.environ, *, root: Path = Path("/")) -> int:
    """Return the cores of this rank, at least 1.

    The ranks that a launcher started here share what it was allowed: as many as torchrun's and our LOCAL_WORLD_SIZE or
    DeepSpeed's LOCAL_SIZE say. A launcher may have bound each to cores of its own (DeepSpeed's --bind_cores_to_rank,
    torchrun's --numa-binding): then these are its share already, and are not divided again.

    Args:
        environ: of the process.
        root: where /proc and /sys are.
    """
    ranks = _launched_here(environ)
    if ranks is None:
        return allowed_cores(environ, root=root)
    return max(1, min(_affinity(0), allowed_cores(environ, root=root, process=os.getppid()) // ranks))


def allowed_cores(environ: Mapping[str, str] = os.environ, *, root: Path = Path("/"), process: int = 0) -> int:
    """Return the cores of a process and the ranks that it starts, together, at least 1.

    The least of its affinity, its control group's quota and what SLURM gave. srun's tasks on a node share the quota and,
    without SLURM_CPUS_PER_TASK, the step's cores. srun may have bound a task to cores of its own: these are not divided.

    Args:
        environ: of the process.
        root: where /proc and /sys are.
        process: whose affinity counts; 0 = this one's.
    """
    affinity, tasks = _affinity(process), 1
    pool = _number(environ.get("SLURM_CPUS_ON_NODE")) or affinity
    if _is_task(environ):
        tasks = _tasks_here(environ)
        if per_task := _number(environ.get("SLURM_CPUS_PER_TASK")):
            pool = per_task * tasks
    pool = min(pool, cpu_quota(root) or pool)
    return max(1, min(affinity, pool // tasks))


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Return the whole cores that the control group and those above it let a process use, None without a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases, limit = [root / "sys/fs/cgroup"], _limit_of_v2
        elif "cpu" in controllers.split(","):
            # "cpuacct,cpu" may be mounted as "cpu,cpuacct", with a link from "cpu"
            bases, limit = [root / "sys/fs/cgroup" / name for name in {controllers, "cpu"}], _limit_of_v1
        else:
            continue
        for base in bases:
            folder = base / path.strip("/")
            for each in (folder, *folder.parents):
                found.append(limit(each))
                if each == base:
                    break
    return min((max(1, math.floor(cores)) for cores in found if cores is not None), default=None)


def _limit_of_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _limit_of_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{n}_us").read_text(encoding="utf-8")) for n in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return None if quota <= 0 else quota / period


def _is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has the job's variables without a step's number."""
    return "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "batch").isdigit()


def _affinity(process: int) -> int:
    return len(os.sched_getaffinity(process)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launched_here(environ: Mapping[str, str]) -> int | None:
    """Return how many ranks a launcher started on this machine, None where none did, or where srun's tasks are the ranks."""
    if _is_task(environ) and environ.get("WORLD_SIZE", "") == environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    return _number(environ.get("LOCAL_WORLD_SIZE")) or _number(environ.get("LOCAL_SIZE"))


def _tasks_here(environ: Mapping[str, str]) -> int:
    told = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    nodes = []  # "2(x3),1": three nodes of two tasks, and one of one
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", told):
        nodes += [int(tasks)] * int(times or 1)
    here = _number(environ.get("SLURM_NODEID")) or 0
    return max(1, nodes[here]) if here < len(nodes) else 1


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
