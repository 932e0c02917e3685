"""AutoAttack (Croce & Hein 2020) through pyautoattack, with results that neither sharding nor a restart can change.

pyautoattack's algorithms are used as they are; its outer loop is not: its state file cannot be read back, its seeds
follow the order of batches, and its verdicts trust the images that it made. Here one fixed chunk of samples is one
call with its own seed, and an image counts only if it lies in the ball and the model, asked again, is wrong on it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from distributed_at.config.evaluation import EvaluationEntry
from distributed_at.errors import ConfigError
from distributed_at.evaluation.kinds.base import EvaluationKind
from distributed_at.evaluation.protocol import AttackProtocol, Protocol
from distributed_at.lazy import F, torch

if TYPE_CHECKING:
    from distributed_at.config import AttackConfig
    from distributed_at.evaluation.attacked import AttackedSamples
    from distributed_at.evaluation.kinds.base import Forward

_NORMS = {"linf": "Linf", "l2": "L2"}
# Samples that AutoAttack treats together. Its random numbers depend on the samples beside one another, so the chunk
# is part of the protocol and not of how the work is spread.
CHUNK = 128
NUM_STEPS, NUM_QUERIES = 100, 5000  # the published budgets
_STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
VERSIONS = {
    "standard": _STANDARD,
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
}


@dataclass(frozen=True, kw_only=True)
class AutoAttackProtocol(AttackProtocol):
    """What AutoAttack's number depends on: version, budgets, the samples treated together, and the library's version."""

    version: str = ""
    num_targets: int = 0
    num_steps: int = 0
    num_queries: int = 0
    restarts: int = 0
    eot_steps: int = 1
    chunk_size: int = 0
    libraries: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "libraries", tuple(sorted((str(k), str(v)) for k, v in self.libraries)))

    @property
    def default_name(self) -> str:
        form = "AutoAttack" if self.version == "standard" else f"AutoAttack-{self.version}"
        return f"{form} {self.norm} {self.eps:g}/255{'' if self._has_published_budget else ' (reduced budget)'}"

    @property
    def _has_published_budget(self) -> bool:
        return self.num_steps == NUM_STEPS and self.num_queries in (NUM_QUERIES, 0)


class AutoAttack(EvaluationKind):
    """Robust accuracy under AutoAttack (Croce & Hein 2020)."""

    class Config(EvaluationEntry):
        """AutoAttack in one of its versions; of ``attack`` only the threat counts."""

        kind: Literal["autoattack"] = "autoattack"
        version: Literal["standard", "plus", "rand", "fast"] = Field(
            default="standard", description="AutoAttack's version; 'fast' = APGD-CE and targeted APGD alone"
        )

    Record = AutoAttackProtocol
    strength: ClassVar[int] = 2
    batch_dependent: ClassVar[bool] = True

    @classmethod
    def settings(cls, entry: EvaluationEntry, attack: AttackConfig | None, num_classes: int) -> dict[str, Any]:
        assert isinstance(entry, AutoAttack.Config)
        attacks, num_targets = autoattack_plan(entry.version, num_classes)
        return {
            "version": entry.version,
            "attacks": attacks,
            "num_targets": num_targets,
            "num_steps": NUM_STEPS,
            "num_queries": NUM_QUERIES if "square" in attacks else 0,
            "restarts": 5 if entry.version == "plus" else 1,
            "eot_steps": 20 if entry.version == "rand" else 1,
            "chunk_size": CHUNK,
            "libraries": (("pyautoattack", metadata.version("pyautoattack")),),
        }

    @classmethod
    def paper_names(cls, details: Mapping[str, Any]) -> set[str]:
        """Papers print the standard version with its published budget, and nothing else, under 'aa'."""
        standard = details.get("version") == "standard" and "(reduced" not in str(details.get("name"))
        return {"aa", "autoattack"} if standard else set()

    @classmethod
    def forward_units(cls, entry: EvaluationEntry) -> None:
        return None

    @classmethod
    def pieces(cls, protocol: Protocol, ids: np.ndarray, missing: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """Return every fixed chunk that lacks a row."""
        assert isinstance(protocol, AutoAttackProtocol)
        chunks = [ids[i : i + protocol.chunk_size] for i in range(0, len(ids), protocol.chunk_size)]
        return [chunk for chunk in chunks if np.isin(chunk, missing).any()]

    @classmethod
    def attack(
        cls,
        forward: Forward,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        ids: torch.Tensor,
        piece: np.ndarray,
        protocol: AutoAttackProtocol,
        on_the_way: dict[int, AttackedSamples],
    ) -> AttackedSamples:
        return run_autoattack(forward, x, y, chunk_ids=piece, protocol=protocol)


def autoattack_plan(version: str, num_classes: int) -> tuple[tuple[str, ...], int]:
    """Return AutoAttack's attacks and number of target classes for a version, fitted to the number of classes.

    The published attacks aim at 9 classes, and their targeted DLR loss divides by the gap to the fourth logit (Croce
    & Hein 2020, section 4): with fewer than 10 classes all wrong classes are aimed at; with 3 classes the targeted
    APGD gives way to the untargeted DLR loss; with 2 there is no DLR loss at all.
    """
    if version not in VERSIONS:
        raise ConfigError(f"version: {version!r} is none of {', '.join(VERSIONS)}")
    if num_classes < 2:
        raise ConfigError(f"AutoAttack needs at least 2 classes, got {num_classes}")
    attacks = list(VERSIONS[version])
    if num_classes < 4 and "apgd-t" in attacks:
        attacks[attacks.index("apgd-t")] = "apgd-dlr"
        attacks = list(dict.fromkeys(attacks))
    if num_classes < 3:
        attacks = [a for a in attacks if a != "apgd-dlr"]
    targeted = any(a.endswith("-t") for a in attacks)
    return tuple(attacks), min(9, num_classes - 1) if targeted else 0


def chunk_seed(seed: int, ids: np.ndarray) -> int:
    """Return the generator seed of a chunk: a hash of the evaluation's seed and the chunk's sample ids, 63 bits."""
    text = np.concatenate([[seed], np.sort(ids)]).astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


@contextmanager
def _silent_logger() -> Iterator[None]:
    """Keep pyautoattack's warnings off the console: they repeat for every chunk and lead to its own documentation."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _toolbox(forward: Forward, protocol: AutoAttackProtocol, device: torch.device, seed: int) -> Any:
    """Build pyautoattack's four attacks with this protocol's budgets, without its outer loop."""
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ConfigError(
            "evaluation kind 'autoattack' needs the package pyautoattack: pip install pyautoattack"
        ) from error
    tools = AutoAttack(
        forward,
        attacks=list(protocol.attacks),
        device=device,
        eps=protocol.eps / 255,
        norm=_NORMS[protocol.norm],
        seed=seed,
        version="custom",
    )
    # Every budget is set by hand: its 'custom' leaves 5 restarts, and one of its versions overwrites FAB's restarts
    # while running, so that a second call of the same object would be weaker than the first.
    tools.apgd.n_restarts = protocol.restarts
    tools.apgd.eot_iter = protocol.eot_steps
    tools.apgd_targeted.n_restarts = 1
    tools.apgd_targeted.n_target_classes = protocol.num_targets
    tools.fab.n_target_classes = protocol.num_targets
    for apgd in (tools.apgd, tools.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = protocol.num_steps
        apgd.n_iter_2 = max(int(0.22 * protocol.num_steps), 1)
        apgd.n_iter_min = max(int(0.06 * protocol.num_steps), 1)
        apgd.size_decr = max(int(0.03 * protocol.num_steps), 1)
    tools.fab.n_iter = protocol.num_steps
    tools.square.n_queries = protocol.num_queries
    return tools


def _run_one(tools: Any, name: str, x: torch.Tensor, y: torch.Tensor, restarts: int) -> torch.Tensor:
    """Run one attack of the ensemble on samples that are still right; (N, C, H, W) in and out."""
    if name in ("apgd-ce", "apgd-dlr"):
        tools.apgd.loss = name.removeprefix("apgd-")
        return tools.apgd.perturb(x, y)
    if name == "apgd-t":
        return tools.apgd_targeted.perturb(x, y)
    if name in ("fab", "fab-t"):
        tools.fab.targeted = name == "fab-t"
        tools.fab.n_restarts = 1 if name == "fab-t" else restarts
        return tools.fab.perturb(x, y)
    if name == "square":
        return tools.square.perturb(x, y)
    raise ConfigError(f"AutoAttack has no attack {name!r}")


def run_autoattack(
    forward: Forward, x: torch.Tensor, y: torch.Tensor, *, chunk_ids: np.ndarray, protocol: AutoAttackProtocol
) -> AttackedSamples:
    """Attack one chunk's correctly classified samples with the whole ensemble, each attack on what is left.

    Args:
        forward: x -> logits, normalisation inside, in eval mode.
        x: (N, C, H, W) float32 in [0, 1]; all must be classified correctly.
        y: (N,) int64.
        chunk_ids: ids of the whole chunk, wrong samples included: what the seed is made of.

    Raises:
        ValueError: where the input is not inside [0, 1] (AutoAttack would leave the ball without a word).
    """
    from distributed_at.evaluation.attacked import AttackedSamples, inside_ball
    from distributed_at.evaluation.isolation import isolated_generators

    if x.numel() and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"AutoAttack needs pixels in [0, 1], got [{x.min():g}, {x.max():g}]")
    outcome = AttackedSamples.unbroken(y)
    if not len(y):
        return outcome
    seed = chunk_seed(protocol.seed, chunk_ids)
    with isolated_generators(x.device), _silent_logger(), torch.no_grad():
        tools = _toolbox(forward, protocol, x.device, seed)
        for number, name in enumerate(protocol.attacks):
            left = torch.nonzero(~outcome.broken).squeeze(1)
            if not len(left):
                break
            for part in (tools.apgd, tools.apgd_targeted, tools.fab, tools.square):
                part.seed = seed
            adv = _run_one(
                tools, name, x[left].clone(memory_format=torch.contiguous_format), y[left].clone(), protocol.restarts
            )
            adv = inside_ball(adv, x[left], eps=protocol.eps / 255, norm=protocol.norm)
            logits = forward(adv)
            outcome.record(left, logits, F.cross_entropy(logits, y[left], reduction="none"), y[left], number)
    return outcome
