"""A norm of a plug-in: the layer that the file makes stands in our networks and in others', and never another one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from distributed_at.catalogue.norms import NORMS, Norm
from distributed_at.config import ModelConfig
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import build_model, weight_decay_groups


class Scale(nn.Module):
    """A norm that is only a scale, which only it has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.view(1, -1, 1, 1)


@pytest.fixture
def norms() -> Iterator[None]:
    own = {
        "instance": Norm(title="instance norm", label="IN", layer=lambda config, n: nn.InstanceNorm2d(n, affine=True)),
        "scale": Norm(title="scale", label="S", layer=lambda config, n: Scale(n)),
        "taken": Norm(
            title="scale by the weights that were there",
            label="T",
            layer=lambda config, n: Scale(n),
            take_over=lambda config, layer: _with(layer),
        ),
    }
    for name, entry in own.items():
        NORMS.add(name, entry, origin="a test")
    yield
    for name in own:
        NORMS.remove(name)


def _with(layer: nn.BatchNorm2d) -> Scale:
    made = Scale(layer.num_features)
    made.scale = layer.weight
    return made


@pytest.mark.parametrize("arch", ["resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize(("norm", "kind"), [("instance", nn.InstanceNorm2d), ("scale", Scale), ("taken", Scale)])
def test_layer_of_the_plugin_stands_everywhere(norms: None, arch: str, norm: str, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(arch=arch, norm=norm), num_classes=10, image_size=64).double().eval()
    layers = [m for m in network.modules() if isinstance(m, kind)]
    assert len(layers) == 20
    assert not [m for m in network.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d)]
    if norm == "taken" and ":" in arch:
        assert all((layer.scale == 1).all() for layer in layers)
    x, y = torch.rand(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 2])
    twin, gradients = Twin(network, bn_mode="eval"), []
    for model in (network, twin):
        image = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(nn.functional.cross_entropy(model(image), y), image)[0])
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[0].norm()


def test_parameters_of_torch_s_norms_are_norms_to_weight_decay(norms: None) -> None:
    network = build_model(ModelConfig(arch="resnet18", norm="instance"), num_classes=10, image_size=32)
    _, free = weight_decay_groups(network, "no_norm_bias")
    spared = {id(parameter) for _, parameter in free}
    own = [p for m in network.modules() if isinstance(m, nn.InstanceNorm2d) for p in m.parameters()]
    assert len(own) == 40
    assert all(id(p) in spared for p in own)
