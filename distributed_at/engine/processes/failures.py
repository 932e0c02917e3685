"""Tells a lost rank from a fault of one's own, and keeps each rank's last words in the run's log folder."""

from __future__ import annotations

import os
import re
import socket
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from distributed_at.errors import first_line
from distributed_at.observe.secrets import without_secrets

# What gloo, NCCL and the rendezvous store say when another process is gone or silent; gloo raises plain RuntimeErrors.
_SIGNS = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "timed out waiting",
    "socket timeout", "wait timeout", "nccl error", "remote process exited", "failed to recv", "gloo/transport",
)  # fmt: skip


def lost_rank(error: BaseException) -> bool:
    """Whether the error, or what caused it, is that another rank is dead or silent."""
    seen: BaseException | None = error
    while seen is not None:
        nested = getattr(seen, "failures", None)  # torch wraps what each rank met in one error
        if isinstance(nested, Mapping) and any(
            lost_rank(why[0] if isinstance(why, tuple) else why) for why in nested.values()
        ):
            return True
        if isinstance(seen, dist.DistError):
            return True
        if isinstance(seen, (RuntimeError, OSError)) and any(sign in str(seen).lower() for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def what_was_lost(error: BaseException) -> str:
    """The part of a ``lost_rank`` error that says what happened, without torch's source lines and advice."""
    text = first_line(error).partition(": ")[2] or first_line(error)
    return re.sub(r"^\[/[^\]]*\] ", "", text).split(". This is typically")[0].rstrip(".")


def rank_and_host() -> str:
    """This process among the ranks, for messages: ``3 on node17``."""
    return f"{os.environ.get('RANK', '0')} on {socket.gethostname()}"


def write_failure(folder: Path) -> Path:
    """Append the traceback of the exception being handled to ``failure-rank<r>.txt``; returns the file's path."""
    path = folder / f"failure-rank{int(os.environ.get('RANK', '0'))}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            text = without_secrets(traceback.format_exc())
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank_and_host()}\n{text}\n")
    except OSError:
        pass  # the terminal has the message
    return path
