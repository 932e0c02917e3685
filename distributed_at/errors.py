"""Errors that a user can cause or must act on, each with the exit code that scripts and SLURM rely on.

A ``UserError`` is printed as its message alone, never as a traceback: it must name the field, the value,
what is allowed and, where it helps, the nearest right spelling.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_NO_CHECKPOINT = 3
EXIT_DIVERGED = 4
EXIT_LOCKED = 5
EXIT_HANG = 6
EXIT_REQUEUE = 85  # saved at a step boundary: the same command goes on where it stopped

# What follows from an exit code, for schedulers: nothing ('done'), the same command again ('again'), a person first
# ('person'), or the same command again a bounded number of times ('crash', every code that is not listed).
EXIT_CLASSES = {
    EXIT_OK: "done",
    EXIT_REQUEUE: "again",
    EXIT_CONFIG: "person",
    EXIT_NO_CHECKPOINT: "person",
    EXIT_DIVERGED: "person",
    EXIT_LOCKED: "person",
}


def exit_class(code: int) -> str:
    """Return what follows from a process's exit code: 'done', 'again', 'person' or 'crash'."""
    return EXIT_CLASSES.get(code, "crash")


class UserError(Exception):
    """A mistake of the user's, or a fact about their files or machine, told in one message."""

    exit_code = EXIT_CONFIG


class ConfigError(UserError):
    """A recipe, an override or a command line that cannot be run."""


class DataError(UserError):
    """A data set that is absent, incomplete or not in its published format."""


class CheckpointError(UserError):
    """No checkpoint that can be used; starting again from nothing is never chosen silently."""

    exit_code = EXIT_NO_CHECKPOINT


class BadCheckpoint(Exception):
    """A folder that is not a whole, unchanged checkpoint; the message says why. ``certain`` is False for a mere I/O error."""

    def __init__(self, reason: str, *, certain: bool = True) -> None:
        super().__init__(reason)
        self.certain = certain


class DivergedError(UserError):
    """The loss, the gradients or the weights are no longer finite."""

    exit_code = EXIT_DIVERGED


class LockedError(UserError):
    """Another live run owns the run folder."""

    exit_code = EXIT_LOCKED


class HangError(UserError):
    """A rank is dead or has not answered in time."""

    exit_code = EXIT_HANG


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed spelling closest to ``word``, or None where nothing is close."""
    found = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest allowed spelling, or an empty string."""
    found = nearest(word, allowed)
    return f" Did you mean {found!r}?" if found else ""


def shorten(message: str, limit: int = 1900) -> str:
    """Return a message that a terminal can show: beginning and end where it is longer than ``limit`` characters."""
    if len(message) <= limit:
        return message
    return f"{message[: limit - 400]} … ({len(message) - limit + 40} characters left out) … {message[-360:]}"


def first_line(error: BaseException) -> str:
    """The most telling line of an error; torch wraps each rank's own error in a longer one."""
    nested = getattr(error, "failures", None)
    if isinstance(nested, Mapping) and nested:
        told = {rank: first_line(why[0] if isinstance(why, tuple) else why) for rank, why in nested.items()}
        if len(set(told.values())) == 1:
            return next(iter(told.values()))
        return "; ".join(f"[{rank}] {why}" for rank, why in told.items())
    if isinstance(error, BadCheckpoint):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
