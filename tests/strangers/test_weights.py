"""Which weights were measured: best, last, live and averaged all differ here, and each door must open the right ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from distributed_at.data.sources import open_split
from distributed_at.engine.checkpoint.tools import checkpoint_convert, read_weights
from distributed_at.engine.runs.initial_weights import read_initial_weights
from distributed_at.observe.events import read_events
from distributed_at.recipes import load_recipe
from tests.strangers.checking import assert_inside
from tests.strangers.finished import answers, fingerprint, network_with, protocol_of, say, weights_in
from tests.training_kit import train

# The attack's radius grows until nothing can be learned any more, so that the best epoch lies in the middle.
PROTOCOLS = (
    "[{kind: clean}, {kind: pgd, name: easy, attack: {eps: 3, num_steps: 2, step_size: 3}}, "
    "{kind: pgd, name: pgd2, attack: {eps: 12, num_steps: 2, step_size: 8}}]"
)
RUN = (
    "data.limit_train=250",
    "data.validation_size=50",
    "data.limit_test=40",
    "model.base_width=8",
    "attack={eps: 200, num_steps: 1, step_size: 200, eps_warmup_epochs: 7}",
    "optimizer={name: adam, lr: 0.01}",
    "train.epochs=7",
    "train.batch_size=25",
    "train.bn_group_size=null",
    "train.ema={decay: 0.6}",
    "train.select=best_validation",
    "checkpoint={every_epochs: 1, keep: 10, asynchronous: false}",
    "evaluation.every_epochs=1",
    f"evaluation.validation={PROTOCOLS}",
    f"evaluation.final={PROTOCOLS}",
)
STEPS = range(10, 71, 10)  # the ends of epochs
STOP = 55


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its best epoch and went on."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, RUN, stop_at=STOP)
    train(folder, RUN)
    return folder


def rounds(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Return step -> protocol -> validation event."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in read_events(folder):
        if row["event"] == "evaluation" and row["split"] == "validation":
            found.setdefault(row["step"], {})[row["protocol"]["name"]] = row
    return found


@pytest.fixture(scope="module")
def best(run: Path) -> int:
    """The step with the most held-out images right under the last protocol, the earliest of equals, by counting."""
    counts = {step: row["pgd2"]["correct"] for step, row in rounds(run).items()}
    assert list(counts) == list(STEPS)
    return min(step for step in counts if counts[step] == max(counts.values()))


@pytest.fixture(scope="module")
def expected(run: Path, best: int) -> dict[str, str]:
    """The hashes of what could have been measured; all differ, or nothing here would show anything."""
    found = {
        f"{name} {kind}": fingerprint(weights_in(run, step, averaged=kind == "averaged"))
        for name, step in (("best", best), ("last", STEPS[-1]), ("stopped", STOP))
        for kind in ("live", "averaged")
    }
    assert len(set(found.values())) == len(found)
    assert best < STOP < STEPS[-1]
    return found


@pytest.fixture(scope="module")
def looked_at(run: Path, expected: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """What ``eval --checkpoint`` says of each choice on the test set: the protocols by which it measured."""
    found = {}
    for choice in ("last", "best", "auto", f"step_{STOP:08d}"):
        rows = say("eval", run, "--checkpoint", choice)["rows"]
        rows = [row for row in rows if row["split"] == "test" and row["metric"] != "worst_case_accuracy"]
        found[choice] = [protocol_of(run, row) for row in rows]
    return found


def test_best_is_the_earliest_epoch_with_the_most_images_right_under_the_last_protocol(run: Path, best: int) -> None:
    marked = json.loads((run / "checkpoints" / "best.json").read_text())
    assert marked["step"] == best
    event = rounds(run)[best]["pgd2"]
    assert marked["value"] == event["correct"] / event["total"] == event["accuracy"]
    assert event["total"] == 50


def test_every_validation_measured_the_averaged_weights_with_the_live_statistics(run: Path, best: int) -> None:
    config = load_recipe(str(run / "recipe.yaml"), []).config
    source = open_split(config.data, "validation", seed=config.seed)
    images, labels = source.read(source.sample_ids, epoch=0, train=False, seed=0)
    differ = 0
    for step, row in rounds(run).items():
        right = {}
        for averaged in (True, False):
            network = network_with(run, weights_in(run, step, averaged=averaged))
            right[averaged] = int((answers(network, images.float() / 255) == labels.numpy()).sum())
        assert row["clean"]["correct"] == right[True], f"step {step}"
        differ += right[True] != right[False]
    assert differ > 1
    # the protocol of an event says the weights by its hash alone: here the same one is written out
    for step in (STEPS[0], best, STEPS[-1]):
        again = say("eval", run, "--split", "validation", "--checkpoint", f"step_{step:08d}")["rows"]
        hashes = {row["protocol"]["hash"]: row["correct"] for row in rounds(run)[step].values()}
        measured = [row for row in again if row["hash"] in hashes]
        assert len(measured) == 3
        for row in measured:
            assert protocol_of(run, row)["weights"] == fingerprint(weights_in(run, step, averaged=True))
            assert row["correct"] == hashes[row["hash"]]


def test_eval_measures_the_checkpoint_that_it_was_asked_for(expected: dict[str, str], looked_at) -> None:
    wanted = {"last": "last", "best": "best", "auto": "best", f"step_{STOP:08d}": "stopped"}
    for choice, protocols in looked_at.items():
        assert [p["weights"] for p in protocols] == [expected[f"{wanted[choice]} averaged"]] * 3, choice


def test_eval_of_a_run_that_selects_the_last_takes_the_last(
    run: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluations"))
    recipe = copy / "recipe.yaml"
    text = recipe.read_text()
    assert text.count("select: best_validation") == 1
    recipe.write_text(text.replace("select: best_validation", "select: last"))
    # the events still name what was measured before, of which the copy has no rows
    rows = say("eval", copy, "--only", "clean")["rows"]
    (row,) = (row for row in rows if (row["protocol"], row["split"]) == ("clean", "test"))
    assert protocol_of(copy, row)["weights"] == expected["last averaged"]
    initial = read_initial_weights(str(copy))
    assert fingerprint(initial) == expected["last averaged"]


def test_report_shows_the_rows_of_the_newest_evaluation(run: Path, looked_at, tmp_path: Path) -> None:
    rows = say("eval", run, "--checkpoint", "last")["rows"]
    shown = say("report", run, "--output", tmp_path / "report.html")["rows"]
    newest = {row["hash"]: row["correct"] for row in rows}
    assert {row["hash"]: row["correct"] for row in shown if row["split"] == "test"}.items() <= newest.items()


def test_examples_are_of_the_network_that_was_evaluated_and_lie_in_ball_and_box(
    run: Path, best: int, looked_at
) -> None:
    config = load_recipe(str(run / "recipe.yaml"), []).config
    source = open_split(config.data, "test", seed=config.seed)
    for choice, step in (("last", STEPS[-1]), ("best", best)):
        say("eval", run, "--checkpoint", choice, "--only", "pgd2")
        held = np.load(run / "examples.npz")
        network = network_with(run, weights_in(run, step, averaged=True))
        clean, adv = (held[name].transpose(0, 3, 1, 2) for name in ("clean", "adv"))
        x = (torch.from_numpy(clean).float() / 255).numpy()
        positions = np.linspace(0, 39, 12).astype(int)
        images, labels = source.read(source.sample_ids[positions], epoch=0, train=False, seed=0)
        np.testing.assert_array_equal(clean, images.numpy())
        np.testing.assert_array_equal(held["labels"], labels.numpy())
        np.testing.assert_array_equal(held["clean_predictions"], answers(network, torch.from_numpy(x)))
        np.testing.assert_array_equal(held["adv_predictions"], answers(network, torch.from_numpy(adv).contiguous()))
        assert float(held["eps"]) == 12 / 255
        assert assert_inside(adv, x, "linf", 12.0) > 0.9999


def test_certificate_of_precision_is_of_the_network_that_eval_measures(
    run: Path, best: int, expected: dict[str, str], tmp_path: Path
) -> None:
    for choice, step, name in (("auto", best, "best"), ("last", STEPS[-1], "last")):
        told = say(
            "bench", "precision", run, "--checkpoint", choice, "--num-samples", 4, "--output", tmp_path / "c.json"
        )
        assert told["weights"] == expected[f"{name} averaged"]
        assert told["checkpoint"] == f"step_{step:08d}"


def test_figures_speak_of_the_network_that_was_trained(run: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Figure 6 sets batches beside running statistics, and those are of the live weights."""
    from distributed_at.evaluation import layer_statistics

    seen = []

    def noting(network: torch.nn.Module, images: torch.Tensor, **arguments: Any) -> Any:
        seen.append(fingerprint(dict(network.state_dict())))
        return original(network, images, **arguments)

    original = layer_statistics.batch_statistics
    with mock.patch.object(layer_statistics, "batch_statistics", noting):
        say("figures", run, "--output", tmp_path, "--batches", 1, "--format", "svg")
    assert seen == [expected["last live"]]


