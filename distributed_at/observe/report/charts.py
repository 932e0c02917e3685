"""Small line charts and interval marks as inline SVG, coloured by the page's own style sheet so that they follow light,
dark and print. Only drawing: which series exist is decided in ``curves.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 30
MOST_POINTS = 240  # a longer series is drawn as the mean of bins inside the band of their extremes

Role = Literal["clean", "adv", "a", "b", "c", "d"]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. ``points`` are (epoch, value); ``intervals`` (low, high) belong to marked series."""

    name: str
    points: Sequence[Point]
    role: Role = "a"
    marked: bool = False
    intervals: Sequence[tuple[float, float] | None] = ()

    @property
    def last(self) -> float | None:
        """The last finite value."""
        return next((y for _, y in reversed(self.points) if math.isfinite(y)), None)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with its legend, ready for the page."""

    title: str
    unit: str
    svg: Markup
    legend: Sequence[tuple[str, Role, bool, str]]  # name, role, marked, last value


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return round numbers that cover [low, high] in steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, count - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def format_tick(value: float) -> str:
    """Return a tick as short as it can be: ``0.1``, ``1e-4``, ``3k``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 0.001 else f"{value:g}"


def _segments(points: Sequence[Point]) -> list[list[Point]]:
    """Split at values that are not finite: a gap is shown as a gap."""
    found: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [part for part in found if part]


def _bins(points: Sequence[Point]) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """Return (means, (x, low, high) of each bin); the band is empty where nothing had to be joined."""
    if len(points) <= MOST_POINTS:
        return list(points), []
    size = math.ceil(len(points) / MOST_POINTS)
    means, band = [], []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        x = sum(p[0] for p in part) / len(part)
        values = [p[1] for p in part]
        means.append((x, sum(values) / len(values)))
        band.append((x, min(values), max(values)))
    return means, band


def line_chart(
    series: Sequence[Series], *, title: str, unit: str = "", percent: bool = False, marks: Sequence[Point] = (),
    from_zero: bool = True, height: int = HEIGHT,
) -> Chart | None:  # fmt: skip
    """Draw series over epochs; None where none of them has a finite value.

    Args:
        series: what to draw; later ones lie on top.
        title, unit: heading and the unit of the vertical axis.
        percent: values are shares; the axis runs in percent.
        marks: (epoch, restart number) of vertical dotted lines.
        from_zero: the vertical axis holds 0.
        height: of the drawing, in the SVG's own units.
    """
    series = [s for s in series if s.last is not None]
    if not series:
        return None
    factor = 100 if percent else 1
    finite = [p for s in series for part in _segments(s.points) for p in part]
    ends = [e * factor for s in series for pair in s.intervals if pair for e in pair if math.isfinite(e)]
    values = [y * factor for _, y in finite] + ends
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    y_ticks = nice_ticks(low, high, count=6 if height >= HEIGHT else 4)
    if percent:
        y_ticks = [t for t in y_ticks if 0 <= t <= 100] or y_ticks
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    x_low = 0.0 if 0 <= x_low < 0.5 * x_high else x_low
    x_ticks = [t for t in nice_ticks(x_low, x_high, count=7) if x_low <= t <= x_high * 1.0001] or [x_low]
    bottom, top = min(y_ticks[0], low), max(y_ticks[-1], high)

    def px(x: float) -> float:
        span = x_high - x_low
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / span if span else 0.5)

    def py(y: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (1 - (y - bottom) / (top - bottom))

    parts = [
        f'<line class="grid{" base" if t == 0 else ""}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
        f'<text class="tick y" x="{LEFT - 8}" y="{py(t) + 4:.1f}">{format_tick(t)}</text>'
        for t in y_ticks
    ]
    parts += [f'<text class="tick x" x="{px(t):.1f}" y="{height - 10}">{format_tick(t)}</text>' for t in x_ticks]
    parts += [
        f'<line class="mark" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" y2="{height - BOTTOM}">'
        f"<title>resumed (restart {number:g}) at epoch {x:.2f}</title></line>"
        for x, number in marks
        if x_low <= x <= x_high
    ]
    for one in series:
        quiet = not one.marked and any(other.marked for other in series)
        parts.append(
            f'<g class="{"quiet" if quiet else "full"}">{_draw(one, px, lambda y: py(y * factor), factor)}</g>'
        )
    summary = "; ".join(f"{s.name}: last {_shown(s.last, percent)}" for s in series)
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)} by epoch. {escape(summary)}">'
        + "".join(parts)
        + "</svg>"
    )
    legend = [(s.name, s.role, s.marked, _shown(s.last, percent)) for s in series]
    return Chart(title=title, unit="%" if percent else unit, svg=Markup(svg), legend=legend)


def _shown(value: float | None, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if percent else f"{value:.4g}"


def _draw(one: Series, px: Any, py: Any, factor: float) -> str:
    found = []
    weight = "held" if one.marked else "raw"
    for segment in _segments(one.points):
        means, band = _bins(segment) if not one.marked else (list(segment), [])
        if band:
            edge = [(x, h) for x, _, h in band] + [(x, lo) for x, lo, _ in reversed(band)]
            found.append(f'<polygon class="band {one.role}" points="{_path(edge, px, py)}"/>')
        if len(means) > 1:
            found.append(f'<polyline class="line {weight} {one.role}" points="{_path(means, px, py)}"/>')
        elif not one.marked:
            found.append(
                f'<circle class="dot {one.role}" cx="{px(means[0][0]):.1f}" cy="{py(means[0][1]):.1f}" r="2.5"/>'
            )
    if one.marked:
        pairs = list(one.intervals) or [None] * len(one.points)
        radius = 3.2 if len(one.points) <= 60 else 2
        for (x, y), pair in zip(one.points, pairs, strict=True):
            if not math.isfinite(y):
                continue
            label = f"{one.name}, epoch {x:.2f}: {y * factor:.2f}"
            if pair and all(math.isfinite(e) for e in pair):
                label += f" [{pair[0] * factor:.2f}, {pair[1] * factor:.2f}]"
                found.append(
                    f'<line class="whisker {one.role}" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(pair[0]):.1f}" y2="{py(pair[1]):.1f}"/>'
                )
            found.append(
                f'<circle class="dot {one.role}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="{radius}"><title>{escape(label)}</title></circle>'
            )
    return "".join(found)


def _path(points: Sequence[Point], px: Any, py: Any) -> str:
    return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)


def interval_mark(*, accuracy: float, low: float | None, high: float | None, paper: float | None, role: Role) -> Markup:
    """Draw an accuracy on a 0 to 100 % track: a dot, its 95% interval, and a hollow diamond for the paper's number."""

    def x(share: float) -> float:
        return 6 + 148 * min(1.0, max(0.0, share))

    parts = ['<line class="track" x1="6" x2="154" y1="9" y2="9"/>']
    if low is not None and high is not None:
        parts.append(f'<line class="whisker {role}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="9" y2="9"/>')
    parts.append(f'<circle class="dot {role}" cx="{x(accuracy):.1f}" cy="9" r="4"/>')
    if paper is not None:
        at = x(paper / 100)
        parts.append(
            f'<path class="paper" d="M{at:.1f} 2.5 l5 6.5 l-5 6.5 l-5 -6.5z"><title>paper: {paper:.2f}%</title></path>'
        )
    return Markup(f'<svg class="interval" viewBox="0 0 160 18" aria-hidden="true">{"".join(parts)}</svg>')
