"""Gathers what the report's template shows, as plain values: header, figures, tables, time, cost, environment."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from distributed_at.accelerators import attack_arithmetic
from distributed_at.catalogue.datasets import recorded_dataset
from distributed_at.cost import format_seconds, gpu_hours, mfu, peak_rate, recipe_forward_flops, recipe_units
from distributed_at.objectives import recorded_objective
from distributed_at.observe.console import time_shares
from distributed_at.observe.events import read_events
from distributed_at.observe.record import RunRecord
from distributed_at.observe.report.charts import interval_mark
from distributed_at.observe.report.curves import charts
from distributed_at.observe.report.pictures import load_examples
from distributed_at.observe.report.verdict import clean_result, findings, robust_result, sentence
from distributed_at.observe.secrets import redact
from distributed_at.observe.tables import compare_rows
from distributed_at.statistics import format_interval, format_percent

ENDS = {
    "finished": ("good", "finished"),
    "early": ("good", "stopped early, as robust accuracy rose no more"),
    "collapsed": ("bad", "robust accuracy collapsed; the best weights before that stand"),
    "stopped": ("note", "stopped; the same command goes on"),
}


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The recipe in a few words: (what, value)."""
    data, model, attack = record.section("data"), record.section("model"), record.section("attack")
    train, objective = record.section("train"), record.section("objective")
    found: list[tuple[str, str]] = []
    if data:
        known = recorded_dataset(data)
        found.append(("Data", known.title if known is not None else str(data.get("dataset"))))
    if model:
        arch = str(model.get("arch"))
        if arch == "wide_resnet":
            arch = f"WRN-{model.get('depth')}-{model.get('widen')}"
        found.append(("Model", f"{arch}, {str(model.get('norm', 'bn')).upper()}"))
    if objective:
        found.append(("Objective", _title(objective)))
    if attack:
        text = f"PGD-{attack.get('num_steps')}, {attack.get('norm', 'linf')} {attack.get('eps', 0):g}/255, step {attack.get('step_size', 0):g}/255"
        found.append(("Training attack", text + (", targeted" if attack.get("target", "none") != "none" else "")))
    if train:
        found.append(("Length", f"{train.get('epochs'):g} epochs, batch {train.get('batch_size'):,}"))
    if record.recipe:
        found.append(("Seed", str(record.recipe.get("seed", 0))))
    paper = record.section("paper")
    if paper:
        found.append(("Paper", " · ".join(str(paper[k]) for k in ("title", "table", "row") if paper.get(k))))
    return found


def _title(section: Mapping[str, Any]) -> str:
    """An objective as its readers call it: its title and what its section adds; its bare name where it is not known here."""
    found = recorded_objective(section)
    return str(section.get("name")) if found is None else ", ".join([found[0].title, *found[0].extras(found[1])])


def _status(record: RunRecord) -> tuple[str, str]:
    """(level, words) for the badge in the header."""
    last_start = next((r for r in reversed(record.events) if r["event"] in ("run_start", "restart")), None)
    end = next((r for r in reversed(record.events) if r["event"] == "run_end"), None)
    if end is None or (last_start is not None and last_start.get("restart", 0) > end.get("restart", 0)):
        return ("note", "not finished") if record.events else ("note", "no events")
    reason = str(end.get("reason") or "finished")
    return ENDS.get(reason, ("bad", reason.replace("_", " ")))


def _wall_seconds(record: RunRecord) -> float:
    """Seconds from the first to the last event of every start: work that a restart repeated counts, as it was paid."""
    spans: dict[Any, list[float]] = {}
    for row in read_events(record.folder, raw=True):
        if isinstance(row.get("time"), (int, float)):
            spans.setdefault(row.get("restart", 0), []).append(float(row["time"]))
    return sum(max(times) - min(times) for times in spans.values())


