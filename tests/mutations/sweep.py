"""``python -m tests.mutations.sweep``: a counted random sample of cosmic-ray's mutants of the files that decide numbers.

cosmic-ray makes the mutants and keeps the session (one SQLite file a source file, so a killed sweep goes on where it
stopped); ``runner.py`` runs the tests, because a process with torch loaded costs seconds less a mutant. The sample is
of *places*: of each place drawn, one of its mutants, so that a ``+`` with eleven replacements counts once. Where a file
changes, its session starts anew; the others stay. Exit code 1 where a survivor has no reason in ``survivors.yaml``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import math
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutations import sweep_table
from tests.mutations.mutation import PACKAGE, ROOT, Mutation
from tests.mutations.numbers import FILES
from tests.mutations.runner import Verdict, baseline, run_all

SHARE, LEAST, SEED = 0.2, 6, 0  # of a file's places, at least so many; the sample's seed
CPU_SECONDS = 90  # a mutant; the tests of every file take a tenth of it
_HERE = Path(__file__).parent
_UNDRAWN = "not in the sample"


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations stand: they are text here, never evaluated, so a mutant inside one is no mutant."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                found.append(((part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)))
    return found


def _sample(items: tuple[Any, ...], source: str, key: str, share: float) -> tuple[set[str], set[str]]:
    """Return (job ids of mutants, job ids drawn). A place is a span of the source text."""
    text = _annotations(source)
    places: dict[tuple, list[tuple[str, int, str]]] = defaultdict(list)
    for item in items:
        (m,) = item.mutations
        if not any(start <= m.start_pos < end for start, end in text):
            places[(m.start_pos, m.end_pos)].append((m.operator_name, m.occurrence, item.job_id))
    chance = random.Random(key)
    drawn = chance.sample(sorted(places), min(len(places), max(LEAST, math.ceil(share * len(places)))))
    real = {job for mutants in places.values() for _, _, job in mutants}
    return real, {chance.choice(sorted(places[place]))[2] for place in drawn}


def _session(file: str, folder: Path, share: float) -> Path:
    """Return the file's session, made where there is none of this source, seed and share."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    source = (ROOT / PACKAGE / file).read_text()
    digest = hashlib.sha256(f"{source} {SEED} {share} {LEAST}".encode()).hexdigest()[:12]
    name = file.removesuffix(".py").replace("/", "-")
    path = folder / f"{name}-{digest}.sqlite"
    if not path.exists():
        for old in folder.glob(f"{name}-????????????.sqlite"):
            old.unlink()
        part = path.with_suffix(".part")
        with use_db(part) as db:
            init([Path(PACKAGE) / file], db, {})
            items = db.work_items
            real, drawn = _sample(items, source, f"{SEED} {file}", share)
            for jobs, why in ((real - drawn, _UNDRAWN), ({i.job_id for i in items} - real, "inside an annotation")):
                db.set_multiple_results(jobs, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output=why))
        part.replace(path)
    return path


