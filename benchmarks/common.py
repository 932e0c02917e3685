"""Honest timing: interleaved rounds, an A/A control, bootstrap intervals, and a JSON record of machine and versions.

Used by every script in this folder; measures whatever callables it is given and knows nothing of them.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"
CONTROL_LIMITS = (0.95, 1.05)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contestant over all rounds."""

    name: str
    fastest: float
    lower_quartile: float
    median: float
    upper_quartile: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Timings of one interleaved run.

    Attributes:
        timings: by contestant.
        ratios: baseline's seconds over each contestant's (above 1: faster than the baseline), the median over rounds,
            with the 95 % bootstrap interval as [median, low, high].
        control: the baseline against itself, likewise; ``trusted`` says whether it stayed within ``CONTROL_LIMITS``.
        rounds: rounds counted.
    """

    timings: dict[str, Timing]
    ratios: dict[str, list[float]]
    control: list[float]
    trusted: bool
    rounds: int


def _seconds(function: Callable[[], object], repeats: int, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def _median_with_interval(values: list[float], draws: int = 2000) -> list[float]:
    generator = np.random.default_rng(0)
    samples = np.median(generator.choice(values, size=(draws, len(values))), axis=1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return [round(float(v), 4) for v in (statistics.median(values), low, high)]


def compare(
    contestants: dict[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = 15,
    warm_up: int = 3,
    target_seconds: float = 0.02,
    cuda: bool = False,
) -> Comparison:
    """Time ``contestants`` in rounds, each round in a new random order, the baseline twice a round as A/A control.

    Ratios are taken within a round, so that load on the machine that changes slowly falls on both sides alike.

    Args:
        contestants: name -> function without arguments.
        baseline: the name that ratios and the control refer to.
        rounds: rounds measured.
        warm_up: unmeasured calls of each contestant.
        target_seconds: each measurement repeats its function until about this long.
        cuda: synchronise the device around measurements.

    Raises:
        KeyError: ``baseline`` is not a contestant.
    """
    again = f"{baseline} (control)"
    functions = {**contestants, again: contestants[baseline]}
    repeats = {}
    for name, function in functions.items():
        for _ in range(warm_up):
            function()
        repeats[name] = max(1, int(target_seconds / max(1e-7, _seconds(function, 1, cuda))))
    repeats[again] = repeats[baseline]
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(_seconds(functions[name], repeats[name], cuda))

    def ratio(name: str) -> list[float]:
        return _median_with_interval([b / s for b, s in zip(seconds[baseline], seconds[name], strict=True)])

    timings = {}
    for name in contestants:
        first, middle, third = statistics.quantiles(seconds[name], n=4)
        timings[name] = Timing(
            name=name, fastest=min(seconds[name]), lower_quartile=first, median=middle, upper_quartile=third
        )
    control = ratio(again)
    return Comparison(
        timings=timings,
        ratios={name: ratio(name) for name in contestants if name != baseline},
        control=control,
        trusted=CONTROL_LIMITS[0] <= control[0] <= CONTROL_LIMITS[1],
        rounds=rounds,
    )


class NoCheckpoints:
    """In place of a trainer's checkpoints: nothing is resumed and nothing saved."""

    failure: str | None = None

    def resume(self) -> bool:
        """Say that there was nothing to resume."""
        return False

    def save_if_due(self, **_: bool) -> bool:
        """Say that all is well with the weights."""
        return True

    def asks(self) -> bool:
        """Ask for no save."""
        return False

    def wait(self) -> None:
        """Have nothing to wait for."""


def command_line() -> str:
    """Return the command that another reader types in the repository's root."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parent.parent
    name = ".".join(script.relative_to(root).with_suffix("").parts) if script.is_relative_to(root) else script.name
    return " ".join(["python -m", name, *sys.argv[1:]])


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a number: machine, threads, load, versions, commit and command."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command_line(),
        "commit": _run("git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_run("git", "-C", str(RESULTS.parent), "status", "--porcelain", "-uno")),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def write_result(name: str, content: dict[str, Any], *, before: dict[str, Any]) -> Path:
    """Write ``content`` with the environment to ``results/NAME.json`` and return the path.

    Args:
        name: file name without suffix.
        content: JSON values; dataclasses are converted.
        before: ``environment()`` as it was before measuring, so that the load recorded is not the benchmark's own.
    """

    def plain(value: object) -> object:
        if hasattr(value, "__dataclass_fields__"):
            return asdict(value)  # type: ignore[call-overload]
        raise TypeError(f"{type(value).__name__} is not JSON")

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": before, **content}, indent=2, default=plain) + "\n")
    return path
