"""Stop signals are heard while a rank waits, acted on by all ranks at one step, and cannot be sent twice by accident."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed_at.engine.processes.preemption import stop_signals
from tests.patience import LONGEST, Stuck, end_of, wait_until

PROGRAM = """
import sys, time
from distributed_at.engine.processes import preemption
preemption.prepare_process()
listener = preemption.start_listening(grace_seconds=float(sys.argv[1]))
print("ready", flush=True)
while not preemption.stop_requested():
    time.sleep(0.01)
print("heard", listener.requested, flush=True)
sys.stdin.read()  # until the test has sent what it sends
print("saved", flush=True)
sys.exit(85)
"""


def start(grace: float) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(grace)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def test_usr1_storm_and_repeated_term_within_the_grace_are_one_request():
    child = start(LONGEST)
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "heard SIGTERM\n"
    for _ in range(20):
        child.send_signal(signal.SIGUSR1)
        child.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    child.stdin.close()
    assert child.stdout.read() == "saved\n"
    assert end_of(child) == 85


def test_second_term_after_the_grace_leaves_at_once():
    child = start(1.0)
    child.send_signal(signal.SIGUSR1)
    assert child.stdout.readline() == "heard SIGUSR1\n"
    time.sleep(1.2)
    child.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert child.poll() is None  # USR1 never insists
    child.send_signal(signal.SIGTERM)
    assert end_of(child) == 143
    assert child.stdout.read() == ""


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "from distributed_at.engine.processes.preemption import prepare_process; prepare_process(); import os, time;"
    "print(os.getpid(), flush=True); time.sleep(3600)"])
time.sleep(3600)
"""


def test_killed_launcher_leaves_no_worker():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    stat = Path(f"/proc/{worker}/stat")

    def gone() -> bool:
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    try:
        wait_until(gone, "the worker ends with its launcher", still=60.0)
    except Stuck:
        os.kill(worker, signal.SIGKILL)
        raise


def _steps(rank: int, world: int, folder: str) -> None:
    from distributed_at.engine.processes.preemption import agree_max, start_listening
    from distributed_at.engine.processes.watchdog import StepTimes

    listener = start_listening()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    assert agree_max([rank, -rank]) == [world - 1, 0]
    times = StepTimes()
    times.record(3.0 if rank == 1 else 1.0)
    slow = times.stragglers()
    assert [(s.rank, s.ratio) for s in slow] == [(1, 3.0)]
    for step in range(2000):
        if rank == 1 and step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(listener.stop_requested, "the signal is heard")  # the others wait in the collective meanwhile
        if agree_max([int(listener.stop_requested())])[0]:
            break
    Path(folder, f"stopped-{rank}").write_text(str(step))
    dist.barrier()
    dist.destroy_process_group()


def test_hang_up_asks_to_stop_unless_it_is_ignored():
    for disposition, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        before = signal.signal(signal.SIGHUP, disposition)
        try:
            assert (signal.SIGHUP in stop_signals()) is asked
        finally:
            signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("gone", [True, False])
def test_what_is_printed_on_a_terminal_that_is_gone_ends_nothing(gone):
    """A user's own code may print between the signal and the save."""
    program = (
        "from distributed_at.engine.processes.preemption import leave_terminal\n"
        "input()\nleave_terminal()\nprint('still here', flush=True)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    if gone:
        os.close(ours)
    process.communicate(b"\n", timeout=120)
    assert process.returncode == 0
    if not gone:
        assert b"still here" in os.read(ours, 100)
        os.close(ours)


def test_all_ranks_stop_at_the_same_step_and_slow_ranks_are_named(tmp_path):
    # a spawned child imports torch, whose threads inherit the mask, before its first line of ours runs
    old = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        mp.spawn(_steps, (3, str(tmp_path)), nprocs=3)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    assert {(tmp_path / f"stopped-{rank}").read_text() for rank in range(3)} == {"7"}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == old
