"""The report shows what the run folder says, and builds from whatever part of it exists."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from distributed_at.errors import DataError
from distributed_at.observe.events import EventLog
from distributed_at.observe.record import load_run
from distributed_at.observe.report import build_report
from distributed_at.observe.report.charts import Series, line_chart, nice_ticks
from distributed_at.observe.report.pictures import load_examples
from distributed_at.observe.report.verdict import findings, robust_result
from distributed_at.recipes import dump_yaml
from tests import records

VOID = {"meta", "img", "br", "link", "hr", "line", "circle", "path", "polyline", "polygon"}


class Checker(HTMLParser):
    """Collects addresses and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.addresses: list[str] = []
        self.images_without_alt = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.addresses += [values[key] for key in ("src", "href") if key in values]
        self.images_without_alt += tag == "img" and not values.get("alt")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack, f"</{tag}> closes nothing"
            assert self.stack.pop() == tag


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.stack == []
    return checker


def write_recipe(folder: Path, **changes: object) -> None:
    recipe = {
        "name": folder.name,
        "seed": 3,
        "data": {"dataset": "digits", "image_size": 8},
        "model": {"arch": "resnet18", "norm": "bn"},
        "attack": {"norm": "linf", "eps": 8.0, "num_steps": 7, "step_size": 2.0},
        "objective": {"name": "pgd_at"},
        "train": {"epochs": 4.0, "batch_size": 32},
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def write_evaluation(folder: Path, name: str, correct: int, total: int = 1000, **protocol: object) -> None:
    place = folder / "evaluations" / re.sub(r"\W+", "-", name)
    place.mkdir(parents=True)
    content = {
        "protocol": {"kind": "pgd", **protocol, "name": name, "hash": f"{folder.name}-{name}"},
        "branch": "adv", "split": "test", "metric": "robust_accuracy", "correct": correct, "total": total,
        "accuracy": correct / total, "seconds": 2.0,
    }  # fmt: skip
    (place / "summary.json").write_text(json.dumps(content))


def full_run(folder: Path, robust: int = 437, description: str = "") -> Path:
    folder.mkdir()
    config = records.recipe(
        {"pgd20": 41.25}, "[{kind: pgd, attack: {eps: 8, num_steps: 20, step_size: 2}}]", f"name={folder.name}",
        f"description='{description}'", "seed=3",
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    (folder / "environment.json").write_text(json.dumps({"host": "node-17", "world_size": 2}))
    with EventLog(folder) as log:
        log.write("run_start", step=0, epoch=0, world_size=2)
        for step in range(40):
            loss = 2.0 if step != 11 else math.nan
            seconds = {"attack": 0.3, "train": 0.1}
            log.write("train", step=step, epoch=step / 10, loss=loss, lr=0.1, eps=8.0, adv_accuracy=0.01 * step, images_per_second=321.0, seconds=seconds)  # fmt: skip
        for epoch, correct in ((1, 90), (2, 160), (4, 70)):
            protocol = {"name": "PGD-10", "hash": str(epoch)}
            log.write("evaluation", step=10 * epoch, epoch=epoch, split="validation", protocol=protocol, branch="adv", metric="robust_accuracy", correct=correct, total=200)  # fmt: skip
        log.write("warning", step=5, epoch=0.5, code="data.corrupt_image", message="<b>bad</b> image")
        log.write("run_end", step=40, epoch=4, reason="finished")
    (entry,) = records.singles(config)
    whole = {key: value for key, value in records.protocol(config, entry).items() if key not in ("name", "hash")}
    write_evaluation(folder, "PGD-20 linf 8/255", robust, **whole)
    write_evaluation(folder, "clean", 871, kind="clean", num_steps=0)
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    adv = np.clip(clean / 255 + rng.uniform(-8 / 255, 8 / 255, clean.shape), 0, 1).astype(np.float32)
    labels = np.arange(5)
    names = np.array(["zero", "one", "two", "three", "four", "quokka"])
    np.savez(folder / "examples.npz", clean=clean, adv=adv, labels=labels, clean_predictions=labels, adv_predictions=np.full(5, 5), eps=np.float32(8 / 255), class_names=names)  # fmt: skip
    return folder


def test_report_of_a_run_that_has_only_a_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    html = build_report(tmp_path).read_text()
    check(html)
    assert "No accuracy has been measured yet" in html


def test_report_of_a_run_that_has_only_one_event(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write("train", step=1, epoch=0.1, loss=math.nan)
    check(build_report(tmp_path).read_text())


def test_report_shows_the_numbers_of_events_and_evaluations(tmp_path: Path) -> None:
    html = build_report(full_run(tmp_path / "mine")).read_text()
    checker = check(html)
    for shown in ("43.70", "437 / 1,000", "87.10", "871 / 1,000", "41.25", "+2.45", "321 img/s", "75.0%", "node-17", "quokka"):  # fmt: skip
        assert shown in html, shown
    assert "PGD-10, held-out <b>35.0%</b>" in html
    assert checker.images_without_alt == 0


def test_other_numbers_give_another_report(tmp_path: Path) -> None:
    html = build_report(full_run(tmp_path / "mine", robust=512)).read_text()
    assert "51.20" in html
    assert "43.70" not in html


def test_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    html = build_report(full_run(tmp_path / "mine")).read_text()
    assert all(address.startswith(("data:", "#")) for address in check(html).addresses)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html


def test_compared_runs_stand_in_the_table_with_their_own_numbers(tmp_path: Path) -> None:
    mine, natural = full_run(tmp_path / "mine"), full_run(tmp_path / "natural", robust=12)
    html = build_report(mine, compare=[natural]).read_text()
    assert "1.20" in html
    assert "12 / 1,000" in html
    assert "More robust than natural" in html


def test_no_verdict_is_drawn_across_protocols(tmp_path: Path) -> None:
    mine, other = full_run(tmp_path / "mine"), full_run(tmp_path / "other", robust=12)
    summary = next((other / "evaluations").glob("PGD*/summary.json"))
    content = json.loads(summary.read_text())
    content["protocol"]["restarts"] = 5
    summary.write_text(json.dumps(content))
    html = build_report(mine, compare=[other]).read_text()
    assert "More robust than" not in html
    assert "not comparable" in html


def test_text_of_events_is_escaped(tmp_path: Path) -> None:
    html = build_report(full_run(tmp_path / "mine", description="<script>alert(1)</script>")).read_text()
    assert "<script>" not in html
    assert "&lt;b&gt;bad&lt;/b&gt; image" in html


def test_no_secret_of_the_environment_reaches_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "tok-abcdef-123456")
    folder = full_run(tmp_path / "mine", description="see tok-abcdef-123456")
    environment = {"command": ["train", "api_key=plainvalue"], "host": "tok-abcdef-123456"}
    (folder / "environment.json").write_text(json.dumps(environment))
    html = build_report(folder).read_text()
    assert "tok-abcdef-123456" not in html
    assert "plainvalue" not in html


def test_output_is_written_where_asked(tmp_path: Path) -> None:
    path = build_report(full_run(tmp_path / "mine"), output=tmp_path / "a" / "b.html")
    assert path == tmp_path / "a" / "b.html"
    assert path.is_file()
    assert not (tmp_path / "mine" / "report.html").exists()


def test_folder_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        build_report(tmp_path / "absent")
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        build_report(tmp_path)


def test_collapse_of_held_out_robustness_is_found(tmp_path: Path) -> None:
    titles = [finding.title for finding in findings(load_run(full_run(tmp_path / "mine")))]
    assert titles[0] == "Robustness collapsed while training"


def test_quoted_robustness_is_the_lowest_on_most_images(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "mine")
    write_evaluation(folder, "AutoAttack linf 8/255", 401, kind="autoattack")
    write_evaluation(folder, "PGD-100", 1, total=10, num_steps=100)
    quoted = robust_result(load_run(folder))
    assert quoted is not None
    assert quoted.correct == 401


def test_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "mine")
    with EventLog(folder, restart=1) as log:
        log.write("restart", step=20, epoch=2)
    assert "not finished" in build_report(folder).read_text()


def test_perturbation_is_amplified_to_the_whole_grey_range(tmp_path: Path) -> None:
    examples = load_examples(full_run(tmp_path / "mine"))
    assert examples is not None
    assert examples.eps == pytest.approx(8, abs=1e-4)
    assert examples.amplification == pytest.approx(0.5 * 255 / 8, rel=1e-4)
    assert examples.crisp
    assert not any(item.adv_right for item in examples.items)
    assert all(item.clean_right for item in examples.items)


def test_examples_file_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "examples.npz", clean=np.array([{"a": 1}], dtype=object))
    assert load_examples(tmp_path) is None
    (tmp_path / "examples.npz").write_bytes(b"no archive")
    assert load_examples(tmp_path) is None


def test_gap_in_a_line_is_drawn_as_a_gap() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 1.0), (4.0, 2.0)]
    chart = line_chart([Series(name="loss", points=points)], title="Loss")
    assert chart is not None
    assert chart.svg.count("<polyline") == 2
    assert "nan" not in chart.svg
    assert line_chart([Series(name="loss", points=[(0.0, math.nan)])], title="Loss") is None


def test_ticks_are_round_and_cover_the_range() -> None:
    for low, high in ((0, 1), (0.013, 0.87), (-3, 12345), (5, 5), (0, 1e-6)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert len(ticks) <= 12
