"""Arguments and output that several verbs share."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distributed_at.engine.processes.launch import Rank
from distributed_at.errors import ConfigError, UserError, did_you_mean


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and its overrides."""
    parser.add_argument("recipe", help="recipe file, its name in the shipped folders, or table.yaml#row")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optimizer.lr=0.05")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout instead of a table")


@contextlib.contextmanager
def telling_the_others(rank: Rank) -> Iterator[None]:
    """Let a user's mistake that this rank alone may have met (its node lacks a file) end all of them with one message."""
    try:
        yield
    except UserError as error:
        from distributed_at.engine.processes.rendezvous import refuse

        refuse(error, error.exit_code, rank)
        raise


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    json.dump(document, sys.stdout, indent=2, sort_keys=False, default=str)
    print()


def print_table(table: Any) -> None:
    """Print a rich table on stdout; into a pipe or a file it gets room for every column."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))
    console.print(table)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys as a table on stdout."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    print_table(table)


def say(message: str) -> None:
    """Print a line for the person at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


def progress_on_terminal(name: str) -> Callable[[int, int], None] | None:
    """Return what shows (done, in all) on one line of stderr; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\r{name}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def find_run(text: str, runs: str = "runs") -> Path:
    """Return the run folder that ``text`` names: a path, or a name under ``runs/``.

    Raises:
        ConfigError: neither exists; names the nearest run.
    """
    for candidate in (Path(text), Path(runs) / text):
        if (candidate / "recipe.yaml").exists():
            return candidate
    known = sorted(p.parent.name for p in Path(runs).glob("*/recipe.yaml")) if Path(runs).is_dir() else []
    listed = f" Runs here: {', '.join(known[:12])}." if known else f" There is no run in {runs}/ yet."
    beside = "" if Path(text).is_absolute() else f" and in {Path(runs) / text}"
    raise ConfigError(
        f"no run folder {text!r}: looked for recipe.yaml in it{beside}.{did_you_mean(text, known)}{listed}"
    )
