"""A finished command leaves no thread of a process group behind: one that meets the interpreter's end aborts the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_at.engine.processes.launch import free_port, worker_environment
from tests.training_kit import RECIPE, TINY, with_words

ROOT = Path(__file__).parents[2]
PAUSE = 0.15  # seconds
# the command as a worker gives it; then the worker's last words are its threads of process groups
WORKER = """
import os, sys
from distributed_at.cli import main
code = main(sys.argv[1:])
names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
print("threads left:", sum(name == "pt_gloo_runloop" for name in names), file=sys.stderr)
sys.exit(code)
"""
SAYS_NAMES = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
names = []
for _ in range(600):  # a thread names itself once it runs, which on a busy machine is a while after it was made
    names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
    if "pt_gloo_runloop" in names:
        break
    time.sleep(0.1)
print(names)
os._exit(0)
"""
# two ranks that share a BN group, and meet in an evaluation: every kind of group that a run makes
WORDS = with_words(
    TINY, "train.epochs=1", "schedule.warmup_epochs=0", "train.bn_group_size=24", "train.micro_batch_size=12"
)
VALIDATING = ["data.validation_size=24", "evaluation.every_epochs=1", "evaluation.validation=[{kind: clean}]"]


def run(words: list[str], **environment: str) -> list[tuple[int, str]]:
    """Give a command to two workers; return exit code and stderr of each."""
    port = free_port()
    started = []
    for rank in range(2):
        env = {**worker_environment(rank, 2, port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-c", WORKER, *words]
        started.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [worker.communicate()[1] for worker in started]
    return [(worker.returncode, told) for worker, told in zip(started, errors, strict=True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("shutdown") / "run"
    return folder, run(["train", str(RECIPE), *with_words(WORDS, *VALIDATING), "--run-folder", str(folder), "--quiet"])


@pytest.fixture(scope="module")
def slow_threads(tmp_path_factory) -> str:
    """A library to preload under which the threads of process groups lag behind."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc")
    library = tmp_path_factory.mktemp("preload") / "slow_threads.so"
    version = {"x86_64": "GLIBC_2.3.2", "aarch64": "GLIBC_2.17"}[os.uname().machine]
    options = [f"-DPAUSE={round(1e6 * PAUSE)}", f'-DVERSION="{version}"']
    source = Path(__file__).with_name("slow_threads.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", *options, "-o", library, source, "-ldl"], check=True)
    return str(library)


def test_a_finished_training_leaves_no_thread_of_a_process_group(trained):
    for code, told in trained[1]:
        assert code == 0, told
        assert told.splitlines()[-1] == "threads left: 0"


def test_a_finished_evaluation_leaves_no_thread_and_ends_well_also_where_threads_lag(trained, slow_threads):
    folder, _ = trained
    words = ["eval", str(folder), "--only", "clean", "--num-samples", "40"]
    for code, told in run(words, LD_PRELOAD=slow_threads):
        assert code == 0, told
        assert told.splitlines()[-1] == "threads left: 0"


def test_threads_of_process_groups_bear_the_name_that_is_counted():
    told = subprocess.run([sys.executable, "-c", SAYS_NAMES], capture_output=True, text=True, check=True).stdout
    assert "'pt_gloo_runloop'" in told
