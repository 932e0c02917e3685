"""Networks that answer nonsense, nothing, or another thing each time are not called robust, and the run says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distributed_at.attacks import ATTACK_LOSSES, PGD, Threat
from distributed_at.catalogue.attacks import ATTACK_TARGETS
from distributed_at.config.evaluation import evaluation_entry
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.engine.runs.evaluate_run import evaluate_run
from distributed_at.errors import ConfigError, DataError
from distributed_at.evaluation import Subject, evaluate, examine, judge
from tests.integration.training import tiny, train

N, K = 40, 4


class Images:
    """A split of grey levels whose labels are given."""

    num_classes, split, name = K, "test", "made"

    def __init__(self, labels: np.ndarray) -> None:
        self.sample_ids = np.arange(len(labels))
        self._labels = torch.from_numpy(labels)
        self._images = torch.randint(0, 256, (len(labels), 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()

    def read(self, ids: np.ndarray, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._images[torch.from_numpy(ids)], self._labels[torch.from_numpy(ids)]


class OffTheGrid(nn.Module):
    """Answers class 0, and NaN as soon as a pixel leaves the grid of 255ths."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([x.mean((1, 2, 3)) + 1, *[x[:, c].mean((1, 2)) * 0 for c in range(3)]], dim=1) * self.scale
        off = ((x * 255 - (x * 255).round()).abs() > 1e-3).flatten(1).any(dim=1)
        return torch.where(off[:, None], torch.nan, logits)


PGD20 = {"eps": 8, "num_steps": 4, "step_size": 2.5}


def pgd(**fields: Any) -> Any:
    return evaluation_entry(kind="pgd", attack={**PGD20, **fields})


def test_logits_that_are_not_finite_are_wrong_in_every_kind_and_said(tmp_path: Path) -> None:
    source, subject = Images(np.zeros(N, dtype=np.int64)), Subject(network=OffTheGrid())
    results = [
        evaluate(subject, source, entry)
        for entry in (
            pgd(),
            pgd(start="zero", loss="margin"),
            pgd(target="random_other"),
            evaluation_entry(kind="autoattack", version="fast", attack={"eps": 8, "num_steps": 1, "step_size": 1}),
        )
    ]
    assert evaluate(subject, source, evaluation_entry(kind="clean")).correct == N
    assert [result.correct for result in results[:3]] == [0, 0, 0]
    assert all((result.rows.adv_prediction[~result.rows.correct_adv] == -1).all() for result in results[:3])
    (verdict, *_) = [v for v in judge(results) if v.code == "nonfinite_logits"]
    assert f"the logits of {N} images are not finite, which counts as wrong (sample ids 0, 1, 2" in verdict.message
    assert verdict.numbers == {"images": float(N)}


def test_an_attack_s_own_judgement_and_the_live_accuracies_count_them_as_wrong() -> None:
    from distributed_at.engine.progress import Meters
    from distributed_at.objectives import Terms

    x, y = torch.rand(6, 3, 4, 4), torch.zeros(6, dtype=torch.int64)
    result = PGD(threat=Threat("linf", 8 / 255), num_steps=2, step_size=0.01).perturb_with_info(
        OffTheGrid(), x, y, checkpoints=(0, 1)
    )
    assert not result.correct.any()
    assert result.trajectory is not None
    assert not result.trajectory.correct.any()
    meters = Meters(torch.device("cpu"))
    logits = torch.tensor([[math.nan, 1.0], [1.0, 0.0], [math.inf, 0.0]])
    meters.add(Terms(torch.tensor(1.0), {}, {"adv": logits}), torch.zeros(3, dtype=torch.int64))
    assert meters.collect(lambda t: t)[0]["adv_accuracy"] == pytest.approx(1 / 3)


def test_a_clean_pass_without_finite_logits_is_an_error() -> None:
    class Broken(OffTheGrid):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + 0.001)

    with pytest.raises(DataError, match=r"logits of 40 clean images are not finite \(sample ids 0, 1, 2"):
        evaluate(Subject(network=Broken()), Images(np.zeros(N, dtype=np.int64)), evaluation_entry(kind="clean"))


@pytest.mark.parametrize("value", [-100, -1, K, 10**6])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("loss", [name for name in ATTACK_LOSSES.builtin if name != "kl"])
def test_labels_outside_of_the_classes_are_named_before_the_loop(value: int, known: bool, loss: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, K))
    x, y = torch.rand(3, 3, 4, 4), torch.tensor([1, value, 2])
    below = "below 0" if value < 0 else f"outside 0 to {K - 1}"
    outside = f"outside 0 to {K - 1}" if known else below
    for target in ATTACK_TARGETS.builtin:
        if ATTACK_TARGETS[target].at_random and not known:
            continue
        attack = PGD(
            threat=Threat("linf", 0.1), num_steps=1, step_size=0.1, loss=loss, target=target,
            num_classes=K if known else None,
        )  # fmt: skip
        with pytest.raises(DataError, match=rf"label {value} of image 1 of the batch is {outside}"):
            attack.perturb(model, x, y)
    with pytest.raises(DataError, match=rf"target {value} of image 1 of the batch is {below}"):
        PGD(threat=Threat("linf", 0.1), num_steps=1, step_size=0.1, loss=loss).perturb(
            model, x, torch.tensor([1, 1, 2]), targets=y
        )