def test_weights_that_leave_a_run_are_those_that_were_asked_for(
    run: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    assert fingerprint(read_initial_weights(str(run))) == expected["best averaged"]
    for average, kind in ((True, "averaged"), (False, "live")):
        written = checkpoint_convert(run, tmp_path / f"{kind}.safetensors", average=average)
        assert fingerprint(read_weights(written)) == expected[f"last {kind}"]


def test_averaged_statistics_are_measured_where_the_recipe_averages_them(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, [*RUN, "train.epochs=2", "train.ema={decay: 0.6, buffers: average}", "train.select=last"])
    state = weights_in(folder, 20, averaged=True, buffers_averaged=True)
    others = [weights_in(folder, 20, averaged=averaged) for averaged in (True, False)]
    assert fingerprint(state) not in [fingerprint(other) for other in others]
    rows = say("eval", folder, "--split", "validation")["rows"]
    held_out = {row["protocol"]["hash"]: row["correct"] for row in rounds(folder)[20].values()}
    assert {
        row["hash"]: row["correct"]
        for row in rows
        if row["split"] == "validation" and row["metric"] != "worst_case_accuracy"
    } == held_out
    assert {protocol_of(folder, row)["weights"] for row in rows if row["hash"] in held_out} == {fingerprint(state)}
