"""List recipes by paper and table, or show one fully resolved; saved as a file it runs identically."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from distributed_at.commands.common import add_json, print_json, print_table
from distributed_at.errors import ConfigError

if TYPE_CHECKING:
    from distributed_at.recipes import RecipeEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", choices=("list", "show"))
    parser.add_argument("recipe", nargs="?", help="with 'show': the recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    add_json(parser)


def _row(entry: RecipeEntry) -> dict[str, Any]:
    """Return a listing's line; these keys are stable."""
    paper = entry.paper
    return {
        "ref": entry.ref,
        "paper": paper.title if paper else "",
        "table": paper.table if paper else "",
        "row": paper.row if paper else "",
        "numbers": dict(paper.numbers) if paper else {},
        "description": entry.description,
    }


def run(args: argparse.Namespace) -> int:
    from distributed_at import recipes

    if args.action == "show":
        if args.recipe is None:
            raise ConfigError("recipes show needs a recipe; 'distributed-at recipes' lists them")
        config = recipes.load_recipe(args.recipe, args.overrides).config
        if args.json:
            print_json(config.model_dump(mode="json"))
        else:
            print(recipes.dump_yaml(config), end="")
        return 0
    entries = recipes.list_recipes()
    if args.json:
        print_json([_row(e) for e in entries])
        return 0
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("recipe", "paper", "table", "the paper's numbers (%)"):
        table.add_column(column, overflow="fold", no_wrap=column == "recipe")
    for e in entries:
        row = _row(e)
        numbers = "  ".join(f"{k} {v:g}" for k, v in row["numbers"].items())
        table.add_row(row["ref"], row["paper"], row["table"], numbers)
    print_table(table)
    return 0
