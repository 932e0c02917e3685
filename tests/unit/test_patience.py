"""The tests' own waits: they outlast whatever moves, and give up on what does not."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import patience
from tests.patience import Stuck, end_of, processor_seconds, run, wait_until

WORKS = "import time\nwhile time.process_time() < 2.5: pass"


def test_a_wait_lasts_as_long_as_something_moves():
    looks = []
    wait_until(lambda: looks.append(1) or len(looks) > 30, "30 looks", moved=lambda: len(looks), still=0.9, pause=0.1)
    assert len(looks) == 31


def test_time_in_which_the_waiting_process_itself_stood_still_is_no_hang(monkeypatch):
    clock, looks = iter(range(0, 10**6, 2000)), []
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    wait_until(lambda: looks.append(1) or len(looks) > 20, "20 looks")
    assert len(looks) == 21


def test_a_wait_for_what_does_not_move_gives_up_and_says_what_it_waited_for():
    with pytest.raises(Stuck, match="the moon is down: not within"):
        wait_until(lambda: False, "the moon is down", still=0.3)


def test_the_processor_time_of_a_process_counts_that_of_those_that_it_started():
    program = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKS!r}]); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "1\n"
        assert processor_seconds([child.pid]) >= 2
        child.stdin.close()
    assert processor_seconds([child.pid]) == 0  # it is gone


def test_an_ended_command_gives_its_code_and_what_it_printed():
    done = run([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_process_that_hangs_is_killed_with_those_that_it_started(monkeypatch):
    monkeypatch.setattr(patience.wait_until, "__kwdefaults__", {**patience.wait_until.__kwdefaults__, "still": 3.0})
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout.readline() == "1\n"
    with pytest.raises(Stuck):
        end_of(child)
    assert child.stdout.read() == ""  # nobody holds the pipe any more