def _mutants(file: str, items: list[Any]) -> Iterator[tuple[Mutation, str]]:
    """Turn cosmic-ray's work items into planted faults, with their job ids."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / PACKAGE / file).read_text()
    for item in items:
        (m,) = item.mutations
        mutated = mutate_code(source, get_operator(m.operator_name)(**m.operator_args), m.occurrence)
        what = f"{m.operator_name.removeprefix('core/')} {m.occurrence} line {m.start_pos[0]}"
        yield Mutation(what, file, source, mutated, FILES[file]), item.job_id


def _record(path: Path, job: str, verdict: Verdict) -> None:
    from cosmic_ray.mutating import _make_diff
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    m = verdict.mutation
    words = {0: "survived", 1: verdict.failed, -1: "timeout", -signal.SIGXCPU: "timeout", -signal.SIGKILL: "timeout"}
    result = WorkResult(
        worker_outcome=WorkerOutcome.NORMAL if verdict.code in (0, 1) else WorkerOutcome.ABNORMAL,
        test_outcome=TestOutcome.SURVIVED if verdict.code == 0 else TestOutcome.KILLED,
        output=words.get(verdict.code, f"does not import or crashes: exit {verdict.code}"),
        diff="\n".join(_make_diff(m.old, m.new, Path(m.file))),
    )
    with use_db(path, WorkDB.Mode.open) as db:
        db.set_result(job, result)


def _survivor(item: Any, result: Any) -> sweep_table.Survivor:
    (m,) = item.mutations
    return sweep_table.survivor(str(m.module_path), m.start_pos[0], m.operator_name, result.diff)


def _pending(path: Path, again: bool) -> list[Any]:
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome

    with use_db(path, WorkDB.Mode.open) as db:
        if again:
            known = sweep_table.reasons()
            lived = [
                (item, _survivor(item, r))
                for item, r in db.completed_work_items
                if r.test_outcome == TestOutcome.SURVIVED
            ]
            return [item for item, found in lived if not sweep_table.reason_for(found, known)]
        return sorted(db.pending_work_items, key=lambda item: item.mutations[0].start_pos)


def _counts(path: Path) -> tuple[sweep_table.Counts, list[sweep_table.Survivor]]:
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome

    counts = sweep_table.Counts()
    survivors = []
    with use_db(path, WorkDB.Mode.open) as db:
        counts.left = len(db.pending_work_items)
        for item, result in db.completed_work_items:
            if result.worker_outcome == WorkerOutcome.SKIPPED:
                counts.undrawn += result.output == _UNDRAWN
            elif result.test_outcome == TestOutcome.SURVIVED:
                counts.survived += 1
                survivors.append(_survivor(item, result))
            elif result.output == "timeout":
                counts.timed_out += 1
            else:
                counts.killed += 1
    return counts, survivors


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.sweep", description=__doc__)
    parser.add_argument("words", nargs="*", help="choose files whose names contain one of these")
    parser.add_argument("--tool", type=Path, help="folder that holds cosmic-ray, where it is not installed")
    parser.add_argument("--session", type=Path, default=ROOT / "build" / "mutate", help="where the sessions are kept")
    parser.add_argument("--share", type=float, default=SHARE, help="share of each file's places to draw")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--again", action="store_true", help="run survivors without a reason again: there are new tests"
    )
    parser.add_argument("--no-baseline", action="store_true", help="skip the run of the tests on the product as it is")
    parser.add_argument("--only-table", action="store_true", help="run nothing; write the table of what is known")
    parser.add_argument("--output", type=Path, default=_HERE / "sweep.md", help="the table, as Markdown")
    args = parser.parse_args()
    if args.tool:
        sys.path.append(str(args.tool.resolve()))  # last, so that the product's own libraries win
    os.chdir(ROOT)
    args.session.mkdir(parents=True, exist_ok=True)
    chosen = [file for file in FILES if not args.words or any(word in file for word in args.words)]
    sessions = {file: _session(file, args.session, args.share) for file in FILES}
    work = [pair for file in chosen for pair in _mutants(file, _pending(sessions[file], args.again))]
    if work and not args.only_table:
        tests = sorted({test for mutation, _ in work for test in mutation.tests})
        code, output = (0, "") if args.no_baseline else baseline(tests)
        if code:
            print(output)
            print("the tests fail on the product as it is: mend that first")
            return 2
        jobs = {id(mutation): job for mutation, job in work}
        done = 0

        def told(verdict: Verdict) -> None:
            nonlocal done
            done += 1
            _record(sessions[verdict.mutation.file], jobs[id(verdict.mutation)], verdict)
            print(f"[{done}/{len(work)}] {verdict.line()}", flush=True)

        run_all([mutation for mutation, _ in work], processes=args.processes, cpu_seconds=CPU_SECONDS, on_verdict=told)
    results = {file: _counts(path) for file, path in sessions.items()}
    tool = f"cosmic-ray {importlib.metadata.version('cosmic-ray')}"
    text, unexplained = sweep_table.table(results, tool=tool, share=args.share, seed=SEED)
    args.output.write_text(text)
    print(f"{args.output}: {sum(c.survived for c, _ in results.values())} survivors, {unexplained} without a reason")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
