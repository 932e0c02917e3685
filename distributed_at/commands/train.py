"""Train a recipe. The same command resumes it from its newest good checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_at.commands.common import add_recipe, progress_on_terminal, say, telling_the_others
from distributed_at.engine.processes.launch import Rank, available_workers, check_workers, detect_rank, run_workers
from distributed_at.engine.processes.preemption import prepare_process

if TYPE_CHECKING:
    from distributed_at.config import RunConfig
    from distributed_at.engine.batching import BatchPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--workers", default="auto", help="workers on this machine, or 'auto' (default): as many as fit"
    )
    parser.add_argument("--run-folder", type=Path, help="where the run lives (default: runs/<name>)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument(
        "--fresh", action="store_true", help="start from step 0 although there are checkpoints (they are set aside)"
    )
    parser.add_argument(
        "--accept-data", action="store_true", help="go on although the data are not those that the run began with"
    )
    parser.add_argument("--quiet", action="store_true", help="no live console")


def run(args: argparse.Namespace) -> int:
    rank = detect_rank()
    if rank is None:
        return _run(args, None)
    prepare_process()  # before torch starts threads: they inherit the mask, and a signal must reach the listener alone
    with telling_the_others(rank):
        return _run(args, rank)


def _run(args: argparse.Namespace, rank: Rank | None) -> int:
    from distributed_at.engine.batching import BatchPlan, largest_world_size
    from distributed_at.engine.runs.folder import RunFolder
    from distributed_at.recipes import load_recipe

    config = load_recipe(args.recipe, args.overrides).config
    folder = RunFolder(args.run_folder or args.runs / config.name)
    batch_size = config.train.batch_size
    limits = {"micro_batch_size": config.train.micro_batch_size, "bn_group_size": config.train.bn_group_size}
    if rank is not None:
        from distributed_at.engine.run import run_worker

        BatchPlan.resolve(batch_size=batch_size, world_size=rank.world_size, **limits)
        return run_worker(config, folder, fresh=args.fresh, quiet=args.quiet, accept_data=args.accept_data)
    workers = check_workers(args.workers) or largest_world_size(available_workers(), batch_size=batch_size, **limits)
    batch = BatchPlan.resolve(batch_size=batch_size, world_size=workers, **limits)
    folder.check(config)
    from distributed_at.engine.runs.initial_weights import check_initial_weights

    if not folder.has_checkpoints:
        check_initial_weights(config)

    _check_data(config, batch)
    say(f"run {config.name}: {workers} worker{'s' if workers > 1 else ''}, folder {folder.root}")
    return run_workers(args.words, workers, folder.logs)


def _check_data(config: RunConfig, batch: BatchPlan) -> None:
    """Tell once, before any worker starts and anything is written, what the data cannot give."""
    from distributed_at.data.sources import open_split
    from distributed_at.data.training import open_training
    from distributed_at.engine.runs.data import look_at_data, require_labels
    from distributed_at.plan_warnings import refuse_lone_image

    source, _ = open_training(config, progress=progress_on_terminal("preparing data"))
    with source:
        look_at_data(config, source)
        require_labels(config, source)
        refuse_lone_image(
            config, batch, num_train=source.num_samples, num_classes=config.data.num_classes or source.num_classes
        )
    if config.evaluation.validation:
        open_split(config.data, "validation", seed=config.seed).close()
