"""Plants each fault in a copy of the checkout and runs only the tests that should notice it.

Heavy libraries are imported once; each fault gets a forked process, so that one costs seconds. A fault counts as caught
only where a test *failed*: a copy that cannot be imported, a test that does not exist, or one that hangs, is reported.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutations.mirror import Mirror
from tests.mutations.mutation import Mutation

PRELOADED = ("torch", "torchvision", "deepspeed", "numpy", "scipy.stats", "sklearn.datasets", "pytest", "hypothesis",
             "pydantic", "yaml", "PIL.Image", "rich", "jinja2", "safetensors.torch", "torch.distributed.checkpoint")  # fmt: skip
TIMEOUT = 600.0  # seconds without an end; a test that hangs has its own, shorter limits
_FAILED, _PASSED = 1, 0
_WORDS = {0: "NOT CAUGHT", 2: "does not import", 3: "pytest broke", 4: "no such test", 5: "no test ran", -1: "hung"}


@dataclass(frozen=True)
class Verdict:
    """What became of one fault."""

    mutation: Mutation
    code: int
    seconds: float
    failed: str  # the first test that failed
    output: str

    @property
    def caught(self) -> bool:
        return self.code == _FAILED and bool(self.failed)

    def line(self) -> str:
        """One row of the table: file, what, caught by, seconds."""
        how = self.failed if self.caught else _WORDS.get(self.code, f"exit {self.code}")
        return f"{self.mutation.file:<34} {self.mutation.what:<70} {how}  {self.seconds:.1f} s"


def preload() -> None:
    """Import what every test needs and no test changes; the package itself stays out."""
    for name in PRELOADED:
        importlib.import_module(name)
    if any(name.split(".")[0] == "distributed_at" for name in sys.modules):
        raise RuntimeError("the package is imported already, so a planted fault would not be seen")


def run_tests(
    folder: Path, tests: Sequence[str], log: Path, timeout: float = TIMEOUT, cpu_seconds: int | None = None
) -> tuple[int, float]:
    """Run tests in a forked process that stands in ``folder``; return pytest's exit code (-1: hung) and the seconds.

    ``cpu_seconds`` limits its processor time, which a busy machine does not stretch; past it the code is -SIGXCPU.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        if cpu_seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
        _become_pytest(folder, tests, log)
    deadline = started + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - started
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1, time.monotonic() - started


def _become_pytest(folder: Path, tests: Sequence[str], log: Path) -> None:
    """Turn this forked process into a test run. Never returns."""
    code = 3
    try:
        os.setsid()
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.chdir(folder)
        for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
            del sys.modules[name]
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(Path(__file__).parents[2])))]
        importlib.invalidate_caches()
        os.environ["PYTHONPATH"] = str(folder)
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "-rfE"]
        code = int(pytest.main([*options, "-m", "not slow and not gpu", *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _first_failure(output: str) -> str:
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" ", 1)[1].split(" - ", 1)[0]
    return ""


def run_all(
    mutations: Sequence[Mutation],
    *,
    processes: int = 2,
    cpu_seconds: int | None = None,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Plant every fault, ``processes`` at a time, each in a copy of its own."""
    preload()
    forking = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        mirrors: SimpleQueue[tuple[Mirror, Path]] = SimpleQueue()
        for number in range(processes):
            folder = Path(name) / str(number)
            folder.mkdir()
            mirrors.put((Mirror(folder), Path(name) / f"{number}.log"))

        def judge(mutation: Mutation) -> Verdict:
            mirror, log = mirrors.get()
            try:
                with mirror.with_fault(mutation):
                    code, seconds = run_tests(mirror.folder, mutation.tests, log, cpu_seconds=cpu_seconds)
                output = log.read_text(errors="replace")
            finally:
                mirrors.put((mirror, log))
            verdict = Verdict(mutation, code, seconds, _first_failure(output), output)
            with forking:
                on_verdict(verdict)
            return verdict

        with ThreadPoolExecutor(processes) as pool:
            return list(pool.map(judge, mutations))


def baseline(tests: Sequence[str]) -> tuple[int, str]:
    """Run the named tests on the product as it stands; they must pass before a failure means anything."""
    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name) / "whole"
        folder.mkdir()
        mirror, log = Mirror(folder), Path(name) / "log"
        code, _ = run_tests(mirror.folder, tests, log, timeout=3600.0)
        return code, log.read_text(errors="replace")
