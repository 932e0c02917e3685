"""Open files of the ranks of a real run, counted, and what is said and done where the system allows too few."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_at.engine.processes.open_files import allow_files, files_needed
from distributed_at.errors import ConfigError
from tests.distributed.test_refusals import RECIPE
from tests.patience import end_of

# A network that counts this process's descriptors in each forward: by then all groups have met.
PLUGIN = """
import os
from pathlib import Path
from torch import nn

class Counting(nn.Module):
    def __init__(self, num_classes, image_size):
        super().__init__()
        self.last = nn.Linear(3 * image_size ** 2, num_classes)

    def forward(self, x):
        kinds = [os.readlink(f"/proc/self/fd/{{n}}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{{n}}")]
        sockets = sum(kind.startswith("socket") for kind in kinds)
        Path({folder!r}, "rank" + os.environ.get("RANK", "none")).write_text(f"{{len(kinds)}} {{sockets}}")
        return self.last(x.flatten(1))

NETWORKS = {{"odd": Counting}}
"""


def counted(folder: Path, world_size: int, soft_limit: int) -> list[tuple[int, int]]:
    """Return each rank's open files, and the sockets among them, in the last step of a run."""
    folder.mkdir()
    (folder / "counting.py").write_text(PLUGIN.format(folder=str(folder)))
    (folder / "counting.yaml").write_text(f"plugins: [{folder}/counting.py]\n{RECIPE}")
    words = ["train", str(folder / "counting.yaml"), "--quiet", "--run-folder", str(folder / "run")]
    words += ["train.bn_group_size=null", "--workers", str(world_size)]
    with open(folder / "told", "w") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed_at", *words], stdout=told, stderr=told, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_NOFILE, (soft_limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            ),
        )  # fmt: skip
    assert end_of(process) == 0, (folder / "told").read_text()
    found = [(folder / f"rank{rank}").read_text().split() for rank in range(world_size)]
    return [(int(files), int(sockets)) for files, sockets in found]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 4), (4, 8, 16)])
def test_open_files_grow_by_four_a_peer_and_stay_below_what_is_asked_for(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """Under a soft limit that would end the larger runs: each process raises it first."""
    seen = {size: counted(tmp_path / str(size), size, soft_limit=60) for size in sizes}
    for size, each in seen.items():
        assert max(files for files, _ in each) <= files_needed(size, "cpu")
    for small, large in itertools.pairwise(sizes):
        for rank in range(1, small):
            slope = (seen[large][rank][1] - seen[small][rank][1]) / (large - small)
            assert 2 <= slope <= 4.5, seen


def test_too_low_a_limit_is_told_before_the_ranks_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    allow_files(512, "cpu")
    assert raised == [(4096, 4096)]
    with pytest.raises(ConfigError, match=r"1024 ranks need up to 7289 open files each, and this system allows 4096"):
        allow_files(1024, "cuda")
    allow_files(1, "cuda")
