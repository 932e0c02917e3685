"""How far two states of a run, or two logs, are from each other: the largest difference of every kind, and its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = {
    "model": "weights",
    "optimizer": "optimiser",
    "ema": "average",
    "buffer": "statistics",
    "objective": "objective",
}


def tensors_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, tuple[float, str]]:
    """Return kind -> (largest difference, name); a difference is relative to the largest number of its tensor."""
    assert found.keys() == expected.keys(), f"names in one alone: {sorted(found.keys() ^ expected.keys())}"
    apart: dict[str, tuple[float, str]] = {}
    for name, tensor in expected.items():
        other = found[name]
        assert other.shape == tensor.shape, name
        if not other.is_floating_point():
            assert torch.equal(other, tensor.to(other.dtype)), f"{name} is {other}, not {tensor}"
            continue
        scale = float(tensor.abs().max()) or 1.0
        difference = float((other.double() - tensor.double()).abs().max()) / scale
        kind = KINDS[name.split(".")[0]]
        apart[kind] = max(apart.get(kind, (0.0, "")), (difference, name))
    return apart


def rows_apart(found: Sequence[dict], expected: Sequence[dict]) -> tuple[float, str]:
    """Return the largest relative difference of two logs, and where it is."""
    assert len(found) == len(expected), f"{len(found)} rows, not {len(expected)}"
    worst = (0.0, "")
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys(), f"columns in one alone: {sorted(row.keys() ^ wanted.keys())}"
        for name, value in wanted.items():
            difference = abs(row[name] - value) / max(abs(value), 0.1)
            worst = max(worst, (difference, f"{name} after step {wanted['step']}: {row[name]!r}, not {value!r}"))
    return worst
