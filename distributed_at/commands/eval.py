"""Measure clean and robust accuracy of a run's weights, sharded over workers, resumed at sample level."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_at.commands.common import add_json, find_run, print_json, print_table, say, telling_the_others
from distributed_at.engine.processes.launch import Rank, available_workers, check_workers, detect_rank, run_workers
from distributed_at.engine.processes.preemption import die_with_parent
from distributed_at.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from distributed_at.config import EvaluationEntry, RunConfig

EVALUATION_KEYS = ("evaluation.", "data.path", "data.backend", "data.limit_test", "data.num_threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder, or its name under --runs")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="evaluation.* and data.path may be overridden"
    )
    parser.add_argument(
        "--checkpoint", default="auto", help="'best', 'last', a step folder, or 'auto' (default): as train.select says"
    )
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--only", help="comma-separated names of protocols, e.g. clean,pgd20")
    parser.add_argument("--num-samples", type=int, help="measure only this many samples, drawn by counters")
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    add_json(parser)


def _load(args: argparse.Namespace, folder: Path) -> RunConfig:
    """Return the run's recipe with overrides that change the evaluation and nothing of what was trained."""
    from distributed_at.recipes import load_recipe

    for text in args.overrides:
        key = text.split("=", 1)[0]
        if not key.startswith(EVALUATION_KEYS):
            raise ConfigError(
                f"{key}: an evaluation cannot change what was trained; it takes {', '.join(EVALUATION_KEYS)}"
            )
    return load_recipe(str(folder / "recipe.yaml"), args.overrides).config


def entry_name(entry: EvaluationEntry) -> str:
    """Return the name that ``--only`` knows an entry of ``evaluation.final`` by."""
    from distributed_at.evaluation.kinds import KINDS

    return entry.name or KINDS[entry.kind].short_name(entry)


def _chosen_steps(entry: EvaluationEntry, wanted: list[str]) -> list[EvaluationEntry]:
    """Return what ``--only`` leaves of an entry: one pass up to the longest number of steps that it names."""
    from distributed_at.evaluation.kinds import KINDS

    kept = [single for single in KINDS[entry.kind].single_entries(entry) if entry_name(single) in wanted]
    if len(kept) < 2:
        return kept
    *fewer, longest = kept
    return [longest.model_copy(update={"checkpoints": tuple(w.attack.num_steps for w in fewer if w.attack)})]


def select_entries(config: RunConfig, only: str | None, num_samples: int | None) -> list[EvaluationEntry]:
    """Return the entries to measure: both branches of a mixture-BN network where an entry names none."""
    from distributed_at.engine.runs.evaluate_run import on_both_branches
    from distributed_at.evaluation.kinds import KINDS

    chosen = list(config.evaluation.final)
    if only is not None:
        names = [entry_name(single) for w in chosen for single in KINDS[w.kind].single_entries(w)]
        for wanted in only.split(","):
            if wanted not in names:
                raise ConfigError(
                    f"--only: the recipe has no protocol {wanted!r}; it has {', '.join(names)}.{did_you_mean(wanted, names)}"
                )
        chosen = [part for w in chosen for part in _chosen_steps(w, only.split(","))]
    if num_samples is not None:
        if num_samples < 1:
            raise ConfigError(f"--num-samples must be at least 1, got {num_samples}")
        chosen = [w.model_copy(update={"num_samples": num_samples}) for w in chosen]
    return on_both_branches(chosen, config)


def run(args: argparse.Namespace) -> int:
    rank = detect_rank()
    if rank is None:
        return _run(args, None)
    die_with_parent()
    with telling_the_others(rank):
        return _run(args, rank)


def _run(args: argparse.Namespace, rank: Rank | None) -> int:
    folder = find_run(args.run, str(args.runs))
    config = _load(args, folder)
    entries = select_entries(config, args.only, args.num_samples)
    if rank is None:
        workers = check_workers(args.workers) or available_workers()
        from distributed_at.data.sources import open_split

        open_split(config.data, args.split, seed=config.seed).close()
        return run_workers(args.words, workers, folder / "log")
    return _work(args, folder, config, entries)


def _work(args: argparse.Namespace, root: Path, config: RunConfig, entries: list[EvaluationEntry]) -> int:
    from distributed_at.data.source import ImageSource
    from distributed_at.engine.processes.watchdog import Watchdog, section_timeouts
    from distributed_at.engine.processes.world import initialise_world, shutdown_world
    from distributed_at.engine.runs.evaluate_run import evaluate_run
    from distributed_at.engine.runs.folder import RunFolder
    from distributed_at.engine.runs.weights import SavedNetwork
    from distributed_at.evaluation import EvaluationResult
    from distributed_at.observe.tables import evaluation_rows, table, worst_case_rows

    world = initialise_world(config.parallel.timeout_seconds)
    logs = RunFolder(root).logs
    watchdog = Watchdog(logs, rank=world.rank, timeouts=section_timeouts(config.parallel.timeout_seconds))

    def opened(saved: SavedNetwork, source: ImageSource) -> None:
        if world.is_main:
            say(
                f"evaluating {saved.path.name} on {source.num_samples} {args.split} images, {world.world_size} worker(s)"
            )

    def tell(result: EvaluationResult) -> None:
        if world.is_main:
            branch = f" ({result.protocol.branch})" if config.model.norm_facts.branches else ""
            say(f"  {result.protocol.name}{branch}: {result.correct}/{result.total} in {result.seconds:.1f} s")

    together = False
    try:
        found = evaluate_run(
            root,
            checkpoint=args.checkpoint,
            split=args.split,
            config=config,
            entries=entries,
            world=world,
            on_open=opened,
            on_result=tell,
            alive=watchdog.beat,
            watch=watchdog.section,
        )
        if world.is_main:
            rows = [*evaluation_rows(root), *worst_case_rows(config.name, found.results)]
            if args.json:
                print_json({"rows": rows, "verdicts": [verdict.to_dict() for verdict in found.verdicts]})
            else:
                print_table(table(rows, title=config.name))
                for verdict in found.verdicts:
                    print(f"suspicious [{verdict.code}]: {verdict.message}")
        together = True
    finally:
        watchdog.close()
        shutdown_world(together=together)
    return 0
