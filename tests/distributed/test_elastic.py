"""World size changes who computes what, never what is computed: samples, views, starts and targets are bitwise the same.

Losses agree within LOSS_TOLERANCE: sums over ranks are taken in another order, in fp32, and the attack's sign amplifies it. At
equal world size the resumed run is bitwise the undisturbed one. ``python -m tests.distributed.test_elastic`` prints the
table.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_at.errors import EXIT_OK, EXIT_REQUEUE
from tests.distributed.launch import run_ranks
from tests.training_kit import recorded, state_digest, train, training_rows, weights

STEPS = 50
LOSS_TOLERANCE = 2e-2  # of losses near 2, over 50 steps; seen: 3e-7 to 4e-3
FIRST_TOLERANCE = 1e-5  # over the first steps: later a pixel whose gradient is near zero may take the other sign
FIRST = 3
RECIPE = [
    "data.limit_train=720",
    "train.epochs=5",
    "train.batch_size=72",
    "train.bn_group_size=6",  # so that 1, 2, 3 and 4 ranks can hold whole groups
    "attack.target=random_other",
    "attack.start_clean_probability=0.25",
    "data.augment={crop: pad, pad: 1, flip: true}",
    "optimizer.lr=0.02",
]
HALF = 25  # of 50 steps, 10 an epoch: the middle of the third epoch


Job = tuple[str, Sequence[int | None], Sequence[str]]  # folder, stops (None: the end), overrides


def work(jobs: Sequence[Job]) -> list[list[Any]]:
    """Train each job to each of its stops in turn; returns this rank's records of each."""
    found = []
    for folder, stops, overrides in jobs:
        with recorded() as records:
            for stop in stops:
                code = train(Path(folder), overrides, stop_at=stop)
                assert code == (EXIT_OK if stop is None else EXIT_REQUEUE)
        found.append(list(records))
    return found


class Runs:
    """Trains runs in parts of any world size and keeps what every sample's attack was given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records: dict[str, list[Any]] = {}

    def train(
        self, world_size: int, jobs: Sequence[tuple[str, Sequence[int | None]]], words: Sequence[str] = ()
    ) -> None:
        """Go on with each named run at ``world_size``; one set of processes trains them all, one after another."""
        asked = [(str(self.root / name), stops, [*RECIPE, *words]) for name, stops in jobs]
        results = [work(asked)] if world_size == 1 else run_ranks(work, world_size, asked)
        for own in results:
            for (name, _), records in zip(jobs, own, strict=True):
                self._records.setdefault(name, []).extend(records)

    def outcome(self, name: str) -> dict[str, Any]:
        """Records of all ranks, losses, rows, and the digest of the whole state at the end."""
        folder = self.root / name
        rows = training_rows(folder)
        return {
            "records": sorted(self._records[name]),
            "losses": [row["loss"] for row in rows if row["event"] == "train"],
            "rows": rows,
            "digest": state_digest(folder),
            "weights": weights(folder),
        }


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert that two runs' losses agree within what is promised."""
    differences = [abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)]
    assert max(differences) < LOSS_TOLERANCE
    assert max(differences[:FIRST]) < FIRST_TOLERANCE


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of losses over all steps, and of weights at the end."""
    losses = max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
    return losses, max(float((a["weights"][n] - b["weights"][n]).abs().max()) for n in a["weights"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    torch.set_num_threads(1)
    found = Runs(tmp_path_factory.mktemp("runs"))
    found.train(2, [("two", [None]), ("two-resumed", [HALF, None]), ("elastic", [13])])
    sparse = ["train.epochs=1", "schedule.warmup_epochs=0", "log.every_steps=4"]
    found.train(2, [("sparse", [None]), ("sparse-resumed", [6, None]), ("sparse-elastic", [6])], sparse)
    found.train(1, [("one", [None]), ("elastic", [27])])
    found.train(1, [("sparse-elastic", [None])], sparse)
    found.train(4, [("elastic", [None])])
    return found


def test_two_ranks_compute_what_one_computes(runs):
    one, two = runs.outcome("one"), runs.outcome("two")
    assert len(one["losses"]) == len(two["losses"]) == STEPS
    assert len(one["records"]) == STEPS * 72
    assert two["records"] == one["records"]  # ids, views, starts and targets, bit for bit
    assert_close(one, two)


def test_resume_at_other_world_sizes_continues_with_bitwise_the_same_samples(runs):
    one, elastic = runs.outcome("one"), runs.outcome("elastic")
    assert elastic["records"] == one["records"]
    assert_close(one, elastic)


def test_resume_at_the_same_world_size_is_bitwise_the_undisturbed_run(runs):
    whole, resumed = runs.outcome("two"), runs.outcome("two-resumed")
    assert resumed["rows"] == whole["rows"]
    assert resumed["digest"] == whole["digest"]


def test_rows_across_a_resume_count_the_steps_before_it_too(runs):
    whole, resumed, fewer = (runs.outcome(n) for n in ("sparse", "sparse-resumed", "sparse-elastic"))
    assert resumed["rows"] == whole["rows"]
    assert [r["step"] for r in fewer["rows"]] == [r["step"] for r in whole["rows"]]
    assert_close(whole, fewer)


def test_the_comparison_sees_another_seed(runs):
    runs.train(1, [("other", [None])], ["seed=1", "train.epochs=2"])
    other = runs.outcome("other")["records"]
    assert other != runs.outcome("one")["records"][: len(other)]


def main() -> int:
    with tempfile.TemporaryDirectory() as root:
        found = Runs(Path(root))
        routes: list[list[tuple[int, int | None]]] = [
            [(1, None)],
            [(2, None)],
            [(1, HALF), (1, None)],
            [(2, HALF), (2, None)],
            [(4, None)],
            [(2, 13), (1, 27), (4, None)],
            [(2, 9), (1, 18), (3, 27), (4, 36), (2, None)],
        ]
        print(f"{'ranks [stop at step]':34} {'samples, views, starts, targets':32} losses and weights")
        base = pair = None
        for legs in routes:
            path = " ".join(f"{w}" + (f" [{s}]" if s is not None else "") for w, s in legs)
            for world_size, stop in legs:
                found.train(world_size, [(path, [stop])])
            outcome = found.outcome(path)
            base, pair = base or outcome, outcome if legs == [(2, None)] else pair
            same = "equal" if outcome["records"] == base["records"] else "DIFFERENT"
            against = pair if {w for w, _ in legs} == {2} else base
            if outcome["digest"] == against["digest"] and outcome["rows"] == against["rows"]:
                told = f"bitwise equal to {legs[0][0]} undisturbed"
            else:
                losses, last = largest_difference(base, outcome)
                told = f"losses within {losses:.1e} of 1 undisturbed, weights {last:.1e}"
            print(f"{path:34} {same:32} {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
