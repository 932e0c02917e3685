"""One live run per run folder: a lock file that names its holder, with detection and safe takeover of dead holders.

It needs nothing of the file system but atomic hard links and renames, which NFS and Lustre have. It does not protect
against someone who deletes the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from distributed_at.errors import LockedError, UserError

LOCK = "lock"
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class Holder:
    """Who holds the lock: enough to tell, from any node, whether it still lives."""

    host: str
    boot: str  # the kernel's boot id: a rebooted host has no old processes
    namespace: str  # of process ids: containers on one host do not see each other's
    pid: int
    started: str  # the process's start time in clock ticks: process ids are used again
    job: str  # SLURM job (array tasks by their array id), "" outside of SLURM
    restart: int  # SLURM_RESTART_COUNT
    token: str  # unique to one acquisition
    time: float  # unix time of the acquisition

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"process {self.pid} on {self.host}{job}, since {since}"


def this_process() -> Holder:
    """Describe the calling process."""
    env = os.environ
    job = env.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return Holder(
        host=socket.gethostname(),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        namespace=_pid_namespace(),
        pid=os.getpid(),
        started=_start_time(os.getpid()),
        job=job,
        restart=int(env.get("SLURM_RESTART_COUNT", "0") or 0),
        token=secrets.token_hex(8),
        time=time.time(),
    )


class RunLock:
    """The lock of one run folder; a context manager, or ``acquire`` and ``release``. One process (rank 0) holds it.

    While held, a thread touches the file every ``heartbeat_seconds``. A holder on another host about which nothing else
    is known counts as dead once its last heartbeat is ``stale_seconds`` old, by the file server's clock.
    """

    def __init__(self, folder: Path | str, *, heartbeat_seconds: float = 15.0, stale_seconds: float = 180.0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        self._heartbeat_seconds, self._stale_seconds = heartbeat_seconds, stale_seconds
        self._me: Holder | None = None
        self.took_over: str | None = None  # whose lock was taken over, and why it counts as dead
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> RunLock:
        """Take the lock. Of several processes at once, exactly one succeeds.

        Raises:
            LockedError: a live process holds it; the message names it.
            UserError: the folder cannot be written.
        """
        me = this_process()
        mine = self.folder / f".lock-{me.token}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mine.write_text(json.dumps(asdict(me)), encoding="utf-8")
        except OSError as error:
            raise UserError(f"run folder {self.folder} cannot be written: {error.strerror}") from None
        try:
            for _ in range(20):
                if _link(mine, self.path):
                    break
                holder = self._holder()
                if holder is None:  # released in between, or not ours to judge yet
                    continue
                reason = self._why_dead(holder, me)
                if reason is None:
                    raise LockedError(
                        f"run folder {self.folder} is in use by {holder}. Stop it first, or use another folder or name."
                    )
                if self._take_over(holder, mine, me):
                    self.took_over = f"{holder}: {reason}"
                    break
            else:
                raise LockedError(f"run folder {self.folder}: its lock changes hands faster than it can be read")
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()
        self._me = me
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Give the lock back; somebody else's is left alone."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None
        if self.held():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._me = None

    def held(self) -> bool:
        """Whether the lock is still this process's."""
        if self._me is None:
            return False
        holder = self._holder()
        return holder is not None and holder.token == self._me.token

    def look(self) -> tuple[Holder | None, str | None]:
        """Return who holds the lock, and why that process counts as dead (None: it lives); changes nothing.

        Raises:
            LockedError: the lock cannot be read.
        """
        holder = self._holder()
        return holder, None if holder is None else self._why_dead(holder, this_process())

    def taken_by(self) -> Holder | None:
        """Who holds the lock instead of this process, None where nobody is known to: ask before writing what they write.

        A file server that does not answer is no reason to end a run, so a lock that cannot be read counts as ours.
        """
        if self._me is None:
            return None
        try:
            holder = self._holder()
        except LockedError:
            return None
        return holder if holder is not None and holder.token != self._me.token else None

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_seconds):
            with contextlib.suppress(OSError, LockedError):
                if self.held():
                    os.utime(self.path)

    def _holder(self) -> Holder | None:
        """Read the lock; a file that cannot be parsed (someone's debris) is a holder of which nothing is known."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LockedError(f"cannot read {self.path}: {error.strerror}") from None
        try:
            return Holder(**json.loads(text))
        except (ValueError, TypeError):
            return Holder("unknown", "", "", 0, "", "", 0, f"?{text[:40]}", 0.0)

    def _why_dead(self, holder: Holder, me: Holder) -> str | None:
        """Return why the holder is certainly or by its silence gone, or None where it must be taken for alive."""
        if holder.host == me.host and holder.boot and holder.boot == me.boot and holder.namespace == me.namespace:
            if _start_time(holder.pid) != holder.started or not holder.started:
                return "its process is gone"
            return None
        if holder.host == me.host and holder.boot and me.boot and holder.boot != me.boot:
            return "its host was rebooted"
        if holder.job and holder.job == me.job:
            return "an earlier start of this same job" if holder.restart < me.restart else self._silent()
        if holder.job:
            state = _slurm_state(holder.job)
            if state is not None:
                return None if state in _RUNNING else f"its job is {state or 'gone'}"
        return self._silent()

    def _silent(self) -> str | None:
        """Judge the last heartbeat by the file server's own clock: the time of a file just written beside it."""
        now_file = self.folder / f".lock-now-{secrets.token_hex(6)}"
        try:
            now_file.write_text("")
            age = now_file.stat().st_mtime - self.path.stat().st_mtime
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):
                now_file.unlink()
        return f"no heartbeat for {age:.0f} s" if age > self._stale_seconds else None

    def _take_over(self, dead: Holder, mine: Path, me: Holder) -> bool:
        """Replace a dead holder's lock. Of several that judged it dead, the one whose marker links first may replace."""
        marker = self.folder / f".lock-takeover-{_safe(dead.token)}"
        if not _link(mine, marker):
            with contextlib.suppress(OSError):  # a taker that died half way: its marker expires
                if time.time() - marker.stat().st_mtime > self._stale_seconds:
                    os.rename(marker, self.folder / f".lock-{me.token}-expired")
                    os.unlink(self.folder / f".lock-{me.token}-expired")
            time.sleep(0.05)
            return False
        try:
            now = self._holder()
            if now is None or now.token != dead.token:  # someone was faster and is done
                return False
            copy = self.folder / f".lock-{me.token}-new"
            os.link(mine, copy)
            os.utime(copy)
            os.replace(copy, self.path)
            return True
        finally:
            with contextlib.suppress(OSError):
                marker.unlink()


def _link(source: Path, target: Path) -> bool:
    """Make ``target`` a second name of ``source`` if it does not exist: atomic, also on NFS."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True


def _safe(token: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in token)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot, "" where there is none (a zombie counts as gone)."""
    stat = _read(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _slurm_state(job: str) -> str | None:
    """State of a SLURM job ("" where the scheduler no longer knows it), or None where the scheduler cannot be asked."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return done.stdout.strip().split("\n")[0]
    return "" if "Invalid job id" in done.stderr else None
