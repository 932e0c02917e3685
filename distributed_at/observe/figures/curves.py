"""Figures 1, 2, 3 and 7: accuracies of several runs against the share of clean images, attack steps, and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distributed_at.catalogue.norms import recorded_norm
from distributed_at.objectives import recorded_objective
from distributed_at.observe.figures.style import COLOURS, MARKERS, Drawn, legend_above, look, new_figure
from distributed_at.observe.paper_row import paper_number
from distributed_at.observe.record import Measurement, RunRecord

_DEPTHS = {"resnet18": 18, "resnet34": 34, "preact_resnet18": 18, "preact_resnet34": 34, "preact_resnet50": 50}


def ratio_of(record: RunRecord) -> float | None:
    """Return the share of clean images beside all adversarial ones; None where the loss is no mixture of both."""
    found = recorded_objective(record.section("objective"))
    return None if found is None else found[0].clean_share(found[1])


def _extras(record: RunRecord) -> tuple[str, ...]:
    found = recorded_objective(record.section("objective"))
    return () if found is None else found[0].extras(found[1])


def strategy_of(record: RunRecord, branch: str = "") -> str:
    """Return a training strategy in the paper's words: ``MBN_adv, 100% adv + 100% clean, ALP*``."""
    ratio = ratio_of(record)
    norm = recorded_norm(record.section("model"))
    label = "" if norm.shared_statistics else norm.label  # one batch norm is what the paper does not name
    name = label + (f"_{branch}" if norm.branches and branch else "")
    mix = "0% adv + 100% clean" if ratio is None else f"100% adv + {100 * ratio:g}% clean"
    star = "*" if record.section("train").get("freeze_bn_from_epoch") is not None else ""
    return f"{name + ', ' if name else ''}{', '.join([mix, *_extras(record)])}{star}"


def depth_of(record: RunRecord) -> int | None:
    """Return the number of layers of a ResNet, from its name or its list of blocks; None for other networks."""
    model = record.section("model")
    arch = str(model.get("arch"))
    if model.get("blocks"):
        return (3 if model.get("block") == "bottleneck" else 2) * sum(model["blocks"]) + 2
    digits = arch.removeprefix("preact_").removeprefix("resnet")
    return _DEPTHS.get(arch) or (int(digits) if digits.isdigit() else None)


def _robust(record: RunRecord, branch: str = "adv") -> list[Measurement]:
    """Return PGD measurements on the test split, the branch's own, by rising steps."""
    found = [
        m
        for m in record.measurements
        if m.details.get("kind") == "pgd" and m.split in ("test", "") and m.branch in (branch, "")
    ]
    return sorted(found, key=lambda m: int(m.details["num_steps"]))


def _ball(measurement: Measurement) -> tuple[Any, ...]:
    return tuple(measurement.details.get(key) for key in ("norm", "eps", "target", "loss", "restarts"))


def _strongest_common(records: Sequence[RunRecord]) -> tuple[int, tuple[Any, ...]] | None:
    """Return (steps, ball) of the longest PGD that all records were measured by."""
    sets = [{(int(m.details["num_steps"]), _ball(m)) for m in _robust(record)} for record in records]
    common = set.intersection(*sets) if sets else set()
    return max(common, key=lambda key: key[0]) if common else None


def _threat(measurement: Measurement) -> str:
    details = measurement.details
    target = "untargeted" if details.get("target", "none") == "none" else "targeted"
    return f"{target}, eps {float(details.get('eps') or 0):g}/255"


def _percent(measurement: Measurement) -> tuple[float, float, float]:
    """Return (percent, distance to the lower end, to the upper end of the 95 % interval)."""
    value = 100 * measurement.accuracy
    low = value if measurement.low is None else 100 * measurement.low
    high = value if measurement.high is None else 100 * measurement.high
    return value, max(0.0, value - low), max(0.0, high - value)


def _line(axis: Any, points: Iterable[tuple[float, Measurement]], *, index: int, label: str) -> None:
    ordered = sorted(points, key=lambda point: point[0])
    values = [_percent(m) for _, m in ordered]
    axis.errorbar(
        [x for x, _ in ordered],
        [v for v, _, _ in values],
        yerr=[[a for _, a, _ in values], [b for _, _, b in values]],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        capsize=2 + 1.5 * index,  # intervals at one place are told apart by their ends
        elinewidth=0.8,
        linewidth=1.4,
        label=label,
    )


def _paper(axis: Any, points: Iterable[tuple[float, float | None]], *, index: int) -> None:
    known = [(x, y) for x, y in sorted(points, key=lambda point: point[0]) if y is not None]
    if known:
        axis.plot(
            [x for x, _ in known],
            [y for _, y in known],
            color=COLOURS[index % len(COLOURS)],
            linestyle=":",
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor="none",
            markersize=5,
            linewidth=1,
            label="_the paper's",
        )


