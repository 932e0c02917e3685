"""Figures 5 and 6: a norm layer's running statistics of both branches, and batch against running statistics.

Given numbers, it draws; where they come from (checkpoints, images, attacks) is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distributed_at.observe.figures.style import ADV, CLEAN, COLOURS, Drawn, legend_above, look, new_figure
from distributed_at.rng import Purpose, permutation

NUM_CHANNELS = 20  # as in the paper


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Mean and variance of every channel of one norm layer.

    Attributes:
        name: what they are of, e.g. "clean", "adv", "batch 1".
        mean: (C,) float.
        variance: (C,) float.
    """

    name: str
    mean: np.ndarray
    variance: np.ndarray


def sample_channels(number: int, *, count: int = NUM_CHANNELS, seed: int = 0) -> np.ndarray:
    """Return up to ``count`` of ``number`` channels, rising, drawn by counters: the same for every run and machine."""
    return np.sort(permutation(seed, 0, number, purpose=Purpose.CHANNELS)[:count])


def _panels(
    sets: Sequence[LayerStatistics], channels: np.ndarray, styles: Sequence[dict[str, Any]], quantity: str
) -> Any:
    """Draw mean and variance of the sampled channels side by side, in the order of the first set's mean."""
    figure, axes = new_figure(2, width=4.6, height=3.2)
    order = channels[np.argsort(sets[0].mean[channels], kind="stable")]
    places = np.arange(len(order))
    for axis, field, title in zip(axes, ("mean", "variance"), ("mean", "variance"), strict=True):
        values = np.stack([getattr(one, field)[order] for one in sets])  # (sets, channels)
        axis.vlines(places, values.min(axis=0), values.max(axis=0), color="#bbbbbb", linewidth=1, zorder=1)
        for row, one, style in zip(values, sets, styles, strict=True):
            axis.scatter(places, row, s=18, label=one.name, zorder=2, **style)
        axis.set_xticks(places, [str(c) for c in order], rotation=90, fontsize=6)
        axis.set_xlabel("channel")
        axis.set_ylabel(f"{quantity} {title}" if quantity else title)
        if field == "variance":
            axis.set_ylim(0, 1.08 * float(values.max()))  # the largest marker whole
    legend_above(axes[0])
    return figure


def branch_statistics(
    clean: LayerStatistics, adv: LayerStatistics, *, layer: str, run: str, channels: np.ndarray
) -> Drawn:
    """Figure 5: running mean and variance of both halves of a mixture batch norm on sampled channels."""
    with look():
        styles = [{"color": CLEAN, "marker": "o"}, {"color": ADV, "marker": "s"}]
        figure = _panels([clean, adv], channels, styles, "running")
    larger = {
        "magnitude of the mean": int((np.abs(adv.mean) > np.abs(clean.mean)).sum()),
        "variance": int((adv.variance > clean.variance).sum()),
    }
    spread = np.sqrt(0.5 * (clean.variance + adv.variance))
    apart = float(np.median(np.abs(adv.mean - clean.mean) / spread))
    ratio = float(np.median(adv.variance / clean.variance))
    told = "; ".join(f"adversarial {what} larger on {n} of {len(clean.mean)} channels" for what, n in larger.items())
    caption = (
        f"Running statistics of MBN_clean and MBN_adv in {layer} of {run}, {len(channels)} sampled channels. Over all "
        f"channels: {told}; median |difference of means| {apart:.3f} standard deviations, median variance ratio "
        f"adv / clean {ratio:.3f}."
    )
    return Drawn(name="figure5", caption=caption, figure=figure)


def batch_and_running(
    batches: Sequence[LayerStatistics], running: LayerStatistics, *, layer: str, run: str, channels: np.ndarray
) -> Drawn:
    """Figure 6: statistics of adversarial mini-batches beside the running ones on sampled channels."""
    with look():
        markers = ("^", "v", "D", "P")
        styles: list[dict[str, Any]] = [{"color": COLOURS[6], "marker": "o"}]
        styles += [{"color": COLOURS[i % 6], "marker": markers[i % len(markers)]} for i in range(len(batches))]
        figure = _panels([running, *batches], channels, styles, "")
    spread = np.sqrt(running.variance)
    means = np.median([np.abs(b.mean - running.mean) / spread for b in batches])
    variances = np.median([np.abs(b.variance - running.variance) / running.variance for b in batches])
    caption = (
        f"Statistics of {len(batches)} adversarial mini-batches beside the running ones in {layer} of {run}, "
        f"{len(channels)} sampled channels. Over all channels: median |batch - running mean| {means:.3f} standard "
        f"deviations, median relative difference of variances {variances:.3f}."
    )
    return Drawn(name="figure6", caption=caption, figure=figure)
