"""Batch norm in its modes, groups and branches, against torch's own and against separate forwards."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError
from distributed_at.models import (
    BatchNorm,
    GroupNorm,
    MixtureBatchNorm,
    bn_buffers,
    build_model,
    norm_layers,
    on_branch,
    set_bn_mode,
    set_branch,
    set_group_size,
    set_process_group,
)
from distributed_at.models.branches import check_branch
from distributed_at.models.norm import group_shares
from distributed_at.models.recomputation import recomputation

C = 6


def features(count: int, seed: int = 0, shift: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, C, 3, 3, generator=generator) * torch.arange(1, C + 1).view(1, C, 1, 1) + shift


def trained(layer: nn.Module) -> nn.Module:
    """Give affine parameters and running statistics values that no default hides."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def snapshot(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def changed(before: dict[str, torch.Tensor], layer: nn.Module) -> set[str]:
    return {name for name, tensor in layer.state_dict().items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0])
def test_train_and_eval_equal_torch_batch_norm_bitwise(momentum: float) -> None:
    ours = trained(BatchNorm(C, eps=1e-3, momentum=momentum))
    theirs = nn.BatchNorm2d(C, eps=1e-3, momentum=momentum)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        assert torch.equal(ours(features(8, seed)), theirs(features(8, seed)))
    assert changed(snapshot(theirs), ours) == set()
    assert torch.equal(ours.eval()(features(8)), theirs.eval()(features(8)))


def test_batch_mode_normalises_by_the_batch_and_leaves_buffers_bitwise() -> None:
    layer = trained(BatchNorm(C))
    expected = copy.deepcopy(layer)(features(8))
    before = snapshot(layer)
    set_bn_mode(layer, "batch")
    assert torch.equal(layer(features(8)), expected)
    set_group_size(layer, 3)
    layer(features(8))
    assert changed(before, layer) == set()


def test_frozen_statistics_leave_the_affine_map_trainable() -> None:
    layer = trained(BatchNorm(C))
    before = snapshot(layer)
    set_bn_mode(layer, "eval")
    x = features(8)
    assert layer.training, "the flag of the rest of the net is its own"
    layer(x).square().sum().backward()
    assert changed(before, layer) == set()
    assert layer.weight.grad.abs().min() > 0
    assert layer.bias.grad.abs().min() > 0
    normalised = (x - layer.running_mean.view(1, C, 1, 1)) / (layer.running_var.view(1, C, 1, 1) + 1e-5).sqrt()
    expected = normalised * layer.weight.view(1, C, 1, 1) + layer.bias.view(1, C, 1, 1)
    torch.testing.assert_close(layer(x), expected)


def test_train_and_eval_calls_set_the_mode_and_set_bn_mode_overrides_it() -> None:
    model = build_model(ModelConfig(arch="resnet", blocks=(1,), block="basic", base_width=8), num_classes=3)
    modes = lambda: {layer.mode for layer in norm_layers(model)}  # noqa: E731
    assert modes() == {"train"}
    model.eval()
    assert modes() == {"eval"}
    set_bn_mode(model, "batch")
    assert modes() == {"batch"}
    assert not model.training
    model.train()
    assert modes() == {"train"}


@pytest.mark.parametrize(("count", "group_size"), [(8, 4), (8, 2), (10, 4), (9, 3), (5, 4)])
@pytest.mark.parametrize("mode", ["train", "batch"])
def test_groups_equal_separate_forwards_and_the_mean_of_their_updates(count: int, group_size: int, mode: str) -> None:
    layer = trained(BatchNorm(C))
    set_bn_mode(layer, mode)
    start = snapshot(layer)
    x = features(count).requires_grad_()
    outputs, updates, weights = [], [], []
    for group in x.split(group_size):
        alone = copy.deepcopy(layer)
        outputs.append(alone(group))
        updates.append(snapshot(alone))
        weights.append(len(group) / count)
    expected = torch.cat(outputs)
    (expected_grad,) = torch.autograd.grad(expected.pow(3).sum(), x)

    set_group_size(layer, group_size)
    found = layer(x)
    (grad,) = torch.autograd.grad(found.pow(3).sum(), x)
    assert torch.equal(found, expected)
    assert torch.equal(grad, expected_grad)
    for name in ("running_mean", "running_var"):
        merged = sum(weight * update[name] for weight, update in zip(weights, updates, strict=True))
        torch.testing.assert_close(getattr(layer, name), merged, rtol=1e-6, atol=1e-6)
    moved = {"running_mean", "running_var", "num_batches_tracked"}
    assert changed(start, layer) == (moved if mode == "train" else set())
    assert layer.num_batches_tracked - start["num_batches_tracked"] == (1 if mode == "train" else 0)


