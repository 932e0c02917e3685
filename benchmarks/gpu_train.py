"""Trains a recipe for some minutes, evaluates what stands, and prints the numbers beside the paper's; call again to go on.

    python -m benchmarks.gpu_train RECIPE --data FOLDER --minutes 9 [--samples 1000] [key=value ...]

The run is an ordinary one (``distributed-at train``): at the time limit it is asked to stop, saves and is resumed by the
next call with the same recipe. An unfinished run's numbers are printed as such.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from distributed_at.commands.common import print_table
    from distributed_at.commands.eval import entry_name
    from distributed_at.errors import EXIT_OK, EXIT_REQUEUE, UserError
    from distributed_at.evaluation.kinds import KINDS
    from distributed_at.observe.tables import table
    from distributed_at.recipes import load_recipe
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"this Python has no module {missing.name!r}; training needs torch, torchvision, pydantic, pyyaml, rich, scipy "
        "and matplotlib (deepspeed, wandb and DALI only for what their names say)"
    ) from None

STOP_SECONDS = 90.0  # to finish a step and save


def command(*words: str) -> list[str]:
    """Return the command line of the product's own interpreter."""
    return [sys.executable, "-m", "distributed_at", *words]


def after(seconds: float) -> Callable[[], bool]:
    """Return what says whether ``seconds`` have gone by since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def train(words: list[str], is_over: Callable[[], bool]) -> int:
    """Train until the end or until ``is_over``, then ask politely to stop; return the exit code."""
    process = subprocess.Popen(command("train", *words))
    while process.poll() is None and not is_over():
        time.sleep(0.2)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise SystemExit(f"training did not stop within {STOP_SECONDS:.0f} s of being asked to") from None


def last_event(folder: Path, kind: str) -> dict[str, Any]:
    """Return the newest event of a kind in the run's events.jsonl, {} without one."""
    path = folder / "events.jsonl"
    found: dict[str, Any] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event.get("event") == kind:
                found = event
    return found


def main() -> int:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--data", help="data folder (data.path)")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, evaluation included")
    parser.add_argument("--evaluation-minutes", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=1000, help="test images of the evaluation")
    parser.add_argument("--only", help="protocols to evaluate, comma-separated (default: the recipe's, but AutoAttack)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--workers", default="1")
    arguments = parser.parse_intermixed_args()
    started = time.monotonic()
    overrides = [*arguments.overrides, *([f"data.path={arguments.data}"] if arguments.data else [])]
    config = load_recipe(arguments.recipe, overrides).config
    words = [arguments.recipe, *overrides, "--workers", arguments.workers, "--runs", str(arguments.runs)]
    left = 60.0 * (arguments.minutes - arguments.evaluation_minutes)
    code = train(words, after(left))
    if code == -signal.SIGTERM:
        raise SystemExit("the time was over before training had begun: give more --minutes")
    if code not in (EXIT_OK, EXIT_REQUEUE):
        raise SystemExit(f"training ended with exit code {code}")
    folder = arguments.runs / config.name
    steps, end = last_event(folder, "train"), last_event(folder, "run_end")
    finished = end.get("reason") == "finished"
    quick = [
        entry_name(one)
        for entry in config.evaluation.final
        for one in KINDS[entry.kind].single_entries(entry)
        if KINDS[one.kind].forward_units(one) is not None  # AutoAttack's cost has no bound known beforehand
    ]
    evaluation = command(
        "eval", str(folder), "--only", arguments.only or ",".join(quick), "--num-samples", str(arguments.samples), "--workers",
        arguments.workers, "--checkpoint", "auto" if finished else "last", "--json",
    )  # fmt: skip
    done = subprocess.run(evaluation, capture_output=True, text=True)
    if done.returncode != EXIT_OK:
        raise SystemExit(f"evaluation ended with exit code {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    rows = json.loads(done.stdout)["rows"]
    state = "finished" if finished else "UNFINISHED: give the same command again to go on"
    begun = last_event(folder, "restart")
    print(f"\n{config.name}: epoch {end.get('epoch', 0):.2f} of {config.train.epochs:g}, {state}")
    if begun:
        print(f"  this call resumed the run at step {begun['step']}; it now stands at step {end.get('step', 0)}")
    if steps:
        seconds = ", ".join(f"{name} {value:.2f}" for name, value in steps["seconds"].items())
        print(f"  {steps['images_per_second']:.0f} images/s; seconds of the last logging interval: {seconds}")
    if config.paper is not None:
        numbers = ", ".join(f"{name} {value:g}" for name, value in config.paper.numbers.items())
        print(f"  the paper's row: {config.paper.title}, {config.paper.table}, {config.paper.row}: {numbers}")
    else:
        print("  the recipe names no paper's row")
    print_table(table(rows, title=config.name))
    print(f"  this call took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as mistake:
        print(f"gpu-train: error: {mistake}", file=sys.stderr)
        raise SystemExit(mistake.exit_code) from None
