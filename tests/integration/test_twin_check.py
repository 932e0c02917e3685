"""Whole runs under ``DISTRIBUTED_AT_CHECK_TWIN=on``: the attack's network is the live one at every attack, and a stale one ends the run.

Learning rates are large here, so that one step moves every weight by more than a rounding to 16 bits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distributed_at.engine.averaging import WeightAverage
from distributed_at.engine.buffers import BufferMerger
from distributed_at.engine.builder import Parts
from distributed_at.engine.parallel import TrainingEngine
from distributed_at.engine.twin import check as twin_check
from distributed_at.engine.twin import compiled_attack, folding
from distributed_at.engine.twin.check import TwinCheck, TwinMismatchError
from distributed_at.engine.twin.twin import Twin
from distributed_at.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from distributed_at.objectives.pgd_at import PgdAt
from tests.distributed.launch import run_ranks
from tests.plugins import registered
from tests.plugins.rooms import Taught
from tests.training_kit import state_digest, train

STEPS = 9
FOLDED = ["model.arch=resnet"]  # every batch norm stands behind a convolution
CAST = ["attack.dtype=bf16"]
MIXTURE = ["objective.name=mixture", "objective.clean_ratio=0.5", "model.norm=mbn"]
EMA = ["train.ema={decay: 0.9, dynamic: true, buffers: average}"]
JUDGED = ["data.validation_size=30", "evaluation.validation=[{kind: clean}]", "evaluation.every_epochs=0.34"]
EVERYTHING = [*FOLDED, *CAST, *EMA, *JUDGED]

RUNS = {
    "folded_cast_averaged_and_judged": EVERYTHING,
    "folded_mixture_cast_zero_2_accumulation": [
        *FOLDED, *MIXTURE, *CAST, "parallel.zero_stage=2", "train.micro_batch_size=12",
    ],
    "mixture_attacked_on_the_clean_branch": [*FOLDED, *MIXTURE, "attack.branch=clean", "parallel.zero_stage=0"],
    "group_norm_cast_zero_0": ["model.norm=gn", *CAST, "parallel.zero_stage=0"],
    "group_norm": ["model.norm=gn", *EMA],
    "norms_before_their_convolutions_fp16": ["attack.dtype=fp16", *EMA],
    "batch_statistics_cast": ["attack.bn_mode=batch", *CAST],
    "attack_that_moves_statistics": ["attack.bn_mode=train", "train.micro_batch_size=12"],
    "statistics_frozen_on_the_way": [*FOLDED, "train.freeze_bn_from_epoch=1"],
    "incomplete_last_batch_adam": [
        *FOLDED, "train.drop_last=false", "data.limit_train=69", "optimizer.name=adam", "optimizer.lr=0.01",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv(twin_check.VARIABLE, "on")


@contextlib.contextmanager
def compared() -> Iterator[list[int]]:
    """Collect the step of every comparison that passed."""
    steps: list[int] = []
    real = TwinCheck.compare

    def noting(self: TwinCheck, step: int, batch: Any) -> None:
        real(self, step, batch)
        steps.append(step)

    with mock.patch.object(TwinCheck, "compare", noting):
        yield steps


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_attack_meets_the_live_network_at_every_step_of_a_run(words: list[str], tmp_path: Path) -> None:
    with compared() as steps:
        assert train(tmp_path / "run", words) == EXIT_OK
    micros = 2 if "train.micro_batch_size=12" in words else 1
    assert steps == [step for step in range(STEPS) for _ in range(micros)]


def test_a_resumed_run_is_compared_from_its_first_step_and_no_number_changes(tmp_path: Path) -> None:
    with compared() as steps:
        assert train(tmp_path / "watched", EVERYTHING, stop_at=4) == EXIT_REQUEUE
        assert train(tmp_path / "watched", EVERYTHING) == EXIT_OK
    assert steps == list(range(STEPS))
    with mock.patch.dict("os.environ", {twin_check.VARIABLE: "off"}), compared() as steps:
        assert train(tmp_path / "alone", EVERYTHING) == EXIT_OK
    assert steps == []
    assert state_digest(tmp_path / "watched") == state_digest(tmp_path / "alone")


def test_an_attack_that_moves_statistics_moves_them_once_under_comparison(tmp_path: Path) -> None:
    words = ["attack.bn_mode=train"]
    assert train(tmp_path / "watched", words) == EXIT_OK
    with mock.patch.dict("os.environ", {twin_check.VARIABLE: "off"}):
        assert train(tmp_path / "alone", words) == EXIT_OK
    assert state_digest(tmp_path / "watched") == state_digest(tmp_path / "alone")


def test_a_run_that_goes_back_meets_the_weights_that_it_went_back_to(tmp_path: Path) -> None:
    real = PgdAt.loss

    def nan_at_five(self: PgdAt, forward: Any, batch: Any, adv: Any) -> Any:
        terms = real(self, forward, batch, adv)
        if batch.step == 5:
            object.__setattr__(terms, "loss", terms.loss * float("nan"))
        return terms

    words = [*FOLDED, *CAST, "train.on_nonfinite=rollback", "checkpoint.every_steps=2"]
    with mock.patch.object(PgdAt, "loss", nan_at_five), compared() as steps:
        assert train(tmp_path / "run", words) == EXIT_OK
    assert steps == [0, 1, 2, 3, 4, 5, 4, 6, 7, 8]


@contextlib.contextmanager
def cheap_compiler() -> Iterator[None]:
    """Compile without a code generator: tracing and autograd are the real ones."""
    real = compiled_attack.StaticIteration.__init__
    torch._dynamo.reset()
    with mock.patch.object(
        compiled_attack.StaticIteration, "__init__", functools.partialmethod(real, backend="aot_eager")
    ):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "by_region"])
def test_compiled_attack_meets_the_live_network(regional: bool, tmp_path: Path) -> None:
    words = [*FOLDED, *CAST, "attack.compile=on"]
    least = 0 if regional else compiled_attack.REGIONAL_CONVOLUTIONS
    with cheap_compiler(), mock.patch.object(compiled_attack, "REGIONAL_CONVOLUTIONS", least), compared() as steps:
        assert train(tmp_path / "run", words) == EXIT_OK
    assert steps == list(range(STEPS))


def test_a_compiled_attack_with_weights_of_its_own_is_caught(tmp_path: Path) -> None:
    real = compiled_attack._compile

    def compiled_with_a_copy(attack: Any, twin: Twin, backend: Any) -> Any:
        other = copy.copy(twin)
        other.module = copy.deepcopy(twin.module)
        return real(attack, other, backend)

    with cheap_compiler(), mock.patch.object(compiled_attack, "_compile", compiled_with_a_copy):
        assert "the logits" in caught(tmp_path, [*FOLDED, "attack.compile=on", "optimizer.lr=1", *AT_ONCE]).what


def caught(folder: Path, words: list[str], *, at: int | None = 1) -> TwinMismatchError:
    with pytest.raises(TwinMismatchError) as error:
        train(folder / "run", words)
    assert at is None or error.value.step == at
    assert error.value.difference > error.value.bound
    return error.value


# Planted staleness. Without a warm-up, so that the first step moves the weights.
AT_ONCE = ["schedule.warmup_epochs=0"]


@pytest.mark.parametrize(
    "words",
    [FOLDED, [*FOLDED, *CAST], CAST, [*CAST, "model.norm=gn"], [*FOLDED, *MIXTURE], ["attack.bn_mode=batch", *CAST]],
    ids=["folded", "folded_cast", "preactivation_cast", "group_norm_cast", "mixture", "batch_statistics_cast"],
)
def test_a_twin_that_is_never_refreshed_is_caught_after_one_step(words: list[str], tmp_path: Path) -> None:
    with mock.patch.object(Twin, "refresh", return_value=None):
        caught(tmp_path, [*words, *AT_ONCE])


@pytest.mark.parametrize("rate", ["0.1", "0.001"])
def test_a_twin_refreshed_before_the_optimiser_is_caught_after_one_step(rate: str, tmp_path: Path) -> None:
    twins: list[Twin] = []
    real_init, real_step, real_refresh = Twin.__init__, TrainingEngine.step, Twin.refresh

    def init(self: Twin, *arguments: Any, **options: Any) -> None:
        real_init(self, *arguments, **options)
        twins.append(self)

    def step(self: TrainingEngine) -> None:
        real_refresh(twins[0])
        real_step(self)

    with (
        mock.patch.object(Twin, "__init__", init),
        mock.patch.object(TrainingEngine, "step", step),
        mock.patch.object(Twin, "refresh", return_value=None),
    ):
        error = caught(tmp_path, [*FOLDED, *CAST, *AT_ONCE, f"optimizer.lr={rate}"])
    assert "weight" in error.what or "bias" in error.what


def test_a_fold_computed_once_is_caught_and_the_layer_is_named(tmp_path: Path) -> None:
    real = folding.Sources.refresh

    def once(self: folding.Sources) -> None:
        real(self)
        self.folded.clear()

    with mock.patch.object(folding.Sources, "refresh", once):
        error = caught(tmp_path, [*FOLDED, *AT_ONCE])
    assert error.what.startswith("conv1.weight, folded with bn1")


def test_a_fold_with_another_layers_statistics_is_caught_at_the_first_attack(tmp_path: Path) -> None:
    real = folding._fold

    def first_norm_for_all(module: Any, conv: Any, norm: Any, *rest: Any, kept: list[Any]) -> Any:
        live, layer, folded = real(module, conv, norm, *rest)
        kept.append(layer)
        same = [k for k in kept if k.num_features == layer.num_features]
        return live, same[0], folded

    with mock.patch.object(folding, "_fold", functools.partial(first_norm_for_all, kept=[])):
        caught(tmp_path, [*FOLDED, *AT_ONCE])


def test_an_average_copied_into_the_live_network_is_caught(tmp_path: Path) -> None:
    real = WeightAverage.copy_into

    def into_live(self: WeightAverage, module: torch.nn.Module) -> None:
        real(self, module)
        for name, live in self._live.items():
            live.data.copy_(self.tensors[name])

    with mock.patch.object(WeightAverage, "copy_into", into_live):
        error = caught(tmp_path, [*EVERYTHING, *AT_ONCE], at=None)
    assert "written to since the step" in error.what


def test_an_update_that_writes_the_average_into_the_live_network_is_caught(tmp_path: Path) -> None:
    def backwards(self: WeightAverage, step: int) -> None:
        live = [value.detach() for value in self._live.values()]
        torch._foreach_lerp_(live, list(self.tensors.values()), 1 - self.decay_at(step))

    with mock.patch.object(WeightAverage, "update", backwards):
        assert "written to since the step" in caught(tmp_path, [*FOLDED, *EMA, *AT_ONCE]).what


def test_statistics_that_are_not_put_back_before_the_next_group_are_caught(tmp_path: Path) -> None:
    with mock.patch.object(BufferMerger, "begin_group", return_value=None):
        caught(tmp_path, [*FOLDED, "train.micro_batch_size=12", *AT_ONCE], at=0)


@pytest.mark.parametrize(("changed", "words"), [({"branch": "clean"}, MIXTURE), ({"bn_mode": "batch"}, [])])
def test_a_twin_of_another_branch_or_bn_mode_is_caught(changed: dict, words: list[str], tmp_path: Path) -> None:
    real = Twin.__init__

    def other(self: Twin, module: torch.nn.Module, **options: Any) -> None:
        real(self, module, **{**options, **changed})

    with mock.patch.object(Twin, "__init__", other):
        caught(tmp_path, [*FOLDED, *words, *AT_ONCE], at=None)


def test_a_network_wired_otherwise_is_caught_and_the_first_layer_named(tmp_path: Path) -> None:
    """Every tensor is right, the computation is not."""
    real = folding.rewrite

    def without_first_relu(*arguments: Any, **options: Any) -> Any:
        module, sources = real(*arguments, **options)
        relu = next(n for n in module.graph.nodes if "act" in str(n.target) or "relu" in str(n.target))
        relu.replace_all_uses_with(relu.args[0])
        module.graph.erase_node(relu)
        module.recompile()
        return module, sources

    with mock.patch("distributed_at.engine.twin.twin.rewrite", without_first_relu):
        error = caught(tmp_path, [*FOLDED, *AT_ONCE], at=0)
    assert error.what.startswith("the logits (from maxpool on)")


def test_the_views_of_an_objectives_other_networks_are_compared_too(tmp_path: Path) -> None:
    """A companion that follows the trained network, and a teacher that stands still."""
    words = [*FOLDED, *CAST, *AT_ONCE, "objective.name=taught"]
    with registered(Taught):
        with compared() as steps:
            assert train(tmp_path / "fresh", words) == EXIT_OK
        assert steps == [step for step in range(STEPS) for _ in ("teacher", "companion", "network")]
        with mock.patch.object(Parts, "refresh_views", lambda self: self.twin.refresh()):
            error = caught(tmp_path, words, at=2)  # it follows the weights that step 0 began with
    assert str(error).startswith("step 2: the companion is not to the attack what it is: conv1.weight, folded with bn1")


def test_a_word_that_is_not_on_or_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(twin_check.VARIABLE, "yes")
    with pytest.raises(ConfigError, match="allowed are on, off"):
        train(tmp_path / "run")


TWO_RANKS = {
    "folded_averaged": [*FOLDED, *EMA, "optimizer.lr=0.05"],
    "mixture_cast_zero_2": [*FOLDED, *MIXTURE, *CAST, "parallel.zero_stage=2"],
    "group_over_both_ranks_in_batch_mode": ["train.bn_group_size=24", "attack.bn_mode=batch", "parallel.zero_stage=0"],
    "a_rank_without_samples_at_the_end": ["train.drop_last=false", "data.limit_train=78", *FOLDED],
}


def work(folder: str) -> dict[str, Any]:
    """Train every run of ``TWO_RANKS``, one of them resumed, and two stale ones, on this rank."""
    found: dict[str, Any] = {}
    with mock.patch.dict("os.environ", {twin_check.VARIABLE: "on"}):
        for name, words in TWO_RANKS.items():
            with compared() as steps:
                if name == "folded_averaged":
                    assert train(Path(folder) / name, words, stop_at=4) == EXIT_REQUEUE
                assert train(Path(folder) / name, words) == EXIT_OK
            found[name] = list(steps)
        stale: dict[str, tuple[Callable[[Any], None], list[str]]] = {
            "stale": (lambda self: None, FOLDED),
            "stale_cast": (lambda self: None, ["model.norm=gn", *CAST]),
        }
        for name, (refresh, words) in stale.items():
            with mock.patch.object(Twin, "refresh", refresh):
                try:
                    train(Path(folder) / name, [*words, *AT_ONCE])
                except TwinMismatchError as error:
                    found[name] = error.step
    return found


def test_two_ranks_compare_at_every_attack_and_both_see_a_stale_twin(tmp_path: Path) -> None:
    for rank in run_ranks(work, 2, str(tmp_path)):
        for name in TWO_RANKS:
            assert rank[name] == list(range(12 if "at_the_end" in name else STEPS)), name
        assert rank["stale"] == rank["stale_cast"] == 1
