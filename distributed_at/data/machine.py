"""What this machine offers to the loaders: processor threads and DALI."""

from __future__ import annotations

import importlib.util
import os


def decoder_threads(requested: int = 0) -> int:
    """Return ``requested``, or this process's fair part of the processors it may use, at least 1."""
    if requested > 0:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(1, cores // max(1, ranks))


def dali_installed() -> bool:
    """Return whether DALI can be found; it is imported only when it is used."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package 'nvidia' at all
        return False
