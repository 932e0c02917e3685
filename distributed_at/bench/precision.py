"""The precision certificate: what an attack in TF32, bfloat16 or float16 is worth beside the same attack in float32.

Same samples, same starts, same targets; whatever crafted an image, the float32 network judges it. It says nothing of
training in 16 bits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from distributed_at.attacks import PGD
from distributed_at.attacks.iteration import input_gradient
from distributed_at.attacks.losses import Goal
from distributed_at.bench.certificate import FORMAT, KIND
from distributed_at.config import AttackConfig
from distributed_at.engine.twin.twin import Twin
from distributed_at.float32 import tf32
from distributed_at.logits import predicted_classes
from distributed_at.rng import EVALUATION_EPOCH
from distributed_at.statistics import mcnemar, wilson

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# An attack passes where it leaves at most this much more robust accuracy than float32's, with 95 % confidence.
TOLERANCE = 0.01
Verdict = Literal["passes", "weaker", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over samples with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One precision's attack.

    Attributes:
        precision: of the attack; the judge is always float32.
        robust_accuracy: share of samples that the float32 network still classifies rightly (Wilson interval).
        loss: mean of the attack's own objective that it reached, by the float32 network.
        accuracy_above_fp32: robust accuracy minus float32's, on the same samples (paired bootstrap).
        loss_below_fp32: share of float32's loss that was missed, (fp32 - this) / |fp32| (paired bootstrap).
        sign_agreement_start, sign_agreement_end: share of pixels at which the gradient's sign equals float32's, at the
            common start and at float32's result.
        weighted_agreement_start: the same, each pixel weighted by the size of its float32 gradient.
        p_value: McNemar's exact test of equal robust accuracy.
        verdict: 'passes' if the interval of ``accuracy_above_fp32`` ends below ``TOLERANCE``, 'weaker' if it begins
            above 0 and does not pass, else 'undecided': take more samples.
    """

    precision: str
    robust_accuracy: Estimate
    loss: Estimate
    accuracy_above_fp32: Estimate | None = None
    loss_below_fp32: Estimate | None = None
    sign_agreement_start: Estimate | None = None
    sign_agreement_end: Estimate | None = None
    weighted_agreement_start: Estimate | None = None
    p_value: float | None = None
    verdict: Verdict | None = None


@dataclass
class _Seen:
    """What one precision's attack left, sample by sample."""

    correct: list[np.ndarray] = field(default_factory=list)
    loss: list[np.ndarray] = field(default_factory=list)
    agreement: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"start": [], "end": [], "weighted": []})


def available_precisions(device: torch.device) -> dict[str, str]:
    """Return precision -> '' where ``device`` has it, else why it has not."""
    reasons = dict.fromkeys(PRECISIONS, "")
    if device.type != "cuda":
        reasons["tf32"] = f"TF32 exists on CUDA devices alone, not on {device.type}"
    elif torch.cuda.get_device_capability(device)[0] < 8:
        reasons["tf32"] = reasons["bf16"] = f"{torch.cuda.get_device_name(device)} has no TF32 and no bfloat16 units"
    return reasons


