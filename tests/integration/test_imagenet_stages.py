"""Stages of Xie & Yuille's training: frozen running statistics, BN-only finetuning, and branches that never mix."""

import json
import pickle

import pytest
import torch

from distributed_at.engine.builder import build_network
from distributed_at.engine.checkpoint.tools import checkpoint_convert, read_weights
from distributed_at.engine.microbatches import MicroBatches
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.initial_weights import (
    apply_initial_weights,
    check_initial_weights,
    read_initial_weights,
)
from distributed_at.errors import CheckpointError, ConfigError
from distributed_at.models.norm import bn_buffers
from distributed_at.recipes import load_recipe
from tests.integration.training import built, cut_back, same_bits, tensors, tiny, train

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
MIXTURE = ("objective={name: mixture}",)


@pytest.fixture(scope="module")
def star_run(tmp_path_factory):
    """Two epochs of 8 steps; from epoch 1 BN normalises with its running statistics."""
    return train(tiny("name=star", "train.freeze_bn_from_epoch=1"), tmp_path_factory.mktemp("star") / "run")


@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory):
    """One epoch of adversarial and clean images with mixture batch norm."""
    config = tiny("name=mbn", "model.norm=mbn", *MIXTURE, "train.epochs=1")
    return train(config, tmp_path_factory.mktemp("mbn") / "run")


def _split(state):
    """Return (statistics, norm parameters, convolution and classifier weights) of a checkpoint."""
    statistics = {n: t for n, t in state.items() if n.startswith("buffer.") and n.endswith(STATISTICS)}
    owners = {n.removeprefix("buffer.").rsplit(".", 1)[0] for n in statistics}
    model = {n: t for n, t in state.items() if n.startswith("model.")}
    affine = {n: t for n, t in model.items() if n.removeprefix("model.").rsplit(".", 1)[0] in owners}
    return statistics, affine, {n: t for n, t in model.items() if n not in affine}


def _unchanged(before, after):
    assert before.keys() == after.keys()
    assert before
    return [same_bits(before[name], after[name]) for name in before]


def test_frozen_statistics_stay_bitwise_constant_while_weights_and_affine_parameters_train(star_run):
    early, switch, end = (_split(tensors(star_run, step)) for step in (4, 8, 16))
    assert not all(_unchanged(early[0], switch[0])), "statistics do not move before the switch either"
    assert all(_unchanged(switch[0], end[0]))
    assert not any(_unchanged(switch[1], end[1]))
    assert not any(_unchanged(switch[2], end[2]))


@pytest.mark.parametrize("killed_after", [4, 8, 12])
def test_run_resumed_across_the_switch_is_bitwise_the_uninterrupted_one(star_run, tmp_path, killed_after):
    resumed = cut_back(star_run, tmp_path / "run", killed_after)
    train(tiny("name=star", "train.freeze_bn_from_epoch=1"), resumed)
    expected, got = tensors(star_run, 16), tensors(resumed, 16)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not same_bits(expected[name], got[name])] == []


@pytest.mark.parametrize(
    "stage",
    [
        ("train.bn_only=clean", "objective={name: standard}", "attack=null"),
        ("train.bn_only=adv", "objective={name: pgd_at}"),
    ],
    ids=["clean", "adv"],
)
def test_bn_only_stage_moves_batch_norms_and_nothing_else(star_run, tmp_path, stage):
    folder = train(tiny(f"train.init_from={star_run}", "train.epochs=1", *stage), tmp_path / "run")
    before, after = _split(tensors(star_run, 16)), _split(tensors(folder, 8))
    assert all(_unchanged(before[2], after[2]))
    assert not any(_unchanged(before[0], after[0]))
    assert not any(_unchanged(before[1], after[1]))
    start = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
    assert start["event"] == "run_start"
    assert start["initial_weights"]["source"] == str(star_run)


