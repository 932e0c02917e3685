"""An evaluation that takes long on one rank is no hang, neither there nor where others wait for it."""

from __future__ import annotations

import time

from distributed_at.errors import EXIT_OK
from tests.faults.harness import Start
from tests.faults.processes import VALIDATING, SlowEvaluation

LIMIT = 12.0  # seconds without progress that count as a hang
ONCE = ["train.epochs=1", "schedule.warmup_epochs=0"]  # one evaluation: of 6 batches of 4 images, every other on rank 1


def test_long_evaluation_on_one_rank_is_no_hang_there_or_where_others_wait(tmp_path):
    waits = (5.0, 5.0, 5.0)
    began = time.monotonic()
    start = Start(tmp_path / "run", 2, [*VALIDATING, *ONCE], inside=SlowEvaluation(1, waits, LIMIT))
    assert set(start.wait().values()) == {EXIT_OK}, start.text()
    assert time.monotonic() - began > sum(waits) > LIMIT
    assert not list((tmp_path / "run" / "log").glob("stacks-*"))
