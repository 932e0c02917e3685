"""Plants every fault in turn and prints what the user sees and what is lost.

python -m tests.faults.table [--json] [--only WORDS] [--write-docs]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tests.faults import damage, mishaps, processes, refusals, storage  # noqa: F401 - they fill the list
from tests.faults.faults import FAULTS, Bench, Fault, Seen, Undisturbed

DOCS = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- table of faults: begin -->", "<!-- table of faults: end -->"
COLUMNS = ("fault", "what you see", "exit code", "steps repeated", "state at the end")


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def do(fault: Fault, root: Path, undisturbed: Undisturbed) -> Seen:
    """Plant one fault in a run of its own below ``root``."""
    root.mkdir(parents=True)
    return fault.plant(Bench(root / "run", undisturbed))


def cells(fault: Fault, seen: Seen) -> tuple[str, ...]:
    """One row of the table."""
    repeated = "-" if seen.repeated is None else str(seen.repeated)
    return fault.name, seen.message, seen.exit_code, repeated, seen.end


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The table for the documentation."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def names_in_docs() -> list[str]:
    """Names of the faults in the documentation's table."""
    text = DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in text.strip().split("\n")[2:]]


def write_docs(rows: list[tuple[str, ...]]) -> None:
    """Put the table between its marks in the documentation."""
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/faults.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [fault for fault in FAULTS if args.only in fault.name]
    rows, failed, found = [], 0, []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        undisturbed = Undisturbed(Path(root))
        mount = can_mount()
        for number, fault in enumerate(chosen):
            if fault.root and not mount:
                print(f"not tried, it needs to mount a file system: {fault.name}", file=sys.stderr)
                continue
            try:
                seen = do(fault, Path(root) / f"fault{number}", undisturbed)
            except Exception as error:
                failed += 1
                print(f"FAILED {fault.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            rows.append(cells(fault, seen))
            found.append({"fault": fault.name, **asdict(seen)})
            if not args.json:
                name, message, code, repeated, end = rows[-1]
                told = textwrap.fill(message, 110, initial_indent="    sees: ", subsequent_indent="          ")
                print(f"{len(rows):2}. {name}\n{told}\n    exit {code}; repeated {repeated}; {end}", flush=True)
    if args.json:
        print(json.dumps(found, indent=1))
    print(
        f"{len(rows)} faults as promised, {failed} not, in {time.monotonic() - began:.0f} s; the most steps repeated: "
        f"{max((seen['repeated'] or 0 for seen in found), default=0)}",
        file=sys.stderr,
    )
    if args.write_docs and not failed and len(rows) == len(FAULTS):
        write_docs(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
