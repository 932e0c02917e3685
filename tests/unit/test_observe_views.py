"""Console, tables and environment: views of a run's records."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from distributed_at.evaluation import Ledger, Rows
from distributed_at.evaluation.rows import COLUMNS
from distributed_at.observe.console import ConsoleView
from distributed_at.observe.environment import changes, collect_environment, read_environment, write_environment
from distributed_at.observe.events import EventLog
from distributed_at.observe.record import parse_measurement
from distributed_at.observe.tables import KEYS, compare, compare_rows, evaluation_rows, rows_json
from distributed_at.statistics import mcnemar
from tests import records


def events() -> list[dict]:
    base = {"event": "train", "restart": 0}
    rows = [{"event": "run_start", "step": 0, "epoch": 0, "time": 0.0, "restart": 0, "total_steps": 100}]
    for step in range(3):
        rows.append({**base, "step": 10 * step, "epoch": step, "time": 5.0 * step, "loss": 1.25, "adv_accuracy": 0.512, "lr": 0.1, "eps": 8.0, "images_per_second": 640.0, "seconds": {"attack": 3.0, "train": 1.0}, "terms": {"kl": 0.25}})  # fmt: skip
    rows.append({"event": "evaluation", "step": 20, "epoch": 2, "time": 11.0, "restart": 0, "split": "validation", "protocol": {"name": "PGD-10"}, "branch": "adv", "correct": 45, "total": 90})  # fmt: skip
    rows.append({"event": "warning", "step": 20, "epoch": 2, "time": 11.0, "restart": 0, "code": "io", "message": "[red]slow[/red] disk"})  # fmt: skip
    return rows


def show(*, live: bool) -> str:
    stream = io.StringIO()
    view = ConsoleView(file=stream, live=live)
    for row in events():
        view.on_event(row)
    view.close()
    return stream.getvalue()


def test_plain_console_writes_one_line_an_event_with_its_numbers() -> None:
    text = show(live=False)
    assert "\x1b" not in text
    lines = text.strip().splitlines()
    assert len(lines) == len(events())
    assert "step 20/100" in lines[3]
    for shown in ("loss 1.25", "kl 0.25", "adv 51.2%", "eps 8/255", "640 img/s", "attack 75%", "left 40 s"):
        assert shown in lines[3], shown
    assert "45/90" in lines[4]
    assert "WARNING io: [red]slow[/red] disk" in lines[5]


def test_live_console_draws_the_same_numbers() -> None:
    text = show(live=True)
    for shown in ("1.25", "51.2%", "640", "45/90", "left 40 s"):
        assert shown in text, shown


def test_console_bears_nan_and_missing_fields() -> None:
    for live in (True, False):
        view = ConsoleView(file=io.StringIO(), live=live)
        view.on_event({"event": "train", "step": 1, "epoch": 0.0, "time": 0.0, "loss": math.nan})
        view.on_event({"event": "restart", "step": 1, "epoch": 0.0, "time": 0.0})
        view.on_event({"event": "something_new", "step": 1, "epoch": 0.0, "time": 0.0})
        view.close()


def write_summary(
    folder: Path, correct: int, branch: str = "adv", paper: dict | None = None, **protocol: object
) -> Path:
    place = folder / "evaluations" / f"pgd-{branch}-{protocol.get('num_steps', 20)}"
    place.mkdir(parents=True)
    held = {"name": "PGD-20 linf 8/255", "kind": "pgd", "num_steps": 20, "eps": 8.0, "hash": folder.name, "weights": folder.name, **protocol}  # fmt: skip
    content = {"protocol": held, "branch": branch, "split": "test", "metric": "robust_accuracy", "correct": correct, "total": 500}  # fmt: skip
    (place / "summary.json").write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text(json.dumps({"name": folder.name, "paper": {"numbers": paper or {}}}))
    return folder


def test_rows_have_the_documented_keys_in_table_and_json(tmp_path: Path) -> None:
    config = records.recipe({"pgd-20": 49.0}, "[{kind: pgd, attack: {eps: 8, num_steps: 20, step_size: 2}}]")
    (entry,) = records.singles(config)
    summary = {"protocol": records.protocol(config, entry), "correct": 250, "total": 500}
    rows = evaluation_rows(records.write(tmp_path / "a", config, [summary]))
    assert tuple(json.loads(rows_json(rows))[0]) == KEYS
    (row,) = rows
    assert (row["accuracy"], row["paper"], row["difference"]) == (0.5, 49.0, pytest.approx(1.0))
    assert row["low"] < 0.5 < row["high"]


def test_paper_number_of_another_attack_is_not_taken(tmp_path: Path) -> None:
    (row,) = evaluation_rows(write_summary(tmp_path / "a", 250, paper={"pgd10": 49.0, "aa": 44.0}))
    assert row["paper"] is None


def test_runs_are_comparable_whatever_their_weights_but_not_across_protocols(tmp_path: Path) -> None:
    runs = [write_summary(tmp_path / "a", 250), write_summary(tmp_path / "b", 10), write_summary(tmp_path / "c", 99, eps=4.0)]  # fmt: skip
    assert [row["comparable"] for row in compare_rows(runs)] == [None, True, False]


def test_compare_table_names_runs_counts_and_intervals(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    console.print(compare([write_summary(tmp_path / "first", 250), write_summary(tmp_path / "second", 10)]))
    for shown in ("first", "second", "50.00", "2.00", "250 / 500", "10 / 500"):
        assert shown in stream.getvalue(), shown


def write_rows(folder: Path, right: np.ndarray, ids: np.ndarray) -> None:
    """Keep rows by sample beside the run's summary, as its evaluation does."""
    columns = {name: np.zeros(len(ids), dtype=kind) for name, kind in COLUMNS.items()}
    rows = Rows(**{**columns, "sample_id": ids, "correct_adv": right})
    Ledger(folder / "evaluations" / "pgd-adv-20", folder.name).append(rows)


