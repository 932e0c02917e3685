"""Check a recipe at any world size and say what it costs, without running it."""

from __future__ import annotations

import argparse

from distributed_at.commands.common import add_json, add_recipe, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--workers", "--gpus", type=int, default=1, help="world size to plan for (default 1)")
    parser.add_argument("--gpu", help="kind of GPU for hours and memory, e.g. h200, h100, a100, v100")
    parser.add_argument(
        "--fit-workers", type=int, metavar="N", help="print the largest world size up to N that the batch allows, alone"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from distributed_at.plan_table import plan_table
    from distributed_at.planning import make_plan
    from distributed_at.recipes import load_recipe

    if args.fit_workers is not None:
        from distributed_at.engine.batching import largest_world_size

        train = load_recipe(args.recipe, args.overrides).config.train
        size = largest_world_size(
            args.fit_workers,
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            bn_group_size=train.bn_group_size,
        )
        print(size)
        return 0
    plan = make_plan(load_recipe(args.recipe, args.overrides).config, world_size=args.workers, gpu=args.gpu)
    if args.json:
        print_json(plan.as_dict())
    else:
        print_table(plan_table(plan))
    return 0
