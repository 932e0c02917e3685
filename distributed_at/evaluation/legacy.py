"""Protocols as earlier versions hashed them, so that what they measured is found and compared, not computed again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed_at.evaluation.protocol import Protocol

# Format 1 hashed every field of every kind, with these values where a kind had no use for one.
_FORMAT_1: dict[str, Any] = {
    "kind": None, "weights": None, "data_ids": None, "num_samples": None, "model": "", "branch": "adv", "dataset": "",
    "split": "", "preprocessing": "", "pixel_box": (0.0, 1.0), "num_classes": 0, "norm": "linf", "eps": 0.0,
    "step_size": 0.0, "num_steps": 0, "restarts": 0, "start": "", "start_std": 0.0, "clip_start": True,
    "start_clean_probability": 0.0, "target": "none", "loss": "", "scope": "clean_correct", "bn_mode": "eval",
    "seed": 0, "dtype": "fp32", "version": "", "attacks": (), "num_targets": 0, "num_queries": 0, "eot_steps": 1,
    "chunk_size": 0, "libraries": (),
}  # fmt: skip


def format_1_hash(protocol: Protocol) -> str | None:
    """Return the hash that format 1 gave this protocol; None where it says what format 1 could not."""
    for one in fields(protocol):
        unknown = one.name not in _FORMAT_1 and one.name != "title"
        if unknown and (one.default is MISSING or getattr(protocol, one.name) != one.default):
            return None
    content = {name: getattr(protocol, name, default) for name, default in _FORMAT_1.items()}
    content["format"] = 1
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
