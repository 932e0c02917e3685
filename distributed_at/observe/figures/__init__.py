"""Figures of Xie & Yuille ("Intriguing properties of adversarial training at scale") drawn from run folders."""

from distributed_at.observe.figures.curves import attack_iterations, clean_ratio, depth
from distributed_at.observe.figures.statistics import (
    LayerStatistics,
    batch_and_running,
    branch_statistics,
    sample_channels,
)
from distributed_at.observe.figures.style import Drawn, save

__all__ = [
    "Drawn",
    "LayerStatistics",
    "attack_iterations",
    "batch_and_running",
    "branch_statistics",
    "clean_ratio",
    "depth",
    "sample_channels",
    "save",
]
