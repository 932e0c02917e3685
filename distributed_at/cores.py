"""How many processor cores one rank may take: its part of what this process is allowed, not of what the machine has."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path


def core_share(environ: Mapping[str, str] = os.environ, *, root: Path = Path("/")) -> int:
    """Return the cores of this rank, at least 1.

    Allowed are the process's affinity and its control group's quota. The ranks of a node share them, as many as torchrun's
    and our launcher's LOCAL_WORLD_SIZE, DeepSpeed's LOCAL_SIZE or srun's tasks a node say. srun may have bound a
    task to cores of its own: then these are its share already.

    Args:
        environ: of the process.
        root: where /proc and /sys are.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks, pool = _launched_here(environ), affinity
    if ranks is None and _is_task(environ):
        ranks, pool = _tasks_here(environ), _number(environ.get("SLURM_CPUS_ON_NODE")) or affinity
        if per_task := _number(environ.get("SLURM_CPUS_PER_TASK")):
            pool = per_task * ranks
    pool = min(pool, cpu_quota(root) or pool)
    return max(1, min(affinity, pool // (ranks or 1)))


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
            base, limit = root / "sys/fs/cgroup", _limit_of_v2
        elif "cpu" in controllers.split(","):
            base, limit = root / "sys/fs/cgroup" / controllers, _limit_of_v1
        else:
            continue
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


def _launched_here(environ: Mapping[str, str]) -> int | None:
    """Return how many ranks a launcher started on this machine, None where none did."""
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
