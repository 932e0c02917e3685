"""Trains the digits demo with the attack's fast path and without it, and sets the two accuracies side by side.

    python -m benchmarks.fast_path [--steps 500] [--seeds 0 1 2 3 4]

Fast: batch norm folded into the convolutions, channels-last, compiled iteration, fused start and step. Plain: the live
weights and layers, eager, each pixel operation on its own. Everything else, starts and batches included, is the same.
The two differ in rounding alone, but the sign of a gradient near zero turns with it, so that trained weights part like
those of two seeds; what must agree is the accuracy on held-out images. Writes results/fast_path.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from scipy.special import stdtrit

from benchmarks import common
from distributed_at.config import EvaluationEntry
from distributed_at.data.sources import open_split
from distributed_at.engine.builder import Parts, build_parts
from distributed_at.engine.processes.world import World, initialise_world, shutdown_world
from distributed_at.engine.state import TrainingState
from distributed_at.engine.trainer import Trainer
from distributed_at.engine.twin.compiled_attack import StaticIteration
from distributed_at.engine.twin.twin import Twin
from distributed_at.evaluation import EvaluationResult, Execution, Subject, evaluate
from distributed_at.recipes import load_recipe
from distributed_at.statistics import mcnemar

RECIPE = "digits/adversarial.yaml"
OVERRIDES = ("evaluation.validation=[]", "evaluation.every_epochs=null", "train.select=last", "attack.compile=on")
PROTOCOLS = ("clean", "pgd20")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run.

    Attributes:
        results: by protocol, on the test split.
        compiled: graphs compiled in the first epoch.
        compiled_later: graphs compiled after it.
        seconds: of training.
        form: what the attack ran as at the end.
    """

    results: dict[str, EvaluationResult]
    compiled: int
    compiled_later: int
    seconds: float
    form: str


def make_plain(parts: Parts) -> None:
    """Take the fast path out: the attack runs the live tensors, eagerly."""
    assert parts.twin is not None
    assert parts.attack is not None
    parts.twin = Twin(
        parts.engine.module, bn_mode=parts.twin.bn_mode, branch=parts.twin.branch, fold=False, channels_last=False
    )
    parts.attack = replace(parts.attack, fused=False)
    parts.iteration = None


def train(seed: int, steps: int, world: World, *, fast: bool) -> Trained:
    """Train ``steps`` steps of the recipe with its schedule drawn to that length, and evaluate the last weights."""
    config = load_recipe(RECIPE, [*OVERRIDES, f"seed={seed}"]).config
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    parts = build_parts(config, world)
    parts = build_parts(
        config.model_copy(
            update={"train": config.train.model_copy(update={"epochs": steps / parts.order.steps_per_epoch})}
        ),
        world,
    )
    if parts.total_steps != steps:
        raise SystemExit(f"{parts.total_steps} steps were planned, not {steps}")
    if not fast:
        make_plain(parts)
    first_epoch = 0

    def note(step: int) -> None:
        nonlocal first_epoch
        if step == parts.order.steps_per_epoch:
            first_epoch = graphs()

    started = time.monotonic()
    Trainer(TrainingState(parts), common.NoCheckpoints(), None, None, on_step=note).run()  # type: ignore[arg-type]
    seconds = time.monotonic() - started
    if isinstance(parts.iteration, StaticIteration) and parts.iteration.failed:
        raise SystemExit(f"the fast path did not run: {parts.iteration.failed}")
    everything = graphs()
    return Trained(
        results=judge(parts),
        compiled=first_epoch,
        compiled_later=everything - first_epoch,
        seconds=seconds,
        form=type(parts.iteration).__name__ if parts.iteration is not None else "plain",
    )


def graphs() -> int:
    """Return how many graphs were compiled since the counters were cleared."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def judge(parts: Parts) -> dict[str, EvaluationResult]:
    """Measure the live network on the test split, in float32 and eagerly for both sides."""
    network = parts.engine.module.eval()
    source = open_split(parts.config.data, "test", seed=parts.config.seed)
    subject = Subject(network=network, training_attack=parts.config.attack, seed=parts.config.seed)
    entries: list[EvaluationEntry] = [
        entry for entry in parts.config.evaluation.final if (entry.name or entry.kind) in PROTOCOLS
    ]
    return {
        entry.name or entry.kind: evaluate(subject, source, entry, execution=Execution(batch_size=512))
        for entry in entries
    }


def difference(fast: list[EvaluationResult], plain: list[EvaluationResult]) -> dict[str, Any]:
    """Compare accuracies over seeds: the mean difference with Student's 95 % interval, and image by image."""
    differences = [f.accuracy - p.accuracy for f, p in zip(fast, plain, strict=True)]
    mean = statistics.fmean(differences)
    half = float("inf")
    if len(differences) > 1:
        half = float(stdtrit(len(differences) - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(len(differences))
    pairs = [(f.rows.correct_adv, p.rows.correct_adv) for f, p in zip(fast, plain, strict=True)]
    test = mcnemar(int(sum((a & ~b).sum() for a, b in pairs)), int(sum((~a & b).sum() for a, b in pairs)))
    return {
        "by_seed": differences,
        "mean": mean,
        "interval": [mean - half, mean + half],
        "within_noise": abs(mean) <= half,
        "seed_to_seed_deviation_of_plain": statistics.stdev([p.accuracy for p in plain]) if len(plain) > 1 else None,
        "only_fast_right": test.only_first,
        "only_plain_right": test.only_second,
        "mcnemar_p": test.p_value,
    }


def row(result: EvaluationResult) -> dict[str, Any]:
    """Return the counts of one evaluation."""
    return {"correct": result.correct, "total": result.total, "accuracy": result.accuracy, "interval": result.interval}


def main() -> None:
    """Train all pairs, print the table and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    before = common.environment()
    runs: dict[str, list[Trained]] = {"fast": [], "plain": []}
    # without DeepSpeed: it is on neither side of the comparison
    with mock.patch("distributed_at.engine.parallel.deepspeed_available", return_value=False):
        world = initialise_world()
        for seed in arguments.seeds:
            for name, found in runs.items():
                found.append(trained := train(seed, arguments.steps, world, fast=name == "fast"))
                counts = ", ".join(f"{k} {r.correct}/{r.total}" for k, r in trained.results.items())
                print(f"seed {seed} {name:5s} {trained.form:15s} {counts}; {trained.seconds:.0f} s", flush=True)
        shutdown_world()
    content: dict[str, Any] = {
        "setting": {"recipe": RECIPE, **vars(arguments)},
        "recompilations_after_first_epoch": sum(t.compiled_later for t in runs["fast"]),
        "graphs_compiled_in_first_epoch": [t.compiled for t in runs["fast"]],
        "runs": {
            name: [{p: row(r) for p, r in t.results.items()} | {"seconds": t.seconds} for t in found]
            for name, found in runs.items()
        },
        "difference": {p: difference(*([t.results[p] for t in runs[name]] for name in runs)) for p in PROTOCOLS},
    }
    for protocol, found in content["difference"].items():
        low, high = found["interval"]
        verdict = "within noise" if found["within_noise"] else "NOT within noise"
        print(
            f"{protocol}: fast - plain {100 * found['mean']:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}], {verdict}; "
            f"images right in one alone: fast {found['only_fast_right']}, plain {found['only_plain_right']}, "
            f"McNemar p {found['mcnemar_p']:.2f}"
        )
    print(f"recompilations after the first epoch: {content['recompilations_after_first_epoch']}")
    print(common.write_result("fast_path", content, before=before))


if __name__ == "__main__":
    main()
