"""``python -m tests.mutations [WORDS] [--processes N] [--no-baseline] [--output FILE]``: plant faults, print who noticed.

WORDS choose faults whose file or description contains them. Exit code 1 where one was not caught.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.runner import Verdict, baseline, run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="choose faults by file or description")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-baseline", action="store_true", help="skip the run of the tests on the product as it is")
    parser.add_argument("--output", type=Path, help="write the table there as Markdown")
    parser.add_argument("--show", action="store_true", help="print the tests' output where a fault was not caught")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if all(word in f"{m.file} {m.what}" for word in args.words)]
    if not chosen:
        print("no planted fault matches")
        return 2
    if not args.no_baseline:
        code, output = baseline(sorted({test for m in chosen for test in m.tests}))
        if code:
            print(output)
            print("the tests fail on the product as it is: mend that first")
            return 2

    def told(verdict: Verdict) -> None:
        print(verdict.line(), flush=True)
        if args.show and not verdict.caught:
            print(verdict.output, flush=True)

    verdicts = run_all(chosen, processes=args.processes, on_verdict=told)
    caught = sum(v.caught for v in verdicts)
    if args.output:
        args.output.write_text(_markdown(verdicts))
    print(f"caught {caught} of {len(verdicts)} planted faults in {sum(v.seconds for v in verdicts):.0f} s of tests")
    return 0 if caught == len(verdicts) else 1


def _markdown(verdicts: list[Verdict]) -> str:
    rows = ["| file | fault | caught by | s |", "|---|---|---|---|"]
    for v in verdicts:
        rows.append(f"| {v.mutation.file} | {v.mutation.what} | {v.failed or 'NOT CAUGHT'} | {v.seconds:.1f} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
