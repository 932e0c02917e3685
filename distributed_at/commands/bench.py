"""Measure a run of yours: 'precision' certifies what 16-bit attacks on its network are worth beside float32 ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed_at.commands.common import add_json, find_run, print_json, print_table, say
from distributed_at.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from distributed_at.bench.precision import Estimate, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    precision = kinds.add_parser("precision", help="fp32, tf32, bf16 and fp16 attacks on the same samples and starts")
    precision.add_argument("run", help="run folder, or its name under --runs")
    precision.add_argument("--checkpoint", default="auto", help="'best', 'last', a step folder, or 'auto' (default)")
    precision.add_argument("--split", choices=("test", "validation"), default="test")
    precision.add_argument("--num-samples", type=int, default=1000, help="drawn by counters (default 1000)")
    precision.add_argument("--batch-size", type=int, default=100)
    precision.add_argument("--output", type=Path, help="certificate file (default RUN/precision.json)")
    precision.add_argument("--runs", type=Path, default=Path("runs"))
    add_json(precision)


def run(args: argparse.Namespace) -> int:
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    document, rows = _certify(args, find_run(args.run, str(args.runs)))
    path = args.output or find_run(args.run, str(args.runs)) / "precision.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print_json(document)
    else:
        print_table(_table(rows, document))
    for precision, reason in document["skipped"].items():
        say(f"{precision} skipped: {reason}")
    say(f"certificate: {path}; name it in a recipe as attack.precision_certificate")
    return 0


def _certify(args: argparse.Namespace, root: Path) -> tuple[dict[str, Any], list[Row]]:
    import numpy as np
    import torch

    from distributed_at.bench import precision
    from distributed_at.data.sources import open_split
    from distributed_at.engine.builder import num_classes_of
    from distributed_at.engine.runs.folder import RunFolder
    from distributed_at.engine.runs.weights import open_network
    from distributed_at.evaluation import evaluation_ids, ids_hash, weights_hash
    from distributed_at.recipes import load_recipe
    from distributed_at.rng import EVALUATION_EPOCH

    config = load_recipe(str(root / "recipe.yaml"), []).config
    if config.attack is None:
        raise ConfigError(f"{config.name} trains without an attack, so there is none to certify")
    folder = RunFolder(root)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_split(config.data, args.split, seed=config.seed)
    saved = open_network(folder, config, args.checkpoint, num_classes=source.num_classes)
    source = saved.fitting(source)
    path, network = saved.path, saved.network.to(device)
    classes = num_classes_of(config, source)
    reasons = precision.available_precisions(device)
    test = precision.PrecisionTest(
        network, config.attack, num_classes=classes, seed=config.seed,
        precisions=tuple(p for p, reason in reasons.items() if not reason),
    )  # fmt: skip
    ids = evaluation_ids(source, min(args.num_samples, len(source.sample_ids)))
    say(f"attacking {len(ids)} {args.split} images of {path.name} in {sum(not r for r in reasons.values())} precisions")
    for piece in np.array_split(ids, max(1, -(-len(ids) // args.batch_size))):
        images, labels = source.read(piece, epoch=EVALUATION_EPOCH, train=False, seed=config.seed)
        x = images.to(device).to(torch.float32).div_(255.0)
        test.add(x, labels.to(device), torch.from_numpy(piece).to(device))
    rows = test.rows()
    about = {
        "run": config.name,
        "checkpoint": path.name,
        "model": config.model.model_dump(mode="json"),
        "weights": weights_hash(network),
        "attack": config.attack.model_dump(mode="json"),
        "dataset": config.data.dataset,
        "split": args.split,
        "num_samples": len(ids),
        "data_ids": ids_hash(ids),
        "seed": config.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    skipped = {name: reason for name, reason in reasons.items() if reason}
    return precision.certificate(rows, skipped=skipped, about=about), rows


def _percent(estimate: Estimate | None, digits: int = 2) -> str:
    if estimate is None:
        return "–"
    value, low, high = (100 * v for v in (estimate.value, estimate.low, estimate.high))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _table(rows: list[Row], document: dict[str, Any]) -> Table:
    from rich.table import Table

    attack = document["attack"]
    table = Table(
        title=f"{document['run']}: PGD-{attack['num_steps']} on {document['num_samples']} images, judged in fp32"
    )
    for column in (
        "attack in",
        "robust accuracy %",
        "above fp32 %",
        "loss",
        "loss missed %",
        "equal signs %",
        "verdict",
    ):
        table.add_column(column, justify="left" if column in ("attack in", "verdict") else "right")
    for row in rows:
        table.add_row(
            row.precision,
            _percent(row.robust_accuracy),
            _percent(row.accuracy_above_fp32),
            f"{row.loss.value:.4f}",
            _percent(row.loss_below_fp32),
            _percent(row.sign_agreement_start),
            row.verdict or "reference",
        )
    return table