def test_labels_of_a_split_are_named_in_an_evaluation() -> None:
    labels = np.zeros(N, dtype=np.int64)
    labels[7] = -100
    with pytest.raises(DataError, match="label -100 of image 7 of the batch is outside 0 to 3"):
        evaluate(Subject(network=OffTheGrid()), Images(labels), pgd())


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda z: (z, z), "returns a tuple, not a tensor: return its logits alone"),
        (lambda z: {"logits": z}, "returns a dict, not a tensor: return its entry 'logits' alone"),
        (lambda z: z[:, :, None, None], r"returns shape \(2, 4, 1, 1\) for images .* pool and flatten"),
        (lambda z: z.argmax(1), r"returns torch.int64 of shape \(2,\): return float logits"),
        (lambda z: z[:, :3], "returns 3 logits an image, but the data have 4 classes"),
        (lambda z: torch.cat([z, z], 1), "returns 8 logits an image, but the data have 4 classes"),
    ],
)
def test_answers_of_another_form_are_told_with_the_cure(answer: Any, told: str) -> None:
    class Other(OffTheGrid):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return answer(super().forward(x))

    source = Images(np.zeros(2, dtype=np.int64))
    with pytest.raises(DataError, match=told):
        evaluate(Subject(network=Other()), source, evaluation_entry(kind="clean"))


def test_what_a_call_overrides_is_checked_like_what_the_ball_was_made_with() -> None:
    attack = PGD(threat=Threat("linf", 0.1), num_steps=1, step_size=0.1)
    x, y = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    for eps, told in ((-0.1, "at least 0"), (math.nan, "at least 0"), (8, "wider than the pixel box")):
        with pytest.raises(ConfigError, match=told):
            attack.perturb(OffTheGrid(), x, y, eps=eps)


def test_a_network_that_draws_at_random_is_said() -> None:
    class Noisy(OffTheGrid):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    source = Images(np.zeros(N, dtype=np.int64))
    assert "randomised" not in [v.code for v in examine(OffTheGrid(), source)]
    (verdict,) = [v for v in examine(Noisy(), source) if v.code == "randomised"]
    assert "AutoAttack's version 'rand'" in verdict.message


def scaled(run: Path, factor: float) -> None:
    """Multiply the last layer of a run's newest checkpoint, which hides the gradients of its cross-entropy."""
    newest = max((run / "checkpoints").glob("step_*"))
    tensors, manifest = read_checkpoint(newest)
    for name in tensors:
        if name.startswith(("model.fc.", "ema.fc.")):
            tensors[name] = tensors[name] * factor
    manager = CheckpointManager(run / "checkpoints")
    manager.save(manifest.step + 1, tensors, {**manifest.metadata, "step": manifest.step + 1})
    manager.wait()


def test_a_run_whose_gradients_vanish_is_suspected_wherever_its_number_stands(tmp_path: Path) -> None:
    final = "[{kind: clean}, {kind: pgd, attack: {eps: 16, num_steps: 4, step_size: 6}}]"
    run = train(tiny(f"evaluation.final={final}", "data.limit_test=48", "train.epochs=4"), tmp_path / "run")
    assert "vanishing_gradients" not in [v.code for v in evaluate_run(run).verdicts]
    scaled(run, 1e6)
    found = evaluate_run(run)
    clean, attacked = (result.correct for result in found.results)
    assert clean == attacked  # the attack stands still
    codes = [verdict.code for verdict in found.verdicts]
    assert "vanishing_gradients" in codes
    assert "attack_breaks_nothing" in codes
    kept = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert "vanishing_gradients" in [v["code"] for v in [e for e in kept if e["event"] == "verdict"][-1]["verdicts"]]


def test_held_out_images_are_looked_at_while_a_run_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed_at.evaluation.verdicts import Verdict

    monkeypatch.setattr(
        "distributed_at.evaluation.examination.randomised", lambda *_: Verdict("randomised", "it draws", {})
    )
    words = ["data.validation_size=16", "evaluation.validation=[{kind: clean}]", "evaluation.every_epochs=1"]
    run = train(tiny(*words), tmp_path / "run")
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = [row["message"] for row in rows if row["event"] == "warning" and row["code"] == "randomised"]
    assert told == ["held-out images: it draws"]


def test_attacks_of_one_ball_that_disagree_are_said() -> None:
    """Margins see a network whose cross-entropy has no gradient; both attacks make the same number of steps."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, K))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e6 * self.net(x)

    network = Steep()
    source = Images(np.zeros(N, dtype=np.int64))
    with torch.no_grad():
        labels = network(source._images / 255).argmax(dim=1)
    source = Images(labels.numpy())
    results = [evaluate(Subject(network=network), source, pgd(loss=loss)) for loss in ("ce", "margin")]
    assert results[0].correct > results[1].correct
    (verdict,) = [v for v in judge(results) if v.code == "attacks_disagree"]
    assert verdict.message.startswith("PGD-4 linf 8/255 leaves")
