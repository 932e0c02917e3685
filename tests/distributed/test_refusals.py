"""One rank that cannot go on while a run is being set up: all end within seconds, with its message and its exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed_at.engine.processes.launch import FIRST_PORT, PORTS, free_port, listening_socket
from distributed_at.errors import EXIT_CONFIG, EXIT_REQUEUE
from tests.patience import end_of, wait_until

# A network whose building goes otherwise on one rank; the others go on to a collective and wait there.
PLUGIN = """
import os, time
from pathlib import Path
from torch import nn
from distributed_at.errors import DataError

{at_import}

def odd(num_classes, image_size):
    if os.environ.get("RANK") == "{rank}" and not Path({mended!r}).exists():
        {in_build}
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (image_size - 2) ** 2, num_classes))

NETWORKS = {{"odd": odd}}
"""
RECIPE = """
name: odd
data: {dataset: digits, image_size: 8, limit_train: 64, limit_test: 8}
model: {arch: odd}
attack: {eps: 16, num_steps: 1, step_size: 16}
objective: {name: pgd_at}
optimizer: {name: sgd, lr: 0.01}
train: {epochs: 2, batch_size: 32, bn_group_size: 8}
"""
REFUSE = "raise DataError('this node has no such file: /scratch/weights')"


def odd_run(
    tmp_path: Path, launcher: str, *, rank: int = 1, at_import: str = "", in_build: str = REFUSE
) -> tuple[subprocess.Popen[str], Path]:
    plugin = tmp_path / "odd.py"
    mended = str(tmp_path / "mended")
    plugin.write_text(PLUGIN.format(rank=rank, at_import=at_import, in_build=in_build, mended=mended))
    (tmp_path / "odd.yaml").write_text(f"plugins: [{plugin}]\n{RECIPE}")
    words = ["train", str(tmp_path / "odd.yaml"), "--quiet", "--run-folder", str(tmp_path / "run")]
    start = {
        "self": [sys.executable, "-m", "distributed_at", *words, "--workers", "2"],
        "torchrun": [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m",
            "distributed_at", *words,
        ],
    }[launcher]  # fmt: skip
    with open(tmp_path / "told", "w") as told:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(start, stdout=told, stderr=told, text=True, env=environment), tmp_path / "told"


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_refuses_in_set_up_ends_all_with_its_message(tmp_path: Path, rank: int) -> None:
    process, told = odd_run(tmp_path, "self", rank=rank)
    assert end_of(process) == EXIT_CONFIG
    text = told.read_text()
    assert "this node has no such file: /scratch/weights" in text
    assert "lost another rank" not in text
    others = [p.read_text() for p in sorted((tmp_path / "run" / "log").glob("rank*.txt"))]
    assert f"rank {rank} on {socket.gethostname()}: this node has no such file" in (text if rank else others[0])
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
def test_rank_that_refuses_before_it_has_met_the_others_tells_them_under_torchrun_too(tmp_path: Path) -> None:
    """The others would wait for it until the rendezvous' own timeout."""
    at_import = "if os.environ.get('RANK') == '1': raise DataError('no licence on this node')"
    process, told = odd_run(tmp_path, "torchrun", at_import=at_import)
    assert end_of(process) != 0
    assert told.read_text().count(f"rank 1 on {socket.gethostname()}: ") >= 1
    assert "no licence on this node" in told.read_text()


def test_term_is_heard_while_ranks_wait_for_one_that_is_still_being_set_up(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    waits = f"Path({str(begun)!r}).touch(); time.sleep(3600)"
    process, told = odd_run(tmp_path, "self", in_build=waits)
    wait_until(lambda: begun.exists() or process.poll() is not None, "the set-up", processes=[process.pid])
    assert begun.exists(), told.read_text()
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert end_of(process) == EXIT_REQUEUE, told.read_text()
    assert time.monotonic() - asked < 25  # five of patience; the launcher would kill at 35
    assert "stopped while the run was being set up; nothing is lost" in told.read_text()
    assert not (tmp_path / "run" / "lock").exists()
    (tmp_path / "mended").touch()
    assert end_of(odd_run(tmp_path, "self", in_build=waits)[0]) == 0


def meeting(port: int, **environ: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import datetime, sys\nfrom distributed_at.engine.processes.launch import detect_rank\n"
        "from distributed_at.engine.processes.rendezvous import meet\nfrom distributed_at.errors import UserError\n"
        "try:\n    meet(detect_rank(), datetime.timedelta(seconds=30))\n"
        "except UserError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "RANK", "WORLD"))}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**environment, **environ}, timeout=120
    )


def test_port_in_use_is_named_with_the_variable_that_sets_it() -> None:
    with listening_socket() as taken:
        port = taken.getsockname()[1]
        done = meeting(port, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert f"port {port} of {socket.gethostname()} is in use by another process. MASTER_PORT is {port}" in done.stdout


def test_port_chosen_from_the_jobs_number_is_another_at_the_next_start() -> None:
    """So a start that finds it taken may be tried again, which its exit code says."""
    from distributed_at.engine.processes.launch import Rank, export_rendezvous

    ports = []
    for restart in range(2):
        environ = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": str(restart)}
        export_rendezvous(Rank(0, 0, 1, "srun"), environ)
        ports.append(int(environ["MASTER_PORT"]))
    assert ports[0] != ports[1]
    job = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", ports[0]))
        taken.listen()
        done = meeting(ports[0], SLURM_LAUNCH_NODE_IPADDR="127.0.0.1", **job)
    assert done.returncode == 1, done.stderr
    assert "another is chosen then" in done.stdout


def test_ports_lie_below_those_that_systems_give_to_outgoing_connections() -> None:
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert low >= FIRST_PORT + PORTS
    for _ in range(20):
        with listening_socket() as one, listening_socket() as other:
            ports = {one.getsockname()[1], other.getsockname()[1]}
        assert len(ports) == 2
        assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)


def test_process_that_ends_while_it_looks_ends_with_its_own_exit_code() -> None:
    """As gloo's threads: one that comes back from C++ to an interpreter that is ending aborts the process."""
    program = (
        "import time, torch.distributed as dist\n"
        "from distributed_at.engine.processes import rendezvous\n"
        "from distributed_at.engine.processes.launch import Rank, free_port\n"
        "rendezvous._LOOK_SECONDS = 0.0\n"
        "store = dist.TCPStore('127.0.0.1', free_port(), None, True, wait_for_workers=False)\n"
        "rendezvous.watch_for_refusals(store, Rank(0, 0, 2, 'self'))\n"
        "time.sleep(0.3)\n"
    )
    begun = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [(process.communicate()[1][-300:], process.returncode) for process in begun]
    assert [code for _, code in ends] == [0] * 4, ends