def test_bn_only_stage_of_a_mixture_leaves_the_other_branch_alone(mixture_run, tmp_path):
    stage = ("train.bn_only=clean", "objective={name: standard}", "attack=null", "model.norm=mbn")
    folder = train(tiny(f"train.init_from={mixture_run}", "train.epochs=1", *stage), tmp_path / "run")
    before, after = _split(tensors(mixture_run, 8)), _split(tensors(folder, 8))
    for old, new in zip(before[:2], after[:2], strict=True):
        of = {b: [n for n in old if f".{b}." in n] for b in ("clean", "adv")}
        assert not any(_unchanged({n: old[n] for n in of["clean"]}, {n: new[n] for n in of["clean"]}))
        assert all(_unchanged({n: old[n] for n in of["adv"]}, {n: new[n] for n in of["adv"]}))
    assert all(_unchanged(before[2], after[2]))


def test_run_that_was_saved_goes_on_without_its_initial_weights(star_run, tmp_path):
    source = cut_back(star_run, tmp_path / "source", 16)
    config = tiny(f"train.init_from={source}", "train.epochs=1")
    whole = train(config, tmp_path / "whole")
    half = cut_back(whole, tmp_path / "half", 4)
    for path in sorted(source.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    source.rmdir()
    train(config, half)
    expected, got = tensors(whole, 8), tensors(half, 8)
    assert [name for name in expected if not same_bits(expected[name], got[name])] == []


def test_bn_only_run_resumed_keeps_the_weights_that_it_does_not_train(star_run, tmp_path):
    config = tiny(f"train.init_from={star_run}", "train.epochs=1", "train.bn_only=adv", "objective={name: pgd_at}")
    whole = train(config, tmp_path / "whole")
    resumed = train(config, cut_back(whole, tmp_path / "half", 4))
    expected, got = tensors(whole, 8), tensors(resumed, 8)
    assert expected.keys() == got.keys()
    assert {f"model.{name}" for name, _ in build_network(config, 10).named_parameters()} <= expected.keys()
    assert [name for name in expected if not same_bits(expected[name], got[name])] == []


def test_weights_files_and_runs_give_the_same_initial_weights(star_run, tmp_path):
    expected = read_weights(star_run)
    for suffix in (".safetensors", ".pt"):
        file = checkpoint_convert(star_run, tmp_path / f"weights{suffix}")
        found = read_initial_weights(str(file))
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)
    network = build_network(tiny(), 10)
    apply_initial_weights(network, found, "file")
    assert all(same_bits(network.state_dict()[name], expected[name]) for name in expected)


def test_weights_of_another_network_are_refused_by_name_and_copied_nowhere(star_run):
    network = build_network(tiny("model.base_width=16"), 10)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with pytest.raises(ConfigError, match=r"train\.init_from .*is \(8, 3, 3, 3\), not \(16, 3, 3, 3\)"):
        apply_initial_weights(network, read_initial_weights(str(star_run)), str(star_run))
    assert all(same_bits(before[name], t) for name, t in network.state_dict().items())


class _Planted:
    def __reduce__(self):
        return exec, ("raise SystemExit('a weights file ran code')",)


def test_weights_file_never_runs_code(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(pickle.dumps({"conv1.weight": _Planted()}))
    with pytest.raises(CheckpointError, match="cannot read weights"):
        read_initial_weights(str(file))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.tensor([1.0, float("nan")])}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"conv1\.weight holds numbers that are not finite"):
        read_initial_weights(str(tmp_path / "weights.pt"))


def test_bn_only_without_a_network_to_finetune_says_what_to_give():
    with pytest.raises(ConfigError, match="init_from=RUN"):
        check_initial_weights(tiny("train.bn_only=adv"))
    with pytest.raises(ConfigError, match="there is no /nowhere"):
        check_initial_weights(tiny("train.init_from=/nowhere"))


def test_bn_only_names_the_objective_of_its_images():
    with pytest.raises(ConfigError, match="bn_only 'clean' finetunes on clean images alone"):
        tiny("train.bn_only=clean")


