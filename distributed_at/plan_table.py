"""Lays a plan out for people: one table of facts, one of rates, then the warnings."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distributed_at.cost import format_seconds
from distributed_at.engine.processes.open_files import files_needed
from distributed_at.planning import Plan


def plan_table(plan: Plan) -> RenderableType:
    """Return a renderable for ``rich``; every number in it is also in ``plan.as_dict()``."""
    facts = Table(box=None, show_header=False, title=plan.name, title_justify="left", title_style="bold")
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in [*_batch_rows(plan), *_cost_rows(plan)]:
        facts.add_row(name, text)
    rates = Table(box=None, header_style="bold")
    for column in ("epoch", "step", "learning rate", "eps (/255)"):
        rates.add_column(column, justify="right")
    for point in plan.rates:
        rates.add_row(f"{point.epoch:.3f}", f"{point.step:,}", f"{point.learning_rate:.6g}", f"{point.eps:g}")
    warnings = [
        Text(f"{w.level} [{w.code}]: {w.message}", style="yellow" if w.level == "warning" else "green")
        for w in plan.warnings
    ]
    return Group(facts, Text(""), rates, *([Text(""), *warnings] if warnings else []))


def _batch_rows(plan: Plan) -> list[tuple[str, str]]:
    batch = plan.batch
    group = f"{batch.group_size} images"
    if batch.ranks_per_group > 1:
        group += f", each over {batch.ranks_per_group} workers"
    if batch.group_free:
        group += " (not fixed by the recipe)"
    assumed = " (assumed as published: data.path holds no index yet)" if plan.sizes_assumed else ""
    rows = [
        (
            "batch",
            f"{batch.batch_size} = {plan.world_size} workers x {batch.micro_batch} images x {batch.accumulation} "
            "accumulated",
        ),
        ("batch-norm group", f"{group}; {batch.groups_per_step} groups a step"),
        ("images", f"{plan.num_train:,} to train on, {plan.num_test:,} to test on{assumed}"),
        ("steps", f"{plan.steps_per_epoch:,} an epoch, {plan.num_steps:,} in {plan.epochs:g} epochs"),
    ]
    for path, digest in plan.plugins:
        rows.insert(0, ("plug-in", f"{path}, sha256 {digest[:12]}"))
    if plan.paper:
        numbers = ", ".join(f"{name} {value:g}" for name, value in plan.paper["numbers"].items())
        rows.insert(0, ("paper", f"{plan.paper['title']}, {plan.paper['table']}: {plan.paper['row']} ({numbers})"))
    return rows


def _cost_rows(plan: Plan) -> list[tuple[str, str]]:
    s = plan.statistics
    units = plan.attack_units + plan.train_units
    rows = [
        ("network", f"{_si(s.parameters)} parameters, {_si(s.macs)} multiply-adds a forward"),
        (
            "forwards an image",
            f"{units:g} equivalents: attack {plan.attack_units:g}, training {plan.train_units:g}",
        ),
        ("FLOPs", f"{plan.flops_per_image:.3g} an image, {plan.flops:.3g} in all ({plan.images:,} images)"),
        (
            "final evaluation",
            "depends on AutoAttack's survivors"
            if plan.evaluation_flops is None
            else f"{plan.evaluation_flops:.3g} FLOPs",
        ),
        (
            "memory a worker",
            f"about {_bytes(plan.memory.total)}: {_bytes(plan.memory.states)} weights, gradients and optimiser, "
            f"{_bytes(plan.memory.activations)} activations",
        ),
        ("checkpoint", _bytes(plan.checkpoint_bytes)),
    ]
    if plan.world_size > 1:
        first, others = (files_needed(plan.world_size, "cuda", rank=rank) for rank in (0, 1))
        rows.append(("open files", f"up to {first:,} on rank 0, {others:,} on the others (ulimit -Hn)"))
    if plan.hours is not None:
        h = plan.hours
        basis = "reported" if h.rate.published else "scaled from another precision"
        rows += [
            (
                "time",
                f"{h.gpu_hours:,.1f} {h.gpu} hours, {format_seconds(h.wall_hours * 3600)} on {plan.world_size}, "
                f"{h.images_per_second:,.1f} images/s",
            ),
            ("rate", f"{h.rate.tflops:g} TFLOP/s a GPU ({h.precision}, {basis}): {h.rate.source}"),
        ]
    return rows


def _si(value: float) -> str:
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
