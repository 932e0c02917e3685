"""The precision certificate: same samples and starts, judged in float32, and a weak attack does not pass."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from distributed_at.bench import precision
from distributed_at.config import AttackConfig, ModelConfig
from distributed_at.models import build_model

CLASSES = 4


def network() -> nn.Module:
    settings = {"arch": "resnet", "blocks": (1,), "block": "basic", "stem": "cifar", "base_width": 8}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(ModelConfig.model_validate(settings), num_classes=CLASSES).eval()
        model.fc.bias -= model(torch.rand(64, 3, 8, 8)).mean(dim=0)  # no class wins everywhere
    return model


def certify(precisions: tuple[str, ...] = ("fp32", "bf16", "fp16"), **fields: object) -> list[precision.Row]:
    config = AttackConfig.model_validate({"eps": 8, "num_steps": 3, "step_size": 3, **fields})
    model = network()
    test = precision.PrecisionTest(model, config, num_classes=CLASSES, seed=3, precisions=precisions)
    generator = torch.Generator().manual_seed(0)
    for batch in range(2):
        x = torch.rand((16, 3, 8, 8), generator=generator)
        with torch.no_grad():
            y = model(x).argmax(dim=1)
        test.add(x, y, torch.arange(16) + 16 * batch)
    return test.rows()


@pytest.mark.parametrize("fields", [{}, {"norm": "l2", "eps": 60}, {"target": "random_other"}, {"loss": "margin"}])
def test_sixteen_bits_follow_float32(fields: dict) -> None:
    rows = {row.precision: row for row in certify(**fields)}
    assert list(rows) == ["fp32", "bf16", "fp16"]
    for name, least in (("bf16", 0.9), ("fp16", 0.97)):
        row = rows[name]
        assert row.sign_agreement_start.value > least
        assert row.weighted_agreement_start.value >= row.sign_agreement_start.value
        assert row.sign_agreement_start.low <= row.sign_agreement_start.value <= row.sign_agreement_start.high
        assert abs(row.loss_below_fp32.value) < 0.05
    assert rows["fp32"].verdict is None


def test_certificate_is_a_function_of_the_seed() -> None:
    assert certify() == certify()


def test_weak_attack_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack whose 16-bit gradients vanish stays at its start; its robust accuracy must be seen to be higher."""
    from distributed_at.engine.twin import Twin

    whole = Twin.__call__

    def vanishing(self: Twin, x: torch.Tensor) -> torch.Tensor:
        logits = whole(self, x)
        return logits if self.dtype == "fp32" else logits.detach() + 0.0 * x.sum()

    monkeypatch.setattr(Twin, "__call__", vanishing)
    row = certify(eps=32, step_size=12)[1]
    assert row.accuracy_above_fp32.low > 0
    assert row.verdict == "weaker"
    assert row.p_value < 0.05


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(-0.02, 0.009, "passes"), (0.001, 0.03, "weaker"), (-0.01, 0.03, "undecided")]
)
def test_verdict_follows_the_interval(low: float, high: float, expected: str) -> None:
    assert precision.verdict(precision.Estimate(value=0.0, low=low, high=high)) == expected


def test_few_equal_samples_prove_nothing() -> None:
    estimate = precision._mean(np.zeros(20))
    assert estimate.high >= 0.15
    assert precision.verdict(estimate) == "undecided"


def test_tf32_is_skipped_with_a_reason_on_the_cpu() -> None:
    reasons = precision.available_precisions(torch.device("cpu"))
    assert "CUDA" in reasons["tf32"]
    assert not reasons["bf16"]


def test_certificate_is_json_and_names_what_was_attacked() -> None:
    document = precision.certificate(certify(), skipped={"tf32": "no"}, about={"weights": "abc", "num_samples": 32})
    again = json.loads(json.dumps(document))
    assert again["weights"] == "abc"
    assert [row["precision"] for row in again["rows"]] == ["fp32", "bf16", "fp16"]