def test_runs_on_the_same_images_are_compared_image_by_image(tmp_path: Path) -> None:
    first, second = write_summary(tmp_path / "a", 250), write_summary(tmp_path / "b", 258)
    ids = np.arange(500) * 3
    right = np.arange(500) < 250
    write_rows(first, right, ids)
    better = right.copy()
    better[[3, *range(300, 309)]] ^= True  # loses one image, gains nine
    write_rows(second, better[::-1].copy(), ids[::-1].copy())
    rows = compare_rows([first, second, write_summary(tmp_path / "c", 258)])
    assert rows[0]["p_value"] is None
    assert rows[1]["p_value"] == pytest.approx(mcnemar(1, 9).p_value) == pytest.approx(0.0215, abs=1e-4)
    assert rows[2]["p_value"] is None, "no rows by sample, so no test"
    stream = io.StringIO()
    Console(file=stream, width=200).print(compare([first, second]))
    assert "0.021" in stream.getvalue()


def test_newest_evaluation_of_one_protocol_stands_and_other_protocols_stay(tmp_path: Path) -> None:
    folder = write_summary(tmp_path / "a", 250)
    old = folder / "evaluations" / "pgd-adv-20" / "summary.json"
    content = json.loads(old.read_text())
    for name, correct, change, modified in (("newer", 260, {"weights": "w2"}, 2e9), ("other", 270, {"seed": 5}, 1e9)):
        place = folder / "evaluations" / name
        place.mkdir()
        changed = {**content, "correct": correct, "protocol": {**content["protocol"], **change}}
        (place / "summary.json").write_text(json.dumps(changed))
        os.utime(place / "summary.json", (modified, modified))
    assert sorted(row["correct"] for row in evaluation_rows(folder)) == [260, 270]


def test_counts_overrule_a_stated_accuracy() -> None:
    found = parse_measurement({"protocol": "clean", "correct": 1, "total": 4, "accuracy": 0.9})
    assert found is not None
    assert found.accuracy == 0.25


def test_environment_keeps_earlier_starts_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_SECRET", "very-hidden-value")
    for start in range(3):
        command = ["train", f"n={start}", "--token", "plainvalue", "very-hidden-value"]
        write_environment(tmp_path, command=command, world_size=start + 1)
    found = read_environment(tmp_path)
    assert found["world_size"] == 3
    assert [earlier["world_size"] for earlier in found["earlier"]] == [1, 2]
    assert found["versions"]["torch"]
    text = (tmp_path / "environment.json").read_text()
    assert "plainvalue" not in text
    assert "very-hidden-value" not in text


def test_environment_is_plain_json() -> None:
    assert json.loads(json.dumps(collect_environment(), allow_nan=False))["python"]


def test_changes_between_two_starts_are_named():
    before = {"versions": {"torch": "2.11.0", "wandb": "0.3"}, "git": {"commit": "a" * 40}, "devices": {"kind": "cpu"}}
    now = {"versions": {"torch": "2.12.0", "triton": "3"}, "git": {"commit": "b" * 40}, "devices": {"kind": "cuda"}}
    assert changes(before, before) == []
    assert changes(before, now) == [
        "torch 2.11.0 -> 2.12.0",
        "triton absent -> 3",
        "wandb 0.3 -> absent",
        f"commit {'a' * 12} -> {'b' * 12}",
        "devices cpu -> cuda",
    ]
    assert changes({"versions": {}, "devices": {"kind": "cpu"}}, {"versions": {}, "devices": {"kind": "cpu"}}) == []


def test_views_get_rows_through_the_event_log(tmp_path: Path) -> None:
    stream = io.StringIO()
    with EventLog(tmp_path, views=[ConsoleView(file=stream, live=False)]) as log:
        log.write("train", step=7, epoch=0.5, loss=0.125)
    assert "loss 0.125" in stream.getvalue()
