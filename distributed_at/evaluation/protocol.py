"""What an evaluation measured, as a frozen record with a hash: two numbers are comparable exactly when hashes agree.

Building a protocol decides nothing about how the work is spread: batch size, world size and device count are not in
it. The record only holds; running it is ``runner.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any

import numpy as np
import torch

from distributed_at.attacks.threat import Norm
from distributed_at.config import AttackConfig, EvalAttackConfig
from distributed_at.errors import ConfigError

# Samples that AutoAttack treats together. Its random numbers depend on the samples beside one another, so the chunk
# is part of the protocol and not of how the work is spread.
AUTOATTACK_CHUNK = 128
_STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
AUTOATTACK_VERSIONS = {
    "standard": _STANDARD,
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
}
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that a robust accuracy depends on. ``eps`` and ``step_size`` are in /255, ``start_std`` in [0, 1].

    Attributes that belong to another ``kind`` keep their defaults. ``title`` is for people and not part of the hash.
    """

    kind: str
    weights: str
    data_ids: str
    num_samples: int
    model: str = ""
    branch: str = "adv"
    dataset: str = ""
    split: str = ""
    preprocessing: str = ""
    pixel_box: tuple[float, float] = (0.0, 1.0)
    num_classes: int = 0
    norm: Norm = "linf"
    eps: float = 0.0
    step_size: float = 0.0
    num_steps: int = 0
    restarts: int = 0
    start: str = ""
    start_std: float = 0.0
    clip_start: bool = True
    start_clean_probability: float = 0.0
    target: str = "none"
    loss: str = ""
    scope: str = "clean_correct"
    bn_mode: str = "eval"
    seed: int = 0
    dtype: str = "fp32"
    version: str = ""
    attacks: tuple[str, ...] = ()
    num_targets: int = 0
    num_queries: int = 0
    eot_steps: int = 1
    chunk_size: int = 0
    libraries: tuple[tuple[str, str], ...] = ()
    title: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("eps", "step_size", "start_std", "start_clean_probability"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 8 and 8.0 are one radius, so one hash
        object.__setattr__(self, "pixel_box", tuple(float(v) for v in self.pixel_box))
        object.__setattr__(self, "attacks", tuple(self.attacks))
        object.__setattr__(self, "libraries", tuple(sorted((str(k), str(v)) for k, v in self.libraries)))

    def canonical(self) -> str:
        """Return the canonical JSON that the hash is taken of: sorted keys, no spaces, no title."""
        content = asdict(self)
        del content["title"]
        content["format"] = _FORMAT
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @property
    def short_hash(self) -> str:
        """First 12 hex digits of the hash, for folders and tables."""
        return self.hash[:12]

    @property
    def name(self) -> str:
        """The title where one was given, else a name such as ``PGD-20 linf 8/255``."""
        return self.title or self.default_name

    @property
    def default_name(self) -> str:
        """Name made from the protocol alone."""
        if self.kind == "clean":
            return "clean"
        ball = f"{self.norm} {self.eps:g}/255"
        if self.kind == "autoattack":
            form = "AutoAttack" if self.version == "standard" else f"AutoAttack-{self.version}"
            reduced = "" if (self.num_steps, self.num_queries) in ((100, 5000), (100, 0)) else " (reduced budget)"
            return f"{form} {ball}{reduced}"
        parts = [f"PGD-{self.num_steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")]
        parts += [] if self.loss == "ce" else [self.loss]
        parts += [] if self.target == "none" else ["targeted"]
        return " ".join([*parts, ball])

    @property
    def folder_name(self) -> str:
        """Folder below ``evaluations/``: readable, and unique by the short hash."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.default_name.lower()).strip("-")
        return f"{slug}-{self.short_hash}"

    @property
    def metric(self) -> str:
        """``clean_accuracy`` or ``robust_accuracy``."""
        return "clean_accuracy" if self.kind == "clean" else "robust_accuracy"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types, with name and hash, as summaries and events show it."""
        return {**json.loads(self.canonical()), "name": self.name, "hash": self.hash}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Protocol:
        """Rebuild a protocol from ``to_dict``; keys that are no fields (name, hash, format) are ignored."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in content.items() if k in known}
        values["libraries"] = tuple(tuple(pair) for pair in values.get("libraries", ()))
        return cls(**values)


def ids_hash(ids: np.ndarray) -> str:
    """Return the sha256 of a set of sample ids; their order does not matter."""
    ordered = np.unique(np.asarray(ids, dtype="<i8"))
    return hashlib.sha256(ordered.tobytes()).hexdigest()


def effective_dtype(dtype: str, device: torch.device) -> str:
    """Return the arithmetic that ``dtype`` really means on a device: fp32 convolutions run as TF32 where allowed."""
    if dtype != "fp32" or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return dtype
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    return "tf32" if any(b.fp32_precision == "tf32" for b in backends) else dtype


def autoattack_plan(version: str, num_classes: int) -> tuple[tuple[str, ...], int]:
    """Return AutoAttack's attacks and number of target classes for a version, fitted to the number of classes.

    The published attacks aim at 9 classes, and their targeted DLR loss divides by the gap to the fourth logit (Croce
    & Hein 2020, section 4): with fewer than 10 classes all wrong classes are aimed at; with 3 classes the targeted
    APGD gives way to the untargeted DLR loss; with 2 there is no DLR loss at all.
    """
    if version not in AUTOATTACK_VERSIONS:
        raise ConfigError(f"version: {version!r} is none of {', '.join(AUTOATTACK_VERSIONS)}")
    if num_classes < 2:
        raise ConfigError(f"AutoAttack needs at least 2 classes, got {num_classes}")
    attacks = list(AUTOATTACK_VERSIONS[version])
    if num_classes < 4 and "apgd-t" in attacks:
        attacks[attacks.index("apgd-t")] = "apgd-dlr"
        attacks = list(dict.fromkeys(attacks))
    if num_classes < 3:
        attacks = [a for a in attacks if a != "apgd-dlr"]
    targeted = any(a.endswith("-t") for a in attacks)
    return tuple(attacks), min(9, num_classes - 1) if targeted else 0


def resolve_attack(config: EvalAttackConfig, training_attack: AttackConfig | None) -> AttackConfig | None:
    """Return the attack of an evaluation: its own, else the training attack's threat; None for clean accuracy."""
    if config.kind == "clean":
        return None
    attack = config.attack or training_attack
    if attack is None:
        raise ConfigError(f"evaluation kind {config.kind!r} needs attack: {{eps, ...}}: the run has no training attack")
    return attack


