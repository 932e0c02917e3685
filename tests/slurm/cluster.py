"""A private SLURM cluster of two nodes on the loopback interface: its own munge, slurmctld and two slurmd.

It proves scripts, signals, requeueing and rank mapping; not networks, cgroups, GPUs or shared file systems.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distributed_at.engine.processes.launch import free_port

ROOT = Path(__file__).parents[2]
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
NODES = ("l1", "l2")
RELEASE_AFTER = 6.0  # seconds
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/ctld.log
SlurmdLogFile={root}/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
KillWait=60
MinJobAge=600
JobRequeue=1
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=l1 NodeHostname=localhost Port={port1} CPUs=4 RealMemory=4000
NodeName=l2 NodeHostname=localhost Port={port2} CPUs=4 RealMemory=4000
PartitionName=low Nodes=l1,l2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=l1,l2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Start it with ``start``; its commands see no other cluster, because SLURM_CONF names this one's file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment.update(
            SLURM_CONF=str(root / "slurm.conf"), PATH=PATH, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"
        )

    def start(self) -> Cluster:
        (self.root / "state").mkdir(parents=True)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        values = {"root": self.root, "user": getpass.getuser(), "port": free_port()}
        values.update(port1=free_port(), port2=free_port())
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(**values))
        munge = ["munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", f"--key-file={key}"]
        munge += [f"--{name}-file={self.root}/munge.{name}" for name in ("log", "pid", "seed")]
        self._launch("munged", munge)
        self._wait((self.root / "munge.socket").exists, "munged", 20)
        self._launch("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        self._wait(lambda: self.idle_nodes() == len(NODES), "both nodes", 60)
        return self

    def start_node(self, node: str) -> None:
        (self.root / f"spool-{node}").mkdir(exist_ok=True)
        self._launch(node, ["slurmd", "-D", "-N", node])

    def stop_controller(self) -> None:
        """The controller is away; the nodes go on with what they run."""
        controller = self._processes.pop("slurmctld")
        controller.terminate()
        controller.wait(20)

    def start_controller(self) -> None:
        """It comes back with what it knew."""
        self._launch("slurmctld", ["slurmctld", "-D"])
        self._wait(self._answers, "the controller", 60)

    def _answers(self) -> bool:
        done = subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True, text=True, check=False)
        return "UP" in done.stdout

    def kill_node(self, node: str) -> None:
        """The node dies: its slurmd and, as on a lost machine, everything that it ran."""
        daemon = self._processes.pop(node)
        daemon.kill()
        daemon.wait()
        for pid in _own_steps(self.root, node):
            for child in [*_children(pid), pid]:
                _kill(child)

    def _launch(self, name: str, command: Sequence[str]) -> None:
        log = open(self.root / f"{name}.out", "ab")  # noqa: SIM115 - the process keeps it
        self._processes[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        log.close()

    def _wait(self, ready: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{p.name}: {p.read_text(errors='replace')[-800:]}" for p in self.root.glob("*.out"))
                raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, capture_output=True, check=False)
        time.sleep(1)
        for node in NODES:
            for pid in _own_steps(self.root, node):
                for child in [*_children(pid), pid]:
                    _kill(child)
        for process in reversed(list(self._processes.values())):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # ------------------------------------------------------------ what a user does

    def command(self, *words: str, cwd: Path = ROOT, extra: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            words, env={**self.environment, **(extra or {})}, cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, *words: str, **variables: str) -> str:
        """``sbatch`` from the checkout; returns the job's number. Output goes to ``<root>/<job>.out``."""
        output = f"--output={self.root}/%A.%a.out" if any(w.startswith("--array") for w in words) else ""
        options = [output or f"--output={self.root}/%j.out"]
        text = self.command("sbatch", *options, *words, extra={"PREFLIGHT": "no", **variables})
        return re.findall(r"\d+", text)[-1]

    def idle_nodes(self) -> int:
        try:
            return self.command("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t").split().count("idle")
        except RuntimeError:
            return 0

    def field(self, job: str, name: str) -> str:
        text = self.command("scontrol", "show", "job", job)
        return re.findall(rf"\b{name}=(\S*)", text)[0]

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def output(self, job: str) -> str:
        path = self.root / f"{job.replace('_', '.')}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_state(self, job: str, *states: str, seconds: float = 240) -> str:
        """Wait for one of the states; a requeued job's two minutes of waiting are waived."""
        deadline, waiting_since = time.monotonic() + seconds, None
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {job} is {state}, not {states}, after {seconds:.0f} s:\n{self.output(job)[-3000:]}"
                )
            waiting_since = (waiting_since or time.monotonic()) if state == "PENDING" else None
            # a node refuses a job whose last start it has not quite ended; hence SLURM's two minutes
            if waiting_since is not None and time.monotonic() - waiting_since > RELEASE_AFTER:
                self.release(job)
            time.sleep(0.4)
        return state

    def ends(self, job: str, wanted: str = "COMPLETED", seconds: float = 240) -> None:
        """Assert how a job ends."""
        state = self.wait_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=seconds)
        assert state == wanted, f"{state}, exit code {self.field(job, 'ExitCode')}:\n{self.output(job)[-4000:]}"

    def release(self, job: str) -> None:
        subprocess.run(
            ["scontrol", "update", f"jobid={job}", "starttime=now"],
            env=self.environment,
            capture_output=True,
            check=False,
        )

    def wait_restarts(self, job: str, number: int, seconds: float = 240) -> None:
        """Wait until the job was requeued so often; it is not begun again yet."""
        self._wait(lambda: self.field(job, "Restarts") == str(number), f"restart {number} of job {job}", seconds)


def steps_done(folder: Path) -> int:
    """Last step in the run's events, 0 before the first."""
    path = folder / "events.jsonl"
    last = 0
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["event"] == "train":
            last = row["step"]
    return last


def wait_steps(folder: Path, step: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while steps_done(folder) < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder}: step {steps_done(folder)}, waited for {step}")
        time.sleep(0.1)


def _own_steps(root: Path, node: str) -> list[int]:
    """What runs on this cluster's node: tasks and batch scripts, by their environment, and the slurmstepd above each."""
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            above = Path(f"/proc/{parent}/cmdline").read_bytes()
        except OSError:
            continue
        if f"SLURMD_NODENAME={node}".encode() in environ and f"SLURM_CONF={root}/slurm.conf".encode() in environ:
            found.add(int(path.name))
            if above.startswith(b"slurmstepd"):  # it has written its title over its own environment
                found.add(parent)
    return sorted(found)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(stat.parent.name)
            found += [*_children(child), child]
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
