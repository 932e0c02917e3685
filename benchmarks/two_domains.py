"""Measures the two-domain effect (Xie & Yuille, section 4.2) on real images: one BN, mixture BN and group norm.

    python -m benchmarks.two_domains --data FOLDER [--runs runs] [--workers 2]

FOLDER is laid out like ImageNet (train/<class>/*, val/<class>/*). Trains the rows of imagenet/two_domains.yaml that
are not finished, evaluates each, and writes results/two_domains.json. Numbers are counts over the whole test split.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from distributed_at.observe.record import load_run
from distributed_at.observe.tables import evaluation_rows
from distributed_at.recipes import load_recipe, recipe_root, rows_of

TABLE = "imagenet/two_domains.yaml"


def command(*words: str) -> None:
    """Run one command of the product with one thread a worker; a failure ends the measurement."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "distributed_at", *words], check=True, env=environment, stdout=sys.stderr)


def measure(row: str, data: Path, runs: Path, workers: int) -> dict[str, Any]:
    """Train and evaluate one row; return its numbers."""
    name = f"two_domains-{row}"
    where = ["--runs", str(runs), "--workers", str(workers)]
    command("train", f"{TABLE}#{row}", f"name={name}", f"data.path={data}", *where, "--quiet")
    command("eval", name, *where)
    record = load_run(runs / name)
    trained = [event for event in record.events if event["event"] == "train"]
    return {
        "row": row,
        "description": load_recipe(f"{TABLE}#{row}").config.description,
        "epochs": trained[-1]["epoch"],
        "steps": trained[-1]["step"],
        "train_seconds": sum(event["wall_seconds"] for event in trained),
        "images_per_second": sum(e["images_per_second"] for e in trained) / len(trained),
        "evaluations": [
            {k: r[k] for k in ("protocol", "branch", "correct", "total", "accuracy", "low", "high")}
            for r in evaluation_rows(record)
        ],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the numbers as text, one line a measurement."""
    lines = [f"{'training':38} {'branch':6} {'protocol':20} {'correct':>13} {'%':>6}  95 % interval"]
    for result in results:
        for e in result["evaluations"]:
            count = f"{e['correct']}/{e['total']}"
            lines.append(
                f"{result['description'].removeprefix('Imagenette, '):38} {e['branch']:6} {e['protocol']:20} {count:>13} "
                f"{100 * e['accuracy']:6.2f}  [{100 * e['low']:.2f}, {100 * e['high']:.2f}]"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    environment = common.environment()
    results = [measure(row, args.data, args.runs, args.workers) for row in rows_of(recipe_root() / TABLE)]
    document = {
        "what": __doc__.splitlines()[0],
        "recipe": TABLE,
        "data": "Imagenette (ten ImageNet classes), 128-pixel JPEGs, 9469 training and 3925 test images",
        "seed": 0,
        "environment": environment,
        "results": results,
    }
    path = common.RESULTS / "two_domains.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
