"""Keys in the environment reach no file of a run and no line that it prints, not even by the traceback of a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.patience import run
from tests.training_kit import TINY

ROOT = Path(__file__).parents[2]
SECRETS = {
    "WANDB_API_KEY": "5d41402abc4b2a76b9719d911017c592a1b2c3d4",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYplantedhere",
}
# every worker fails in its third step with an error that quotes the environment, as clients of storage and web do
CRASH = """
import os
if "RANK" in os.environ:
    import torch
    real, calls = torch.optim.SGD.step, []
    def step(self, *a, **k):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(f"PUT refused: {os.environ['AWS_SECRET_ACCESS_KEY']} {dict(os.environ)}")
        return real(self, *a, **k)
    torch.optim.SGD.step = step
"""


def command(folder: Path, *words: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(planted)
    paths = os.pathsep.join([str(folder / "site"), str(ROOT)])
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**own, **SECRETS, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "distributed_at", *words]
    return run(arguments, cwd=folder / "work", env=environment)


def test_keys_of_the_environment_are_in_no_file_and_no_line_after_a_crash_and_after_a_run(tmp_path):
    (tmp_path / "work").mkdir()
    train = ["train", "digits/adversarial.yaml", *TINY, "name=kept", "log.wandb=offline", "checkpoint.every_steps=2"]
    crashed = command(tmp_path, *train, "--workers", "2", planted=CRASH)
    assert crashed.returncode == 1, crashed.stderr
    assert "PUT refused: [redacted]" in crashed.stderr
    log = tmp_path / "work" / "runs" / "kept" / "log"
    for name in ("failure-rank0.txt", "failure-rank1.txt", "rank0001.txt"):
        assert "PUT refused: [redacted]" in (log / name).read_text(), name
    finished = command(tmp_path, *train, "--workers", "1")
    assert finished.returncode == 0, finished.stderr
    told = command(tmp_path, "report", "kept")
    assert told.returncode == 0, told.stderr
    files = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert {"events.jsonl", "environment.json", "report.html"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files), "the wandb mirror did not run"
    for name, secret in SECRETS.items():
        held = [str(path) for path in files if secret.encode() in path.read_bytes()]
        assert held == [], f"{name} is in {held}"
        for start in (crashed, finished, told):
            assert secret not in start.stdout + start.stderr, f"{name} was printed"


def test_any_command_that_fails_unexpectedly_keeps_them_too(tmp_path):
    (tmp_path / "work").mkdir()
    planted = "import json, os\ndef fail(*_, **__):\n    raise OSError(os.environ['WANDB_API_KEY'])\njson.dump = fail\n"
    failed = command(tmp_path, "recipes", "--json", planted=planted)
    assert failed.returncode == 1
    assert "OSError: [redacted]" in failed.stderr
    assert SECRETS["WANDB_API_KEY"] not in failed.stdout + failed.stderr
