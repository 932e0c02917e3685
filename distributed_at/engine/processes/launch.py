"""Who starts the ranks: `torchrun`, `srun`, DeepSpeed's launcher, or this command itself on one machine.

Only processes and environment variables here; process groups are made in ``parallel.py``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_at.cores import allowed_cores
from distributed_at.engine.processes.open_files import allow_files
from distributed_at.engine.processes.preemption import leave_terminal, stop_signals
from distributed_at.errors import EXIT_HANG, EXIT_REQUEUE, ConfigError

KILL_AFTER_SECONDS = 30.0
FIRST_PORT, PORTS = 20000, 12000  # below what systems give to outgoing connections, from 32768 on
WORKER_MARK = "DISTRIBUTED_AT_WORKER"
STORE_FD = "DISTRIBUTED_AT_STORE_FD"  # where rank 0 finds the socket that this launcher listens on


@dataclass(frozen=True)
class Rank:
    """This process's place among the workers."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str


def detect_rank(environ: Mapping[str, str] = os.environ) -> Rank | None:
    """Return the rank that a launcher gave this process, or None where it was started by hand.

    torchrun's and DeepSpeed's RANK win over SLURM's variables, because both may run inside an allocation.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        launcher = "self" if WORKER_MARK in environ else "torchrun"
        return Rank(int(environ["RANK"]), int(environ.get("LOCAL_RANK", 0)), int(environ["WORLD_SIZE"]), launcher)
    # SLURM_PROCID is set in a batch script too; only a step started by srun has SLURM_STEP_ID of a task.
    if "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "batch").isdigit():
        tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
        return Rank(int(environ["SLURM_PROCID"]), int(environ.get("SLURM_LOCALID", 0)), tasks, "srun")
    return None


def export_rendezvous(rank: Rank, environ: dict[str, str] | None = None) -> None:
    """Set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for torch and DeepSpeed from SLURM's variables."""
    env = os.environ if environ is None else environ
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = str(rank.rank), str(rank.world_size), str(rank.local_rank)
    if rank.launcher == "srun":
        # Node names need not resolve on every node; the launching node's address always does.
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
        restart = int(env.get("SLURM_RESTART_COUNT", 0))
        env.setdefault("MASTER_PORT", str(FIRST_PORT + (job * 131 + step * 17 + restart * 7) % PORTS))


def free_port() -> int:
    """Return a TCP port that was free on the loopback interface a moment ago."""
    with listening_socket() as found:
        return int(found.getsockname()[1])


def listening_socket() -> socket.socket:
    """Return a socket that listens on a free port of the loopback interface, which is ours as long as it is open."""
    first = os.getpid() * 7 + time.monotonic_ns() // 1000
    for number in range(PORTS):
        found = socket.socket()
        try:
            found.bind(("127.0.0.1", FIRST_PORT + (first + number) % PORTS))
            found.listen(2048)
        except OSError:
            found.close()
            continue
        return found
    raise ConfigError(f"no free port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} on this machine")


def usable_workers() -> int:
    """Return how many workers this machine holds: one a GPU, else one."""
    import torch

    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


def available_workers(environ: Mapping[str, str] = os.environ) -> int:
    """Return what `--workers auto` may use: the tasks that SLURM gave, the launcher's world, or this machine."""
    rank = detect_rank(environ)
    return rank.world_size if rank is not None else usable_workers()


def check_workers(text: str) -> int | None:
    """Parse `--workers`: a positive integer, or 'auto' (None)."""
    if text == "auto":
        return None
    try:
        workers = int(text)
    except ValueError:
        workers = 0
    if workers < 1:
        raise ConfigError(f"--workers is a positive number or 'auto', got {text!r}")
    return workers


def worker_environment(rank: int, workers: int, port: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of one local worker."""
    env = dict(environ)
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        LOCAL_WORLD_SIZE=str(workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    env[WORKER_MARK] = "1"
    # DeepSpeed and torch look for ninja and the console scripts on PATH; a venv may not be activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    if "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(max(1, allowed_cores(env) // workers))
    return env


def run_workers(arguments: Sequence[str], workers: int, log_folder: Path | None) -> int:
    """Run `distributed-at ARGUMENTS` as ``workers`` local processes and return the exit code of the run.

    Rank 0 keeps the terminal; the other ranks write to ``log_folder``. When one rank fails, the rest get SIGTERM and
    after 30 s SIGKILL, so that nothing is left behind. SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored, SIGHUP are passed
    on to every rank.
    """
    allow_files(workers, "cpu")  # one message rather than one a rank; each knows better what it needs on a GPU
    meeting = listening_socket()
    port = int(meeting.getsockname()[1])
    command = [sys.executable, "-m", "distributed_at", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    files = []
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGHUP:
            leave_terminal()
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    passed_on = (*stop_signals(), signal.SIGINT)
    previous = {s: signal.signal(s, forward) for s in passed_on}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)  # whoever started this command may have blocked them
    try:
        for rank in range(workers):
            output = None
            if rank and log_folder is not None:
                log_folder.mkdir(parents=True, exist_ok=True)
                output = open(log_folder / f"rank{rank:04d}.txt", "ab")  # noqa: SIM115 - lives as long as the worker
                files.append(output)
            env = worker_environment(rank, workers, port)
            if rank == 0:
                env[STORE_FD] = str(meeting.fileno())
            processes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    pass_fds=(meeting.fileno(),) if rank == 0 else (),
                    stdout=output,
                    stderr=subprocess.STDOUT if output is not None else None,
                    start_new_session=True,  # a Ctrl-C reaches the workers once, through forward()
                )
            )
        meeting.close()  # rank 0 has it
        return _wait(processes)
    finally:
        meeting.close()
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for file in files:
            file.close()


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; the first failure's code is the run's, and ends the others."""
    first_failure: int | None = None
    deadline = float("inf")
    while any(p.poll() is None for p in processes):
        failed = [p.returncode for p in processes if p.poll() not in (None, 0)]
        if failed and first_failure is None:
            first_failure = failed[0]
            deadline = time.monotonic() + KILL_AFTER_SECONDS
            grace = time.monotonic() + 5.0  # ranks that agreed to stop together need a moment
            while time.monotonic() < grace and any(p.poll() is None for p in processes):
                time.sleep(0.05)
            for p in processes:
                if p.poll() is None:
                    p.terminate()
        if time.monotonic() > deadline:
            for p in processes:
                if p.poll() is None:
                    p.kill()
        time.sleep(0.05)
    codes = [p.returncode for p in processes]
    if first_failure is None:
        first_failure = next((c for c in codes if c), 0)
    # a worker that raised a message of ours explains more than one that was killed for it, or that lost it
    own = [c for c in codes if c is not None and 0 < c < 128]
    if first_failure != EXIT_REQUEUE:
        # a rank that was only told to leave, by us, does not make a crash a request to go on
        own = [c for c in own if c != EXIT_REQUEUE]
    own.sort(key=lambda code: (code == EXIT_HANG, code != first_failure))
    told = own[0] if own else None
    result = told if first_failure and told is not None else first_failure
    return 128 - result if result < 0 else result
