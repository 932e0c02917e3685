"""Seconds by section of a step, against a clock that a test moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from distributed_at.engine import clock as module
from distributed_at.engine.clock import SECTIONS, StepClock


class Watch:
    """Stands still until it is told that time passes."""

    def __init__(self) -> None:
        self.now = 100.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


def step(clock: StepClock, watch: Watch, **seconds: float) -> None:
    for name, length in seconds.items():
        with clock.section(name):
            watch.passes(length)


def test_sections_add_up_over_visits_and_the_rest_is_other(watch: Watch) -> None:
    clock = StepClock(torch.device("cpu"))
    step(clock, watch, data=1.0, attack=8.0, train=2.0)
    watch.passes(0.5)
    step(clock, watch, attack=4.0, communication=0.25)
    seconds, wall = clock.collect()
    assert seconds == {
        "data": 1.0, "attack": 12.0, "train": 2.0, "communication": 0.25, "checkpoint": 0.0, "other": 0.5,
    }  # fmt: skip
    assert list(seconds) == list(SECTIONS)
    assert wall == sum(seconds.values()) == 15.75


def test_each_row_begins_where_the_last_one_ended(watch: Watch) -> None:
    clock = StepClock(torch.device("cpu"))
    step(clock, watch, attack=3.0)
    clock.collect()
    watch.passes(1.0)
    step(clock, watch, attack=2.0)
    seconds, wall = clock.collect()
    assert (seconds["attack"], seconds["other"], wall) == (2.0, 1.0, 3.0)


def test_an_evaluation_is_in_no_figure(watch: Watch) -> None:
    clock = StepClock(torch.device("cpu"))
    step(clock, watch, train=2.0)
    with clock.paused():
        watch.passes(60.0)
    step(clock, watch, train=1.0)
    seconds, wall = clock.collect()
    assert (seconds["train"], seconds["other"], wall) == (3.0, 0.0, 3.0)


def test_time_counts_where_a_section_fails(watch: Watch) -> None:
    clock = StepClock(torch.device("cpu"))

    def attack() -> None:
        with clock.section("attack"):
            watch.passes(5.0)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        attack()
    assert clock.collect()[0]["attack"] == 5.0


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(ValueError, match="'attak' is none of"), StepClock(torch.device("cpu")).section("attak"):
        pass
