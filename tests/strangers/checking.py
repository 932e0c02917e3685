"""Comparisons of rows, and checks in float64 of the images that a network was asked about."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.strangers.pgd import Row


def sizes(adv: np.ndarray, x: np.ndarray, norm: str) -> np.ndarray:
    """(N,) float64: how far each image of ``adv`` (N, C, H, W) lies from its clean one."""
    delta = (adv.astype(np.float64) - x.astype(np.float64)).reshape(len(x), -1)
    return np.abs(delta).max(1) if norm == "linf" else np.sqrt((delta**2).sum(1))


def assert_inside(adv: np.ndarray, x: np.ndarray, norm: str, eps: float) -> float:
    """Check ball (``eps`` in /255) and box, with no allowance for rounding; return the largest size over the radius."""
    found = sizes(adv, x, norm)
    assert (found <= eps / 255).all(), f"{found.max()} is more than {eps / 255}"
    assert adv.min() >= 0
    assert adv.max() <= 1
    return float(found.max() / (eps / 255))


def judged_images(seen: list[torch.Tensor], x: np.ndarray, norm: str) -> list[list[np.ndarray]]:
    """Return for each clean image (C, H, W) the perturbed ones among ``seen``, in order, and not twice in a row."""
    found: list[list[np.ndarray]] = [[] for _ in x]
    for image in (image.numpy() for batch in seen for image in batch):
        distances = sizes(np.broadcast_to(image, x.shape), x, norm)
        mine = found[int(distances.argmin())]
        if distances.min() > 0 and not (mine and np.abs(mine[-1] - image).max() < 1e-6):
            mine.append(image)
    return found


def assert_same_rows(result: Any, expected: list[Row], source: Any) -> None:
    """Compare an evaluation's result with rows written by hand, column by column."""
    rows = result.rows
    np.testing.assert_array_equal(rows.sample_id, source.sample_ids)
    np.testing.assert_array_equal(rows.label, source.all_labels.numpy())
    for name in ("clean_prediction", "adv_prediction", "correct_clean", "correct_adv", "target_hit", "attack"):
        np.testing.assert_array_equal(getattr(rows, name), [getattr(e, name) for e in expected], err_msg=name)
    np.testing.assert_allclose(rows.loss, [e.loss for e in expected], rtol=1e-4, atol=1e-6)
    assert (result.correct, result.total) == (sum(e.correct_adv for e in expected), len(expected))
    assert result.clean_correct == sum(e.correct_clean for e in expected)
    if result.protocol.target != "none":
        assert result.attack_success_rate == sum(e.target_hit for e in expected) / len(expected)
