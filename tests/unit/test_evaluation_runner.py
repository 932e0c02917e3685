"""An evaluation gives one number whatever the batch, the interruptions and the state of the model it borrows."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_at.config import AttackConfig, EvalAttackConfig
from distributed_at.errors import ConfigError
from distributed_at.evaluation import Ledger, LedgerConflictError, evaluate, evaluation_ids, worst_case
from distributed_at.evaluation import runner as runner_module
from distributed_at.evaluation.rows import COLUMNS, Rows
from tests.evaluation_kit import MemorySource, digits, source, trained


def attack(**changes) -> AttackConfig:
    values = {"eps": 40.0, "num_steps": 5, "step_size": 12.0, **changes}
    return AttackConfig(**values)


def pgd(**changes) -> EvalAttackConfig:
    return EvalAttackConfig(kind="pgd", attack=attack(**changes))


@pytest.fixture(scope="module")
def model():
    return trained()


def frozen(model):
    """A copy in eval mode: what the model under evaluation must behave like."""
    return copy.deepcopy(model).eval()


def assert_same_rows(a: Rows, b: Rows) -> None:
    for name in COLUMNS:
        if name == "loss":
            np.testing.assert_allclose(a.loss, b.loss, rtol=1e-3, atol=1e-4)
        else:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_clean_accuracy_is_the_count_of_right_predictions() -> None:
    model, data = trained(steps=12), source()  # trained so little that it is wrong on some
    result = evaluate(model, data, EvalAttackConfig(kind="clean"), batch_size=7)
    with torch.no_grad():
        predicted = frozen(model)(data.images.float() / 255).argmax(1)
    assert result.correct == int((predicted == data.all_labels).sum())
    assert result.total == 100
    assert result.protocol.metric == "clean_accuracy"
    assert result.low < result.accuracy < result.high


def test_rows_do_not_depend_on_the_batch_size(model) -> None:
    results = [evaluate(model, source(), pgd(restarts=2), batch_size=size, seed=3) for size in (100, 33, 1)]
    assert 0 < results[0].correct < results[0].clean_correct
    for other in results[1:]:
        assert_same_rows(results[0].rows, other.rows)
        assert other.protocol.hash == results[0].protocol.hash


def test_restarts_agree_with_the_attack_that_runs_them_all(model) -> None:
    from distributed_at.evaluation.kinds.pgd import build_attack

    data = source()
    result = evaluate(model, data, pgd(restarts=3, num_steps=2), seed=5)
    once = evaluate(model, data, pgd(restarts=1, num_steps=2), seed=5)
    whole = build_attack(result.protocol).perturb_with_info(
        frozen(model),
        data.images.float() / 255,
        data.all_labels,
        sample_ids=torch.from_numpy(data.sample_ids),
        seed=5,
    )
    expected = whole.correct.numpy() & result.rows.correct_clean
    np.testing.assert_array_equal(result.rows.correct_adv, expected)
    assert result.correct < once.correct


def test_attack_never_raises_accuracy_and_more_steps_break_more(model) -> None:
    clean = evaluate(model, source(), EvalAttackConfig(kind="clean"))
    weak, strong = (evaluate(model, source(), pgd(num_steps=n)) for n in (1, 20))
    assert strong.correct < weak.correct <= clean.correct == weak.clean_correct


def test_natural_model_falls_to_about_zero(model) -> None:
    result = evaluate(model, source(), pgd(eps=80.0, num_steps=20, step_size=10.0))
    assert result.clean_accuracy > 0.9
    assert result.accuracy < 0.05


def test_random_labels_leave_no_accuracy_above_chance(model) -> None:
    images, _ = digits()
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 300))
    result = evaluate(model, MemorySource(images[-300:], labels), EvalAttackConfig(kind="clean"))
    assert result.low <= 0.1 <= result.high


def test_targeted_attack_counts_all_samples_and_its_success(model) -> None:
    result = evaluate(model, source(), pgd(target="random_other", eps=80.0, num_steps=20, step_size=10.0))
    assert result.protocol.scope == "all"
    assert result.attack_success_rate > 0.5
    reached = result.rows.target_hit
    assert (result.rows.adv_prediction[reached] != result.rows.label[reached]).all()
    assert not result.rows.correct_adv[reached].any()
    assert evaluate(model, source(), pgd()).attack_success_rate is None


class Stopped(Exception):
    pass


def test_killed_half_way_then_resumed_gives_the_same_rows_and_computes_only_the_missing(model, tmp_path: Path) -> None:
    whole = evaluate(model, source(), pgd(), batch_size=20)

    def stop(done: int, total: int) -> None:
        assert total == 100
        if done >= 40:
            raise Stopped

    with pytest.raises(Stopped):
        evaluate(model, source(), pgd(), batch_size=20, folder=tmp_path, on_progress=stop)
    assert not list(tmp_path.glob("*/summary.json"))
    data = source()
    resumed = evaluate(model, data, pgd(), batch_size=16, folder=tmp_path)
    assert resumed.computed == 60
    assert sorted(data.read_ids) == sorted(data.sample_ids[40:])
    assert_same_rows(whole.rows, resumed.rows)
    again = evaluate(model, source(), pgd(), folder=tmp_path)
    assert again.computed == 0
    assert_same_rows(whole.rows, again.rows)


def test_torn_last_line_costs_one_sample(model, tmp_path: Path) -> None:
    whole = evaluate(model, source(), pgd(), folder=tmp_path)
    (rows,) = tmp_path.glob("*/rows-*.jsonl")
    rows.write_bytes(rows.read_bytes()[:-20])
    resumed = evaluate(model, source(), pgd(), folder=tmp_path)
    assert resumed.computed == 1
    assert_same_rows(whole.rows, resumed.rows)


def test_contradicting_rows_are_an_error_that_names_the_sample(model, tmp_path: Path) -> None:
    result = evaluate(model, source(), pgd(), folder=tmp_path)
    ledger = Ledger.open(tmp_path / result.protocol.folder_name, result.protocol)
    row = result.rows.take(np.array([4]))
    ledger.append(row)
    assert len(ledger.read()) == 100  # the same row twice is one row
    columns = {name: getattr(row, name) for name in COLUMNS}
    ledger.append(Rows(**{**columns, "correct_adv": ~row.correct_adv}))
    with pytest.raises(LedgerConflictError, match=f"sample {row.sample_id[0]} differs in correct_adv"):
        evaluate(model, source(), pgd(), folder=tmp_path)


def test_processes_that_share_only_a_folder_complete_one_another(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test may have left a group
    whole = evaluate(model, source(), pgd())
    first = evaluate(model, source(), pgd(), rank=1, world_size=2, batch_size=30, folder=tmp_path)
    assert not first.complete
    assert not list(tmp_path.glob("*/summary.json"))
    second = evaluate(model, source(), pgd(), rank=0, world_size=2, batch_size=30, folder=tmp_path)
    assert second.complete
    assert first.computed + second.computed == 100
    assert_same_rows(whole.rows, second.rows)
    assert len(list(tmp_path.glob("*/summary.json"))) == 1


def test_summary_holds_the_number_with_its_protocol(model, tmp_path: Path) -> None:
    result = evaluate(model, source(), pgd(), folder=tmp_path)
    summary = json.loads((tmp_path / result.protocol.folder_name / "summary.json").read_text())
    assert summary["protocol"]["hash"] == result.protocol.hash
    assert summary["protocol"]["name"] == "PGD-5 linf 40/255"
    for name in ("branch", "split", "metric", "correct", "total", "accuracy", "low", "high", "seconds"):
        assert name in summary
    assert (summary["correct"], summary["total"]) == (result.correct, 100)


@pytest.mark.parametrize("kind", ["clean", "pgd", "autoattack"])
def test_model_flags_buffers_and_generators_are_bitwise_as_before(kind, model) -> None:
    model.norm.eval()  # frozen BN inside a training model must stay frozen, and the rest in training
    model.first.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    generators = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    config = EvalAttackConfig(kind=kind, version="fast", attack=None if kind == "clean" else attack())
    try:
        runner_module.evaluate(model, source(size=12), config)
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert [m.training for m in model.modules()] == flags
        assert not model.first.weight.requires_grad
        assert model.second.weight.requires_grad
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert model.second.weight.grad is None
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert np.array_equal(np.random.get_state()[1], generators[1])
        assert random.getstate() == generators[2]
    finally:
        model.train()
        model.first.weight.requires_grad_(True)
        model.head.weight.grad = None


def test_a_model_that_writes_its_buffers_in_eval_mode_is_refused(model) -> None:
    class Leaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained()

        def forward(self, x):
            self.inner.norm.running_mean.mul_(0.9)
            return self.inner(x)

    with pytest.raises(RuntimeError, match=r"inner\.norm\.running_mean"):
        evaluate(Leaky(), source(size=8), EvalAttackConfig(kind="clean"))


def test_flags_are_restored_when_the_evaluation_fails(model) -> None:
    def stop(done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        evaluate(model, source(), EvalAttackConfig(kind="clean"), on_progress=stop)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_protocol_of_other_weights_or_samples_is_refused(model) -> None:
    protocol = evaluate(model, source(size=10), pgd()).protocol
    assert evaluate(model, source(size=10), protocol).protocol == protocol
    with pytest.raises(ConfigError, match="weights"):
        evaluate(trained(steps=2), source(size=10), protocol)
    with pytest.raises(ConfigError, match="samples"):
        evaluate(model, source(size=11), protocol)


def test_a_whole_split_is_every_image_however_many_and_every_row_is_kept(model, tmp_path: Path) -> None:
    data = source(size=1203)
    result = evaluate(model, data, EvalAttackConfig(kind="clean"), folder=tmp_path, batch_size=500)
    np.testing.assert_array_equal(result.rows.sample_id, np.sort(data.sample_ids))
    assert result.total == 1203
    kept = Ledger.open(tmp_path / result.protocol.folder_name, result.protocol).read()
    assert_same_rows(kept.by_id(), result.rows)


def test_fewer_samples_are_drawn_over_the_whole_split_and_always_the_same() -> None:
    data = source(size=100)
    ids = evaluation_ids(data, 20)
    assert len(set(ids)) == 20
    assert set(ids) <= set(data.sample_ids)
    assert ids.max() > data.sample_ids[60]
    np.testing.assert_array_equal(ids, evaluation_ids(source(size=100), 20))
    with pytest.raises(ConfigError, match="num_samples"):
        evaluation_ids(data, 101)


def test_evaluation_uses_running_statistics_so_samples_do_not_influence_one_another(model) -> None:
    data = source()
    alone = evaluate(model, data, EvalAttackConfig(kind="clean"), ids=data.sample_ids[:1])
    among = evaluate(model, data, EvalAttackConfig(kind="clean"))
    np.testing.assert_allclose(alone.rows.loss, among.rows.loss[:1], rtol=1e-4)


def test_worst_case_of_two_attacks_is_the_intersection(model) -> None:
    a, b = (evaluate(model, source(), pgd(loss=loss, num_steps=3), seed=s) for loss, s in (("ce", 1), ("margin", 2)))
    both = worst_case([a, b])
    expected = a.rows.sample_id[a.rows.correct_adv & b.rows.correct_adv]
    np.testing.assert_array_equal(both.survivors, expected)
    assert both.correct <= min(a.correct, b.correct)
