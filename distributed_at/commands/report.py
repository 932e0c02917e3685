"""Write a run's self-contained report.html, with other runs beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from distributed_at.commands.common import add_json, find_run, print_json, print_table, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder, or its name under --runs")
    parser.add_argument("compare", nargs="*", help="other runs to set beside it, e.g. natural training")
    parser.add_argument("--output", type=Path, help="where to write (default: RUN/report.html)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    folder = find_run(args.run, str(args.runs))
    others = [find_run(name, str(args.runs)) for name in args.compare]

    from distributed_at.observe.report import build_report
    from distributed_at.observe.tables import compare_rows, table

    path = build_report(folder, compare=others, output=args.output)
    rows = compare_rows([folder, *others])
    if args.json:
        print_json({"report": str(path), "rows": rows})
    else:
        print_table(table(rows) if rows else "no evaluation yet")
        say(f"report: {path}")
    return 0
