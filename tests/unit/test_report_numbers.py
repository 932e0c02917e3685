"""The report's pictures read back: charts through their own axes, PNGs pixel by pixel, costs by hand."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from distributed_at.observe.record import load_run
from distributed_at.observe.report import build_report
from distributed_at.observe.report.charts import Series, interval_mark, line_chart
from distributed_at.observe.report.curves import charts
from distributed_at.observe.report.page import page_values
from distributed_at.observe.report.pictures import load_examples
from distributed_at.observe.report.verdict import findings, sentence
from tests import records


class Drawing:
    """An SVG chart and the scales that its own tick labels give."""

    def __init__(self, svg: str) -> None:
        self.root = ET.fromstring(svg)
        self.x, self.y = self._scale("x"), self._scale("y")

    def of(self, kind: str) -> list[ET.Element]:
        return [e for e in self.root.iter() if kind in (e.get("class") or "").split()]

    def _scale(self, axis: str) -> np.poly1d:
        ticks = [e for e in self.of("tick") if axis in e.get("class").split()]
        shift = 4 if axis == "y" else 0  # a label's foot lies that far below its line
        values = [float(e.text.replace("k", "e3")) for e in ticks]
        return np.poly1d(np.polyfit([float(e.get(axis)) - shift for e in ticks], values, 1))

    def points(self, element: ET.Element) -> list[tuple[float, float]]:
        pairs = [pair.split(",") for pair in element.get("points").split()]
        return [(float(self.x(float(x))), float(self.y(float(y)))) for x, y in pairs]


def test_a_chart_of_shares_reads_in_percent_on_its_own_axis() -> None:
    points, pairs = [(1.0, 0.125), (2.0, 0.5), (4.0, 0.375)], [(0.1, 0.15), (0.45, 0.55), None]
    raw = Series(name="raw", points=[(0.0, 0.25), (4.0, 0.75)])
    held = Series(name="held", points=points, role="adv", marked=True, intervals=pairs)
    chart = line_chart([raw, held], title="Accuracy", percent=True)
    assert chart.unit == "%"
    drawing = Drawing(chart.svg)
    dots = [(drawing.x(float(e.get("cx"))), drawing.y(float(e.get("cy")))) for e in drawing.of("dot")]
    np.testing.assert_allclose(dots, [(x, 100 * y) for x, y in points], atol=0.3)
    whiskers = [[drawing.y(float(e.get(end))) for end in ("y1", "y2")] for e in drawing.of("whisker")]
    np.testing.assert_allclose(whiskers, [(10, 15), (45, 55)], atol=0.3)
    (line,) = drawing.of("raw")
    np.testing.assert_allclose(drawing.points(line), [(0, 25), (4, 75)], atol=0.3)


def test_a_chart_of_losses_reads_as_they_are() -> None:
    points = [(0.0, 2.25), (1.0, 1.5), (3.0, 0.75)]
    drawing = Drawing(line_chart([Series(name="loss", points=points)], title="Loss").svg)
    np.testing.assert_allclose(drawing.points(drawing.of("raw")[0]), points, atol=0.02)


def test_a_long_curve_is_drawn_to_its_end_as_means_between_extremes() -> None:
    y = np.abs(np.sin(np.arange(1000) / 60)) + 1 + 0.2 * (np.arange(1000) % 2)
    drawing = Drawing(line_chart([Series(name="loss", points=list(zip(range(1000), y, strict=True)))], title="L").svg)
    line = np.array(drawing.points(drawing.of("raw")[0]))
    size = -(-1000 // len(line))
    bins = y.reshape(-1, size)
    np.testing.assert_allclose(line[:, 0], np.arange(1000).reshape(-1, size).mean(axis=1), atol=1.5)
    np.testing.assert_allclose(line[:, 1], bins.mean(axis=1), atol=0.01)
    edge = np.array(drawing.points(drawing.of("band")[0]))
    np.testing.assert_allclose(edge[: len(line), 1], bins.max(axis=1), atol=0.01)
    np.testing.assert_allclose(edge[len(line) :, 1], bins.min(axis=1)[::-1], atol=0.01)


def test_marks_of_the_accuracy_table_stand_at_their_share_of_the_track() -> None:
    root = ET.fromstring(interval_mark(accuracy=0.437, low=0.40, high=0.47, paper=41.25, role="adv"))
    track = root.find(".//*[@class='track']")
    start, end = float(track.get("x1")), float(track.get("x2"))

    def share(place: str) -> float:
        return (float(place) - start) / (end - start)

    assert share(root.find(".//circle").get("cx")) == pytest.approx(0.437, abs=0.001)
    whisker = root.find(".//*[@class='whisker adv']")
    assert [share(whisker.get(k)) for k in ("x1", "x2")] == pytest.approx([0.40, 0.47], abs=0.001)
    assert share(re.match(r"M([\d.]+)", root.find(".//path").get("d"))[1]) == pytest.approx(0.4125, abs=0.001)


def write_run(folder: Path, events: list[dict] = (), environment: dict | None = None, **recipe: object) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": folder.name, **recipe}))
    (folder / "environment.json").write_text(json.dumps(environment or {}))
    (folder / "events.jsonl").write_text("".join(json.dumps({"restart": 0, **row}) + "\n" for row in events))
    return folder


def add_summary(folder: Path, name: str, correct: int, **fields: object) -> None:
    place = folder / "evaluations" / f"{name}-{fields.get('branch', 'adv')}"
    place.mkdir(parents=True)
    protocol = {"name": name, "kind": "clean" if name == "clean" else "pgd", "num_steps": 20}
    row = {"branch": "adv", "split": "test", "metric": "accuracy", "total": 1000, **fields}
    (place / "summary.json").write_text(json.dumps({**row, "protocol": protocol, "correct": correct}))


def train_row(step: int, time: float, restart: int = 0, **fields: object) -> dict:
    return {"event": "train", "step": step, "epoch": step / 10, "time": time, "restart": restart, **fields}


def test_curves_of_training_batches_are_named_as_the_events_name_them(tmp_path: Path) -> None:
    events = [train_row(s, s, clean_accuracy=0.80 + s / 100, adv_accuracy=0.30, lr=0.1) for s in range(5)]
    accuracy, *_ = charts(load_run(write_run(tmp_path / "run", events)))
    last = {(name, role): value for name, role, _, value in accuracy.legend}
    assert last == {("clean, training batches", "clean"): "84.0%", ("adversarial, training batches", "adv"): "30.0%"}


def test_cost_of_a_run_of_two_starts_is_counted_by_hand(tmp_path: Path) -> None:
    """100 s, then a pause, then 60 s from the step that the first start had reached after half of its time."""
    common = {"images_per_second": 320.0}
    events = [{"event": "run_start", "step": 0, "epoch": 0, "time": 1000.0, "world_size": 2, "forward_flops": 1e9}]
    for step in range(1, 11):
        events.append(train_row(step, 1000.0 + 10 * step, seconds={"attack": 7.0, "data": step / 10}, **common))
    events.append({"event": "restart", "step": 5, "epoch": 0.5, "time": 5000.0, "restart": 1})
    for step in range(6, 13):
        seconds = {"attack": 5.0, "data": 3.5}
        events.append(train_row(step, 5000.0 + 60 * (step - 5) / 7, 1, seconds=seconds, **common))
    folder = write_run(
        tmp_path / "run", events, {"devices": {"kind": "cuda", "names": ["NVIDIA A100-SXM4-80GB"] * 2}},
        objective={"name": "pgd_at"}, attack={"num_steps": 7, "eps": 8, "step_size": 2}, train={"epochs": 1, "batch_size": 128},
    )  # fmt: skip
    values = page_values(load_run(folder), [])
    cost = {what: value for what, value, _ in values["cost"]}
    assert cost["Wall time"] == "2 m 40 s"
    assert float(cost["GPU-hours"]) == pytest.approx(2 * 160 / 3600, rel=0.01)
    assert cost["Training images"] == f"{12 * 128:,}"
    assert cost["Training speed"] == "320 img/s"
    assert cost["Cost of an image"] == "17 forwards"  # seven steps of two, and three to train
    assert cost["Arithmetic"] == "17 GFLOP"
    assert float(cost["Peak rate used (MFU)"].rstrip("%")) == pytest.approx(100 * 320 * 17e9 / (2 * 19.5e12), abs=0.05)
    attack, data = 5 * 7.0 + 7 * 5.0, (1 + 2 + 3 + 4 + 5) / 10 + 7 * 3.5  # rows that stand
    split = {one["name"]: float(one["percent"]) for one in values["split"]}
    assert split == pytest.approx(
        {"attack": 100 * attack / (attack + data), "data": 100 * data / (attack + data)}, abs=0.05
    )


def test_large_numbers_and_verdict_are_those_of_the_branch_that_faces_the_attack(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", model={"norm": "mbn"})
    for name, branch, correct in (("clean", "clean", 790), ("clean", "adv", 640), ("PGD-20", "adv", 437)):
        add_summary(folder, name, correct, branch=branch)
    figures = {one["title"]: one["value"] for one in page_values(load_run(folder), [])["figures"]}
    assert figures == {"Clean accuracy": "64.00", "Robust accuracy": "43.70"}
    words = sentence(load_run(folder)).replace("\u00a0", " ").replace("\u2060", "")
    assert words.startswith("43.70% (95% interval 40.7–46.8) of the test set")
    assert "64.00% (95% interval 61.0–66.9) without an attack" in words


@pytest.mark.parametrize(("number", "title"), [(41.25, "Agrees"), (46.7, "Agrees"), (46.9, "Below"), (40.5, "Above")])
def test_a_run_agrees_with_the_paper_where_its_interval_holds_the_number(
    tmp_path: Path, number: float, title: str
) -> None:
    config = records.recipe({"pgd20": number}, "[{kind: pgd, attack: {eps: 8, num_steps: 20, step_size: 2}}]")
    (entry,) = records.singles(config)
    row = {"protocol": records.protocol(config, entry), "correct": 437, "total": 1000}  # Wilson: 40.66 to 46.79
    folder = records.write(tmp_path / "run", config, [row])
    assert [one.title for one in findings(load_run(folder))] == [
        "Agrees with the paper" if title == "Agrees" else f"{title} the paper"
    ]


@pytest.mark.parametrize(
    ("other", "title"), [(370, "More robust than other"), (500, "Less robust than other"), (420, "")]
)
def test_runs_differ_only_where_their_intervals_are_apart(tmp_path: Path, other: int, title: str) -> None:
    folders = [write_run(tmp_path / name) for name in ("mine", "other")]
    for folder, correct in zip(folders, (437, other), strict=True):
        add_summary(folder, "PGD-20", correct)
    mine, theirs = map(load_run, folders)
    assert [one.title for one in findings(mine, [theirs])] == ([title] if title else [])


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_pictures_show_the_images_and_the_perturbation_between_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    adv = np.clip(clean / 255 + rng.uniform(-8 / 255, 8 / 255, clean.shape), 0, 1).astype(np.float32)
    answers = {"labels": [0, 1, 2], "clean_predictions": [0, 2, 2], "adv_predictions": [1, 1, 0]}
    np.savez(tmp_path / "examples.npz", clean=clean, adv=adv, eps=8 / 255, class_names=["cat", "dog", "owl"], **answers)
    examples = load_examples(tmp_path)
    for k, item in enumerate(examples.items):
        np.testing.assert_array_equal(picture(item.clean), clean[k])
        np.testing.assert_array_equal(picture(item.adv), np.rint(255 * adv[k].astype(np.float64)))
        moved = (adv[k].astype(np.float64) - clean[k] / 255) * examples.amplification
        np.testing.assert_allclose(picture(item.perturbation), 255 * (0.5 + moved), atol=0.51)
    assert examples.amplification == pytest.approx(0.5 * 255 / 8)
    assert examples.largest == pytest.approx(255 * np.abs(adv - clean / 255.0).max(), abs=1e-3)
    said = [(i.label, i.clean_prediction, i.adv_prediction, i.clean_right, i.adv_right) for i in examples.items]
    assert said == [
        ("cat", "cat", "dog", True, False),
        ("dog", "owl", "dog", False, True),
        ("owl", "owl", "cat", True, False),
    ]


def test_each_run_of_a_comparison_has_its_own_numbers_in_its_own_row(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("first", "second", "third")]
    for folder, correct in zip(folders, (437, 121, 250), strict=True):
        add_summary(folder, "PGD-20", correct)
    html = build_report(folders[0], compare=folders[1:]).read_text()
    cells = re.findall(
        r'<td class="run">(\w+).*?<td class="number strong">([\d.]+)</td>.*?([\d,]+) / 1,000', html, re.DOTALL
    )
    assert cells == [("first", "43.70", "437"), ("second", "12.10", "121"), ("third", "25.00", "250")]
