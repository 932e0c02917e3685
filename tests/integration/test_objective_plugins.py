"""An objective of a user's, one file, is right everywhere at once: schema, plan, report, two workers, resumption.

And what the interface has room for holds: batches used several times, other networks, changed weights, gradients.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from distributed_at.attacks import PGD
from distributed_at.batch import Batch
from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.engine.parallel import TrainingEngine
from distributed_at.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from distributed_at.objectives import Needs
from distributed_at.objectives.pgd_at import PgdAt
from distributed_at.observe.record import load_run
from distributed_at.observe.report.page import _facts
from distributed_at.planning import Plan, make_plan
from distributed_at.recipes import load_recipe
from tests.conformance.kit import Recorder, agrees, batch_of, build
from tests.conformance.product import REAL
from tests.conformance.requirements import counted, missing
from tests.distributed.launch import run_ranks
from tests.plugins import registered
from tests.plugins.mart import Mart, mart_loss
from tests.plugins.rooms import Free, Halved, Taught
from tests.training_kit import state_digest, train, training_rows

STOP_AT = 5  # of 9 steps, or of 18: the middle of an epoch, and of a batch that is used twice
WORDS = {
    "mart": ["objective.name=own_mart"],
    "free": ["objective.name=free", "attack.eps_warmup_epochs=1"],
    "taught": ["objective.name=taught"],
    "halved": ["objective.name=halved", "parallel.zero_stage=0"],
}


@pytest.fixture(autouse=True)
def plugins():
    with registered(Mart, Free, Taught, Halved):
        yield


def plan(*words: str) -> Plan:
    return make_plan(load_recipe("digits/adversarial", words).config)


def test_plan_and_schema_know_the_plugin_by_what_it_declares() -> None:
    mart, trades, pgd_at = (plan(f"objective.name={name}") for name in ("own_mart", "trades", "pgd_at"))
    assert (mart.train_units, pgd_at.train_units) == (6, 3)
    assert mart.memory.activations == trades.memory.activations == 2 * pgd_at.memory.activations
    assert plan("objective.name=own_mart", "model.norm=mbn").train_units == 6
    for words, said in (
        (["objective.name=own_mrat"], "Did you mean 'own_mart'?"),
        (["objective={name: own_mart, bta: 1}"], "Did you mean 'objective.beta'? Allowed: beta, name"),
        (["objective.name=own_mart", "objective.beta=-1"], "objective.beta: must be at least 0, got -1"),
        (["objective.name=own_mart", "attack=null"], "objective 'own_mart' needs attack"),
        (["objective.name=own_mart", "attack.loss=kl"], "belongs to objectives that train on it (pgd_at, trades, mart"),
        (["objective.name=own_mart", "train.bn_only=adv"], "'own_mart' trains on clean and adv images: use pgd_at"),
    ):
        with pytest.raises(ConfigError) as caught:
            plan(*words)
        assert said in str(caught.value)


def test_plugin_is_told_what_it_lacks_and_nothing_else() -> None:
    lacks = missing("own_mart", Mart, None, home="tests/mart.py")
    assert len(lacks) == 2
    assert "no conformance check" in lacks[0]
    assert "no planted fault in mart.py" in lacks[1]
    assert counted(Mart, {}, shared_statistics=True) == Mart.passes(Mart.Config())


def test_mart_is_its_papers_loss() -> None:
    (batch, adv), recorder = batch_of(), Recorder()
    loss = build(REAL, Mart.Config(beta=5.0)).loss(recorder, batch, adv).loss
    p, q = recorder.model(batch.images).softmax(1), recorder.model(adv).softmax(1)
    expected = torch.zeros((), dtype=torch.float64)
    for i, y in enumerate(batch.labels.tolist()):
        wrong = max(float(q[i, k].detach()) for k in range(q.shape[1]) if k != y)
        kl = F.kl_div(q[i].log(), p[i], reduction="sum")
        expected = expected - q[i, y].log() - torch.log(torch.tensor(1.0001 - wrong)) + 5.0 * kl * (1 - p[i, y])
    assert torch.allclose(loss, expected / len(batch), rtol=1e-6)
    assert agrees(mart_loss(recorder.model(batch.images), recorder.model(adv), batch.labels, 5.0), loss)


def work(folder: str) -> None:
    """Train MART undisturbed, and stopped and resumed."""
    with registered(Mart):
        assert train(Path(folder) / "whole", WORDS["mart"]) == EXIT_OK
        assert train(Path(folder) / "parts", WORDS["mart"], stop_at=STOP_AT) == EXIT_REQUEUE
        assert train(Path(folder) / "parts", WORDS["mart"]) == EXIT_OK


def test_plugin_trains_on_two_workers_resumes_bitwise_and_is_reported_by_its_title(tmp_path: Path) -> None:
    run_ranks(work, 2, str(tmp_path))
    assert state_digest(tmp_path / "parts") == state_digest(tmp_path / "whole")
    assert training_rows(tmp_path / "parts") == training_rows(tmp_path / "whole")
    assert ("Objective", "MART") in _facts(load_run(tmp_path / "whole"))


def in_parts(name: str, folder: Path) -> None:
    assert train(folder / "whole", WORDS[name]) == EXIT_OK
    assert train(folder / "parts", WORDS[name], stop_at=STOP_AT) == EXIT_REQUEUE
    assert train(folder / "parts", WORDS[name]) == EXIT_OK
    assert training_rows(folder / "parts") == training_rows(folder / "whole")
    assert state_digest(folder / "parts") == state_digest(folder / "whole")


@pytest.mark.parametrize("name", ["free", "taught", "halved"])
def test_what_there_is_room_for_is_resumed_bitwise(name: str, tmp_path: Path) -> None:
    in_parts(name, tmp_path)


def test_a_network_that_nobody_saves_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_at.engine.state.whole_networks", lambda networks: {})
    with pytest.raises(AssertionError):
        in_parts("taught", tmp_path)


def test_gradients_changed_between_backward_and_step_are_those_of_the_step(tmp_path: Path) -> None:
    plain = ["parallel.zero_stage=0", "optimizer.weight_decay=0", "train.micro_batch_size=12"]
    train(tmp_path / "halved", [*plain, "objective.name=halved", "optimizer.lr=0.25"])
    train(tmp_path / "slower", [*plain, "optimizer.lr=0.125"])
    assert [row["loss"] for row in training_rows(tmp_path / "halved")] == [
        row["loss"] for row in training_rows(tmp_path / "slower")
    ]
    with pytest.raises(ConfigError, match=r"whole until then at parallel.zero_stage 0 alone, got 1"):
        load_recipe("digits/adversarial", ["objective.name=halved"])


def test_repeated_batches_are_steps_of_their_own_in_the_plan() -> None:
    once, twice = plan(), plan("objective.name=free")
    assert (twice.steps_per_epoch, twice.num_steps) == (2 * once.steps_per_epoch, 2 * once.num_steps)
    assert twice.images == 2 * once.images
    assert (twice.attack_units, twice.train_units) == (0, 3)


def test_other_networks_count_in_memory_and_checkpoints() -> None:
    alone, taught = plan(), plan("objective.name=taught")
    network = 4 * (alone.statistics.parameters + alone.statistics.buffers)
    assert taught.memory.states - alone.memory.states == 2 * network
    assert taught.checkpoint_bytes - alone.checkpoint_bytes == 2 * network


class Watching(Taught):
    """Notes, before each attack, how far the view of the companion is from the companion, and its weights' change."""

    found: ClassVar[list[tuple[float, float]]] = []

    def prepare(self, batch: Batch) -> Batch:
        seen = self.views["companion"](batch.images) - self.companion(batch.images)
        changed = self.companion(batch.images) - self.teacher(batch.images)
        self.found.append((seen.abs().max().item(), changed.abs().max().item()))
        return super().prepare(batch)


