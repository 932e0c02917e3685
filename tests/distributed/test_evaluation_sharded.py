"""The same rows on every rank and at every world size, also after ranks were killed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distributed_at.config import AttackConfig, evaluation_entry
from distributed_at.evaluation import build_protocol, evaluation_ids, weights_hash
from distributed_at.evaluation.ledger import Ledger
from distributed_at.evaluation.rows import COLUMNS, Rows
from tests.distributed.launch import run_ranks
from tests.evaluation_kit import measure, measure_entry, source, trained

SIZE = 53  # no world size below divides it
ATTACK = AttackConfig(eps=40.0, num_steps=5, step_size=12.0, restarts=2)
PGD = evaluation_entry(kind="pgd", attack=ATTACK)
TARGETED = evaluation_entry(kind="pgd", attack=ATTACK.model_copy(update={"target": "random_other"}))


def autoattack_protocol(model, data):
    return build_protocol(
        evaluation_entry(kind="autoattack", attack=ATTACK),
        weights=weights_hash(model),
        ids=evaluation_ids(data),
        num_classes=10,
        chunk_size=10,
        num_steps=4,
        num_queries=10,
    )


def everything(folder: str | None, batch_size: int) -> dict:
    """Evaluate three protocols on this rank; return what each gave."""
    model, data = trained(), source(size=SIZE)
    out = {}
    for name, what in (("pgd", PGD), ("targeted", TARGETED), ("autoattack", autoattack_protocol(model, data))):
        seen: list[tuple[int, int]] = []
        data.read_ids.clear()
        result = measure(
            model,
            data,
            what,
            folder=Path(folder) / name if folder else None,
            batch_size=batch_size,
            on_progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        numbers = (result.correct, result.total, result.accuracy, result.attack_success_rate, result.protocol.hash)
        out[name] = {"rows": result.rows, "numbers": numbers, "computed": result.computed, "read": len(data.read_ids)}
        assert not seen or seen[-1][0] == seen[-1][1]
    single = ATTACK.model_copy(update={"restarts": 1})
    several = evaluation_entry(kind="pgd", attack=single, checkpoints=(1, 2))
    points = measure_entry(model, data, several, batch_size=batch_size)
    out["curve"] = [(p.protocol.num_steps, p.correct, p.total) for p in points]
    return out


def assert_same_rows(a: Rows, b: Rows) -> None:
    for name in COLUMNS:
        if name == "loss":
            np.testing.assert_allclose(a.loss, b.loss, rtol=1e-3, atol=1e-4)
        else:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def stop_half_way(folder: str) -> str:

    def stop(done: int, total: int) -> None:
        if dist.get_rank() == 1 and done >= 12:
            raise KeyError("killed")

    try:
        measure(trained(), source(size=SIZE), PGD, folder=Path(folder), batch_size=6, on_progress=stop)
    except (KeyError, RuntimeError) as error:
        return type(error).__name__
    return "finished"


def resume(folder: str) -> dict:
    data = source(size=SIZE)
    result = measure(trained(), data, PGD, folder=Path(folder), batch_size=4)
    return {"rows": result.rows, "computed": result.computed, "read": len(data.read_ids)}


def differing_weights() -> str:
    model = trained(steps=2)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.norm.running_mean += 1
    try:
        measure(model, source(size=6), PGD)
    except RuntimeError as error:
        return str(error)
    return "no error"


def two_ranks(folder: str) -> dict:
    dist.init_process_group("gloo")
    return {
        "all": everything(folder + "/all", 6),
        "stopped": stop_half_way(folder + "/stopped"),
        "differing": differing_weights(),
    }


def three_ranks(folder: str) -> dict:
    dist.init_process_group("gloo")
    whole = everything(None, 9)
    reads = []
    plain = Ledger.read
    Ledger.read = lambda self: (reads.append(self), plain(self))[1]
    return {"all": whole, "resumed": resume(folder + "/stopped"), "ledgers read": len(reads)}


@dataclass(frozen=True)
class Launches:
    """What two ranks, and then three on the same folder, returned."""

    folder: Path
    two: list[dict]
    stored: int
    three: list[dict]


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> Launches:
    # starting processes is nearly all of the time, so everything runs in two launches
    folder = tmp_path_factory.mktemp("evaluations")
    two = run_ranks(two_ranks, 2, str(folder))
    files = list(folder.glob("stopped/*/rows-*"))
    stored = sum(len(path.read_text().splitlines()) - 1 for path in files)
    return Launches(folder, two, stored, run_ranks(three_ranks, 3, str(folder)))


def test_rows_are_the_same_on_one_two_and_three_ranks(launches: Launches) -> None:
    reference = everything(None, 20)
    for ranks in ([r["all"] for r in launches.two], [r["all"] for r in launches.three]):
        for name in ("pgd", "targeted", "autoattack"):
            assert reference[name]["rows"].sample_id.shape == (SIZE,)
            for rank in ranks:
                assert_same_rows(reference[name]["rows"], rank[name]["rows"])
                assert rank[name]["numbers"] == reference[name]["numbers"]
            # the work was shared: each sample was read by one rank alone
            assert sum(rank[name]["read"] for rank in ranks) == SIZE
            assert max(rank[name]["read"] for rank in ranks) < 0.7 * SIZE
        assert all(rank["curve"] == reference["curve"] for rank in ranks)
    assert reference["curve"][-1][1] >= reference["pgd"]["numbers"][0]  # a second restart breaks no fewer
    assert reference["curve"][0][1] > reference["curve"][-1][1]
    assert len(list(launches.folder.glob("all/*/*/summary.json"))) == 3


def test_a_failure_on_one_rank_ends_all_and_another_world_size_resumes(launches: Launches) -> None:
    assert [rank["stopped"] for rank in launches.two] == ["RuntimeError", "KeyError"]
    assert 12 <= launches.stored < SIZE
    whole = measure(trained(), source(size=SIZE), PGD)
    for rank in launches.three:
        assert_same_rows(whole.rows, rank["resumed"]["rows"])
        assert rank["resumed"]["computed"] == SIZE - launches.stored
    assert [rank["ledgers read"] for rank in launches.three] == [1, 0, 0]  # the first tells the others
    assert sum(rank["resumed"]["read"] for rank in launches.three) == SIZE - launches.stored


def test_ranks_with_different_buffers_are_an_error_on_every_rank(launches: Launches) -> None:
    for rank in launches.two:
        assert "disagree about the weights" in rank["differing"]


def test_world_size_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        measure(trained(steps=1), source(size=6), PGD, rank=2, world_size=2)
