"""Initial weights, parameter names, weight decay groups, and weights published for torchvision's networks."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision

from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError
from distributed_at.models import (
    BRANCHES,
    bn_buffers,
    build_model,
    load_torchvision_state_dict,
    on_branch,
    weight_decay_groups,
)

SHARED = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@pytest.mark.parametrize("arch", SHARED)
def test_names_shapes_and_order_are_those_of_torchvision(arch: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)().state_dict()
        ours = build_model(ModelConfig(arch=arch), num_classes=1000).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("arch", SHARED)
def test_same_weights_give_identical_logits(arch: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=7)
    ours = build_model(ModelConfig(arch=arch), num_classes=7)
    load_torchvision_state_dict(ours, theirs.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))  # train mode: this moves the running statistics of both
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_torchvision_weights_fill_both_halves_of_a_mixture() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7)
    x = torch.rand(2, 3, 64, 64)
    theirs(x)
    ours = build_model(ModelConfig(arch="resnet18", norm="mbn"), num_classes=7)
    load_torchvision_state_dict(ours, theirs.state_dict())
    expected = theirs.eval()(x)
    ours.eval()
    for branch in BRANCHES:
        with on_branch(ours, branch):
            assert torch.equal(ours(x), expected)


def test_foreign_weights_are_refused_by_name_and_nothing_is_copied() -> None:
    ours = build_model(ModelConfig(arch="resnet18"), num_classes=7)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ConfigError, match=r"fc\.weight is \(5, 512\), not \(7, 512\)"):
        load_torchvision_state_dict(ours, torchvision.models.resnet18(num_classes=5).state_dict())
    with pytest.raises(ConfigError, match=r"unknown layer1\.2"):
        load_torchvision_state_dict(ours, torchvision.models.resnet34(num_classes=7).state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name])


def convolutions(model: torch.nn.Module) -> list[torch.nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 20_000]


def fan_out(conv: torch.nn.Conv2d) -> int:
    return conv.weight.shape[0] * conv.weight[0, 0].numel()


@pytest.mark.parametrize("init", ["torchvision", "xie", "wrn"])
def test_initial_kernels_have_variance_two_over_fan_out(init: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch="resnet18", init=init), num_classes=100)
    for conv in convolutions(model):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out(conv)), rel=0.03)
        cut = conv.weight.abs().max().item() / math.sqrt(2 / fan_out(conv))
        assert (cut < 2.3) == (init == "xie"), "only Xie & Yuille's normal is truncated"


def test_initial_classifier_follows_the_rule() -> None:
    torch.manual_seed(0)
    xie = build_model(ModelConfig(arch="resnet18", init="xie"), num_classes=100)
    assert xie.fc.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert xie.fc.bias.abs().max() == 0
    assert build_model(ModelConfig(arch="resnet18", init="wrn"), num_classes=100).fc.bias.abs().max() == 0
    assert build_model(ModelConfig(arch="resnet18", init="torchvision"), num_classes=100).fc.bias.abs().max() > 0


def test_default_rule_is_the_architectures_own() -> None:
    def std_ratio(config: ModelConfig) -> float:
        torch.manual_seed(0)
        conv = convolutions(build_model(config, num_classes=10))[-1]
        return conv.weight.std().item() / math.sqrt(2 / fan_out(conv))

    assert std_ratio(ModelConfig(arch="resnet18")) == pytest.approx(1, rel=0.02)
    assert std_ratio(ModelConfig(arch="wide_resnet", depth=10, widen=4)) == pytest.approx(1, rel=0.02)
    # torch's own: uniform of variance 1 / (3 fan_in)
    assert std_ratio(ModelConfig(arch="preact_resnet18")) == pytest.approx(math.sqrt(1 / 6), rel=0.02)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("norm", ["bn", "gn", "mbn"])
@pytest.mark.parametrize("init", ["default", "torchvision", "xie", "wrn"])
def test_zero_init_gamma_makes_every_residual_branch_vanish(block: str, norm: str, init: str) -> None:
    config = ModelConfig(
        arch="resnet", blocks=(2, 1), block=block, base_width=32, norm=norm, init=init, zero_init_gamma=True
    )
    model = build_model(config, num_classes=10)
    last = "bn2" if block == "basic" else "bn3"
    scales = {
        name: p for name, p in model.named_parameters() if ("bn" in name or "downsample.1" in name) and "weight" in name
    }
    zero = {name for name, p in scales.items() if p.abs().max() == 0}
    assert zero == {name for name in scales if f".{last}." in name}
    assert all((p == 1).all() for name, p in scales.items() if name not in zero)
    x = torch.rand(2, 128 if block == "bottleneck" else 32, 8, 8)
    assert torch.equal(model.layer1[1](x), x), "the block is the identity for activations"


def test_same_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(ModelConfig(arch="preact_resnet18"), num_classes=10).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weight_decay_rules_pick_what_they_say() -> None:
    config = ModelConfig(arch="resnet", blocks=(1,), block="basic", base_width=8, norm="mbn")
    model = build_model(config, num_classes=10)
    everything = dict(model.named_parameters())
    kernels = {"conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "fc.weight"}
    for rule, expected in (("all", set(everything)), ("no_norm_bias", kernels), ("kernels", kernels)):
        decay, no_decay = weight_decay_groups(model, rule)
        assert {name for name, _ in decay} == expected
        assert {name for name, _ in no_decay} == set(everything) - expected
        assert all(parameter is everything[name] for name, parameter in decay + no_decay)


def test_no_norm_bias_and_kernels_differ_on_other_parameters() -> None:
    model = build_model(ModelConfig(arch="resnet", blocks=(1,), block="basic", base_width=8), num_classes=10)
    model.register_parameter("temperature", torch.nn.Parameter(torch.ones(())))
    assert "temperature" in dict(weight_decay_groups(model, "no_norm_bias")[0])
    assert "temperature" in dict(weight_decay_groups(model, "kernels")[1])


def test_unknown_weight_decay_rule_is_refused_with_the_nearest() -> None:
    model = build_model(ModelConfig(arch="resnet", blocks=(1,), block="basic", base_width=8), num_classes=10)
    with pytest.raises(ConfigError, match="Did you mean 'kernels'"):
        weight_decay_groups(model, "kernel")


def test_bn_buffers_are_the_live_tensors_under_their_state_dict_names() -> None:
    config = ModelConfig(arch="resnet", blocks=(1,), block="basic", base_width=8, norm="mbn")
    model = build_model(config, num_classes=10)
    buffers = bn_buffers(model)
    expected = {n for n in model.state_dict() if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert set(buffers) == expected
    assert len(expected) == 3 * 2 * 3
    named = dict(model.named_buffers())
    assert all(buffer is named[name] for name, buffer in buffers.items())
    assert bn_buffers(build_model(config.model_copy(update={"norm": "gn", "groups": 4}), num_classes=10)) == {}


@pytest.mark.parametrize(("unknown", "told"), [(4, ""), (6, "; and 2 more")])
def test_four_problems_are_named_and_the_rest_counted(unknown: int, told: str) -> None:
    model = build_model(ModelConfig(arch="resnet18"), num_classes=2)
    state = {**model.state_dict(), **{f"extra{i}": torch.zeros(1) for i in range(unknown)}}
    with pytest.raises(ConfigError) as caught:
        load_torchvision_state_dict(model, state)
    assert str(caught.value).endswith("; ".join(f"unknown extra{i}" for i in range(4)) + told)
