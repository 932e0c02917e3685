"""Parameter counts, multiply-accumulates and saved activations against published figures and a closed form."""

from __future__ import annotations

import pytest
import torch

from distributed_at.config import ModelConfig
from distributed_at.models import LAYOUTS, build_model, measure

IMAGENET = {  # millions of parameters, GMACs at 224 pixels
    "resnet18": (11.690, 1.81),
    "resnet34": (21.798, 3.66),
    "resnet50": (25.557, 4.09),
    "resnet101": (44.549, 7.80),
    "resnet152": (60.193, 11.51),
    "resnet200": (64.7, 15.0),
    "resnet338": (101.0, 25.1),
    "resnet518": (147.9, 38.2),
    "resnet638": (179.2, 46.9),
}
WIDE = {  # millions of parameters, ten classes
    (28, 10): 36.48,
    (28, 15): 82.04,
    (28, 20): 145.82,
    (34, 10): 46.160,
    (34, 15): 103.82,
    (34, 20): 184.532,
    (40, 8): 35.75,
    (40, 10): 55.84,
    (46, 15): 147.38,
    (70, 16): 266.80,
}
CIFAR = {
    "preact_resnet18": 11.172,
    "preact_resnet34": 21.280,
    "preact_resnet50": 23.513,
    "resnet18": 11.174,
    "resnet50": 23.521,
}


@pytest.mark.parametrize("arch", IMAGENET)
def test_imagenet_networks_have_the_published_size_and_cost(arch: str) -> None:
    parameters, gmacs = IMAGENET[arch]
    found = measure(ModelConfig(arch=arch), num_classes=1000, image_size=224)
    assert found.parameters / 1e6 == pytest.approx(parameters, abs=0.05 if parameters > 64 else 0.0006)
    assert found.macs / 1e9 == pytest.approx(gmacs, abs=0.055)


@pytest.mark.parametrize("arch", [name for name, layout in LAYOUTS.items() if layout.block == "bottleneck"])
def test_bottleneck_depth_is_what_the_name_says(arch: str) -> None:
    assert 3 * sum(LAYOUTS[arch].blocks) + 2 == int("".join(c for c in arch if c.isdigit()))


@pytest.mark.parametrize(("depth", "widen"), WIDE)
def test_wide_networks_have_no_unused_block(depth: int, widen: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(arch="wide_resnet", depth=depth, widen=widen), num_classes=10)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(WIDE[depth, widen], abs=0.0006 if depth == 34 and widen != 15 else 0.006)


@pytest.mark.parametrize("arch", CIFAR)
def test_cifar_networks_have_the_published_size(arch: str) -> None:
    found = measure(ModelConfig(arch=arch, stem="cifar"), num_classes=10, image_size=32)
    assert found.parameters / 1e6 == pytest.approx(CIFAR[arch], abs=0.0006)


def bottleneck_macs(blocks: tuple[int, ...], image_size: int, num_classes: int) -> int:
    """Closed form for a bottleneck net with the ImageNet stem, stride on the 3x3."""
    size = image_size // 2
    total = size**2 * 64 * 3 * 49
    size, channels = size // 2, 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            out = size // stride
            total += size**2 * channels * width + out**2 * 9 * width**2 + out**2 * width * 4 * width
            if index == 0:
                total += out**2 * channels * 4 * width
            size, channels = out, 4 * width
    return total + channels * num_classes


@pytest.mark.parametrize("image_size", [64, 224])
@pytest.mark.parametrize("arch", ["resnet50", "resnet152", "resnet338"])
def test_measured_cost_equals_the_closed_form(arch: str, image_size: int) -> None:
    found = measure(ModelConfig(arch=arch), num_classes=1000, image_size=image_size)
    assert found.macs == bottleneck_macs(LAYOUTS[arch].blocks, image_size, 1000)


def test_second_set_of_batch_norm_adds_parameters_and_buffers_but_no_cost() -> None:
    plain = measure(ModelConfig(arch="resnet50"), num_classes=1000, image_size=64)
    mixture = measure(ModelConfig(arch="resnet50", norm="mbn"), num_classes=1000, image_size=64)
    assert plain.buffers == 53_120
    assert mixture.buffers == 2 * plain.buffers
    assert mixture.parameters - plain.parameters == 53_120
    assert mixture.macs == plain.macs
    assert mixture.activations == plain.activations


def test_saved_bytes_grow_with_the_image_and_match_a_real_forward() -> None:
    config = ModelConfig(arch="resnet", blocks=(1, 1), block="basic", base_width=8, stem="cifar")
    small, large = (measure(config, num_classes=10, image_size=size) for size in (16, 32))
    assert 3.9 < large.train_bytes / small.train_bytes < 4.1
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    model = build_model(config, num_classes=10).to(memory_format=torch.channels_last)
    owned = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    x = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(x)
    assert logits.shape == (2, 10)
    real = sum(size for pointer, size in kept.items() if pointer not in owned) / 2
    assert small.train_bytes == pytest.approx(real, rel=0.03)


def test_checkpointing_keeps_fewer_bytes_for_training_and_as_many_for_the_attack() -> None:
    config = ModelConfig(arch="resnet50")
    plain = measure(config, num_classes=1000, image_size=64)
    recomputing = measure(config.model_copy(update={"activation_checkpointing": True}), num_classes=1000, image_size=64)
    assert recomputing.train_bytes < 0.5 * plain.train_bytes
    assert recomputing.input_grad_bytes == plain.input_grad_bytes
