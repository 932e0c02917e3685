"""The precision certificate: same samples and starts, judged in float32, and a weak attack does not pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distributed_at.bench import precision
from distributed_at.bench.certificate import check_certificate
from distributed_at.config import AttackConfig, ModelConfig
from distributed_at.models import build_model
from distributed_at.plan_table import plan_table
from distributed_at.planning import make_plan
from distributed_at.recipes import load_recipe

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
    from distributed_at.engine.twin.twin import Twin

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


def recipe(*overrides: str):
    return load_recipe("digits/adversarial.yaml", ["attack.dtype=bf16", *overrides]).config


@pytest.fixture
def written(tmp_path: Path):
    """Return a function that writes a certificate of the digits recipe with changes, and checks a recipe against it."""
    config = recipe()
    row = precision.Row(
        precision="bf16",
        robust_accuracy=precision.Estimate(value=0.5, low=0.4, high=0.6),
        loss=precision.Estimate(value=1.0, low=0.9, high=1.1),
        accuracy_above_fp32=precision.Estimate(value=0.001, low=-0.002, high=0.004),
        verdict="passes",
    )

    def check(config=config, *, verdict: str = "passes", text: str | None = None, **about: object) -> tuple[str, str]:
        fields = {
            "run": "earlier", "model": recipe().model.model_dump(mode="json"), "dataset": "digits", "num_samples": 900,
            "attack": recipe("attack.dtype=fp32").attack.model_dump(mode="json"),
        }  # fmt: skip
        rows = [replace(row, verdict=verdict)]
        document = precision.certificate(rows, skipped={"fp16": "no such unit"}, about={**fields, **about})
        path = tmp_path / "certificate.json"
        path.write_text(json.dumps(document) if text is None else text)
        return check_certificate(path, config, config.attack)

    return check


def test_certificate_that_passed_is_said_to(written) -> None:
    code, message = written()
    assert code == "certificate_passed"
    assert "on 900 images of run earlier the bf16 attack leaves +0.10 points [-0.20, +0.40]" in message


@pytest.mark.parametrize(
    ("overrides", "changes", "code", "words"),
    [
        ([], {"verdict": "weaker"}, "certificate_failed", "flatters the model"),
        ([], {"verdict": "undecided"}, "certificate_undecided", "too few images"),
        (["attack.dtype=fp16"], {}, "certificate_without_this_precision", "says nothing of fp16: no such unit"),
        (["model.base_width=32"], {}, "certificate_of_another_network", "base_width is 16, not 32"),
        ([], {"dataset": "cifar10"}, "certificate_of_another_network", "dataset is 'cifar10', not 'digits'"),
        (["attack.num_steps=9"], {}, "certificate_of_another_attack", "num_steps is 7, not 9"),
        (["attack.eps=40"], {}, "certificate_of_another_attack", "eps is 51.0, not 40.0"),
        ([], {"text": "{"}, "certificate_unreadable", "cannot be read"),
        ([], {"text": "[1]"}, "certificate_unreadable", "is no attack precision certificate"),
        ([], {"format": 1}, "certificate_unreadable", "of format 2"),
    ],
)
def test_certificate_that_does_not_cover_the_recipe_is_warned_of(written, overrides, changes, code, words) -> None:
    found, message = written(recipe(*overrides), **changes)
    assert found == code
    assert words in message


def test_plan_names_the_field_and_tells_a_note_from_a_warning(written, tmp_path: Path) -> None:
    written()
    for name, level, code in (("certificate.json", "note", "passed"), ("absent.json", "warning", "missing")):
        found = make_plan(recipe(f"attack.precision_certificate={tmp_path / name}"))
        (told,) = [w for w in found.warnings if w.code.startswith("certificate_")]
        assert (told.level, told.code) == (level, f"certificate_{code}")
        assert told.message.startswith("attack.precision_certificate: ")
        assert any(f"{level} [certificate_{code}]" in str(part) for part in plan_table(found).renderables)
