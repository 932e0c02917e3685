"""What this machine offers to the loaders: processor threads and DALI."""

from __future__ import annotations

import importlib.util

from distributed_at.cores import core_share


def decoder_threads(requested: int = 0) -> int:
    """Return ``requested``, or this rank's share of the processors."""
    return requested if requested > 0 else core_share()


def dali_installed() -> bool:
    """Return whether DALI can be found; it is imported only when it is used."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package 'nvidia' at all
        return False
