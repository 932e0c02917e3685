"""Adversarial examples for the report: originals, adversarial images and amplified perturbations as PNG data URIs."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES_FILE = "examples.npz"
MOST_EXAMPLES = 12
MOST_PIXELS = 12 * 3 * 160 * 160  # of all pictures together: the report stays a few megabytes
CRISP_BELOW = 80  # images smaller than this are enlarged with visible pixels


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image three times, with what the model says of it. The pictures are data URIs."""

    clean: str
    adv: str
    perturbation: str
    label: str
    clean_prediction: str
    adv_prediction: str
    clean_right: bool
    adv_right: bool


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The report's examples with what is common to them."""

    items: list[Example]
    eps: float | None  # /255
    amplification: float
    largest: float  # largest absolute perturbation, /255
    size: tuple[int, int]
    crisp: bool


def _uri(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _radius(arrays: Any, largest: float) -> float | None:
    """Return eps in [0, 1]; files may hold it in /255, where it is 1 or more."""
    if "eps" not in arrays:
        return None
    value = float(np.max(arrays["eps"])) if np.size(arrays["eps"]) else 0.0
    if value <= 0:
        return None
    return value / 255 if value >= 1 and largest < 1 else value


def load_examples(run_folder: Path | str) -> Examples | None:
    """Read ``examples.npz`` of a run; None where it is absent, empty or not of the documented form.

    Arrays: ``clean`` uint8 (N, H, W, 3), ``adv`` float32 (N, H, W, 3) in [0, 1], ``labels``, ``clean_predictions``,
    ``adv_predictions`` int (N,), ``eps``, and optionally ``class_names``. Nothing in the file is unpickled.
    """
    path = Path(run_folder) / EXAMPLES_FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        clean, adv = arrays["clean"], arrays["adv"].astype(np.float64)
        labels, before, after = (arrays[name] for name in ("labels", "clean_predictions", "adv_predictions"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if clean.ndim != 4 or clean.shape != adv.shape or clean.shape[-1] not in (1, 3) or not len(clean):
        return None
    height, width = clean.shape[1:3]
    count = min(MOST_EXAMPLES, len(clean), max(3, MOST_PIXELS // (3 * height * width)))
    delta = adv[:count] - clean[:count].astype(np.float64) / 255
    largest = float(np.abs(delta).max())
    radius = _radius(arrays, largest)
    span = radius if radius is not None and largest <= radius * 1.01 else largest  # an L2 radius is no pixel range
    amplification = 0.5 / span if span > 0 else 1.0
    names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else []

    def name(index: Any) -> str:
        return names[int(index)] if 0 <= int(index) < len(names) else str(int(index))

    def rgb(image: np.ndarray) -> np.ndarray:
        return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image

    items = [
        Example(
            clean=_uri(rgb(clean[i].astype(np.uint8))), adv=_uri(rgb(_to_uint8(adv[i]))),
            perturbation=_uri(rgb(_to_uint8(0.5 + amplification * delta[i]))),
            label=name(labels[i]), clean_prediction=name(before[i]), adv_prediction=name(after[i]),
            clean_right=int(before[i]) == int(labels[i]), adv_right=int(after[i]) == int(labels[i]),
        )
        for i in range(count)
    ]  # fmt: skip
    return Examples(
        items=items, eps=None if radius is None else radius * 255, amplification=amplification, largest=largest * 255,
        size=(height, width), crisp=max(height, width) < CRISP_BELOW,
    )  # fmt: skip