def test_groups_differ_from_one_batch_so_that_the_size_matters() -> None:
    layer = trained(BatchNorm(C))
    x = torch.cat([features(4, 0, shift=-5), features(4, 1, shift=5)])
    whole = layer(x)
    set_group_size(layer, 4)
    assert not torch.allclose(layer(x), whole, atol=0.1)


def test_batch_no_larger_than_the_group_is_one_batch() -> None:
    layer, reference = trained(BatchNorm(C)), trained(BatchNorm(C))
    set_group_size(layer, 8)
    assert torch.equal(layer(features(8)), reference(features(8)))
    assert changed(snapshot(reference), layer) == set()


def test_a_rank_without_samples_moves_nothing() -> None:
    layer = trained(BatchNorm(C))
    before = snapshot(layer)
    assert layer(torch.empty(0, C, 3, 3)).shape == (0, C, 3, 3)
    assert changed(before, layer) == set()


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize(("branch", "other"), [("clean", "adv"), ("adv", "clean")])
def test_one_branch_never_moves_the_other_by_a_bit(branch: str, other: str, group_size: int | None) -> None:
    config = ModelConfig(arch="resnet", blocks=(1, 1), block="basic", base_width=8, norm="mbn", stem="cifar")
    torch.manual_seed(0)
    model = build_model(config, num_classes=3)
    set_group_size(model, group_size)
    before = snapshot(model)
    set_branch(model, other)
    logits_other = model.eval()(torch.ones(2, 3, 8, 8))
    model.train()
    for _ in range(3):
        with on_branch(model, branch):
            model(torch.rand(4, 3, 8, 8)).sum().backward()
    moved = changed(before, model)
    expected = {name for name in bn_buffers(model) if f".{branch}." in name}
    assert moved == expected
    assert all(p.grad is None for name, p in model.named_parameters() if f".{other}." in name)
    assert torch.equal(model.eval()(torch.ones(2, 3, 8, 8)), logits_other)


def test_branches_of_a_mixture_are_full_and_separate_sets() -> None:
    layer = MixtureBatchNorm(C)
    pointers = [tensor.data_ptr() for tensor in layer.state_dict().values()]
    assert len(pointers) == len(set(pointers)) == 2 * 5
    with torch.no_grad():
        layer.adv.weight.fill_(3.0)
    x = features(4)
    torch.testing.assert_close(layer(x), 3 * layer.serving("clean")(x))


def test_mode_of_one_branch_leaves_the_other_alone() -> None:
    layer = MixtureBatchNorm(C)
    set_bn_mode(layer, "eval", branch="adv")
    assert (layer.adv.mode, layer.clean.mode) == ("eval", "train")
    set_bn_mode(layer, "batch", branch="clean")
    assert (layer.adv.mode, layer.clean.mode) == ("eval", "batch")
    set_bn_mode(layer, "train")
    assert (layer.adv.mode, layer.clean.mode) == ("train", "train")
    plain = BatchNorm(C)
    set_bn_mode(plain, "eval", branch="clean")
    assert plain.mode == "eval", "a plain batch norm serves both branches"


def test_misspelt_mode_branch_and_group_size_are_refused() -> None:
    layer = MixtureBatchNorm(C)
    with pytest.raises(ConfigError, match="Did you mean 'batch'"):
        set_bn_mode(layer, "bach")
    with pytest.raises(ConfigError, match="'clean', 'adv'"):
        set_bn_mode(layer, "eval", branch="main")
    with pytest.raises(ConfigError, match="Did you mean 'clean'"):
        set_branch(layer, "cleam")
    with pytest.raises(ConfigError, match="at least 1"):
        set_group_size(layer, 0)


def test_a_branch_holds_within_its_block_alone_and_also_after_an_error() -> None:
    layer = MixtureBatchNorm(C)
    with on_branch(layer, "clean"):
        assert layer.branch == "clean"
        with pytest.raises(ConfigError), on_branch(layer, "adv"):
            check_branch("main" if layer.branch == "adv" else "adv")
        assert layer.branch == "clean"
    assert layer.branch == "adv"


def test_group_norm_is_per_sample_whatever_the_mode() -> None:
    layer = trained(GroupNorm(3, C))
    x = features(8)
    expected = torch.cat([layer(x[i : i + 1]) for i in range(8)])
    set_bn_mode(layer, "batch")
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), nn.functional.group_norm(x, 3, layer.weight, layer.bias, 1e-5))


