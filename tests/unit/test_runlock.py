"""A run folder belongs to one live run; a dead one's lock is taken over by exactly one successor."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distributed_at.engine.runs import lock as runlock
from distributed_at.engine.runs.lock import RunLock, this_process
from distributed_at.errors import EXIT_LOCKED, LockedError
from tests.patience import LONGEST, wait_until


def plant(folder: Path, **changes) -> None:
    """A lock file left by a process that differs from this one in ``changes``."""
    holder = replace(this_process(), **changes)
    (folder / "lock").write_text(json.dumps(asdict(holder)))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


def test_second_job_is_refused_with_the_holder_named(tmp_path):
    with RunLock(tmp_path), pytest.raises(LockedError) as caught:
        RunLock(tmp_path).acquire()
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert caught.value.exit_code == EXIT_LOCKED
    with RunLock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def _race(folder: str, ready, go, results) -> None:
    lock = RunLock(folder)
    ready.release()
    while not go.value:
        pass
    try:
        lock.acquire()
        results.put(True)
        time.sleep(LONGEST)  # the winner lives until all have tried: a dead one's lock would be taken over
    except LockedError:
        results.put(False)


@pytest.mark.parametrize("stale", [False, True])
def test_of_racing_jobs_exactly_one_wins(tmp_path, stale):
    context = multiprocessing.get_context("fork")
    pid = dead_pid()
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if stale:
            plant(folder, pid=pid)
        ready, go, results = context.Semaphore(0), context.Value("b", 0, lock=False), context.Queue()
        racers = [context.Process(target=_race, args=(str(folder), ready, go, results)) for _ in range(8)]
        for racer in racers:
            racer.start()
        try:
            assert all(ready.acquire(timeout=LONGEST) for _ in racers)
            go.value = 1
            won = [results.get(timeout=LONGEST) for _ in racers]
        finally:
            for racer in racers:
                racer.kill()
                racer.join()
        assert sum(won) == 1


def test_dead_process_on_this_host_and_reused_pid_are_stale(tmp_path):
    plant(tmp_path, pid=dead_pid())
    with RunLock(tmp_path):
        pass
    plant(tmp_path, started="1")  # our pid, but of an earlier process
    with RunLock(tmp_path):
        pass


def test_process_of_another_container_on_this_host_is_judged_by_its_heartbeat(tmp_path):
    """Containers do not see each other's processes, so a process that cannot be seen may live."""
    plant(tmp_path, namespace="pid:[1]", pid=dead_pid())
    with pytest.raises(LockedError):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / "lock", (time.time() - 1000, time.time() - 1000))
    with RunLock(tmp_path):
        pass


def test_a_rebooted_host_has_no_old_processes(tmp_path):
    plant(tmp_path, boot="before")
    with RunLock(tmp_path) as lock:
        assert "its host was rebooted" in lock.took_over


def test_live_process_is_never_stale_however_old_its_heartbeat(tmp_path):
    plant(tmp_path)
    os.utime(tmp_path / "lock", (0, 0))
    with pytest.raises(LockedError):
        RunLock(tmp_path).acquire()


def test_another_host_is_judged_by_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(runlock, "_slurm_state", lambda job: None)
    plant(tmp_path, host="elsewhere", boot="other")
    with pytest.raises(LockedError, match="elsewhere"):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / "lock", (time.time() - 1000, time.time() - 1000))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize(("state", "free"), [("RUNNING", False), ("COMPLETING", False), ("", True), ("PENDING", True)])
def test_another_host_is_judged_by_its_job(tmp_path, monkeypatch, state, free):
    monkeypatch.setattr(runlock, "_slurm_state", lambda job: state)
    plant(tmp_path, host="elsewhere", boot="other", job="41")
    if free:
        RunLock(tmp_path).acquire().release()
    else:
        with pytest.raises(LockedError, match="SLURM job 41"):
            RunLock(tmp_path).acquire()


def test_requeued_job_takes_over_its_own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    plant(tmp_path, host="elsewhere", boot="other", restart=1)
    with RunLock(tmp_path):
        pass
    plant(tmp_path, host="elsewhere", boot="other", restart=2)  # another step of the running job
    with pytest.raises(LockedError):
        RunLock(tmp_path).acquire()


def test_heartbeat_keeps_the_lock_fresh_and_a_lost_lock_is_noticed_and_left_alone(tmp_path):
    lock = RunLock(tmp_path, heartbeat_seconds=0.05).acquire()
    os.utime(tmp_path / "lock", (0, 0))
    wait_until(lambda: (tmp_path / "lock").stat().st_mtime > 1, "the lock's time is renewed")
    assert lock.held()
    assert lock.taken_by() is None
    plant(tmp_path, token="somebody-else")
    assert not lock.held()
    assert lock.taken_by().token == "somebody-else"
    (tmp_path / "lock").rename(tmp_path / "aside")
    (tmp_path / "lock").mkdir()  # cannot be read: not known to be another's
    assert lock.taken_by() is None
    (tmp_path / "lock").rmdir()
    (tmp_path / "aside").rename(tmp_path / "lock")
    lock.release()
    assert (tmp_path / "lock").exists()


def test_debris_is_not_taken_for_a_free_folder(tmp_path):
    (tmp_path / "lock").write_text("{")
    with pytest.raises(LockedError, match="unknown"):
        RunLock(tmp_path).acquire()
