"""Several ranks save and load one checkpoint: a failure on one is a failure on all, and a killed one loses nothing."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.shards import FlatShard
from distributed_at.errors import CheckpointError, UserError
from tests.distributed import checkpoint_worker as worker

SIZE = 30_011


def shard(values: torch.Tensor) -> FlatShard:
    """This rank's part of a vector that all ranks split unevenly; rank 1 owns nothing where there are three."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = {1: [0, SIZE], 2: [0, 7, SIZE], 3: [0, 20_000, 20_000, SIZE]}[world]
    return FlatShard(values[bounds[rank] : bounds[rank + 1]].clone(), bounds[rank], (SIZE,))


def whole(step: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float32) * step


def save_steps(root, steps, asynchronous):
    manager = CheckpointManager(root, retry_seconds=0.0)
    for step in steps:
        state = {"split": shard(whole(step)), "same": torch.full((9,), float(step))}
        result = manager.save(step, state, {"step": step}, asynchronous=asynchronous)
        if asynchronous:
            state["split"].local.zero_()
            state["same"].zero_()
            result = manager.wait()
        assert result.ok, result.failures
    return sorted(path.name for path in (root / files.step_name(steps[-1])).iterdir())


def load_newest(root):
    manager = CheckpointManager(root)
    path = manager.latest_good()
    state = {"split": shard(torch.zeros(SIZE)), "same": torch.zeros(9)}
    metadata = manager.load(path, state)
    expected = shard(whole(metadata["step"])).local
    assert torch.equal(state["split"].local, expected)
    assert torch.equal(state["same"], torch.full((9,), float(metadata["step"])))
    return path.name


def test_fragments_written_by_two_ranks_open_on_one_and_three(tmp_path):
    written = worker.run(tmp_path / "a", 2, save_steps, tmp_path / "c", [1, 2], True)
    assert written[0] == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"]  # each rank its own file
    for world in (1, 3):
        assert worker.run(tmp_path / f"b{world}", world, load_newest, tmp_path / "c") == ["step_00000002"] * world


def kinds(value: float) -> dict[str, torch.Tensor]:
    """Tensors that all ranks hold alike, of many types; the first is cut into pieces, the second at an odd byte."""
    return {
        "large": torch.arange(3 * 65_536 + 5, dtype=torch.float32) * value,
        "odd": (torch.arange(2 * 65_536 + 3) * int(value) % 251).to(torch.uint8),
        "flags": torch.arange(7) % 2 == int(value) % 2,
        "half": torch.full((3, 3), value, dtype=torch.bfloat16),
        "count": torch.tensor(int(value)),
        "grid": torch.full((2, 3, 4, 5), -value).contiguous(memory_format=torch.channels_last),
        "negative": torch.full((5,), -int(value), dtype=torch.int64),
    }


def save_kinds(root):
    assert CheckpointManager(root).save(1, kinds(3.0), {}).ok


def load_kinds(root):
    manager, state = CheckpointManager(root), kinds(1.0)
    manager.load(manager.latest_good(), state)
    return [name for name, value in kinds(3.0).items() if not torch.equal(state[name], value)]


def test_what_all_ranks_hold_alike_is_read_in_shares_and_whole_on_each(tmp_path):
    worker.run(tmp_path / "a", 3, save_kinds, tmp_path / "c")
    for world in (1, 2, 3):
        assert worker.run(tmp_path / f"b{world}", world, load_kinds, tmp_path / "c") == [[]] * world


def fail_on_one_rank(root, asynchronous):
    events = []
    manager = CheckpointManager(root, retry_seconds=0.0, on_event=lambda kind, fields: events.append((kind, fields)))
    state = {"split": shard(whole(1))}
    assert manager.save(1, state, {"step": 1}).ok
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    result = manager.save(2, state, {"step": 2}, asynchronous=asynchronous) or manager.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert manager.save(3, state, {"step": 3}).ok
    return result.failures, [fields.get("code", kind) for kind, fields in events], sorted(os.listdir(root))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_the_next_one_works(tmp_path, asynchronous):
    first, second = worker.run(tmp_path / "a", 2, fail_on_one_rank, tmp_path / "c", asynchronous)
    assert first[0] == second[0]
    assert "rank 1: File too large" in first[0][-1]
    assert first[1] == ["checkpoint", "checkpoint_failed", "checkpoint"]
    assert second[1] == []  # rank 0 alone reports
    assert first[2] == ["step_00000001", "step_00000003"]


