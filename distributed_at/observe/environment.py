"""Records where a run ran: ``environment.json`` with versions, commit, host, devices and command, without secrets."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from distributed_at.files import write_atomically
from distributed_at.observe.encoding import to_json
from distributed_at.observe.secrets import redact

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "distributed-at", "torch", "torchvision", "deepspeed", "numpy", "pydantic", "wandb", "pyautoattack",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton", "safetensors",
)  # fmt: skip
JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    """Ask git about the folder that holds this package; None where there is no repository or no git."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # an installed package inside someone else's repository has no commit
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _devices() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"kind": "unknown", "names": []}
    if not torch.cuda.is_available():
        return {"kind": "cpu", "names": [], "cuda": torch.version.cuda}
    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "kind": "cuda",
        "names": [p.name for p in properties],
        "memory_gib": [round(p.total_memory / 2**30, 1) for p in properties],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def collect_environment(
    *, command: Sequence[str] | None = None, world_size: int | None = None, restart: int = 0
) -> dict[str, Any]:
    """Return what is known about this process's surroundings, redacted, as JSON types.

    Args:
        command: the command line; None takes ``sys.argv``.
        world_size: processes of the run; None takes the launcher's WORLD_SIZE, else 1.
        restart: restart number of this start.
    """
    status = _git("status", "--porcelain")
    found = {
        "time": time.time(),
        "restart": restart,
        "command": list(sys.argv if command is None else command),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE") or 1) if world_size is None else world_size,
        "devices": _devices(),
        "versions": package_versions(),
        "git": {"commit": _git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)},
        "job": {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ},
    }
    return redact(to_json(found))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what the program is made of and has changed between two environments: ``torch 2.11.0 -> 2.12.0``.

    Between other versions a resumed run need not be bitwise the one that would have gone on.
    """
    old, new = before.get("versions", {}), now.get("versions", {})
    found = [
        f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    commits = [str((one.get("git") or {}).get("commit") or "")[:12] for one in (before, now)]
    if all(commits) and commits[0] != commits[1]:
        found.append(f"commit {commits[0]} -> {commits[1]}")
    kinds = [(one.get("devices") or {}).get("kind") for one in (before, now)]
    if kinds[0] != kinds[1]:
        found.append(f"devices {kinds[0]} -> {kinds[1]}")
    return found


def read_environment(run_folder: Path | str) -> dict[str, Any]:
    """Return ``environment.json``, or an empty mapping where it is absent or unreadable."""
    try:
        found = json.loads((Path(run_folder) / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_environment(
    run_folder: Path | str,
    environment: dict[str, Any] | None = None,
    *,
    command: Sequence[str] | None = None,
    world_size: int | None = None,
) -> Path:
    """Write ``environment.json``; what earlier starts wrote moves under ``earlier``. The file is replaced in one move.

    Args:
        run_folder: the run's folder; made if absent.
        environment: what to write; None collects it from this process.
        command, world_size: as in ``collect_environment``.

    Raises:
        OSError: the run folder cannot be written.
    """
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_environment(folder)
    earlier = before.pop("earlier", [])
    earlier = [*earlier, before] if before else earlier
    if environment is None:
        environment = collect_environment(command=command, world_size=world_size, restart=len(earlier))
    content = {**redact(to_json(environment)), "earlier": earlier}
    path = folder / ENVIRONMENT_FILE
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path
