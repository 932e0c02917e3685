"""Robust accuracy against the number of PGD steps, read off one trajectory instead of one attack a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from distributed_at.attacks import PGD
from distributed_at.errors import ConfigError
from distributed_at.evaluation.kinds.pgd import build_attack
from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.quiet import Model, device_of, lent
from distributed_at.evaluation.sharding import Shard
from distributed_at.evaluation.source import Source
from distributed_at.evaluation.work import make_forward
from distributed_at.rng import EVALUATION_EPOCH
from distributed_at.statistics import wilson


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Accuracy after ``num_steps`` steps; ``low`` and ``high`` are its Wilson 95% interval."""

    num_steps: int
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """``correct / total``, a share in [0, 1]."""
        return self.correct / self.total

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return wilson(self.correct, self.total)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return wilson(self.correct, self.total)[1]


def pgd_curve(
    model: Model,
    source: Source,
    protocol: Protocol,
    steps: Sequence[int],
    *,
    ids: np.ndarray,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> list[CurvePoint]:
    """Return robust accuracy at each number of ``steps`` along the attack of a PGD protocol.

    With an explicit step size the first k of n steps are PGD-k itself, so PGD-10, -100 and -2000 (Xie & Yuille 2020,
    figure 4) cost what PGD-2000 costs. Samples count as in ``evaluate``; every rank must call this and all return the
    same points.

    Args:
        protocol: kind ``pgd``, of this model; its ``num_steps`` is the longest that can be asked for.
        steps: numbers of steps in [0, ``protocol.num_steps``].
        ids: (N,) sample ids.
    """
    if protocol.kind != "pgd":
        raise ConfigError(f"a curve over steps needs a protocol of kind 'pgd', got {protocol.kind!r}")
    checkpoints = tuple(sorted(set(steps)))
    if not checkpoints or checkpoints[0] < 0 or checkpoints[-1] > protocol.num_steps:
        raise ConfigError(f"steps must lie in [0, {protocol.num_steps}], got {list(steps)}")
    on = torch.device(device) if device is not None else device_of(model)
    shard = Shard.here(None, None, on)
    ids = np.unique(np.asarray(ids, dtype=np.int64))
    forward = make_forward(model, protocol, on)
    attack = build_attack(protocol)

    def count() -> torch.Tensor:
        standing = torch.zeros(len(checkpoints), dtype=torch.int64)
        for start in shard.mine(range(0, len(ids), batch_size)):
            standing += _standing(forward, attack, source, protocol, checkpoints, ids[start : start + batch_size], on)
        return standing

    with lent(model, protocol.branch):
        standing = shard.together(count)
    standing = shard.reduce(standing, dist.ReduceOp.SUM)
    return [CurvePoint(num_steps=k, correct=int(c), total=len(ids)) for k, c in zip(checkpoints, standing, strict=True)]


def _standing(
    forward,
    attack: PGD,
    source: Source,
    protocol: Protocol,
    checkpoints: tuple[int, ...],
    ids: np.ndarray,
    device: torch.device,
) -> torch.Tensor:
    """Return (T,) counts of samples that are right after each number of steps."""
    images, labels = source.read(ids, epoch=0, train=False, seed=0)
    x, y = images.to(device).float().div_(255), labels.to(device)
    sample_ids = torch.from_numpy(ids).to(device)
    if protocol.scope == "clean_correct":
        with torch.no_grad():
            right = forward(x).argmax(1) == y
        x, y, sample_ids = x[right], y[right], sample_ids[right]
    if not len(y):
        return torch.zeros(len(checkpoints), dtype=torch.int64)
    result = attack.perturb_with_info(
        forward, x, y, sample_ids=sample_ids, epoch=EVALUATION_EPOCH, seed=protocol.seed, checkpoints=checkpoints
    )
    assert result.trajectory is not None
    return result.trajectory.correct.sum(1).cpu()