def test_views_of_other_networks_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_at.engine.builder.build_objective", Watching)
    Watching.found.clear()
    train(tmp_path, ["objective.name=taught"])
    assert len(Watching.found) == 9
    assert max(stale for stale, _ in Watching.found) < 1e-5
    assert Watching.found[0][1] == 0
    assert Watching.found[-1][1] > 0.01


def test_statistics_of_other_networks_are_saved(tmp_path: Path) -> None:
    train(tmp_path, ["objective.name=taught"], stop_at=1)
    saved = [name for name in read_checkpoint(tmp_path)[0] if name.startswith("objective.network.teacher.")]
    own = [name for name in read_checkpoint(tmp_path)[0] if name.startswith(("model.", "buffer."))]
    assert len(saved) == len(own)
    assert any("running_mean" in name for name in saved)


def test_own_images_of_an_objective_keep_to_the_ball_of_the_recipe(tmp_path: Path) -> None:
    train(tmp_path, ["objective.name=free"], stop_at=4)
    delta = read_checkpoint(tmp_path)[0]["objective.delta"]
    eps = load_recipe("digits/adversarial").config.attack.eps / 255
    assert delta.shape == (24, 3, 8, 8)
    assert delta.abs().max().item() == pytest.approx(eps)


def test_every_use_of_a_batch_begins_from_starts_and_masks_of_its_own(tmp_path: Path) -> None:
    class Twice(PgdAt):
        """Adversarial training on each batch twice (Shafahi et al. 2019 show it m times)."""

        class Config(PgdAt.Config):
            """PGD-AT, each batch twice."""

            name: str = "twice"

        @classmethod
        def needs(cls, config: Config) -> Needs:
            return Needs(repeats=2)

    draws: list[tuple[int, int]] = []
    perturb = PGD.perturb

    def spied(self: PGD, *images: torch.Tensor, **options: Any) -> torch.Tensor:
        draws.append((int(options["sample_ids"][0]), self.first_draw))
        return perturb(self, *images, **options)

    with registered(Twice), mock.patch.object(PGD, "perturb", spied):
        train(tmp_path / "run", ["objective.name=twice", "attack.restarts=3", "train.micro_batch_size=null"])
    assert [first for _, first in draws] == [0, 3] * (len(draws) // 2)
    assert [ids for ids, _ in draws[::2]] == [ids for ids, _ in draws[1::2]]
    engine, batch = TrainingEngine.__new__(TrainingEngine), batch_of()[0]
    numbers = []
    for repeat in range(3):
        engine.begin_batch(replace(batch, repeat=repeat), 1)
        numbers.append(engine._draw.forward)
    assert numbers == [0, 64, 128]


def test_soft_labels_reach_attack_and_loss(tmp_path: Path) -> None:
    """What ``prepare`` gives a batch: an attack whose loss takes soft labels climbs them, another goes by the labels."""
    given: list[torch.Tensor | None] = []
    perturb = PGD.perturb

    def spied(self: PGD, *images: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append(options["soft_labels"])
        return perturb(self, *images, **options)

    with mock.patch.object(PGD, "perturb", spied):
        train(tmp_path / "ce", WORDS["taught"])
        soft = [labels for labels in given if labels is not None]
        assert len(soft) == len(given) > 0
        assert all(torch.allclose(labels.sum(dim=1), torch.ones(len(labels))) for labels in soft)
        given.clear()
        train(tmp_path / "margin", [*WORDS["taught"], "attack.loss=margin"])
        assert given
        assert all(labels is None for labels in given)