def test_group_norm_that_cannot_be_made_names_what_can() -> None:
    with pytest.raises(ConfigError, match=r"model\.groups 32 does not divide the 16 channels.*1, 2, 4, 8, 16$"):
        GroupNorm(32, 16)


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
@pytest.mark.parametrize("group_size", [None, 3])
def test_gradients_pass_gradcheck_in_every_mode(mode: str, group_size: int | None) -> None:
    layer = trained(BatchNorm(C)).double()
    set_bn_mode(layer, mode)
    set_group_size(layer, group_size)
    x = features(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: layer(z), (x,))


def test_two_forwards_before_one_backward_work_in_train_mode() -> None:
    layer = trained(BatchNorm(C))
    for group_size in (None, 2):
        set_group_size(layer, group_size)
        x = features(4).requires_grad_()
        (layer(x).pow(3).sum() + layer(2 * x).pow(3).sum()).backward()
        assert torch.isfinite(x.grad).all()


def test_bf16_input_keeps_its_type_and_the_buffers_theirs() -> None:
    for group_size in (None, 2):
        layer = trained(BatchNorm(C))
        set_group_size(layer, group_size)
        assert layer(features(4).bfloat16()).dtype == torch.bfloat16
        assert layer.running_mean.dtype == torch.float32


def test_channels_last_stays_channels_last() -> None:
    x = features(8).contiguous(memory_format=torch.channels_last)
    for mode in ("eval", "batch", "train"):
        for group_size in (None, 3):
            layer = trained(BatchNorm(C))
            set_bn_mode(layer, mode)
            set_group_size(layer, group_size)
            assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_a_copy_shares_the_process_group_but_no_storage() -> None:
    class Group:
        def __deepcopy__(self, memo: dict) -> None:
            raise TypeError("a process group cannot be copied")

    model = nn.Sequential(BatchNorm(C), MixtureBatchNorm(C))
    group = Group()
    set_process_group(model, group)
    duplicate = copy.deepcopy(model)
    assert all(layer.process_group is group for layer in norm_layers(duplicate))
    assert not {t.data_ptr() for t in model.state_dict().values()} & {
        t.data_ptr() for t in duplicate.state_dict().values()
    }


def test_a_new_layer_is_torchs_own() -> None:
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    assert (ours.eps, ours.momentum) == (theirs.eps, theirs.momentum)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_training_is_what_train_means_without_an_argument() -> None:
    layer = BatchNorm(3).eval()
    assert (layer.mode, layer.training) == ("eval", False)
    layer.train()
    assert (layer.mode, layer.training) == ("train", True)


@pytest.mark.parametrize("group_size", [None, 2])
def test_a_recomputed_forward_gives_the_same_and_moves_nothing_and_the_next_one_does(group_size: int | None) -> None:
    layer = BatchNorm(3)
    layer.group_size = group_size
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 3
    first = layer(x)
    moved = copy.deepcopy(layer.state_dict())
    for _ in range(2):  # also where the first one fails
        with suppress(RuntimeError), recomputation(nn.Sequential(layer)):
            assert torch.equal(layer(x), first)
            assert not layer.updates
            raise RuntimeError
    assert all(torch.equal(value, moved[name]) for name, value in layer.state_dict().items())
    layer(x)
    assert layer.num_batches_tracked == 2
    assert (layer.running_mean > moved["running_mean"]).all()


@pytest.mark.parametrize("group_size", [None, 4])
def test_a_group_that_is_alone_moves_statistics_by_its_share_of_the_step(group_size: int | None) -> None:
    layer, reference = trained(BatchNorm(C)), trained(BatchNorm(C))
    set_group_size(layer, group_size)
    before, x = layer.running_mean.clone(), features(3)
    with group_shares(layer, (0.6,)):
        assert torch.allclose(layer(x), reference(x))
    moved, whole = layer.running_mean - before, reference.running_mean - before
    assert torch.allclose(moved, 0.6 * whole, atol=1e-6)
    assert whole.abs().max() > 0.01


def test_shares_hold_within_their_block_alone_and_also_after_an_error() -> None:
    layer = BatchNorm(C)
    with group_shares(layer, (0.6,)):
        assert layer.shares == (0.6,)
    assert layer.shares is None
    with pytest.raises(KeyError), group_shares(layer, (0.6,)):
        raise KeyError
    assert layer.shares is None
