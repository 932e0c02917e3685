"""Numbers that views show, from events and summaries written by hand, against counting, scipy and data sheets."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from scipy.stats import binomtest

from distributed_at.cost import mfu, recipe_forward_flops
from distributed_at.observe.console import ConsoleView
from distributed_at.observe.record import load_run
from distributed_at.observe.secrets import redact_text, secret_values
from distributed_at.observe.tables import evaluation_rows
from distributed_at.observe.wandb import flatten
from distributed_at.statistics import wilson
from tests import records


def shown(*rows: dict) -> list[str]:
    """Return what the plain console prints of some events."""
    stream = io.StringIO()
    view = ConsoleView(file=stream, live=False, total_steps=100)
    for row in rows:
        view.on_event({"epoch": 0.0, "restart": 0, **row})
    view.close()
    return stream.getvalue().splitlines()


def test_time_left_is_that_of_this_starts_own_speed_whatever_the_pause_before_it() -> None:
    before = [{"event": "train", "step": step, "time": 3.0 * step} for step in (0, 10, 20)]
    after = [{"event": "train", "step": step, "time": 9000.0 + 0.5 * step} for step in (21, 31, 41)]
    lines = shown(*before, {"event": "restart", "step": 20, "time": 9000.0}, *after)
    assert "left 4 m 00 s" in lines[2]  # 80 steps of 3 s
    assert "left 30 s" in lines[-1]  # 59 steps of half a second


def test_console_shows_the_wilson_interval_of_an_evaluation_in_percent() -> None:
    row = {"event": "evaluation", "step": 1, "time": 0.0, "split": "validation", "protocol": {"name": "clean"}}
    (line,) = shown({**row, "correct": 45, "total": 90})
    low, high = binomtest(45, 90).proportion_ci(0.95, method="wilson")
    assert f"50.00%  [{100 * low:.1f}, {100 * high:.1f}]  45/90" in line


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (3, 10), (437, 1000), (9999, 10000)])
def test_intervals_are_scipys_wilson_intervals_at_95_percent(correct: int, total: int) -> None:
    theirs = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson(correct, total) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


# TFLOP/s of one device as the data sheets say, dense: half precision, TF32, FP32
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (312, 156, 19.5),
    "NVIDIA H100 80GB HBM3": (989.5, 494.7, 67),
    "Tesla V100-SXM2-32GB": (125, 15.7, 15.7),
}


@pytest.mark.parametrize("device", PEAKS)
def test_mfu_is_held_against_the_peak_of_the_precision_in_use(device: str) -> None:
    half, tf32, fp32 = PEAKS[device]
    for precision, peak in (("bf16", half), ("fp16", half), ("tf32", tf32), ("fp32", fp32)):
        # 4 devices reach a quarter of the peak with images of 3 GFLOP
        found = mfu(
            images_per_second=peak * 1e12 / 3e9,
            flops_per_image=3e9,
            num_devices=4,
            device_name=device,
            precision=precision,
        )
        assert found == pytest.approx(0.25), precision


@pytest.mark.parametrize(("dataset", "classes"), [("imagenet", 1000), ("cifar100", 100), ("cifar10", 10)])
def test_flops_of_a_recipe_are_those_of_its_data_sets_classes(dataset: str, classes: int) -> None:
    recipe = {
        "data": {"dataset": dataset, "image_size": 32, "num_classes": None},
        "model": {"arch": "resnet", "blocks": [1], "block": "basic", "base_width": 8, "stem": "cifar"},
    }
    convolutions = 32 * 32 * 8 * 9 * (3 + 8 + 8)
    assert recipe_forward_flops(recipe) == 2 * (convolutions + 8 * classes)


def run_folder(folder: Path, summaries: list[dict], events: list[dict] = (), **recipe: object) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": folder.name, **recipe}))
    for number, summary in enumerate(summaries):
        place = folder / "evaluations" / str(number)
        place.mkdir(parents=True)
        held = {"split": "test", "branch": "adv", "metric": "robust_accuracy", "correct": 430, "total": 1000}
        (place / "summary.json").write_text(json.dumps({**held, **summary}))
    lines = [json.dumps({"epoch": 1.0, "time": 0.0, "restart": 0, **row}) for row in events]
    (folder / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def pgd(steps: int, **fields: object) -> dict:
    return {"name": f"PGD-{steps}", "kind": "pgd", "num_steps": steps, **fields}


PGD10 = "[{kind: pgd, attack: {eps: 8, num_steps: 10, step_size: 2, restarts: RESTARTS}}]"


def measured(
    folder: Path, numbers: dict[str, float], *, restarts: int = 1, branches: tuple[str, ...] = ("adv",)
) -> Path:
    """Write a run whose recipe measures PGD-10, and what came of it on each branch."""
    norm = ["model.norm=mbn", "objective={name: mixture}"] if len(branches) > 1 else []
    config = records.recipe(numbers, PGD10.replace("RESTARTS", str(restarts)), *norm)
    (entry,) = records.singles(config)
    rows = [
        {"protocol": records.protocol(config, entry, branch=branch), "branch": branch, "correct": 430, "total": 1000}
        for branch in branches
    ]
    return records.write(folder, config, rows)


def test_attack_with_restarts_is_another_row_of_the_paper(tmp_path: Path) -> None:
    alone = measured(tmp_path / "a", {"pgd10": 40.0}, restarts=5)
    assert evaluation_rows(alone)[0]["paper"] is None
    (row,) = evaluation_rows(measured(tmp_path / "b", {"pgd10": 40.0, "pgd10x5": 38.5}, restarts=5))
    assert (row["paper"], row["difference"]) == (38.5, pytest.approx(4.5))


def test_a_mixtures_clean_branch_is_not_held_against_the_number_of_the_robust_one(tmp_path: Path) -> None:
    mixture = measured(tmp_path / "mixture", {"pgd10": 40.0}, branches=("adv", "clean"))
    assert {row["branch"]: row["paper"] for row in evaluation_rows(mixture)} == {"adv": 40.0, "clean": None}
    named = {"pgd10": 40.0, "clean_branch_pgd10": 3.0}
    mixture = measured(tmp_path / "named", named, branches=("adv", "clean"))
    assert {row["branch"]: row["paper"] for row in evaluation_rows(mixture)} == {"adv": 40.0, "clean": 3.0}


def test_only_the_test_split_is_a_result_and_only_the_rest_was_held_out(tmp_path: Path) -> None:
    row = {"event": "evaluation", "step": 9, "protocol": {"name": "clean"}, "branch": "adv", "total": 100}
    events = [{**row, "split": split, "correct": n} for split, n in (("validation", 41), ("test", 37), ("train", 99))]
    record = load_run(run_folder(tmp_path / "run", [], events))
    assert [(m.split, m.correct) for m in record.measurements] == [("test", 37)]
    drawn = {key[0]: [m.correct for m in found] for key, found in record.held_out().items()}
    assert drawn == {"validation": [41], "train": [99]}


def test_wandb_gets_every_number_of_a_row_under_its_own_name() -> None:
    row = {"event": "train", "step": 30, "epoch": 1.5, "restart": 2, "time": 7.0, "loss": 0.25}
    assert flatten({**row, "seconds": {"attack": 3.0, "train": 1.0}, "note": "x", "ok": True}) == {
        "train/step": 30, "epoch": 1.5, "restart": 2, "train/time": 7.0, "train/loss": 0.25,
        "train/seconds/attack": 3.0, "train/seconds/train": 1.0,
    }  # fmt: skip


def test_secret_that_begins_with_another_one_leaves_no_tail() -> None:
    secrets = secret_values({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-and-more", "C_TOKEN": "abcdefgh-and"})
    text = redact_text("said abcdefgh-and-more, then abcdefgh-and, then abcdefgh.", secrets)
    assert "abcdefgh" not in text
    assert "-and" not in text
