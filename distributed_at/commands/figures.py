"""Draw Xie & Yuille's figures 1, 2, 3, 5, 6 and 7 from run folders, as SVG and PNG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_at.catalogue.norms import recorded_norm
from distributed_at.commands.common import add_json, find_run, print_json, say
from distributed_at.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from distributed_at.observe.figures import Drawn
    from distributed_at.observe.record import RunRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", help="run folders, or their names under --runs")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder to write to (default: figures)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--format", action="append", choices=("svg", "png", "pdf"), help="default: svg and png")
    parser.add_argument(
        "--layer", help="batch norm of figures 5 and 6 (default: one in the middle of the second stage)"
    )
    parser.add_argument("--batches", type=int, default=2, help="mini-batches of figure 6; 0 leaves it out (default 2)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.batches < 0:
        raise ConfigError(f"--batches must be at least 0, got {args.batches}")
    folders = [find_run(name, str(args.runs)) for name in args.run]

    from distributed_at.observe.figures import attack_iterations, clean_ratio, depth, save
    from distributed_at.observe.record import load_run

    records = [load_run(folder) for folder in folders]
    drawn = [
        clean_ratio(records),
        attack_iterations(records, shared=True, name="figure2"),
        attack_iterations(records, shared=False, name="figure3"),
        *_statistics(records, args),
        depth(records),
    ]
    rows = []
    for figure in drawn:
        if figure is not None:
            paths = save(figure, args.output, tuple(args.format or ("svg", "png")))
            rows.append({"figure": figure.name, "caption": figure.caption, "files": [str(p) for p in paths]})
            say(f"{figure.name}: {figure.caption}")
    if not rows:
        raise DataError(
            "these runs give no figure: figures 1, 2, 3 and 7 need evaluations ('distributed-at eval RUN') at two shares, "
            "step counts or depths, figures 5 and 6 a checkpoint of a network with batch norm"
        )
    if args.json:
        print_json(rows)
    else:
        for row in rows:
            print(*row["files"], sep="\n")
    return 0


def _statistics(records: list[RunRecord], args: argparse.Namespace) -> list[Drawn]:
    """Figures 5 and 6, each of the first run that can show it; what is missing is said and left out."""
    drawn: list[Drawn] = []
    norms = {record.folder: recorded_norm(record.section("model")) for record in records}
    for fact, draw in (("branches", _figure5), ("shared_statistics", _figure6)):
        record = next((r for r in records if getattr(norms[r.folder], fact) and r.section("objective")), None)
        if record is None or (draw is _figure6 and (args.batches == 0 or not record.section("attack"))):
            continue
        try:
            drawn.append(draw(record, args))
        except UserError as error:
            say(f"{draw.__name__.strip('_')} of {record.name} is left out: {error}")
    return drawn


def _figure5(record: RunRecord, args: argparse.Namespace) -> Drawn:
    from distributed_at.engine.checkpoint.tools import read_weights
    from distributed_at.evaluation.layer_statistics import choose_layer, norm_layer_names
    from distributed_at.observe.figures import LayerStatistics, branch_statistics, sample_channels

    state = read_weights(record.folder)
    layer = choose_layer(norm_layer_names(state), args.layer)
    clean, adv = (
        LayerStatistics(
            name=f"MBN_{branch}",
            mean=state[f"{layer}.{branch}.running_mean"].double().numpy(),
            variance=state[f"{layer}.{branch}.running_var"].double().numpy(),
        )
        for branch in ("clean", "adv")
    )
    return branch_statistics(clean, adv, layer=layer, run=record.name, channels=sample_channels(len(clean.mean)))


def _figure6(record: RunRecord, args: argparse.Namespace) -> Drawn:
    """Attack ``--batches`` groups of training images as training does, and look at one layer's statistics."""
    import torch

    from distributed_at.attacks import PGD
    from distributed_at.data.order import StepOrder
    from distributed_at.data.sources import open_split
    from distributed_at.engine.runs.folder import RunFolder
    from distributed_at.engine.runs.weights import open_network
    from distributed_at.engine.twin.twin import Twin
    from distributed_at.evaluation.layer_statistics import batch_statistics, choose_layer, norm_layer_names
    from distributed_at.observe.figures import LayerStatistics, batch_and_running, sample_channels
    from distributed_at.rng import EVALUATION_EPOCH

    folder = RunFolder(record.folder)
    config = folder.load_config()
    assert config.attack is not None
    group = config.train.bn_group_size or config.train.micro_batch_size or config.train.batch_size
    with open_split(config.data, "train", seed=config.seed) as opened:
        # the running statistics are those of the weights that were trained
        saved = open_network(folder, config, "last", num_classes=opened.num_classes, average=False)
        network, source = saved.network, saved.fitting(opened)
        layer = choose_layer(norm_layer_names(network.state_dict()), args.layer)
        order = StepOrder(source.num_samples, group, seed=config.seed, drop_last=True, sample_ids=source.sample_ids)
        attack = PGD.from_config(config.attack, num_classes=source.num_classes)
        # in the recipe's own mode; statistics that it would move stay as they are
        mode = "batch" if config.attack.bn_mode == "train" else config.attack.bn_mode
        attacked = Twin(network, bn_mode=mode, branch=config.attack.branch)
        found = []
        for number in range(args.batches):
            ids = order.ids(0, number)
            images, labels = source.read(ids, epoch=0, train=True, seed=config.seed)
            adv = attack.perturb(
                attacked,
                images.float() / 255,
                labels,
                sample_ids=torch.from_numpy(ids),
                group_ids=torch.full((len(ids),), number, dtype=torch.int64),
                epoch=EVALUATION_EPOCH,
                seed=config.seed,
            )
            mean, variance = batch_statistics(network, adv, layer=layer)
            found.append(LayerStatistics(name=f"batch {number + 1}", mean=mean.numpy(), variance=variance.numpy()))
    buffers = dict(network.named_buffers())
    running = LayerStatistics(
        name="running",
        mean=buffers[f"{layer}.running_mean"].double().numpy(),
        variance=buffers[f"{layer}.running_var"].double().numpy(),
    )
    return batch_and_running(found, running, layer=layer, run=record.name, channels=sample_channels(len(running.mean)))
