"""Say where a run stands: finished, newest good checkpoint, who runs it, what to do next. Prints one JSON document."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

from distributed_at.commands.common import print_json
from distributed_at.errors import ConfigError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder, or its name under --runs; one that does not exist was not started")
    parser.add_argument(
        "--get", metavar="FIELD", help="print this one field alone, for scripts: true, false, a number, a word"
    )
    parser.add_argument(
        "--exit-code", type=int, metavar="N", help="what the run's process ended with; exit_class and advice follow it"
    )
    parser.add_argument("--verify", action="store_true", help="read every byte of the newest checkpoint")
    parser.add_argument("--runs", type=Path, default=Path("runs"))


def run(args: argparse.Namespace) -> int:
    from distributed_at.engine.runs.status import Status, run_status

    names = [field.name for field in fields(Status)]
    if args.get is not None and args.get not in names:
        raise ConfigError(
            f"--get: a status has no field {args.get!r}; it has {', '.join(names)}.{did_you_mean(args.get, names)}"
        )
    folder = Path(args.run)
    if not folder.exists() and (args.runs / args.run).is_dir():
        folder = args.runs / args.run
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run folder {folder} is a file")
    status = run_status(folder, exit_code=args.exit_code, verify=args.verify).as_dict()
    if args.get is None:
        print_json(status)
    else:
        value = status[args.get]
        print(value if isinstance(value, str) else json.dumps(value))
    return 0
