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
from pathlib import Path

from distributed_at.errors import EXIT_OK, EXIT_REQUEUE
from distributed_at.recipes import load_recipe

STOP_SECONDS = 90.0  # to finish a step and save


def command(*words: str) -> list[str]:
    """Return the command line of the product's own interpreter."""
    return [sys.executable, "-m", "distributed_at", *words]


def train(words: list[str], seconds: float) -> int:
    """Train for at most ``seconds``, then ask politely to stop; return the exit code."""
    process = subprocess.Popen(command("train", *words))
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise SystemExit(f"training did not stop within {STOP_SECONDS:.0f} s of being asked to") from None


def last_event(folder: Path, kind: str) -> dict:
    """Return the newest event of a kind in the run's events.jsonl, {} without one."""
    path = folder / "events.jsonl"
    found: dict = {}
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
    parser.add_argument("--only", default="clean", help="protocols of the recipe to evaluate, comma-separated")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--workers", default="1")
    arguments = parser.parse_intermixed_args()
    started = time.monotonic()
    overrides = [*arguments.overrides, *([f"data.path={arguments.data}"] if arguments.data else [])]
    config = load_recipe(arguments.recipe, overrides).config
    words = [arguments.recipe, *overrides, "--workers", arguments.workers, "--runs", str(arguments.runs)]
    left = 60.0 * (arguments.minutes - arguments.evaluation_minutes)
    code = train(words, left)
    if code == -signal.SIGTERM:
        raise SystemExit("the time was over before training had begun: give more --minutes")
    if code not in (EXIT_OK, EXIT_REQUEUE):
        raise SystemExit(f"training ended with exit code {code}")
    folder = arguments.runs / config.name
    steps, end = last_event(folder, "train"), last_event(folder, "run_end")
    finished = end.get("reason") == "finished"
    evaluation = command(
        "eval", str(folder), "--only", arguments.only, "--num-samples", str(arguments.samples), "--workers",
        arguments.workers, "--checkpoint", "auto" if finished else "last", "--json",
    )  # fmt: skip
    rows = json.loads(subprocess.run(evaluation, capture_output=True, text=True, check=True).stdout)
    state = "finished" if finished else "UNFINISHED: call again to go on"
    print(f"\n{config.name}: epoch {end.get('epoch', 0):.2f} of {config.train.epochs}, {state}")
    if steps:
        print(f"  {steps['images_per_second']:.0f} images/s; seconds by section {steps['seconds']}")
    for row in rows:
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items() if value is not None))
    paper = config.paper.model_dump(exclude_none=True) if config.paper is not None else {}
    print(f"  the paper's row: {paper or 'none'}")
    print(f"  this call took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