def build_protocol(
    config: EvalAttackConfig,
    *,
    weights: str,
    ids: np.ndarray,
    num_classes: int,
    training_attack: AttackConfig | None = None,
    model: str = "",
    branch: str | None = None,
    dataset: str = "",
    split: str = "",
    preprocessing: str = "",
    seed: int = 0,
    device: torch.device | str = "cpu",
    chunk_size: int = AUTOATTACK_CHUNK,
    num_steps: int = 100,
    num_queries: int = 5000,
) -> Protocol:
    """Turn one evaluation of a recipe into the record of everything that its number depends on.

    BN always normalises with running statistics in an evaluation, whatever ``attack.bn_mode`` says of training; the
    epsilon warm-up of training does not apply either.

    Args:
        weights: ``weights_hash`` of the model.
        ids: (N,) sample ids that the number is over.
        model: the architecture in words or JSON, for what the weights do not tell (activation, normalisation).
        chunk_size, num_steps, num_queries: AutoAttack alone; smaller budgets are named as such.

    Raises:
        ConfigError: where the configuration cannot be run.
    """
    common: dict[str, Any] = {
        "kind": config.kind,
        "weights": weights,
        "data_ids": ids_hash(ids),
        "num_samples": len(np.unique(ids)),
        "model": model,
        "branch": branch or config.branch or "adv",
        "dataset": dataset,
        "split": split,
        "preprocessing": preprocessing,
        "num_classes": num_classes,
        "title": config.name or "",
    }
    attack = resolve_attack(config, training_attack)
    if attack is None:
        return Protocol(**common, dtype=effective_dtype("fp32", torch.device(device)))
    common.update(norm=attack.norm, eps=attack.eps, seed=seed)
    common["dtype"] = effective_dtype(attack.dtype, torch.device(device))
    if config.kind == "autoattack":
        attacks, num_targets = autoattack_plan(config.version, num_classes)
        return Protocol(
            **common,
            version=config.version,
            attacks=attacks,
            num_targets=num_targets,
            num_steps=num_steps,
            num_queries=num_queries if "square" in attacks else 0,
            restarts=5 if config.version == "plus" else 1,
            eot_steps=20 if config.version == "rand" else 1,
            chunk_size=chunk_size,
            libraries=(("pyautoattack", metadata.version("pyautoattack")),),
        )
    return Protocol(
        **common,
        step_size=attack.effective_step_size,
        num_steps=attack.num_steps,
        restarts=attack.restarts,
        start=attack.start,
        start_std=attack.start_std if attack.start == "gaussian" else 0.0,
        clip_start=attack.clip_start,
        start_clean_probability=attack.start_clean_probability,
        target=attack.target,
        loss=attack.loss,
        # A targeted attack may turn a mistake into a hit, and published targeted numbers are over all images
        # (Xie & Yuille 2020, section 3), so there nothing may be skipped.
        scope="clean_correct" if attack.target == "none" else "all",
        attacks=("pgd",),
    )
