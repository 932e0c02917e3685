"""Pre-activation and wide networks against their papers' definitions written out here, and what a network costs.

Torchvision has the post-activation networks, against which ``test_models_weights.py`` holds ours; it has none of these.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from distributed_at.config import ModelConfig
from distributed_at.models import build_model, measure
from distributed_at.models.statistics import count_macs

Weights = dict[str, torch.Tensor]


def with_weights(config: ModelConfig) -> tuple[torch.nn.Module, Weights]:
    """Return a network whose weights and running statistics hide nothing, with its state."""
    torch.manual_seed(0)
    model = build_model(config, num_classes=5).double().eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            noise = torch.randn_like(tensor) if tensor.ndim == 1 else torch.zeros_like(tensor)
            tensor.copy_(noise.abs() + 0.5 if "var" in name else tensor + 0.5 * noise)
    return model, state


def images(size: int = 16) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def conv(x: torch.Tensor, kernel: torch.Tensor, stride: int = 1) -> torch.Tensor:
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def norm_relu(x: torch.Tensor, state: Weights, name: str) -> torch.Tensor:
    mean, var, scale, shift = (
        state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp_min(0)


def preact_resnet(
    state: Weights, x: torch.Tensor, blocks: tuple[int, ...], *, raw: bool, imagenet: bool
) -> torch.Tensor:
    """He et al. 2016b: norm, activation, convolution; the bottleneck's 3x3 is the one that strides."""
    x = conv(x, state["conv1.weight"], 2 if imagenet else 1)
    if imagenet:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage, count in enumerate(blocks, 1):
        for index in range(count):
            name, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            out = norm_relu(x, state, f"{name}.bn1")
            shortcut = x
            if f"{name}.shortcut.0.weight" in state:
                shortcut = conv(x if raw else out, state[f"{name}.shortcut.0.weight"], stride)
            if f"{name}.conv3.weight" in state:
                out = conv(out, state[f"{name}.conv1.weight"])
                out = conv(norm_relu(out, state, f"{name}.bn2"), state[f"{name}.conv2.weight"], stride)
                out = conv(norm_relu(out, state, f"{name}.bn3"), state[f"{name}.conv3.weight"])
            else:
                out = conv(out, state[f"{name}.conv1.weight"], stride)
                out = conv(norm_relu(out, state, f"{name}.bn2"), state[f"{name}.conv2.weight"])
            x = shortcut + out
    features = norm_relu(x, state, "bn").mean(dim=(2, 3))
    return features @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_preactivation_networks_compute_what_their_paper_defines(block: str, stem: str, raw: bool) -> None:
    shortcut = "raw" if raw else "activated"
    config = ModelConfig(
        arch="preact_resnet", blocks=(1, 2, 1), block=block, base_width=4, stem=stem, preact_shortcut=shortcut
    )
    model, state = with_weights(config)
    x = images(32 if stem == "imagenet" else 16)
    expected = preact_resnet(state, x, (1, 2, 1), raw=raw, imagenet=stem == "imagenet")
    assert expected.std() > 0.01
    torch.testing.assert_close(model(x), expected)


def wide_resnet(state: Weights, x: torch.Tensor, count: int) -> torch.Tensor:
    """Zagoruyko & Komodakis 2016: three stages at full, half and quarter size; projections take the activated input."""
    x = conv(x, state["conv1.weight"])
    for stage in (1, 2, 3):
        for index in range(count):
            name = f"block{stage}.layer.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            out = norm_relu(x, state, f"{name}.bn1")
            projection = state.get(f"{name}.convShortcut.weight")
            shortcut = x if projection is None else conv(out, projection, stride)
            out = norm_relu(conv(out, state[f"{name}.conv1.weight"], stride), state, f"{name}.bn2")
            x = shortcut + conv(out, state[f"{name}.conv2.weight"])
    features = norm_relu(x, state, "bn1").mean(dim=(2, 3))
    return features @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 2)])
def test_wide_networks_compute_what_their_paper_defines(depth: int, widen: int) -> None:
    model, state = with_weights(ModelConfig(arch="wide_resnet", depth=depth, widen=widen))
    expected = wide_resnet(state, images(), (depth - 4) // 6)
    assert expected.std() > 0.01
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("norm", ["bn", "mbn", "gn"])
def test_norm_layers_take_eps_and_momentum_from_the_recipe(norm: str) -> None:
    config = ModelConfig(
        arch="resnet", blocks=(1,), block="basic", base_width=4, stem="cifar", norm=norm, groups=2,
        bn_eps=0.3, bn_momentum=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config, num_classes=5).double()
    seen = []
    model.bn1.register_forward_hook(lambda layer, given, out: seen.append((given[0], out)))
    model(images())
    ((x, out),) = seen
    if norm == "gn":
        torch.testing.assert_close(out, F.group_norm(x, 2, eps=0.3))
        return
    mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
    torch.testing.assert_close(out, (x - mean.view(1, -1, 1, 1)) / (var + 0.3).sqrt().view(1, -1, 1, 1))
    layer = model.bn1.adv if norm == "mbn" else model.bn1
    torch.testing.assert_close(layer.running_mean, 0.02 * mean)
    torch.testing.assert_close(layer.running_var, 0.98 + 0.02 * x.var(dim=(0, 2, 3), unbiased=True))


NETWORKS = {
    "bottleneck": ModelConfig(arch="resnet", blocks=(1, 1), block="bottleneck", base_width=8),
    "preact": ModelConfig(arch="preact_resnet", blocks=(1, 1), block="basic", base_width=8, stem="cifar"),
    "wide": ModelConfig(arch="wide_resnet", depth=10, widen=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_adds_are_half_the_flops_that_torch_counts(name: str) -> None:
    model = build_model(NETWORKS[name], num_classes=7).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    flops = counter.get_total_flops()
    assert 2 * count_macs(NETWORKS[name], num_classes=7, image_size=32) == flops
    assert 2 * measure(NETWORKS[name], num_classes=7, image_size=32).macs == flops


def test_activations_are_those_of_one_image_counted_by_hand() -> None:
    config = ModelConfig(arch="resnet", blocks=(1, 1), block="basic", base_width=8, stem="cifar")
    stem, first, second = 8 * 16 * 16, 2 * 8 * 16 * 16, (2 + 1) * 16 * 8 * 8  # the second stage has a projection
    assert measure(config, num_classes=10, image_size=16).activations == stem + first + second + 10


def test_bytes_of_an_attack_are_those_that_a_real_one_keeps_for_one_image() -> None:
    config = ModelConfig(arch="resnet", blocks=(1, 1), block="basic", base_width=8, stem="cifar")
    model = build_model(config, num_classes=10).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    owned = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = (tensor.numel() * tensor.element_size(), tensor)
        return tensor

    x = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(x)
    assert logits.shape == (4, 10)
    real = sum(size for pointer, (size, _) in kept.items() if pointer not in owned) / 4
    found = measure(config, num_classes=10, image_size=16)
    assert found.input_grad_bytes == pytest.approx(real, rel=0.03)
    assert found.input_grad_bytes < found.train_bytes
