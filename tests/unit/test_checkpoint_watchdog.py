"""A hang ends within its time with stacks and exit code 6; slow ranks are named."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from distributed_at.engine.processes import watchdog
from distributed_at.engine.processes.watchdog import StepTimes, Watchdog
from distributed_at.errors import EXIT_HANG
from tests.patience import LONGEST, run

HANG = f"""
import sys, time
from distributed_at.engine.processes.watchdog import Watchdog
dog = Watchdog(sys.argv[1], rank=3, timeouts={{"step": 0.5, "setup": {LONGEST}}})
def stuck_in_the_loader():
    time.sleep({LONGEST})
with dog.section("setup"), dog.section("step"):
    stuck_in_the_loader()
"""


def test_a_hang_leaves_stacks_and_its_exit_code(tmp_path):
    done = run([sys.executable, "-c", HANG, str(tmp_path)])
    assert done.returncode == EXIT_HANG
    text = (tmp_path / "stacks-rank3.txt").read_text()
    assert "stuck_in_the_loader" in text
    assert "section 'step'" in text
    assert "stacks-rank3.txt" in done.stderr


def test_progress_and_unwatched_time_are_no_hang(tmp_path, monkeypatch):
    """By a clock of its own: were this machine's time taken for a hang, the watchdog would end the test's process."""
    clock = [1000.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime))
    monkeypatch.setattr(watchdog, "_GRACE", LONGEST)
    dog = Watchdog(tmp_path, timeouts={"step": 0.3})
    with dog.section("step"):
        for _ in range(5):
            clock[0] += 0.29
            dog.beat()
            time.sleep(0.03)
        time.sleep(0.5)  # the watchdog looks at least every 0.3 s
    clock[0] += 100
    time.sleep(0.5)
    dog.close()
    assert not dog.path.exists()


def test_a_slow_rank_is_named():
    times = StepTimes()
    assert times.stragglers() == []
    times.record(1.0)
    assert times.stragglers() == []  # alone, nobody is slower than the others
