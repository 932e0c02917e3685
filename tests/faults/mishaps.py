"""Numbers that are not finite, damaged images, services and clocks that fail: what a recipe says is done about them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from distributed_at.engine.checkpoint.files import step_name
from distributed_at.engine.nonfinite import NonfiniteGuard
from distributed_at.errors import EXIT_DIVERGED, EXIT_OK
from distributed_at.objectives.pgd_at import PgdAt
from tests.faults.faults import INTERVAL, SAVING, SILENT, Bench, Seen, fault, log_lines
from tests.faults.kill_many import repeated_steps
from tests.training_kit import state_digest, train

ROLLBACK = ["train.on_nonfinite=rollback"]
WITHOUT_THE_STEP = "bitwise a run that never had that step's batch"


def loss_times(factor: float, steps: Sequence[int]) -> contextlib.AbstractContextManager[object]:
    """Multiply the loss of these optimiser steps (from 0), every time that they are computed."""
    real = PgdAt.loss

    def wrong(self, forward, batch, adv):
        terms = real(self, forward, batch, adv)
        if batch.step in steps:
            object.__setattr__(terms, "loss", terms.loss * factor)
        return terms

    return mock.patch.object(PgdAt, "loss", wrong)


def nan_at(*steps: int) -> contextlib.AbstractContextManager[object]:
    """Make the loss of these optimiser steps NaN."""
    return loss_times(float("nan"), steps)


def _as_without_step(bench: Bench, step: int, words: Sequence[str]) -> bool:
    """Whether the run ended bitwise as one that passes over this step from the beginning."""
    real = NonfiniteGuard.__init__

    def knowing(self: NonfiniteGuard, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self.skipped.add(step)

    without = bench.folder.parent / "without"
    with mock.patch.object(NonfiniteGuard, "__init__", knowing):
        assert train(without, [*SAVING, *words]) == EXIT_OK
    return state_digest(without) == state_digest(bench.folder)


def _nonfinite(bench: Bench) -> str:
    row = bench.events("nonfinite")[0]
    assert len(row["sample_ids"]) == 24 or row["what"] == "jump of the loss"
    return f"nonfinite: {row['what']} at step {row['at_step']}, {len(row['sample_ids'])} sample ids"


@fault("NaN loss, on_nonfinite: stop")
def _nan_passed_over(bench: Bench) -> Seen:
    with nan_at(5):
        code, _ = bench.train()
    assert code == EXIT_OK
    return Seen(_nonfinite(bench), str(code), 0, "the step moves nothing; the rest goes on")


@fault("NaN loss in step after step, on_nonfinite: stop")
def _nan_to_the_end(bench: Bench) -> Seen:
    words = ["train.max_nonfinite_steps=2"]
    with nan_at(5, 6):
        code, message = bench.train(words=words)
    assert code == EXIT_DIVERGED
    assert "2 steps in a row" in message
    again, told = bench.train(words=words)
    assert again == EXIT_OK, told
    return Seen(message, str(code), max(repeated_steps(bench.folder)), "the bad steps moved nothing; the rest goes on")


@fault("NaN loss, on_nonfinite: rollback")
def _nan_rolled_back(bench: Bench) -> Seen:
    with nan_at(5):
        code, _ = bench.train(words=ROLLBACK)
        whole = bench.folder.parent / "stopped"
        assert train(whole, [*SAVING, *ROLLBACK], stop_at=7) != EXIT_OK
    assert code == EXIT_OK
    back = bench.events("rollback")[0]
    assert back["step"] == 4
    assert train(whole, [*SAVING, *ROLLBACK]) == EXIT_OK  # sound again, but the step stays passed over
    assert state_digest(whole) == state_digest(bench.folder)
    assert _as_without_step(bench, 5, ROLLBACK)
    assert not bench.as_undisturbed(words=ROLLBACK)
    message = f"{_nonfinite(bench)}; rollback: from step {back['from_step']} to {back['step']}"
    return Seen(message, str(code), back["from_step"] - back["step"] - 1, WITHOUT_THE_STEP)


@fault("NaN loss wherever the run goes back to, on_nonfinite: rollback")
def _nan_everywhere(bench: Bench) -> Seen:
    words = [*ROLLBACK, "train.max_nonfinite_steps=3"]
    with nan_at(*range(4, 9)):
        code, message = bench.train(words=words)
    assert code == EXIT_DIVERGED
    assert "not finite at step 6" in message
    assert bench.newest.name == step_name(6)  # two steps passed over: the weights of step 4
    return Seen(message, str(code), INTERVAL, "not reached; the weights of step 4 stand")


@fault("a jump of the loss, spike_factor: 50")
def _jump(bench: Bench) -> Seen:
    words = [*ROLLBACK, "train.spike_factor=50", "train.epochs=5"]
    with loss_times(1000, [11]):
        code, _ = bench.train(words=words)
    assert code == EXIT_OK
    assert [row["what"] for row in bench.events("nonfinite")] == ["jump of the loss"]
    assert _as_without_step(bench, 11, words)
    back = bench.events("rollback")[0]
    return Seen(_nonfinite(bench), str(code), back["from_step"] - back["step"] - 1, WITHOUT_THE_STEP)


def _photos(root: Path) -> Path:
    """Write an image folder of two classes: 12 images of 16 x 16 each, in train and val."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{number:02d}.JPEG", quality=95)
    return root


@fault("a damaged image among the training data")
def _image(bench: Bench) -> Seen:
    root = _photos(bench.folder.parent / "photos")
    words = [f"data={{dataset: imagenet, path: {root}, image_size: 8, resize_size: 8, backend: pil, num_threads: 1}}"]
    assert train(bench.folder.parent / "whole", [*SAVING, *words]) == EXIT_OK  # makes the index too
    path = root / "train" / "n01" / "n01_03.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    code, told = bench.train(words=words)
    assert code == EXIT_OK, told
    message = bench.warning("image_damaged")
    assert "n01_03.JPEG" in message
    again = bench.folder.parent / "again"
    train(again, [*SAVING, *words], stop_at=5)
    assert train(again, [*SAVING, *words]) == EXIT_OK
    assert state_digest(again) == state_digest(bench.folder)
    return Seen(bench.plain(message), str(code), 0, "another image in its place, the same in every resume")


@fault("wandb out of reach", slow=True)
def _wandb(bench: Bench) -> Seen:
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    with mock.patch.dict(os.environ, away), log_lines() as lines:
        code, told = bench.train(words=["log.wandb=online"])
    assert code == EXIT_OK, told
    assert len(lines) == 1
    return bench.ended(lines[0], code)


@fault("the clock jumps by an hour, back and forth")
def _clock(bench: Bench) -> Seen:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (3600 if calls[0] % 3 else -3600)

    with mock.patch("time.time", jumping):
        bench.train(stop_at=5)
        code, told = bench.train()
    assert code == EXIT_OK, told
    assert calls[0] > 10
    return bench.ended(SILENT, code, most=0)


@contextlib.contextmanager
def _other_versions() -> Iterator[None]:
    """Let the program find other versions of what it is made of."""
    from distributed_at.observe import environment

    real = environment.package_versions()
    with mock.patch.object(environment, "package_versions", return_value={**real, "torch": "2.11.0"}):
        yield


@fault("the run goes on with other versions of the program and of torch")
def _versions(bench: Bench) -> Seen:
    bench.train(stop_at=5)
    with _other_versions():
        code, told = bench.train()
    assert code == EXIT_OK, told
    message = bench.warning("environment_changed")
    assert "-> 2.11.0" in message
    return bench.ended(message, code, most=0)