class PrecisionTest:
    """Attacks batch after batch in each precision, then tells.

    Args:
        network: in float32, on its device; not changed.
        config: the attack to certify; its own dtype is ignored, and BN mode 'train' counts as 'batch'.
        num_classes, seed: of targets and starts.
        precisions: which to compare; 'fp32' always runs.
    """

    def __init__(
        self, network: nn.Module, config: AttackConfig, *, num_classes: int, seed: int, precisions: tuple[str, ...]
    ) -> None:
        self._seed, self._config = seed, config
        bn_mode = "batch" if config.bn_mode == "train" else config.bn_mode
        self._attacks: dict[str, tuple[PGD, Twin]] = {}
        for precision in ("fp32", *(p for p in precisions if p != "fp32")):
            dtype = precision if precision in ("bf16", "fp16") else "fp32"
            attack = PGD.from_config(config.model_copy(update={"dtype": dtype}), num_classes=num_classes)
            self._attacks[precision] = attack, Twin(network, bn_mode=bn_mode, branch=config.branch, dtype=dtype)
        # statistics stand still here, so one look at the clean images is as good as one a step
        once = config.model_copy(update={"reference_forward": "once", "dtype": "fp32"})
        self._attack = PGD.from_config(once, num_classes=num_classes)
        judge = Twin(network, bn_mode="eval", branch=config.branch, fold=False, channels_last=False)
        self._judge = judge
        self._seen = {precision: _Seen() for precision in self._attacks}

    def add(self, x: torch.Tensor, y: torch.Tensor, sample_ids: torch.Tensor) -> None:
        """Attack images (N, 3, H, W) float32 in [0, 1] with labels and ids (N,) int64 in every precision."""
        counters: dict[str, Any] = {"sample_ids": sample_ids, "epoch": EVALUATION_EPOCH, "seed": self._seed}
        groups: dict[str, Any] = {"group_ids": torch.zeros_like(y)} if self._config.start_clean_scope == "group" else {}
        goal = self._goal(x, y, sample_ids)
        points: dict[str, torch.Tensor] = {}
        expected: dict[str, torch.Tensor] = {}
        for precision, (attack, twin) in self._attacks.items():
            seen = self._seen[precision]
            with tf32(precision == "tf32"):
                adv = attack.perturb(twin, x, y, **counters, **groups)
                if not points:
                    ball = attack.threat
                    start = ball.random_start(x, kind=attack.start, std=attack.start_std, clip=True, **counters)
                    points = {"start": start, "end": adv}
                gradients = {name: self._gradient(attack, twin, at, goal) for name, at in points.items()}
            expected = expected or gradients
            for name in points:
                same = (gradients[name].sign() == expected[name].sign()).flatten(1).float()
                seen.agreement[name].append(same.mean(dim=1).cpu().numpy())
                if name == "start":
                    weight = expected[name].abs().flatten(1)
                    share = (same * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
                    seen.agreement["weighted"].append(share.cpu().numpy())
            with tf32(False), torch.no_grad():
                logits = self._judge(adv).float()
                seen.correct.append((predicted_classes(logits) == y).cpu().numpy())
                seen.loss.append(self._attack.objective(logits, goal).cpu().numpy())

    def _goal(self, x: torch.Tensor, y: torch.Tensor, sample_ids: torch.Tensor) -> Goal:
        with tf32(False), torch.no_grad():
            return self._attack.goal(self._judge, x, y, sample_ids=sample_ids, epoch=EVALUATION_EPOCH, seed=self._seed)

    def _gradient(self, attack: PGD, twin: Twin, at: torch.Tensor, goal: Goal) -> torch.Tensor:
        return input_gradient(twin, attack.objective, at, goal, loss_scale=attack.loss_scale)[0]

    def rows(self) -> list[Row]:
        """Return one row a precision, 'fp32' first.

        Raises:
            ValueError: nothing was added.
        """
        if not self._seen["fp32"].correct:
            raise ValueError("no sample was attacked: call add first")
        base = self._seen["fp32"]
        base_correct, base_loss = np.concatenate(base.correct), np.concatenate(base.loss).astype(np.float64)
        rows = []
        for precision, seen in self._seen.items():
            correct, loss = np.concatenate(seen.correct), np.concatenate(seen.loss).astype(np.float64)
            low, high = wilson(int(correct.sum()), len(correct))
            accuracy = Estimate(value=float(correct.mean()), low=low, high=high)
            if precision == "fp32":
                rows.append(Row(precision=precision, robust_accuracy=accuracy, loss=_mean(loss)))
                continue
            above = _mean(correct.astype(np.float64) - base_correct)
            agreement = {name: _mean(np.concatenate(v).astype(np.float64)) for name, v in seen.agreement.items()}
            rows.append(
                Row(
                    precision=precision,
                    robust_accuracy=accuracy,
                    loss=_mean(loss),
                    accuracy_above_fp32=above,
                    loss_below_fp32=_mean((base_loss - loss) / max(abs(float(base_loss.mean())), 1e-12)),
                    sign_agreement_start=agreement["start"],
                    sign_agreement_end=agreement["end"],
                    weighted_agreement_start=agreement["weighted"],
                    p_value=mcnemar(int((correct & ~base_correct).sum()), int((~correct & base_correct).sum())).p_value,
                    verdict=verdict(above),
                )
            )
        return rows


def verdict(above: Estimate) -> Verdict:
    """Judge robust accuracy above float32's; see ``Row.verdict``."""
    if above.high <= TOLERANCE:
        return "passes"
    return "weaker" if above.low > 0 else "undecided"


def _mean(values: np.ndarray, draws: int = 2000) -> Estimate:
    """Return the mean over samples with a percentile-bootstrap interval, the same at each call.

    Where all values are equal the bootstrap has no width; for shares that would claim too much, so an end that rests on
    n equal values moves by 3 / n (the rule of three).
    """
    generator = np.random.default_rng(0)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    if values.min() == values.max() and values.min() in (-1.0, 0.0, 1.0):
        low, high = low - 3.0 / len(values), high + 3.0 / len(values)
    return Estimate(value=float(values.mean()), low=float(low), high=float(high))


def certificate(rows: list[Row], *, skipped: dict[str, str], about: dict[str, Any]) -> dict[str, Any]:
    """Return the certificate as plain data: what was attacked (``about``), the rows, and what could not run and why."""
    return {
        "format": FORMAT,
        "kind": KIND,
        "tolerance": TOLERANCE,
        **about,
        "rows": [asdict(row) for row in rows],
        "skipped": skipped,
    }
