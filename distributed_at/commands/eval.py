"""Measure clean and robust accuracy of a run's weights, sharded over workers, resumed at sample level."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_at.commands.common import add_json, find_run, print_json, print_table, say
from distributed_at.engine.launch import available_workers, check_workers, detect_rank, run_workers
from distributed_at.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from distributed_at.config import EvalAttackConfig, RunConfig
    from distributed_at.engine.parallel import World
    from distributed_at.engine.runfolder import RunFolder
    from distributed_at.engine.watchdog import Watchdog

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


def protocol_name(what: EvalAttackConfig) -> str:
    """Return the name that ``--only`` knows an entry of ``evaluation.final`` by."""
    if what.name:
        return what.name
    if what.kind == "pgd" and what.attack is not None:
        return f"pgd{what.attack.num_steps}"
    return what.kind


def _chosen_steps(what: EvalAttackConfig, wanted: list[str]) -> list[EvalAttackConfig]:
    """Return what ``--only`` leaves of an entry: one pass up to the longest number of steps that it names."""
    from distributed_at.evaluation.step_counts import singles

    kept = [single for single in singles(what) if protocol_name(single) in wanted]
    if len(kept) < 2:
        return kept
    *fewer, longest = kept
    return [longest.model_copy(update={"checkpoints": tuple(w.attack.num_steps for w in fewer if w.attack)})]


def select_protocols(config: RunConfig, only: str | None, num_samples: int | None) -> list[EvalAttackConfig]:
    """Return the protocols to run: both branches of a mixture-BN network where a protocol names none."""
    from distributed_at.evaluation.step_counts import singles

    chosen = list(config.evaluation.final)
    if only is not None:
        names = [protocol_name(single) for w in chosen for single in singles(w)]
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
    if config.model.norm != "mbn":
        return chosen
    return [
        w if w.branch is not None else w.model_copy(update={"branch": branch})
        for w in chosen
        for branch in (("adv", "clean") if w.branch is None else (w.branch,))
    ]


def run(args: argparse.Namespace) -> int:
    folder = find_run(args.run, str(args.runs))
    config = _load(args, folder)
    protocols = select_protocols(config, args.only, args.num_samples)
    if detect_rank() is None:
        workers = check_workers(args.workers) or available_workers()
        from distributed_at.data.sources import open_split

        open_split(config.data, args.split, seed=config.seed).close()
        return run_workers(args.words, workers, folder / "log")
    return _work(args, folder, config, protocols)


def _work(args: argparse.Namespace, root: Path, config: RunConfig, protocols: list[EvalAttackConfig]) -> int:
    from distributed_at.engine.parallel import initialise_world, shutdown_world
    from distributed_at.engine.runfolder import RunFolder
    from distributed_at.engine.watchdog import Watchdog, section_timeouts

    folder = RunFolder(root)
    world = initialise_world(config.parallel.timeout_seconds)
    watchdog = Watchdog(folder.logs, rank=world.rank, timeouts=section_timeouts(config.parallel.timeout_seconds))
    together = False
    try:
        _evaluate(args, folder, config, protocols, world, watchdog)
        together = True
    finally:
        watchdog.close()
        shutdown_world(together=together)
    return 0


def _evaluate(
    args: argparse.Namespace,
    folder: RunFolder,
    config: RunConfig,
    protocols: list[EvalAttackConfig],
    world: World,
    watchdog: Watchdog,
) -> None:
    from distributed_at.data.sources import open_split
    from distributed_at.engine.builder import num_classes_of
    from distributed_at.engine.checkpoint import CheckpointManager
    from distributed_at.engine.weights import find_checkpoint, load_network
    from distributed_at.evaluation import EvaluationResult, evaluate_entry, judge
    from distributed_at.evaluation.examples import save_examples
    from distributed_at.observe.tables import evaluation_rows, table, worst_case_rows

    with open_split(config.data, args.split, seed=config.seed) as source:
        manager = CheckpointManager(folder.checkpoints)
        path = find_checkpoint(folder, manager, args.checkpoint, config)
        network = load_network(config, manager, path, num_classes=num_classes_of(config, source)).to(world.device)
        if world.is_main:
            say(f"evaluating {path.name} on {source.num_samples} {args.split} images, {world.world_size} worker(s)")
        everything: list[EvaluationResult] = []
        for what in protocols:
            with watchdog.section("evaluation"):
                results = evaluate_entry(
                    network,
                    source,
                    what,
                    training_attack=config.attack,
                    folder=folder.evaluations,
                    seed=config.seed,
                    architecture=config.model.model_dump_json(),
                    device=world.device,
                    alive=watchdog.beat,
                )
            everything += results
            for result in results if world.is_main else ():
                branch = f" ({result.protocol.branch})" if config.model.norm == "mbn" else ""
                say(f"  {result.protocol.name}{branch}: {result.correct}/{result.total} in {result.seconds:.1f} s")
        if not world.is_main:
            return
        attacked = next((w for w in protocols if w.kind == "pgd"), None)
        if attacked is not None and attacked.attack is not None:
            examples = folder.root / "examples.npz"
            save_examples(examples, network, source, attacked.attack, seed=config.seed, device=world.device)
    rows = [*evaluation_rows(folder.root), *worst_case_rows(config.name, everything)]
    verdicts = judge(everything)
    if args.json:
        print_json({"rows": rows, "verdicts": [asdict(verdict) for verdict in verdicts]})
    else:
        print_table(table(rows, title=config.name))
        for verdict in verdicts:
            print(f"suspicious [{verdict.code}]: {verdict.message}")
