"""What is said and done where the system allows too few open files; they are counted in ``test_growth.py``."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_at.engine.processes.open_files import allow_files, files_needed
from distributed_at.errors import EXIT_CONFIG, ConfigError


def test_rank_0_alone_needs_more_with_every_rank() -> None:
    assert files_needed(1, "cpu") == 96
    assert files_needed(2, "cpu") == 96 + 4 + 3
    assert files_needed(1024, "cuda") == 384 + 4 * 20 + 3 * 1023
    assert files_needed(1024, "cuda", rank=1) == 384 + 4 * 20 + 1


def test_too_low_a_limit_is_told_before_the_ranks_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    allow_files(512, "cpu")
    assert raised == [(4096, 4096)]
    with pytest.raises(ConfigError, match=r"rank 0 of 2048 needs up to 6613 open files, and this system allows 4096"):
        allow_files(2048, "cuda")
    allow_files(2048, "cuda", rank=1)
    allow_files(1, "cuda")


def test_a_launcher_tells_it_once_and_starts_nobody(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "distributed_at",
        "train",
        "digits/natural",
        "--workers",
        "40",
        "train.batch_size=40",
    ]
    words += ["train.bn_group_size=1", "--run-folder", str(tmp_path / "run")]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )  # fmt: skip
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert done.stderr.count("rank 0 of 40 needs up to 261 open files, and this system allows 200 (ulimit -Hn)") == 1
    assert not (tmp_path / "run" / "log").exists()
