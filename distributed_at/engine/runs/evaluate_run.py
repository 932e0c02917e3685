"""Measure a run's network: the one way from a run folder to accuracies and verdicts, for commands and notebooks.

    from distributed_at.engine.runs.evaluate_run import evaluate_run
    found = evaluate_run("runs/mine")
    print(found.results[0].accuracy, found.verdicts)

It needs the run folder and the images that are measured, not those of training. What it finds stands in the run's
events, from which wandb, the report and every other view take it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from distributed_at.config import EvaluationEntry, RunConfig
from distributed_at.data.source import ImageSource
from distributed_at.data.sources import open_split
from distributed_at.engine.processes.world import World
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.views import remote_views
from distributed_at.engine.runs.weights import SavedNetwork, open_network
from distributed_at.evaluation import EvaluationResult, Execution, Subject, Verdict, evaluate_entry, judge
from distributed_at.evaluation.examination import examine
from distributed_at.evaluation.examples import save_examples
from distributed_at.evaluation.isolation import borrowed
from distributed_at.float32 import tf32
from distributed_at.models.branches import on_branch
from distributed_at.observe.events import EventLog, next_restart
from distributed_at.observe.record import load_run
from distributed_at.observe.verdicts import run_verdicts


@dataclass(frozen=True, kw_only=True)
class RunEvaluation:
    """What was found of one checkpoint of a run.

    Attributes:
        checkpoint: folder that the weights come from.
        results: one a protocol, in the recipe's order.
        verdicts: on the run, gravest first; empty on ranks other than 0.
    """

    checkpoint: Path
    results: tuple[EvaluationResult, ...]
    verdicts: tuple[Verdict, ...]


def subject_of(network: nn.Module, config: RunConfig) -> Subject:
    """Return a run's network as an evaluation sees it; the contents of plug-ins are part of what it is."""
    description = config.model.description
    if config.plugins:
        content = {"model": json.loads(description), "plugins": sorted(plugin.sha256 for plugin in config.plugins)}
        description = json.dumps(content, sort_keys=True)
    return Subject(network=network, description=description, training_attack=config.attack, seed=config.seed)


def other_data(difference: str) -> Verdict:
    """Return the verdict on numbers of other data than those that the run began with."""
    return Verdict("other_data", f"measured on other data than the run's own: {difference}", {})


def looked_at(subject: Subject, source: ImageSource, *, device: torch.device) -> list[Verdict]:
    """Return what a look at a few images tells of a run's network."""
    assert isinstance(subject.network, nn.Module)
    with tf32(False), borrowed(subject.network), on_branch(subject.network, subject.branch or "adv"):
        return examine(subject.network, source, device=device)


def measure(
    subject: Subject, source: ImageSource, entries: Sequence[EvaluationEntry], execution: Execution
) -> list[EvaluationResult]:
    """Measure every entry of a recipe on one network."""
    return [result for entry in entries for result in evaluate_entry(subject, source, entry, execution=execution)]


def evaluate_run(
    folder: Path | str,
    *,
    checkpoint: str = "auto",
    split: Literal["test", "validation"] = "test",
    config: RunConfig | None = None,
    entries: Sequence[EvaluationEntry] | None = None,
    world: World | None = None,
    keep_examples: bool = True,
    on_open: Callable[[SavedNetwork, ImageSource], None] = lambda saved, source: None,
    on_result: Callable[[EvaluationResult], None] = lambda result: None,
    alive: Callable[[], None] = lambda: None,
    watch: Callable[[str], AbstractContextManager[None]] = lambda section: nullcontext(),
) -> RunEvaluation:
    """Measure the network of a run, keep every row in its folder, and write what was found into its events.

    Where torch.distributed runs, every rank calls it and shares the work; rank 0 writes.

    Args:
        folder: the run's.
        checkpoint: 'auto' (as ``train.select`` says), 'best', 'last', or a step folder.
        split: 'test' or 'validation'.
        config: the run's recipe where an evaluation overrides parts of it; None = as the folder holds it.
        entries: what to measure; None = ``evaluation.final``, on both branches of a network that has two.
        world: this process among the workers; None = alone, on the GPU where there is one.
        keep_examples: write ``examples.npz`` for the report.
        on_open, on_result: called when the network is loaded, and with each result.
        alive: called before each forward pass: a watchdog's ``beat``; watch: a watchdog's ``section``.

    Raises:
        CheckpointError: no such checkpoint.
        DataError: the images cannot be read.
    """
    run = RunFolder(Path(folder))
    config = config if config is not None else run.load_config()
    world = world if world is not None else _alone()
    chosen = list(entries) if entries is not None else on_both_branches(config.evaluation.final, config)
    with open_split(config.data, split, seed=config.seed) as source:
        saved = open_network(run, config, checkpoint, num_classes=source.num_classes)
        fitting, other = saved.fitting(source), saved.other_data(source)
        network = saved.network.to(world.device)
        on_open(saved, fitting)
        subject = subject_of(network, config)
        execution = Execution(folder=run.evaluations, device=world.device, alive=alive)
        results: list[EvaluationResult] = []
        for entry in chosen:
            with watch("evaluation"), tf32(False):
                found = measure(subject, fitting, [entry], execution)
            results += found
            for result in found:
                on_result(result)
        verdicts: list[Verdict] = []
        if world.is_main:
            attack = next((e.attack for e in chosen if e.attack is not None and e.attack.num_steps > 0), None)
            if keep_examples and attack is not None:
                save_examples(
                    run.root / "examples.npz", network, fitting, attack, seed=config.seed, device=world.device
                )
            doubts = [] if other is None else [other_data(other)]
            doubts += looked_at(subject, fitting, device=world.device)
            verdicts = _record(run, config, saved, split, results, data=source.identity().digest, doubts=doubts)
    return RunEvaluation(checkpoint=saved.path, results=tuple(results), verdicts=tuple(verdicts))


def on_both_branches(entries: Sequence[EvaluationEntry], config: RunConfig) -> list[EvaluationEntry]:
    """Return entries with a branch each: both branches of a mixture-BN network where an entry names none."""
    if not config.model.norm_facts.branches:
        return list(entries)
    return [
        entry if entry.branch is not None else entry.model_copy(update={"branch": branch})
        for entry in entries
        for branch in (("adv", "clean") if entry.branch is None else (entry.branch,))
    ]


def _record(
    run: RunFolder,
    config: RunConfig,
    saved: SavedNetwork,
    split: str,
    results: Sequence[EvaluationResult],
    *,
    data: str,
    doubts: Sequence[Verdict],
) -> list[Verdict]:
    """Write results and verdicts into the run's events; return the verdicts.

    ``data``: digest of the data that were measured; ``doubts``: of data and network, whatever was measured.
    """
    other = next((doubt.message for doubt in doubts if doubt.code == "other_data"), None)
    restart = max(0, next_restart(run.root) - 1)
    with EventLog(run.root, restart=restart, views=remote_views(config, run)) as events:
        step, epoch = saved.step, saved.epoch
        for result in results:
            if result.complete:
                measured = {"data": data, **({} if other is None else {"other_data": other})}
                events.write(
                    "evaluation", step=step, epoch=epoch, checkpoint=saved.path.name, **measured, **result.summary()
                )
        verdicts = run_verdicts(load_run(run.root), [*doubts, *judge(results)])
        events.write(
            "verdict", step=step, epoch=epoch, split=split, verdicts=[verdict.to_dict() for verdict in verdicts]
        )
    return verdicts


def _alone() -> World:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return World(rank=0, world_size=1, local_rank=0, device=device)