def test_init_takes_model_data_and_weights_of_a_run_and_later_overrides_win(mixture_run):
    config = load_recipe(
        "imagenet/bn_finetune.yaml", ["train.batch_size=32", f"init={mixture_run}", "data.limit_train=32"]
    ).config
    held = RunFolder(mixture_run).load_config()
    assert config.model == held.model
    assert config.data == held.data.model_copy(update={"limit_train": 32})
    assert config.train.init_from == str(mixture_run)
    assert (config.train.bn_only, config.train.batch_size, config.optimizer.lr) == ("clean", 32, 0.01)
    with pytest.raises(ConfigError, match="there is no 'nowhere'"):
        load_recipe("imagenet/bn_finetune.yaml", ["init=nowhere"])


def _one_step(config, change):
    """Return the BN buffers after one training step whose clean and adversarial inputs ``change`` may replace."""
    parts = built(config)
    batches = MicroBatches(
        parts.source,
        parts.order,
        parts.plan,
        rank=0,
        device=torch.device("cpu"),
        seed=config.seed,
        first_step=0,
        last_step=1,
        prefetch=0,
    )
    (micro,) = batches.next_step()
    batches.close()
    batch = micro.batch
    before = {name: b.clone() for name, b in bn_buffers(parts.engine.module).items()}
    adv = parts.attack.perturb(
        parts.twin, batch.images, batch.labels, sample_ids=batch.ids, group_ids=batch.group_ids, epoch=0, seed=0
    )
    assert all(same_bits(before[n], b) for n, b in bn_buffers(parts.engine.module).items()), "the attack moved BN"
    clean, adv = change(batch.images, adv)
    terms = parts.objective.loss(parts.engine.forward, type(batch)(**{**vars(batch), "images": clean}), adv)
    parts.engine.backward(terms.loss)
    parts.engine.step()
    return {name: b.clone() for name, b in bn_buffers(parts.engine.module).items()}


def _moved(first, second, branch):
    names = [n for n in first if f".{branch}." in n and not n.endswith("num_batches_tracked")]
    assert names
    return [n for n in names if not same_bits(first[n], second[n])], names


def test_branches_of_a_mixture_never_contaminate_each_other():
    config = tiny("model.norm=mbn", *MIXTURE)
    plain = _one_step(config, lambda clean, adv: (clean, adv))
    other_clean = _one_step(config, lambda clean, adv: (clean * 0.5 + 0.1, adv))
    other_adv = _one_step(config, lambda clean, adv: (clean, adv * 0.5 + 0.1))
    assert _moved(plain, other_clean, "adv")[0] == []
    assert _moved(plain, other_adv, "clean")[0] == []
    moved, names = _moved(plain, other_clean, "clean")
    assert moved == names
    moved, names = _moved(plain, other_adv, "adv")
    assert moved == names


def test_one_batch_norm_over_the_mixture_is_contaminated_by_both():
    config = tiny("model.norm=bn", *MIXTURE)
    plain = _one_step(config, lambda clean, adv: (clean, adv))
    for change in (lambda clean, adv: (clean * 0.5 + 0.1, adv), lambda clean, adv: (clean, adv * 0.5 + 0.1)):
        changed = _one_step(config, change)
        names = [n for n in plain if n.endswith(("running_mean", "running_var"))]
        assert not any(same_bits(plain[n], changed[n]) for n in names)


def test_groups_inside_one_forward_move_the_statistics_as_forwards_of_their_own(tmp_path):
    """One forward of eight in groups of two is what four devices of two images each would have made of the buffers."""
    one_step = ("model.norm=mbn", *MIXTURE, "train.epochs=0.125")
    kinds = {"together": ("train.bn_group_size=2",), "apart": ("train.bn_group_size=2", "train.micro_batch_size=2")}
    runs = {name: tensors(train(tiny(*one_step, *extra), tmp_path / name), 1) for name, extra in kinds.items()}
    whole = tensors(train(tiny(*one_step), tmp_path / "whole"), 1)
    names = [n for n in whole if n.endswith("running_var")]
    assert any(".clean." in n for n in names)
    assert any(".adv." in n for n in names)
    for name in names:
        torch.testing.assert_close(runs["together"][name], runs["apart"][name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(runs["together"][name], whole[name], rtol=1e-5, atol=1e-6), name