def _time_split(record: RunRecord) -> list[dict[str, Any]]:
    spent: dict[str, float] = {}
    for row in record.rows("train"):
        for name, seconds in (row.get("seconds") or {}).items():
            if isinstance(seconds, (int, float)):
                spent[name] = spent.get(name, 0.0) + seconds
    shares = dict(time_shares(spent))
    return [
        {"name": n, "share": s, "percent": f"{100 * s:.1f}", "seconds": format_seconds(spent[n])}
        for n, s in shares.items()
    ]


def _cost(record: RunRecord) -> list[tuple[str, str, str]]:
    """(what, value, explanation) of the run's cost."""
    rows = record.rows("train")
    found: list[tuple[str, str, str]] = []
    wall, world = (
        _wall_seconds(record),
        int(record.start.get("world_size") or record.environment.get("world_size") or 1),
    )
    devices = record.environment.get("devices") or {}
    names = devices.get("names") or []
    kind = "GPU" if devices.get("kind") == "cuda" else "process"
    if wall > 0:
        found.append(
            (
                "Wall time",
                format_seconds(wall),
                f"on {world} {kind}{'es' if kind == 'process' and world > 1 else 's' if world > 1 else ''}",
            )
        )
        hours = gpu_hours(wall, world)
        if kind == "GPU":
            found.append(("GPU-hours", f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}", "repeated work included"))
    speeds = [r["images_per_second"] for r in rows if isinstance(r.get("images_per_second"), (int, float))]
    speed = statistics.median(speeds) if speeds else None
    if speed:
        found.append(("Training speed", f"{speed:,.0f} img/s", "median over the run, all devices"))
    batch = record.section("train").get("batch_size")
    if rows and batch:
        found.append(
            (
                "Training images",
                f"{int(rows[-1]['step']) * int(batch):,}",
                f"{int(rows[-1]['step']):,} steps of {int(batch):,}",
            )
        )
    units = recipe_units(record.recipe)
    if units is not None:
        found.append(
            (
                "Cost of an image",
                f"{units.total:g} forwards",
                f"attack {units.attack:g}, training {units.train:g}; natural training 3",
            )
        )
        flops = record.start.get("forward_flops") or recipe_forward_flops(record.recipe)
        if flops:
            found.append(("Arithmetic", _flops(flops * units.total), f"an image; one forward pass {_flops(flops)}"))
        if flops and speed and names:
            precision = attack_arithmetic(
                str(record.section("train").get("precision") or "fp32"), record.section("attack").get("dtype")
            )
            share = mfu(
                images_per_second=speed,
                flops_per_image=flops * units.total,
                num_devices=world,
                device_name=names[0],
                precision=precision,
            )
            rate = peak_rate(names[0])
            if share is not None and rate is not None:
                found.append(("Peak rate used (MFU)", f"{100 * share:.1f}%", f"{precision}; {rate.source}"))
    return found


def _flops(value: float) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f} FLOP"


def _figures(record: RunRecord, cost: Sequence[tuple[str, str, str]]) -> list[dict[str, str]]:
    """The few large numbers below the verdict."""
    found = []
    for title, one, role in (
        ("Clean accuracy", clean_result(record), "clean"),
        ("Robust accuracy", robust_result(record), "adv"),
    ):
        if one is not None:
            interval = (
                "" if one.low is None or one.high is None else f"95% interval {format_interval(one.low, one.high)}"
            )
            found.append(
                {
                    "title": title,
                    "value": format_percent(one.accuracy),
                    "unit": "%",
                    "note": interval,
                    "sub": one.protocol,
                    "role": role,
                }
            )
    spent = [c for c in cost if c[0] == "GPU-hours"] or [c for c in cost if c[0] == "Wall time"]
    for match in [c for c in cost if c[0] == "Training speed"] + spent:
        if match:
            value, _, unit = match[1].partition(" ")
            found.append({"title": match[0], "value": value, "unit": unit, "note": match[2], "sub": "", "role": ""})
    return found


