"""How the figures look, and how they reach the disk: SVG for papers, PNG to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

FORMATS = ("svg", "png")
# Okabe & Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
CLEAN, ADV = COLOURS[0], COLOURS[1]
_HEIGHT = 3.4  # inches, without a legend
_ROW = 0.2  # inches, of one row of a legend
_LEGEND_COLUMNS = 4
_LONG_LABEL = 14
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "distributed-at",  # equal runs give equal files
    "svg.fonttype": "none",
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure with what it says in words.

    Attributes:
        name: file name without its ending, e.g. ``figure5``.
        caption: what is shown, of which runs, and what can be read off it.
        figure: matplotlib's.
    """

    name: str
    caption: str
    figure: Figure


@contextmanager
def look() -> Iterator[None]:
    """Draw within it: one look, whatever the user's own matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(columns: int = 1, *, width: float = 5.2, height: float = _HEIGHT) -> tuple[Figure, list[Any]]:
    """Return a figure and its axes, side by side; no window system is touched."""
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def legend_above(axis: Any) -> None:
    """Name what an axis shows above it, where no curve and no interval can lie under the words; the figure grows with it.

    Lines whose label begins with an underscore are the paper's and share one entry.
    """
    handles, labels = axis.get_legend_handles_labels()
    if any(line.get_linestyle() == ":" for line in axis.lines):
        handles, labels = [*handles, Line2D([], [], color="#666666", linestyle=":")], [*labels, "the paper's"]
    columns = 1 if max(map(len, labels)) > _LONG_LABEL else min(len(labels), _LEGEND_COLUMNS)
    axis.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
    axis.figure.set_figheight(max(axis.figure.get_figheight(), _HEIGHT + _ROW * -(-len(labels) // columns)))


def save(drawn: Drawn, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write a figure in each format; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with look():
        for kind in formats:
            path = folder / f"{drawn.name}.{kind}"
            drawn.figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            paths.append(path)
    return paths
