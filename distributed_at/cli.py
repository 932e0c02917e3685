"""The command line: one verb, one function in ``commands/``; parsing, errors and exit codes here.

Imports of torch wait until a verb needs them, so that help, listings and mistakes answer at once. Tables go to stdout,
everything else to stderr; with ``--json`` stdout holds one JSON document and nothing more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from distributed_at import __version__
from distributed_at.commands.words import WordError, quoted, refuse, split_words, subparser
from distributed_at.errors import EXIT_CONFIG, UserError, did_you_mean, shorten
from distributed_at.terminal import make_printable

VERBS = {
    "train": "train a recipe; the same command resumes it",
    "eval": "measure clean and robust accuracy of a run, sharded over workers",
    "status": "say where a run stands and what to do next, as JSON",
    "report": "write a run's report.html, beside other runs",
    "figures": "draw the figures of a set of runs: clean ratio, attack iterations, BN statistics, depth",
    "plan": "check a recipe at any world size and say what it costs, without running it",
    "recipes": "list recipes, or show one resolved",
    "data": "index, check or pack an image folder; check a file of extra images",
    "bench": "certify what 16-bit attacks on a run's network are worth",
    "checkpoint": "list, verify, compare or convert checkpoints",
    "doctor": "say what is installed, what will be used, and how to fix what is missing",
}


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors name the nearest right spelling; an option is written whole."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: (['\"])(.*)\1 \(choose from (.*)\)", message, re.DOTALL)
        if choice:
            allowed = [word.strip(" '") for word in choice.group(3).split(",")]
            word = choice.group(2)
            message = f"{quoted(word)} is not one of {', '.join(allowed)}.{did_you_mean(word, allowed)}"
        self.print_usage(sys.stderr)
        print(f"distributed-at: error: {shorten(message)}", file=sys.stderr)
        raise SystemExit(EXIT_CONFIG)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="distributed-at", description="Distributed adversarial training at ImageNet scale.")
    parser.add_argument("--version", action="version", version=f"distributed-at {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in VERBS.items():
        module = importlib.import_module(f"distributed_at.commands.{verb}")
        module.add_arguments(verbs.add_parser(verb, help=text, description=module.__doc__))
    return parser


def _verb(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.ArgumentParser, str | None]:
    """Return the parser of the verb, or of a verb's own verb, that ``words`` name first, and its name."""
    names = []
    for word in words:
        inner = subparser(parser, word)
        if inner is not None:
            parser = inner
            names.append(word)
    return parser, " ".join(names) or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the process's exit code."""
    make_printable()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    chosen, verb = _verb(parser, words)
    try:
        split = split_words(words, parser)
    except WordError as error:
        chosen.error(str(error))
    args, unknown = parser.parse_known_args(split.rest)
    # argparse gives to ``overrides`` what it has no other place for
    if extra := [*(getattr(args, "overrides", None) or []), *unknown]:
        chosen.error(refuse([word for word in words if word in extra], words, chosen, verb))
    if split.overrides and not hasattr(args, "overrides"):
        chosen.error(f"'{verb}' takes no overrides, got {' '.join(quoted(word) for word in split.overrides[:3])}")
    args.overrides = split.overrides
    args.words = words
    try:
        return importlib.import_module(f"distributed_at.commands.{args.verb}").run(args)
    except UserError as error:
        _tell(f"distributed-at: error: {shorten(str(error))}")
        return error.exit_code
    except KeyboardInterrupt:
        print("distributed-at: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe (head, less) has gone; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        _tell(traceback.format_exc())
        return 1


def _tell(message: str) -> None:
    """Print a message on stderr without what the environment holds in secret; errors quote addresses and requests."""
    from distributed_at.observe.secrets import without_secrets

    print(without_secrets(message), file=sys.stderr)
