"""A checkpoint exists wholly or not at all, and nothing in it can harm its reader (one process)."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.files import BadCheckpoint
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.shards import FlatShard
from distributed_at.engine.checkpoint.state import shard_places
from distributed_at.engine.processes.failures import lost_rank
from distributed_at.errors import CheckpointError, UserError


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.full((4, 3), float(value)),
        "model.bias": torch.arange(5.0) + value,
        "buffer.count": torch.tensor(int(value)),
    }


def manager(root: Path, events: list | None = None, **kwargs) -> CheckpointManager:
    sink = None if events is None else lambda kind, fields: events.append((kind, fields))
    return CheckpointManager(root, on_event=sink, **{"retry_seconds": 0.0, **kwargs})


def saved(root: Path, *steps: int) -> CheckpointManager:
    m = manager(root)
    for step in steps:
        assert m.save(step, state(step), {"epoch": step / 10}).ok
    return m


def test_load_returns_what_was_saved_bit_for_bit(tmp_path):
    m = manager(tmp_path)
    m.save(7, state(7.25), {"epoch": 1.5, "nested": {"list": [1, "two", None]}})
    target = state(0)
    assert manager(tmp_path).load(m.latest_good(), target) == {"epoch": 1.5, "nested": {"list": [1, "two", None]}}
    assert all(torch.equal(target[k], v) for k, v in state(7.25).items())


def test_a_rank_lost_while_a_checkpoint_is_read_is_no_bad_checkpoint(tmp_path, monkeypatch):
    m = saved(tmp_path, 1)

    def peer_dies(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:9")

    with monkeypatch.context() as patch:
        patch.setattr(m.ranks, "failures", peer_dies)
        with pytest.raises(RuntimeError) as caught:
            m.load_latest(lambda: state(0))
    assert lost_rank(caught.value)
    assert m.load_latest(lambda: state(0)) == (tmp_path / "step_00000001", {"epoch": 0.1})


def resign(folder: Path, name: str) -> None:
    """Let the manifest vouch for whatever a file holds now."""
    manifest = files.read_manifest(folder)
    files.write_manifest(folder, replace(manifest, files={**manifest.files, name: files.hash_file(folder / name)}))


def vouch_for_rubbish(folder: Path) -> None:
    (folder / DATA).write_bytes(b"x" * (folder / DATA).stat().st_size)
    resign(folder, DATA)


def test_contents_that_cannot_be_loaded_give_way_to_the_checkpoint_before(tmp_path):
    saved(tmp_path, 1, 2)
    vouch_for_rubbish(tmp_path / "step_00000002")
    events: list = []
    m = manager(tmp_path, events)
    target = state(0)
    assert m.load_latest(lambda: target) == (tmp_path / "step_00000001", {"epoch": 0.1})
    assert all(torch.equal(target[k], v) for k, v in state(1).items())
    assert [(kind, fields["code"]) for kind, fields in events] == [("warning", "checkpoint_bad")]
    assert "step_00000002 is not used: cannot be read: " in events[0][1]["message"]
    assert (tmp_path / "step_00000002").exists()  # who reads changes nothing
    assert m.save(3, state(3), {}).ok
    assert not (tmp_path / "step_00000002").exists()
    assert list(tmp_path.glob(".bad-step_00000002-*"))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no room")])
def test_disk_or_memory_that_refuses_while_a_checkpoint_is_read_is_told_and_no_older_one_taken(
    error, tmp_path, monkeypatch
):
    saved(tmp_path, 1, 2)
    m = manager(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("distributed_at.engine.checkpoint.reader._read_tensor", mock.Mock(side_effect=error))
        with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*step_00000002: .*(Input/output|no room)"):
            m.load_latest(lambda: state(0))
    assert m.load_latest(lambda: state(0)) == (tmp_path / "step_00000002", {"epoch": 0.2})


def test_where_every_content_is_unreadable_each_is_named(tmp_path):
    saved(tmp_path, 1, 2)
    for step in ("step_00000001", "step_00000002"):
        vouch_for_rubbish(tmp_path / step)
    told = r"(?s)no usable checkpoint.*step_00000002: cannot be read: .*step_00000001: cannot be read: "
    with pytest.raises(CheckpointError, match=told):
        manager(tmp_path).load_latest(lambda: state(0))


def test_a_checkpoint_of_another_network_gives_way_to_none(tmp_path):
    saved(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"step_00000002: it does not fit this run: model\.weight has shape"):
        manager(tmp_path).load_latest(lambda: {**state(0), "model.weight": torch.zeros(3, 3)})


def test_rows_of_places_open_at_another_world_size(tmp_path):
    batch = torch.randn(12, 3, 2)
    m = manager(tmp_path)
    m.save(1, {"objective.delta": batch}, {})
    for world_size in (1, 2, 3, 4):
        parts = [torch.zeros(12 // world_size, 3, 2) for _ in range(world_size)]
        for rank, part in enumerate(parts):
            m.load(m.latest_good(), {"objective.delta": shard_places({"": part}, rank=rank, world_size=world_size)[""]})
        assert torch.equal(torch.cat(parts), batch)
    with pytest.raises(ValueError, match="not contiguous"):
        shard_places({"delta": batch.transpose(1, 2)}, rank=0, world_size=1)


def test_non_contiguous_tensors_are_filled_in_place_and_independent_of_memory_format(tmp_path):
    values = torch.randn(2, 3, 4, 5)
    m = manager(tmp_path)
    m.save(1, {"w": values.contiguous(memory_format=torch.channels_last)}, {})
    for layout in (torch.channels_last, torch.contiguous_format):
        target = torch.zeros(2, 3, 4, 5).contiguous(memory_format=layout)
        m.load(m.latest_good(), {"w": target})
        assert torch.equal(target, values)
        assert target.is_contiguous(memory_format=layout)


def test_no_checkpoint_at_all_is_a_new_run(tmp_path):
    assert manager(tmp_path / "none").latest_good() is None


def test_asynchronous_save_keeps_the_state_of_the_call(tmp_path):
    events: list = []
    m = manager(tmp_path, events)
    live = {"w": torch.ones(200_000)}
    assert m.save(1, live, {}, asynchronous=True) is None
    live["w"].fill_(2.0)
    result = m.wait()
    assert result.ok
    assert result.seconds_durable >= result.seconds_blocked
    m.load(m.latest_good(), live)
    assert torch.equal(live["w"], torch.ones(200_000))
    assert [kind for kind, _ in events] == ["checkpoint"]


def test_asynchronous_save_waits_for_the_one_before(tmp_path):
    m = manager(tmp_path, keep=5)
    for step in range(1, 6):
        m.save(step, state(step), {}, asynchronous=True)
    assert m.close().ok
    assert [step for step, _ in files.list_steps(tmp_path)] == [5, 4, 3, 2, 1]


DATA = "__0_0.distcp"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("name", [DATA, ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, os.unlink, replace_by_link])
def test_any_damage_to_any_file_is_found_and_the_previous_checkpoint_used(tmp_path, name, damage):
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step_00000002" / name)
    before = sorted(os.listdir(tmp_path))
    events: list = []
    m = manager(tmp_path, events)
    assert m.latest_good() == tmp_path / "step_00000001"
    assert events[0][1]["code"] == "checkpoint_bad"
    assert name in events[0][1]["message"]
    assert sorted(os.listdir(tmp_path)) == before  # who only reads changes nothing
    assert m.save(2, state(2), {}).ok
    assert len(files.quarantined(tmp_path)) == 1
    assert m.latest_good() == tmp_path / "step_00000002"


def test_folder_renamed_to_a_later_step_is_not_taken_for_it(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000900")
    events: list = []
    assert manager(tmp_path, events).latest_good() == tmp_path / "step_00000002"
    assert "manifest.json is of step 1: the folder was renamed" in events[0][1]["message"]


def test_rubbish_under_a_manifest_that_vouches_for_it_gives_way_to_the_one_before(tmp_path):
    saved(tmp_path, 1, 2)
    folder = tmp_path / "step_00000002"
    (folder / ".metadata").write_bytes(b"rubbish")
    resign(folder, ".metadata")
    events: list = []
    assert manager(tmp_path, events).latest_good() == tmp_path / "step_00000001"
    assert ".metadata cannot be read" in events[0][1]["message"]


def test_every_single_byte_of_the_manifest_is_protected(tmp_path):
    saved(tmp_path, 3)
    path = tmp_path / "step_00000003" / "manifest.json"
    raw = path.read_bytes()
    good = files.read_manifest(path.parent)
    for place in range(0, len(raw), 7):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with contextlib.suppress(BadCheckpoint):
            assert files.read_manifest(path.parent) == good  # a changed blank says the same


def test_all_bad_is_refused_by_name_now_and_at_the_next_start_unless_fresh(tmp_path):
    saved(tmp_path, 1, 2)
    flip(tmp_path / "step_00000001" / DATA)
    os.unlink(tmp_path / "step_00000002" / DATA)
    with pytest.raises(CheckpointError, match=r"(?s)step_00000002: __0_0.distcp is missing.*step_00000001: .*SHA-256"):
        manager(tmp_path).latest_good()
    with pytest.raises(CheckpointError, match="step_00000001"):
        manager(tmp_path).latest_good()
    m = manager(tmp_path)
    assert m.latest_good(fresh=True) is None
    assert m.save(1, state(1), {}).ok
    assert len(files.quarantined(tmp_path)) == 2
    os.unlink(tmp_path / "step_00000001" / DATA)
    with pytest.raises(CheckpointError, match="found bad by an earlier start"):
        manager(tmp_path).latest_good()


def test_a_checkpoint_given_by_its_path_is_verified_before_anything_is_filled(tmp_path):
    saved(tmp_path, 1)
    flip(tmp_path / "step_00000001" / DATA)
    target = state(0)
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        manager(tmp_path).load(tmp_path / "step_00000001", target)
    assert all(torch.equal(target[k], v) for k, v in state(0).items())


def test_what_does_not_fit_is_named_and_nothing_is_filled(tmp_path):
    saved(tmp_path, 1)
    target = {"model.weight": torch.zeros(3, 4), "model.other": torch.zeros(2), "model.bias": torch.zeros(5).double()}
    with pytest.raises(CheckpointError) as caught:
        manager(tmp_path).load(tmp_path / "step_00000001", target)
    for told in ("model.weight has shape [4, 3] there and [3, 4] here", "model.other is not in it", "float64 here"):
        assert told in str(caught.value)
    assert all(not t.any() for t in target.values())


def test_retention_keeps_the_newest_the_best_and_one_a_period(tmp_path):
    m = manager(tmp_path, keep=2, keep_every_epochs=1.0)
    for step in range(1, 9):
        m.save(step * 5, state(step), {"epoch": step / 2})
        if step == 3:
            m.mark_best(15, 0.5)
    left = sorted(step for step, _ in files.list_steps(tmp_path))
    assert left == [10, 15, 20, 30, 35, 40]  # epochs 1, best, 2, 3, and the newest two
    assert m.best() == tmp_path / "step_00000015"


def test_an_epoch_that_is_a_whole_number_of_periods_begins_one(tmp_path):
    m = manager(tmp_path, keep=2, keep_every_epochs=0.1)
    for step in range(2, 12):
        m.save(step, state(step), {"epoch": step / 20})  # 0.3 / 0.1 is a little less than 3 in floating point
    assert sorted(step for step, _ in files.list_steps(tmp_path)) == [2, 4, 6, 8, 10, 11]


def test_keep_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="at least 2"):
        manager(tmp_path, keep=1)


def test_saving_a_step_again_replaces_it_and_dying_between_the_renames_loses_nothing(tmp_path):
    m = saved(tmp_path, 1)
    assert m.save(1, state(9), {}).ok
    target = state(0)
    m.load(tmp_path / "step_00000001", target)
    assert target["model.weight"][0, 0] == 9
    os.rename(tmp_path / "step_00000001", tmp_path / ".old-replaced-step_00000001-1")
    m = manager(tmp_path)
    assert m.load(m.latest_good(), target) == {}
    assert m.save(2, state(2), {}).ok
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    saved(tmp_path, 1)
    os.rename(tmp_path / "step_00000001", tmp_path / ".tmp-step_00000001")
    m = manager(tmp_path)
    assert m.latest_good() is None
    assert m.save(2, state(2), {}).ok
    assert os.listdir(tmp_path) == ["step_00000002"]


def test_full_disk_is_an_event_and_training_goes_on_and_saves_later(tmp_path):
    events: list = []
    m = manager(tmp_path, events)
    big = {"w": torch.randn(1_000_000)}
    assert m.save(1, big, {}).ok
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        for asynchronous in (False, True):
            result = m.save(2, big, {}, asynchronous=asynchronous) or m.wait()
            assert not result.ok
            assert "File too large" in result.failures[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001"]
    assert m.latest_good() == tmp_path / "step_00000001"
    assert m.save(3, big, {}).ok
    assert [f.get("code", kind) for kind, f in events] == [
        "checkpoint",
        "checkpoint_failed",
        "checkpoint_failed",
        "checkpoint",
    ]


def test_after_a_failure_saves_wait_unless_forced(tmp_path):
    events: list = []
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    m = manager(blocked / "checkpoints", events, retry_seconds=60.0)
    assert m.save(1, state(1), {}).failures
    assert m.save(2, state(1), {}).skipped
    blocked.unlink()
    assert m.save(3, state(1), {}, force=True).ok
    assert m.save(4, state(1), {}).ok
    assert [f.get("code") for _, f in events] == ["checkpoint_failed", "checkpoint_postponed", None, None]


def test_the_wait_after_a_failed_save_doubles_up_to_a_quarter_of_an_hour_and_begins_anew(tmp_path, monkeypatch):
    events: list = []
    m = manager(tmp_path / "run", events, retry_seconds=30.0)
    monkeypatch.setattr(
        "distributed_at.engine.checkpoint.manager._fresh_folder", lambda path: (tmp_path / "none").read_text()
    )
    for step in range(7):
        m.save(step, state(step), {}, force=True)
    monkeypatch.undo()
    assert m.save(8, state(8), {}, force=True).ok
    monkeypatch.setattr(
        "distributed_at.engine.checkpoint.manager._fresh_folder", lambda path: (tmp_path / "none").read_text()
    )
    m.save(9, state(9), {}, force=True)
    told = [fields["message"].rpartition("in ")[2] for kind, fields in events if kind == "warning"]
    assert told == ["30 s", "60 s", "120 s", "240 s", "480 s", "900 s", "900 s", "30 s"]


def test_a_failed_save_asks_to_be_repeated_once_its_wait_is_over_and_not_while_one_is_under_way(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    patient, quick = (manager(blocked / "checkpoints", retry_seconds=seconds) for seconds in (60.0, 0.0))
    assert not quick.retry_is_due
    assert patient.save(1, state(1), {}).failures
    assert quick.save(1, state(1), {}).failures
    assert not patient.retry_is_due
    assert quick.retry_is_due
    blocked.unlink()
    assert quick.save(2, state(1), {}, asynchronous=True) is None
    assert not quick.retry_is_due
    assert quick.wait().ok
    assert not quick.retry_is_due


def test_an_unwritable_folder_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        manager(tmp_path / "file").probe()
    m = manager(tmp_path)
    m.probe()
    assert os.listdir(m.root) == ["file"]


def test_metadata_that_is_not_json_is_refused_at_the_call(tmp_path):
    with pytest.raises(TypeError):
        manager(tmp_path).save(1, state(1), {"x": object()})
    with pytest.raises(ValueError, match="JSON"):
        manager(tmp_path).save(1, state(1), {"x": float("nan")})


def test_a_gap_in_the_saved_fragments_is_refused(tmp_path):
    m = manager(tmp_path)
    m.save(1, {"w": FlatShard(torch.ones(3), 0, (5,))}, {})
    with pytest.raises(CheckpointError, match="only a part of 'w'"):
        m.load(tmp_path / "step_00000001", {"w": torch.zeros(5)})


KILLED = """
import sys, torch
from distributed_at.engine.checkpoint.manager import CheckpointManager
m = CheckpointManager(sys.argv[1])
step = 0
while True:
    step += 1
    m.save(step, {"w": torch.full((300_000,), float(step))}, {"step": step}, asynchronous=step % 2 == 0)
    print(step, flush=True)
"""


def test_sigkill_at_any_time_leaves_a_good_newest_checkpoint(tmp_path):
    for attempt in range(3):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            child.stdout.readline()
        time.sleep(0.013 * attempt)
        child.kill()
        child.wait()
        m, target = manager(tmp_path), {"w": torch.zeros(300_000)}
        found = m.load(m.latest_good(), target)
        assert found["step"] >= 2
        assert (target["w"] == found["step"]).all()
        assert not files.quarantined(tmp_path)
