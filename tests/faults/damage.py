"""Checkpoints that were cut, flipped, lost, swapped or forged: named, set aside, and the one before used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from distributed_at.engine.checkpoint import files
from distributed_at.errors import EXIT_NO_CHECKPOINT, EXIT_OK, EXIT_REQUEUE
from tests.faults.faults import Bench, Seen, fault

LAST = 5  # where the run is stopped: checkpoints of steps 4 and 5 are there
NAMES = {"shard": "__0_0.distcp", "table of tensors": ".metadata", "manifest": files.MANIFEST}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def swap(path: Path) -> None:
    """Put the older checkpoint's file of this name in its place: whole, of the right size, of another step."""
    shutil.copyfile(min(path.parents[1].glob("step_*")) / path.name, path)


def wrong_hash(path: Path) -> None:
    body = json.loads(path.read_text())
    body["step"] += 1
    path.write_text(json.dumps(body))


def forge(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return damage that changes a manifest's content and gives it the right hash again."""

    def do(path: Path) -> None:
        body = json.loads(path.read_text())
        change(body)
        del body["sha256"]
        body["sha256"] = files._digest(body)
        path.write_text(json.dumps(body))

    return do


def _escape(body: dict) -> None:
    body["files"]["../../recipe.yaml"] = body["files"].pop("__0_0.distcp")


def _claim(body: dict) -> None:
    body["files"]["__0_0.distcp"]["bytes"] = 1 << 60


def _newer(body: dict) -> None:
    body["version"] += 1


def link(path: Path) -> None:
    """Put the content elsewhere and a symbolic link in its place."""
    elsewhere = path.parents[2] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def empty(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.mkdir()


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"{what} truncated": (name, truncate) for what, name in NAMES.items()},
    **{f"{what} bit-flipped": (name, flip) for what, name in NAMES.items()},
    **{f"{what} missing": (name, Path.unlink) for what, name in NAMES.items()},
    # the table of another step is the same file: both hold the same tensors
    **{f"{what} of another step": (NAMES[what], swap) for what in ("shard", "manifest")},
    "shard replaced by a symbolic link": ("__0_0.distcp", link),
    "manifest changed, its hash not": (files.MANIFEST, wrong_hash),
    "manifest with a path out of its folder": (files.MANIFEST, forge(_escape)),
    "manifest that claims an exabyte": (files.MANIFEST, forge(_claim)),
    "manifest of another version of the program": (files.MANIFEST, forge(_newer)),
    "checkpoint folder empty": (files.MANIFEST, empty),
}


def _plant(name: str, damage: Callable[[Path], None]) -> Callable[[Bench], Seen]:
    def plant(bench: Bench) -> Seen:
        assert bench.train(stop_at=LAST)[0] == EXIT_REQUEUE
        damaged = bench.newest
        damage(damaged / name)
        code, told = bench.train()
        assert code == EXIT_OK, told
        message = bench.warning("checkpoint_bad")
        assert damaged.name in message
        assert bench.events("restart")[0]["step"] == LAST - 1
        aside = [path.name for path in bench.checkpoints.glob(".bad-*")]
        # what another version of the program wrote may be good: it is passed over, not set aside
        assert len(aside) == (0 if damage is DAMAGES["manifest of another version of the program"][1] else 1)
        return bench.ended(message, code)

    return plant


for _what, (_name, _damage) in DAMAGES.items():
    fault(f"newest checkpoint: {_what}")(_plant(_name, _damage))


@fault("half-written checkpoint left by a kill")
def _left_over(bench: Bench) -> Seen:
    bench.train(stop_at=LAST)
    shutil.copytree(bench.newest, bench.checkpoints / ".tmp-step_00000007")
    (bench.checkpoints / ".tmp-step_00000007" / files.MANIFEST).unlink()
    code, _ = bench.train()
    assert not list(bench.checkpoints.glob(".tmp-*"))
    assert bench.events("restart")[0]["step"] == LAST
    return bench.ended("", code)


@fault("every checkpoint damaged")
def _all_damaged(bench: Bench) -> Seen:
    bench.train(stop_at=LAST)
    kept = {path: (path / NAMES["shard"]).read_bytes() for path in bench.checkpoints.glob("step_*")}
    for path in kept:
        flip(path / NAMES["shard"])
    code, message = bench.train()
    assert code == EXIT_NO_CHECKPOINT
    assert all(path.name in message for path in kept)
    assert "--fresh" in message
    for path, content in kept.items():  # restored from a backup, nothing was lost by refusing
        (path / NAMES["shard"]).write_bytes(content)
    return bench.goes_on(message, code)
