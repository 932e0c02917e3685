"""`make demo`: the main job end to end on real handwritten digits, with the same commands that an ImageNet run uses."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from distributed_at.cli import main as run_command
from distributed_at.commands.common import say

ADVERSARIAL, NATURAL = "demo-adversarial", "demo-natural"


def _run(words: list[str]) -> None:
    say(f"\n$ distributed-at {shlex.join(words)}")
    code = run_command(words)
    if code:
        raise SystemExit(code)


def main() -> int:
    """Train robustly and naturally, attack both, and write the report that sets them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--runs", default="runs")
    args = parser.parse_args()
    began = time.monotonic()
    workers = ["--workers", args.workers, "--runs", args.runs]
    say("Training a small PreActResNet on 1,797 real handwritten digits, twice: against PGD, and naturally.")
    _run(["train", "digits/adversarial.yaml", f"name={ADVERSARIAL}", *workers])
    _run(["train", "digits/natural.yaml", f"name={NATURAL}", *workers])
    say("\nAttacking both on held-out images: PGD-20, and AutoAttack (four attacks, no free parameter).")
    _run(["eval", ADVERSARIAL, *workers])
    _run(["eval", NATURAL, *workers])
    _run(["report", ADVERSARIAL, NATURAL, "--runs", args.runs])
    report = Path(args.runs, ADVERSARIAL, "report.html").resolve()
    say(
        f"\nDone in {time.monotonic() - began:.0f} s. Open the report:\n  {report}\n"
        "Next:\n"
        "  distributed-at recipes                                  every recipe, by paper and table\n"
        "  distributed-at plan imagenet/xie_yuille/base.yaml --workers 128\n"
        "  distributed-at train cifar/smoke.yaml data.path=DIR     the same engine on CIFAR-10"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
