"""Chooses what the report's charts show: which fields of which events become which lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distributed_at.observe.record import RunRecord
from distributed_at.observe.report.charts import Chart, Role, Series, line_chart

NEUTRAL: tuple[Role, ...] = ("a", "b", "c", "d")
SMALL = 180


def _points(rows: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    found = []
    for row in rows:
        value, epoch = row.get(field), row.get("epoch")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isinstance(epoch, (int, float)):
            found.append((float(epoch), float(value)))
    return found


def _loss(rows: list[Mapping[str, Any]], marks: list[tuple[float, float]]) -> Chart | None:
    series = [Series(name="loss", points=_points(rows, "loss"), role="a")]
    names = list(dict.fromkeys(name for row in rows for name in (row.get("terms") or {})))
    if len(names) > 1:  # a single term is the loss itself
        others = iter(NEUTRAL[1:])
        for name in names[:4]:
            role: Role = "clean" if "clean" in name else "adv" if "adv" in name else next(others, "d")
            terms = [{"epoch": row.get("epoch"), name: (row.get("terms") or {}).get(name)} for row in rows]
            series.append(Series(name=name, points=_points(terms, name), role=role))
    return line_chart(series, title="Loss", unit="per image", marks=marks)


def _accuracy(record: RunRecord, rows: list[Mapping[str, Any]], marks: list[tuple[float, float]]) -> Chart | None:
    series = [
        Series(name="clean, training batches", points=_points(rows, "clean_accuracy"), role="clean"),
        Series(name="adversarial, training batches", points=_points(rows, "adv_accuracy"), role="adv"),
    ]
    groups = record.held_out()
    branches = {key[2] for key in groups}
    for (split, protocol, branch, _), found in groups.items():
        where = {"validation": "held-out", "train": "training images"}.get(split, split)
        side = f", {branch} branch" if len(branches) > 1 and branch else ""
        points = [(one.epoch or 0.0, one.accuracy) for one in found]
        pairs = [None if one.low is None or one.high is None else (one.low, one.high) for one in found]
        role: Role = "clean" if found[0].is_clean else "adv"
        series.append(Series(name=f"{protocol}, {where}{side}", points=points, role=role, marked=True, intervals=pairs))
    return line_chart(series, title="Accuracy", percent=True, marks=marks)


def charts(record: RunRecord) -> list[Chart]:
    """Return the charts that the run's events have data for."""
    rows = record.rows("train")
    marks = [
        (float(row["epoch"]), float(row.get("restart") or 0))
        for row in record.rows("restart")
        if isinstance(row.get("epoch"), (int, float)) and math.isfinite(row["epoch"])
    ]
    eps = _points(rows, "eps")
    found = [
        _accuracy(record, rows, marks),
        _loss(rows, marks),
        line_chart([Series(name="learning rate", points=_points(rows, "lr"), role="a")], title="Learning rate", marks=marks, height=SMALL),
        line_chart([Series(name="eps", points=eps, role="adv")], title="Attack radius", unit="eps, /255", marks=marks, height=SMALL)
        if any(value > 0 for _, value in eps)
        else None,
        line_chart([Series(name="images a second", points=_points(rows, "images_per_second"), role="b")], title="Throughput", unit="images/s", marks=marks, height=SMALL),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]