def load_damaged(root):
    manager = CheckpointManager(root)
    with pytest.raises(CheckpointError) as caught:
        manager.latest_good()
    with pytest.raises(CheckpointError):
        manager.load(root / "step_00000007", {"same": torch.zeros(9)})
    return str(caught.value)


def test_refusals_are_the_same_on_all_ranks_and_a_damaged_newest_one_is_skipped_by_all(tmp_path):
    root = tmp_path / "c"
    worker.run(tmp_path / "a", 2, save_steps, root, [1, 2], False)
    os.truncate(root / "step_00000002" / "__1_0.distcp", 100)
    assert worker.run(tmp_path / "b", 2, load_newest, root) == ["step_00000001"] * 2
    os.unlink(root / "step_00000001" / "__0_0.distcp")
    first, second = worker.run(tmp_path / "d", 2, load_damaged, root)
    assert first == second
    assert "__0_0.distcp is missing" in first


def load_where_one_node_is_behind(root):
    """Rank 1's node does not see a new file yet, and its share of the looking is that file."""
    plain = files.open_plain

    def behind(path):
        if dist.get_rank() == 1 and path.parent.name == "step_00000002" and path.name == "__0_0.distcp":
            raise files.BadCheckpoint(f"{path.name} is missing")
        return plain(path)

    files.open_plain = behind
    manager = CheckpointManager(root, retry_seconds=0.0)
    path = manager.latest_good()
    assert manager.save(3, {"split": shard(whole(3))}, {"step": 3}).ok
    return path.name, sorted(os.listdir(root))


def test_a_node_that_is_behind_sets_no_good_checkpoint_aside(tmp_path):
    root = tmp_path / "c"
    worker.run(tmp_path / "a", 2, save_steps, root, [1, 2], False)
    for name, there in worker.run(tmp_path / "b", 2, load_where_one_node_is_behind, root):
        assert name == "step_00000001"
        assert there == ["step_00000002", "step_00000003"]  # the two newest, by their names


def probe_apart(folder):
    try:
        CheckpointManager(folder / str(dist.get_rank())).probe()
    except UserError as error:
        return str(error).partition(": ")[2]
    return "no error"


def test_folder_that_ranks_do_not_share_is_found_before_training(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    first, second = worker.run(tmp_path / "a", 2, probe_apart, tmp_path)
    assert first == second
    assert first.startswith("rank 1: does not see what rank 0 wrote")
    assert not list(tmp_path.glob("*/.probe*"))


CHILD = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from tests.distributed.test_checkpoint_ranks import CheckpointManager, shard, whole
root, meeting, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=world)
manager = CheckpointManager(root)
path, step = manager.latest_good(), 0
if path is not None:
    state = {"split": shard(torch.zeros(30_011))}
    step = manager.load(path, state)["step"]
    assert torch.equal(state["split"].local, shard(whole(step)).local)
print("at", step, flush=True)
while True:
    step += 1
    manager.save(step, {"split": shard(whole(step))}, {"step": step}, asynchronous=step % 2 == 0)
    print(step, flush=True)
"""


def test_sigkill_of_all_or_of_one_rank_in_a_save_loses_at_most_that_save(tmp_path):
    root, last = tmp_path / "c", 0
    for attempt, (world, only_one) in enumerate([(2, False), (3, True), (1, False), (2, True)]):
        command = [sys.executable, "-c", CHILD, str(root), str(tmp_path / f"m{attempt}")]
        children = [
            subprocess.Popen(
                [*command, str(rank), str(world)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            for rank in range(world)
        ]
        try:
            begun = int(children[0].stdout.readline().split()[1])
            assert begun >= last - 1  # the last announced save may have been in the air
            for _ in range(3 + attempt):
                last = int(children[0].stdout.readline())
            if only_one:
                children[-1].kill()
                children[-1].wait()
        finally:
            for child in children:
                child.kill()
                child.wait()
                child.stdout.close()
        newest = files.list_steps(root)[0][1]
        files.verify(newest)
        assert int(newest.name.split("_")[1]) >= last - 1
    assert Path(root).is_dir()
    assert not files.quarantined(root)
