"""Times a training step of the whole engine against a bare torch loop, at K = 0 and on a tiny network: pure overhead.

    python -m benchmarks.engine_overhead [--steps 40] [--rounds 9]

Both sides compute the same batches, forward, backward and SGD step on one process; the losses after all steps must agree
first. The engine's side is ``Trainer``'s own loop (data order, clock, meters, buffers, events), without checkpoints and
evaluation. Writes results/engine_overhead.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common
from distributed_at.engine.builder import Parts, build_network, build_parts, set_groups
from distributed_at.engine.microbatches import MicroBatches
from distributed_at.engine.processes.world import initialise_world, shutdown_world
from distributed_at.engine.state import TrainingState
from distributed_at.engine.trainer import Trainer
from distributed_at.observe.events import EventLog
from distributed_at.recipes import load_recipe

OVERRIDES = (
    "model.base_width=4", "attack=null", "objective.name=standard", "train.ema=null", "train.precision=fp32",
    "evaluation.validation=[]", "train.select=last", "log.every_steps=10", "optimizer.weight_decay=0", "optimizer.nesterov=false",
)  # fmt: skip


def batches(parts: Parts, steps: int) -> MicroBatches:
    """Return the micro-batches of the first ``steps`` steps."""
    return MicroBatches(
        parts.source, parts.order, parts.plan, rank=0, device=parts.world.device, seed=parts.config.seed,
        first_step=0, last_step=steps, prefetch=parts.config.data.prefetch,
    )  # fmt: skip


def fresh_network(parts: Parts) -> nn.Module:
    """Return the recipe's network as it begins, its batch norm grouped as the engine groups it."""
    network = build_network(parts.config, parts.source.num_classes).train()
    set_groups(network, parts.objective, parts.plan)
    return network


def bare(network: nn.Module, parts: Parts, steps: int) -> None:
    """Train with the plain loop."""
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=parts.config.optimizer.momentum)
    ahead = batches(parts, steps)
    for step in range(steps):
        for group in sgd.param_groups:
            group["lr"] = parts.schedules.learning_rate(step)
        for micro in ahead.next_step():
            (F.cross_entropy(network(micro.batch.images), micro.batch.labels) * micro.weight).backward()
        sgd.step()
        sgd.zero_grad()
    ahead.close()


def engine(parts: Parts, steps: int, folder: Path) -> None:
    """Train with the trainer's loop, from step 0 with the weights as they are."""
    parts.total_steps = steps
    with EventLog(folder) as events:
        Trainer(TrainingState(parts), common.NoCheckpoints(), None, events).run()  # type: ignore[arg-type]


def main() -> None:
    """Check equality, measure, print and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits/natural.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    before = common.environment()
    # without DeepSpeed: its cost is its own; what is measured here is this project's code
    with mock.patch("distributed_at.engine.parallel.deepspeed_available", return_value=False):
        world = initialise_world()
        config = load_recipe(arguments.recipe, list(OVERRIDES)).config
        steps = arguments.steps
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)

            parts = build_parts(config, world)
            network = fresh_network(parts)
            engine(parts, steps, folder)
            bare(network, parts, steps)
            last, expected = _loss(parts.engine.module, parts, steps), _loss(network, parts, steps)
            if abs(last - expected) > 1e-4 * max(1.0, abs(expected)):
                raise SystemExit(f"the engine's network has loss {last:.6f}, the bare loop's {expected:.6f}: no timing")
            comparison = common.compare(
                {"bare loop": lambda: bare(network, parts, steps), "engine": lambda: engine(parts, steps, folder)},
                baseline="bare loop",
                rounds=arguments.rounds,
                warm_up=1,
            )
        shutdown_world()
    times = {name: 1e6 * timing.median / steps for name, timing in comparison.timings.items()}
    print(f"A/A control {comparison.control}{'' if comparison.trusted else '  NOT TRUSTED: the machine was too busy'}")
    for name, microseconds in times.items():
        print(f"  {name:10s} {microseconds:8.0f} µs a step")
    extra = times["engine"] - times["bare loop"]
    print(f"  the engine adds {extra:.0f} µs a step; a PGD-30 step of ResNet-50 takes 100,000 µs and more")
    content = {"setting": vars(arguments), "microseconds_a_step": times, "added": extra, "comparison": comparison}
    print(common.write_result("engine_overhead", content, before=before))


def _loss(network: nn.Module, parts: Parts, steps: int) -> float:
    """Return a trained network's loss on the batch after the last one."""
    ahead = batches(parts, steps + 1)
    for _ in range(steps):
        ahead.next_step()
    micro = ahead.next_step()[0]
    ahead.close()
    with torch.no_grad():
        return F.cross_entropy(network.train()(micro.batch.images), micro.batch.labels).item()


if __name__ == "__main__":
    main()
