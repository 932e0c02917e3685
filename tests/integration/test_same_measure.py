"""A number stands beside another only where both measure the same: the paper's, another run's, and what plan assumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distributed_at.config import RunConfig
from distributed_at.data.index import build_index
from distributed_at.engine.runs.evaluate_run import evaluate_run
from distributed_at.observe.record import load_run
from distributed_at.observe.report import build_report
from distributed_at.observe.report.verdict import findings
from distributed_at.observe.tables import evaluation_rows, table
from distributed_at.plan_table import _batch_rows
from distributed_at.planning import make_plan
from distributed_at.recipes import load_recipe
from tests import records
from tests.integration.test_any_data import fill
from tests.integration.training import tiny, train

ROW = "cifar/bag_of_tricks/baselines.yaml#resnet18-train"
NUMBERS = {"clean": 82.52, "pgd10": 53.58, "aa": 48.51}


def run_of(folder: Path, *words: str, evaluation: tuple[str, ...] = (), total: int = 10_000) -> list[dict]:
    """Write a run of the row with changes, measured by its recipe with changes to that; return the table's rows."""
    config = load_recipe(ROW, list(words)).config
    asked = load_recipe(ROW, [*words, *evaluation]).config
    rows = [
        {
            "protocol": records.protocol(config, entry),
            "correct": total // 2,
            "total": total,
            "metric": "robust_accuracy",
        }
        for entry in records.singles(asked)
    ]
    records.write(folder, config, rows)
    return evaluation_rows(folder)


def test_a_run_of_the_row_stands_beside_the_paper_s_numbers(tmp_path: Path) -> None:
    how = ("seed=7", "data.path=/elsewhere", "log.every_steps=3", "train.micro_batch_size=64", "name=mine")
    rows = run_of(tmp_path / "run", *how)
    assert sorted(row["paper"] for row in rows) == sorted(NUMBERS.values())
    assert all(row["paper_differs"] == [] for row in rows)


@pytest.mark.parametrize(
    "word",
    [
        "evaluation.final.1.attack.eps=1", "evaluation.final.1.attack.step_size=1", "evaluation.final.1.attack.loss=margin",
        "evaluation.final.1.attack.target=random_other", "evaluation.final.1.attack.start=zero",
        "evaluation.final.1.attack.norm=l2", "evaluation.final.1.attack.update=adam",
    ],
)  # fmt: skip
def test_another_evaluation_of_the_same_name_does_not(word: str, tmp_path: Path) -> None:
    rows = {row["protocol"].split(" ")[0]: row for row in run_of(tmp_path / "run", evaluation=(word,))}
    other = next(row for name, row in rows.items() if name.startswith("PGD-10") or name == "pgd10")
    assert (other["paper"], other["difference"]) == (None, None)
    assert other["paper_differs"] == ["the evaluation is not the recipe's"]
    assert {row["paper"] for row in rows.values()} == {82.52, 48.51, None}


def test_fewer_images_do_not(tmp_path: Path) -> None:
    rows = run_of(tmp_path / "run", total=1000)
    assert {row["paper"] for row in rows} == {None}


def test_a_changed_recipe_is_told_in_place_of_points(tmp_path: Path) -> None:
    rows = run_of(
        tmp_path / "run", "train.epochs=2", "schedule.milestones=[1]", "model.base_width=16", "attack.num_steps=2"
    )
    assert {row["paper"] for row in rows} == {None}
    told = ["attack.num_steps: 10 -> 2", "model.base_width: 64 -> 16", "train.epochs: 110.0 -> 2.0"]
    assert set(told) <= set(rows[0]["paper_differs"])
    caption = str(table(rows).caption)
    assert caption.startswith("not set beside the paper's numbers: ")
    assert all(line in caption for line in told)
    found = {finding.title: finding.text for finding in findings(load_run(tmp_path / "run"))}
    assert "Below the paper" not in found
    assert all(line in found["Not the paper's row"] for line in told)
    page = build_report(tmp_path / "run").read_text()
    assert "train.epochs: 110.0 -&gt; 2.0" in page


def test_a_report_says_what_the_recipe_asks_for_and_nobody_measured(tmp_path: Path) -> None:
    config = load_recipe(ROW).config
    clean, *_ = records.singles(config)
    row = {"protocol": records.protocol(config, clean), "correct": 8000, "total": 10_000, "metric": "clean_accuracy"}
    records.write(tmp_path / "run", config, [row])
    found = {finding.title: finding.text for finding in findings(load_run(tmp_path / "run"))}
    assert found["Not all measured"] == "The recipe asks for pgd10, aa, which no result of the test images answers."


def test_protocol_hashes_of_two_networks_agree_and_result_hashes_do_not(tmp_path: Path) -> None:
    final = "evaluation.final=[{kind: clean}, {kind: pgd, attack: {eps: 16, num_steps: 2, step_size: 8}}]"
    rows = [
        evaluation_rows(_evaluated(train(tiny(final, f"seed={seed}", "data.limit_test=null"), tmp_path / str(seed))))
        for seed in (0, 1)
    ]
    for one, other in zip(*rows, strict=True):
        assert one["protocol_hash"] == other["protocol_hash"] != ""
        assert one["hash"] != other["hash"]
    assert len({row["protocol_hash"] for row in rows[0]}) == 2


def _evaluated(run: Path) -> Path:
    evaluate_run(run)
    return run


def test_a_repeated_evaluation_keeps_the_measured_seconds(tmp_path: Path) -> None:
    run = train(tiny(), tmp_path / "run")
    (first,) = evaluate_run(run).results
    (again,) = evaluate_run(run).results
    assert again.computed == 0
    assert again.seconds == first.seconds > 0
    (summary,) = [json.loads(path.read_text()) for path in run.rglob("summary.json")]
    assert summary["seconds"] == first.seconds


def imagenet(path: Path) -> RunConfig:
    return load_recipe(
        "imagenet/xie_yuille/table7.yaml#n30-clean0", [f"data.path={path}", "train.batch_size=32"]
    ).config


def test_plan_reads_an_index_and_says_what_it_assumes(tmp_path: Path) -> None:
    absent = make_plan(imagenet(tmp_path / "nowhere"))
    assert (absent.num_train, absent.sizes_assumed) == (1_281_167, True)
    assert "(assumed as published" in dict(_batch_rows(absent))["images"]
    fill(tmp_path / "data" / "train", 10)
    fill(tmp_path / "data" / "val", 2)
    assert make_plan(imagenet(tmp_path / "data")).sizes_assumed
    for part in ("train", "val"):
        build_index(tmp_path / "data" / part)
    found = make_plan(imagenet(tmp_path / "data"))
    assert (found.num_train, found.num_test, found.sizes_assumed) == (40, 8, False)
    assert dict(_batch_rows(found))["images"] == "40 to train on, 8 to test on"