def _accuracy_groups(record: RunRecord, others: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Rows of the accuracy table in groups of one protocol, this run first."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    branches = {m.branch for r in (record, *others) for m in r.measurements}
    for row in compare_rows([record, *others]):
        key = (row["protocol"], row["branch"], row["split"], row["metric"])
        clean = row["metric"].startswith("clean") or row["protocol"].lower().startswith("clean")
        group = groups.setdefault(
            key,
            {
                "protocol": row["protocol"],
                "split": row["split"],
                "branch": row["branch"] if len(branches) > 1 else "",
                "rows": [],
            },
        )
        group["rows"].append({
            "run": row["run"], "accuracy": format_percent(row["accuracy"]),
            "interval": "–" if row["low"] is None else format_interval(row["low"], row["high"]),
            "counts": "–" if row["total"] is None else f"{row['correct']:,} / {row['total']:,}",
            "paper": "" if row["paper"] is None else f"{row['paper']:.2f}",
            "difference": "" if row["difference"] is None else f"{row['difference']:+.2f}",
            "mark": interval_mark(accuracy=row["accuracy"], low=row["low"], high=row["high"], paper=row["paper"], role="clean" if clean else "adv"),
            "comparable": row["comparable"] is not False, "p": "" if row["p_value"] is None else f"{row['p_value']:.2g}",
        })  # fmt: skip
    return list(groups.values())


def _protocols(record: RunRecord) -> list[dict[str, Any]]:
    return [
        {
            "name": m.protocol, "branch": m.branch, "split": m.split, "hash": m.hash, "seconds": format_seconds(m.seconds),
            "details": [(k, _plain(v)) for k, v in sorted(m.details.items()) if k not in ("name", "hash") and v not in ("", None, [], ())],
        }
        for m in record.measurements
    ]  # fmt: skip


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _environment(record: RunRecord) -> list[tuple[str, str]]:
    env = record.environment
    git, devices = env.get("git") or {}, env.get("devices") or {}
    names = devices.get("names") or []
    pairs = [
        ("Host", env.get("host")), ("Devices", f"{len(names)} × {names[0]}" if names else devices.get("kind")),
        ("CUDA", devices.get("cuda") if names else None), ("Python", env.get("python")), ("Platform", env.get("platform")),
        ("Processes", env.get("world_size")), ("Versions", _plain(env.get("versions") or {})),
        ("Commit", f"{git['commit']}{' (modified)' if git.get('modified') else ''}" if git.get("commit") else None),
        ("Job", _plain(env.get("job") or {})), ("Command", " ".join(map(str, env.get("command") or []))),
        ("Earlier starts", len(env.get("earlier") or []) or None),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def _warnings(record: RunRecord) -> list[dict[str, str]]:
    rows = record.rows("warning")
    return [
        {"code": str(r.get("code", "")), "message": str(r.get("message", "")), "step": f"{r.get('step', 0):,}"}
        for r in rows[-20:]
    ]


def page_values(record: RunRecord, others: Sequence[RunRecord]) -> dict[str, Any]:
    """Return every value that ``report.html.j2`` names."""
    cost = _cost(record)
    groups = _accuracy_groups(record, others)
    level, status = _status(record)
    rows = [row for group in groups for row in group["rows"]]
    return {
        "name": record.name, "description": record.recipe.get("description") or "", "facts": _facts(record),
        "status": status, "status_level": level, "sentence": sentence(record), "findings": findings(record, others),
        "figures": _figures(record, cost), "groups": groups, "several": bool(others),
        "has_paper": any(row["paper"] for row in rows), "all_comparable": all(row["comparable"] for row in rows),
        "has_pairs": any(row["p"] for row in rows),
        "paper_note": record.section("paper").get("note") or "", "charts": charts(record),
        "restarts": len(record.rows("restart")), "examples": load_examples(record.folder), "split": _time_split(record),
        "cost": cost, "warnings": _warnings(record), "protocols": _protocols(record), "environment": _environment(record),
        "recipe": yaml.safe_dump(redact(dict(record.recipe)), sort_keys=False, allow_unicode=True) if record.recipe else "",
    }  # fmt: skip
