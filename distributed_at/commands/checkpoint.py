"""List, verify, compare or convert checkpoints. Nothing in them is executed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distributed_at.commands.common import add_json, find_run, print_json, print_table, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (("ls", "list a run's checkpoints"), ("verify", "check every byte against the manifest")):
        action = actions.add_parser(name, help=text)
        action.add_argument("path", help="run folder or name, checkpoints folder, or one checkpoint")
        action.add_argument("--runs", type=Path, default=Path("runs"))
        add_json(action)
    diff = actions.add_parser("diff", help="largest difference of every tensor between two checkpoints")
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    add_json(diff)
    convert = actions.add_parser(
        "convert", help="to or from a plain PyTorch state dict, safetensors, or DeepSpeed's format"
    )
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("--average", action="store_true", help="the averaged weights, where the run keeps them")
    convert.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open a foreign pickle: it can run any code; only files that you trust",
    )


def run(args: argparse.Namespace) -> int:
    from distributed_at.engine.checkpoint import tools

    if args.action == "convert":
        written = tools.checkpoint_convert(
            args.source, args.target, average=args.average, allow_pickle=args.allow_pickle
        )
        say(f"wrote {written}")
        return 0
    if args.action == "diff":
        rows = tools.checkpoint_diff(args.first, args.second)
        different = any(not r["equal"] for r in rows)
        return _show(args, rows, 1 if different else 0)
    path = Path(args.path)
    if not path.is_dir() or (path / "recipe.yaml").exists():
        path = find_run(args.path, str(args.runs)) / "checkpoints"
    rows = tools.checkpoint_ls(path) if args.action == "ls" else tools.checkpoint_verify(path)
    bad = args.action == "verify" and any(r["state"] != "good" for r in rows)
    return _show(args, rows, 3 if bad else 0)


def _show(args: argparse.Namespace, rows: list[dict[str, Any]], code: int) -> int:
    if args.json:
        print_json(rows)
        return code
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    print_table(table if rows else "no checkpoints")
    return code
