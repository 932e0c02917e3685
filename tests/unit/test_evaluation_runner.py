"""An evaluation gives one number whatever the batch, the interruptions and the state of the model it borrows."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_at.config import AttackConfig, EvaluationEntry, evaluation_entry
from distributed_at.errors import ConfigError
from distributed_at.evaluation import Ledger, LedgerConflictError, evaluation_ids
from distributed_at.evaluation.legacy import format_1_hash
from distributed_at.evaluation.rows import COLUMNS, Rows
from distributed_at.evaluation.worst_case import worst_case
from tests.evaluation_kit import MemorySource, digits, measure, source, trained


def attack(**changes) -> AttackConfig:
    values = {"eps": 40.0, "num_steps": 5, "step_size": 12.0, **changes}
    return AttackConfig(**values)


def pgd(**changes) -> EvaluationEntry:
    return evaluation_entry(kind="pgd", attack=attack(**changes))


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
    result = measure(model, data, evaluation_entry(kind="clean"), batch_size=7)
    with torch.no_grad():
        predicted = frozen(model)(data.images.float() / 255).argmax(1)
    assert result.correct == int((predicted == data.all_labels).sum())
    assert result.total == 100
    assert result.protocol.metric == "clean_accuracy"
    assert result.low < result.accuracy < result.high


def test_rows_do_not_depend_on_the_batch_size(model) -> None:
    results = [measure(model, source(), pgd(restarts=2), batch_size=size, seed=3) for size in (100, 33, 1)]
    assert 0 < results[0].correct < results[0].clean_correct
    for other in results[1:]:
        assert_same_rows(results[0].rows, other.rows)
        assert other.protocol.hash == results[0].protocol.hash


def test_restarts_agree_with_the_attack_that_runs_them_all(model) -> None:
    from distributed_at.evaluation.kinds.pgd import build_attack

    data = source()
    result = measure(model, data, pgd(restarts=3, num_steps=2), seed=5)
    once = measure(model, data, pgd(restarts=1, num_steps=2), seed=5)
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
    clean = measure(model, source(), evaluation_entry(kind="clean"))
    weak, strong = (measure(model, source(), pgd(num_steps=n)) for n in (1, 20))
    assert strong.correct < weak.correct <= clean.correct == weak.clean_correct


def test_natural_model_falls_to_about_zero(model) -> None:
    result = measure(model, source(), pgd(eps=80.0, num_steps=20, step_size=10.0))
    assert result.clean_accuracy > 0.9
    assert result.accuracy < 0.05


def test_random_labels_leave_no_accuracy_above_chance(model) -> None:
    images, _ = digits()
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 300))
    result = measure(model, MemorySource(images[-300:], labels), evaluation_entry(kind="clean"))
    assert result.low <= 0.1 <= result.high


def test_targeted_attack_counts_all_samples_and_its_success(model) -> None:
    result = measure(model, source(), pgd(target="random_other", eps=80.0, num_steps=20, step_size=10.0))
    assert result.protocol.scope == "all"
    assert result.attack_success_rate > 0.5
    reached = result.rows.target_hit
    assert (result.rows.adv_prediction[reached] != result.rows.label[reached]).all()
    assert not result.rows.correct_adv[reached].any()
    assert measure(model, source(), pgd()).attack_success_rate is None


class Stopped(Exception):
    pass


def test_killed_half_way_then_resumed_gives_the_same_rows_and_computes_only_the_missing(model, tmp_path: Path) -> None:
    whole = measure(model, source(), pgd(), batch_size=20)

    def stop(done: int, total: int) -> None:
        assert total == 100
        if done >= 40:
            raise Stopped

    with pytest.raises(Stopped):
        measure(model, source(), pgd(), batch_size=20, folder=tmp_path, on_progress=stop)
    assert not list(tmp_path.glob("*/summary.json"))
    data = source()
    resumed = measure(model, data, pgd(), batch_size=16, folder=tmp_path)
    assert resumed.computed == 60
    assert sorted(data.read_ids) == sorted(data.sample_ids[40:])
    assert_same_rows(whole.rows, resumed.rows)
    again = measure(model, source(), pgd(), folder=tmp_path)
    assert again.computed == 0
    assert_same_rows(whole.rows, again.rows)


def test_torn_last_line_costs_one_sample(model, tmp_path: Path) -> None:
    whole = measure(model, source(), pgd(), folder=tmp_path)
    (rows,) = tmp_path.glob("*/rows-*.jsonl")
    rows.write_bytes(rows.read_bytes()[:-20])
    resumed = measure(model, source(), pgd(), folder=tmp_path)
    assert resumed.computed == 1
    assert_same_rows(whole.rows, resumed.rows)


def test_contradicting_rows_are_an_error_that_names_the_sample(model, tmp_path: Path) -> None:
    result = measure(model, source(), pgd(), folder=tmp_path)
    ledger = Ledger.open(tmp_path / result.protocol.folder_name, result.protocol)
    row = result.rows.take(np.array([4]))
    ledger.append(row)
    assert len(ledger.read()) == 100  # the same row twice is one row
    columns = {name: getattr(row, name) for name in COLUMNS}
    ledger.append(Rows(**{**columns, "correct_adv": ~row.correct_adv}))
    with pytest.raises(LedgerConflictError, match=f"sample {row.sample_id[0]} differs in correct_adv"):
        measure(model, source(), pgd(), folder=tmp_path)


def test_processes_that_share_only_a_folder_complete_one_another(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test may have left a group
    whole = measure(model, source(), pgd())
    first = measure(model, source(), pgd(), rank=1, world_size=2, batch_size=30, folder=tmp_path)
    assert not first.complete
    assert not list(tmp_path.glob("*/summary.json"))
    second = measure(model, source(), pgd(), rank=0, world_size=2, batch_size=30, folder=tmp_path)
    assert second.complete
    assert first.computed + second.computed == 100
    assert_same_rows(whole.rows, second.rows)
    assert len(list(tmp_path.glob("*/summary.json"))) == 1


def test_summary_holds_the_number_with_its_protocol(model, tmp_path: Path) -> None:
    result = measure(model, source(), pgd(), folder=tmp_path)
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
    versions = {"version": "fast"} if kind == "autoattack" else {}
    config = evaluation_entry(kind=kind, attack=None if kind == "clean" else attack(), **versions)
    try:
        measure(model, source(size=12), config)
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
        measure(Leaky(), source(size=8), evaluation_entry(kind="clean"))


def test_flags_are_restored_when_the_evaluation_fails(model) -> None:
    def stop(done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        measure(model, source(), evaluation_entry(kind="clean"), on_progress=stop)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_protocol_of_other_weights_or_samples_is_refused(model) -> None:
    protocol = measure(model, source(size=10), pgd()).protocol
    assert measure(model, source(size=10), protocol).protocol == protocol
    with pytest.raises(ConfigError, match="weights"):
        measure(trained(steps=2), source(size=10), protocol)
    with pytest.raises(ConfigError, match="samples"):
        measure(model, source(size=11), protocol)


def test_a_whole_split_is_every_image_however_many_and_every_row_is_kept(model, tmp_path: Path) -> None:
    data = source(size=1203)
    result = measure(model, data, evaluation_entry(kind="clean"), folder=tmp_path, batch_size=500)
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
    alone = measure(model, data, evaluation_entry(kind="clean"), ids=data.sample_ids[:1])
    among = measure(model, data, evaluation_entry(kind="clean"))
    np.testing.assert_allclose(alone.rows.loss, among.rows.loss[:1], rtol=1e-4)


def test_worst_case_of_two_attacks_is_the_intersection(model) -> None:
    a, b = (measure(model, source(), pgd(loss=loss, num_steps=3), seed=s) for loss, s in (("ce", 1), ("margin", 2)))
    both = worst_case([a, b])
    expected = a.rows.sample_id[a.rows.correct_adv & b.rows.correct_adv]
    np.testing.assert_array_equal(both.survivors, expected)
    assert both.correct <= min(a.correct, b.correct)


def test_rows_that_an_earlier_version_kept_are_found_and_not_computed_again(tmp_path, model) -> None:
    """A folder named by the earlier hash, whose rows carry it, is gone on with in place."""
    whole = measure(model, source(), pgd(), folder=tmp_path)
    now = tmp_path / whole.protocol.folder_name
    earlier = format_1_hash(whole.protocol)
    before = now.rename(tmp_path / f"{whole.protocol.slug}-{earlier[:12]}")
    for path in before.glob("rows-*.jsonl"):
        path.write_text(path.read_text().replace(whole.protocol.hash, earlier))
    record = json.loads((before / "protocol.json").read_text())
    (before / "protocol.json").write_text(json.dumps({**record, "hash": earlier, "format": 1}))
    (before / "summary.json").unlink()
    data = source()
    again = measure(model, data, pgd(), folder=tmp_path)
    assert data.read_ids == []
    assert_same_rows(again.rows, whole.rows)
    assert [p.name for p in tmp_path.iterdir()] == [before.name]
    third = measure(model, source(), pgd(), folder=tmp_path)  # now with the record of both hashes
    assert third.computed == 0
    assert_same_rows(Ledger(before, whole.protocol.hash).read(), whole.rows)
    foreign = before / "rows-other.jsonl"
    foreign.write_text(json.dumps({"protocol": "f" * 64}) + "\n")
    with pytest.raises(LedgerConflictError):
        measure(model, source(), pgd(), folder=tmp_path)