def _grouped(records: Iterable[RunRecord], key: Callable[[RunRecord], str]) -> dict[str, list[RunRecord]]:
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def clean_ratio(records: Sequence[RunRecord]) -> Drawn | None:
    """Figure 1: robust accuracy against the share of clean images, a line a norm; None without two shares to compare."""
    chosen = [
        r
        for r in records
        if ratio_of(r) is not None
        and not _extras(r)
        and r.section("train").get("freeze_bn_from_epoch") is None
        and _robust(r)
    ]
    common = _strongest_common(chosen)
    if common is None or len({ratio_of(r) for r in chosen}) < 2:
        return None

    def measured(record: RunRecord) -> Measurement:
        return next(m for m in _robust(record) if (int(m.details["num_steps"]), _ball(m)) == common)

    with look():
        figure, (axis,) = new_figure()
        norms = _grouped(chosen, lambda r: str(r.section("model").get("norm", "bn")))
        for index, group in enumerate(norms.values()):
            norm = recorded_norm(group[0].section("model"))
            label = f"{norm.label}_adv" if norm.branches else norm.label
            _line(axis, [(100 * (ratio_of(r) or 0.0), measured(r)) for r in group], index=index, label=label)
            _paper(axis, [(100 * (ratio_of(r) or 0.0), paper_number(r, measured(r))) for r in group], index=index)
        axis.set_xlabel("clean images kept beside 100% adversarial ones (%)")
        axis.set_ylabel(f"accuracy against PGD-{common[0]} (%)")
        axis.set_ylim(bottom=0)
        legend_above(axis)
    threat = _threat(measured(chosen[0]))
    caption = f"Accuracy against PGD-{common[0]} ({threat}) by share of clean images; bars are 95 % intervals, dotted lines the paper's numbers."
    return Drawn(name="figure1", caption=caption, figure=figure)


def attack_iterations(records: Sequence[RunRecord], *, shared: bool, name: str) -> Drawn | None:
    """Figures 2 (``shared=True``, one batch norm) and 3 (the other norms): accuracy against PGD steps, a curve a run.

    None where no such run was measured at two numbers of steps.
    """
    chosen = [r for r in records if recorded_norm(r.section("model")).shared_statistics == shared]
    curves = [(r, _robust(r)) for r in chosen if len({m.details["num_steps"] for m in _robust(r)}) >= 2]
    curves = [(r, points) for r, points in curves if ratio_of(r) is not None]
    if not curves:
        return None
    labels = [strategy_of(r, "adv" if recorded_norm(r.section("model")).branches else "") for r, _ in curves]
    with look():
        figure, (axis,) = new_figure()
        for index, ((record, points), label) in enumerate(zip(curves, labels, strict=True)):
            if labels.count(label) > 1:  # runs of one strategy that differ in depth, seed, ...
                label = f"{label} ({record.name})"
            steps = [(float(m.details["num_steps"]), m) for m in points]
            _line(axis, steps, index=index, label=label)
            _paper(axis, [(x, paper_number(record, m)) for x, m in steps], index=index)
        ticks = sorted({int(m.details["num_steps"]) for _, points in curves for m in points})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_xlabel("attack iterations")
        axis.set_ylabel("accuracy (%)")
        axis.set_ylim(bottom=0)
        legend_above(axis)
    threat = _threat(curves[0][1][0])
    caption = f"Accuracy against PGD by number of iterations ({threat}); bars are 95 % intervals, dotted lines the paper's numbers."
    return Drawn(name=name, caption=caption, figure=figure)


def depth(records: Sequence[RunRecord]) -> Drawn | None:
    """Figure 7: clean accuracy of standard training and robust accuracy of adversarial training against depth."""
    known = [r for r in records if depth_of(r) is not None]
    standard = [r for r in known if ratio_of(r) is None and any(m.is_clean for m in r.measurements)]
    adversarial = [r for r in known if ratio_of(r) == 0.0 and _robust(r)]
    common = _strongest_common(adversarial)
    lines: list[tuple[str, list[tuple[RunRecord, Measurement]]]] = []
    if len({depth_of(r) for r in standard}) >= 2:
        clean = [(r, next(m for m in r.measurements if m.is_clean)) for r in standard]
        lines.append(("0% adv + 100% clean, clean accuracy", clean))
    if common is not None and len({depth_of(r) for r in adversarial}) >= 2:
        measured = [
            (r, next(m for m in _robust(r) if (int(m.details["num_steps"]), _ball(m)) == common)) for r in adversarial
        ]
        lines.append((f"{strategy_of(adversarial[0])}, PGD-{common[0]}", measured))
    if not lines:
        return None
    with look():
        figure, axes = new_figure(len(lines))
        for index, (axis, (label, points)) in enumerate(zip(axes, lines, strict=True)):
            places = [(float(depth_of(r) or 0), m) for r, m in points]
            _line(axis, places, index=index, label=label)
            _paper(axis, [(float(depth_of(r) or 0), paper_number(r, m)) for r, m in points], index=index)
            axis.set_xticks(sorted({x for x, _ in places}), [f"{x:g}" for x in sorted({x for x, _ in places})])
            axis.set_xlabel("layers")
            axis.set_ylabel("accuracy (%)")
            legend_above(axis)
    threat = f" (PGD: {_threat(lines[-1][1][0][1])})" if lines[-1][1][0][1].details.get("kind") == "pgd" else ""
    caption = f"Accuracy by depth{threat}; bars are 95 % intervals, dotted lines the paper's numbers."
    return Drawn(name="figure7", caption=caption, figure=figure)
