"""Which batch norms go into a convolution, and which must not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.engine.twin.folding import GroupNormReLU
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import BatchNorm, build_model


def build(**fields: object) -> nn.Module:
    settings = {"arch": "resnet18", "stem": "cifar", "base_width": 8, "groups": 4, **fields}
    return build_model(ModelConfig.model_validate(settings), num_classes=5)


def norms(twin: Twin) -> int:
    return sum(isinstance(layer, BatchNorm) for layer in twin.module.modules())


@pytest.mark.parametrize("norm", ["bn", "mbn"])
def test_post_activation_network_keeps_no_batch_norm(norm: str) -> None:
    twin = Twin(build(norm=norm), bn_mode="eval")
    assert (twin.folded, norms(twin)) == (20, 0)


def test_narrow_strided_projections_fold_as_well() -> None:
    network = build(base_width=4).double()
    twin = Twin(network, bn_mode="eval")
    assert (twin.folded, norms(twin)) == (20, 0)
    x = torch.rand(3, 3, 17, 17, dtype=torch.float64)
    torch.testing.assert_close(twin(x), network.eval()(x), rtol=1e-10, atol=1e-10)


def test_preactivation_folds_only_norms_behind_a_convolution() -> None:
    # Per block bn2 stands behind conv1, and bn1 behind an addition. The very first bn1 follows the stem directly, but
    # the stem is also read by the first shortcut, so it stays.
    twin = Twin(build(arch="preact_resnet18"), bn_mode="eval")
    assert (twin.folded, norms(twin)) == (8, 9)


@pytest.mark.parametrize("bn_mode", ["batch", "train"])
def test_batch_statistics_are_never_folded(bn_mode: str) -> None:
    twin = Twin(build(), bn_mode=bn_mode)
    assert (twin.folded, norms(twin)) == (0, 20)


def test_group_norm_takes_the_relu_behind_it() -> None:
    twin = Twin(build(norm="gn"), bn_mode="eval", fuse_group_norm=True)
    fused = [layer for layer in twin.module.modules() if isinstance(layer, GroupNormReLU)]
    assert [layer.relu for layer in fused].count(True) == 9  # the stem's and each block's first
    assert len(fused) == 20


def test_fused_group_norm_keeps_the_recipes_eps() -> None:
    twin = Twin(build(norm="gn", bn_eps=0.25), bn_mode="eval", fuse_group_norm=True)
    fused = [layer for layer in twin.module.modules() if isinstance(layer, GroupNormReLU)]
    assert {layer.eps for layer in fused} == {0.25}


def test_other_activations_stay_behind_group_norm() -> None:
    twin = Twin(build(norm="gn", activation="silu"), bn_mode="eval", fuse_group_norm=True)
    fused = [layer for layer in twin.module.modules() if isinstance(layer, GroupNormReLU)]
    assert not any(layer.relu for layer in fused)


def test_convolution_with_a_bias_folds_exactly() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3, padding_mode="reflect")
            self.bn = BatchNorm(6, eps=0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(x)).mean((2, 3))

    torch.manual_seed(0)
    net = Net().double()
    net.bn.running_mean.uniform_(-1, 1)
    net.bn.running_var.uniform_(0.1, 2)
    net.eval()
    twin = Twin(net, bn_mode="eval")
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    assert twin.folded == 1
    assert torch.allclose(twin(x), net(x), rtol=1e-12, atol=1e-13)


def test_convolution_read_twice_is_not_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = BatchNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return (self.bn(y) + y).mean((2, 3))

    net = Net().double().eval()
    net.bn.running_mean.fill_(0.5)
    twin = Twin(net, bn_mode="eval")
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert twin.folded == 0
    assert torch.allclose(twin(x), net(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_laid_out_and_cast_once(dtype: str) -> None:
    twin = Twin(build(), bn_mode="eval", dtype=dtype)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for layer in twin.module.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)
            assert layer.weight.dtype == wanted
            assert not layer.weight.requires_grad
