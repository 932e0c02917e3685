"""A hang ends within its time with stacks and exit code 6; slow ranks are named."""

from __future__ import annotations

import subprocess
import sys
import time

from distributed_at.engine.watchdog import StepTimes, Watchdog
from distributed_at.errors import EXIT_HANG

HANG = """
import sys, time
from distributed_at.engine.watchdog import Watchdog
dog = Watchdog(sys.argv[1], rank=3, timeouts={"step": 0.5, "setup": 60})
def stuck_in_the_loader():
    time.sleep(60)
with dog.section("setup"), dog.section("step"):
    stuck_in_the_loader()
"""


def test_a_hang_leaves_stacks_and_its_exit_code(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_HANG
    assert time.monotonic() - began < 40
    text = (tmp_path / "stacks-rank3.txt").read_text()
    assert "stuck_in_the_loader" in text
    assert "section 'step'" in text
    assert "stacks-rank3.txt" in done.stderr


def test_progress_and_unwatched_time_are_no_hang(tmp_path):
    dog = Watchdog(tmp_path, timeouts={"step": 0.3})
    with dog.section("step"):
        for _ in range(5):
            time.sleep(0.12)
            dog.beat()
    time.sleep(0.5)
    dog.close()
    assert not dog.path.exists()


def test_a_slow_rank_is_named():
    times = StepTimes()
    assert times.stragglers() == []
    times.record(1.0)
    assert times.stragglers() == []  # alone, nobody is slower than the others
