"""Regions: the whole network's results, one compilation for each distinct block, and nothing shared that differs."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from distributed_at.config import ModelConfig
from distributed_at.engine.twin.compiled_attack import REGIONAL_CONVOLUTIONS, StaticIteration, convolutions_to_compile
from distributed_at.engine.twin.regions import CompiledRegions, count_convolutions, cut
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import build_model
from tests.unit.test_compiled_attack import BATCH, attack, batch, compilations, disturb  # noqa: F401

RESNET = {"arch": "resnet", "block": "bottleneck", "stem": "cifar", "base_width": 2}


def build(**fields: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(ModelConfig.model_validate({**RESNET, **fields}), num_classes=5).eval()


def twin_of(model: nn.Module, *, bn_mode: str = "eval", dtype: str = "fp32") -> Twin:
    return Twin(model, bn_mode=bn_mode, dtype=dtype, fuse_group_norm=True)


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs.append(graph)
        return graph


NETWORKS = [
    ({"blocks": (3, 3)}, "eval"),
    ({"blocks": (4,)}, "batch"),
    ({"blocks": (4,), "norm": "mbn"}, "eval"),
    ({"blocks": (4,), "norm": "gn", "groups": 2}, "eval"),
    ({"blocks": (4,), "block": "basic", "activation": "silu"}, "eval"),
    ({"arch": "preact_resnet", "blocks": (4,), "block": "basic"}, "eval"),
    ({"arch": "wide_resnet", "depth": 22, "widen": 1, "block": None}, "eval"),
]


@pytest.mark.parametrize(("fields", "bn_mode"), NETWORKS)
def test_regions_give_the_gradient_of_the_whole_bit_for_bit_and_compile_each_kind_once(
    fields: dict,
    bn_mode: str,
    compilations,  # noqa: F811
) -> None:
    backend = Counting()
    twin = twin_of(build(**fields), bn_mode=bn_mode)
    regional = CompiledRegions(twin.module, backend=backend)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in (twin, regional, regional):
        image = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(image).square().sum(), image)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    kinds = len({region.kind for region in regional.regions})
    assert kinds == len(backend.graphs) == compilations() < len(regional.regions)


def test_resnets_101_and_152_have_ten_kinds_of_regions() -> None:
    for arch, regions in (("resnet101", 34), ("resnet152", 51)):
        found = cut(twin_of(build(arch=arch)).module)
        assert (len(found), len({region.kind for region in found})) == (regions, 10)


def test_network_without_blocks_is_one_region() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    (region,) = cut(fx.symbolic_trace(chain))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(region.module(x), chain(x))


def residual(*layers: nn.Module) -> fx.GraphModule:
    """Return a network of residual blocks, one a layer."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.relu()
            for layer in self.layers:
                x = x + layer(x)
            return x

    return fx.symbolic_trace(Network())


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
    ],
)
def test_blocks_that_differ_share_nothing(other: nn.Module) -> None:
    first, last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
    _, a, b, c = (region.kind for region in cut(residual(first, other, last)))
    assert a != b
    assert a == c


def test_a_setting_of_a_leaf_layer_that_no_text_shows_separates_kinds() -> None:
    twin = twin_of(build(blocks=(4,), norm="gn", groups=2))
    kinds = [region.kind for region in cut(twin.module)]
    assert kinds[1] != kinds[2] == kinds[3]
    norm = [m for n, m in twin.module.named_modules() if n.endswith("layer1.2.bn2")]
    norm[0].eps *= 2
    changed = [region.kind for region in cut(twin.module)]
    assert changed[2] == kinds[2] == changed[2]
    assert changed[3] != kinds[3]


def test_one_layer_called_twice_is_not_two_layers() -> None:
    conv, one, two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    _, twice, separate = cut(residual(nn.Sequential(conv, conv), nn.Sequential(one, two)))
    assert twice.kind != separate.kind
    assert (len(twice.tensors), len(separate.tensors)) == (2, 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_regional_iteration_never_compiles_again(dtype: str, compilations) -> None:  # noqa: F811
    model, pgd = build(blocks=(3,)), attack()
    twin = twin_of(model, dtype=dtype)
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, regional=True, backend=Counting())
    pgd.perturb(twin, *batch(), iteration=static)
    first = compilations()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(3):
            for count in (BATCH, BATCH - 1, 1):
                disturb(model)
                twin.refresh()
                x, y = batch(count)
                eps = pgd.threat.eps * (epoch + 1) / 3
                found = pgd.perturb(twin, x, y, epoch=epoch, eps=eps, iteration=static)
                expected = pgd.perturb(twin, x, y, epoch=epoch, eps=eps)
                assert ((found - expected).abs() > 1e-6).float().mean() < (0.001 if dtype == "fp32" else 0.2)
    assert (static.failed, compilations()) == ("", first)


def test_only_deep_networks_are_compiled_by_regions() -> None:
    shallow, deep = twin_of(build(arch="resnet50")), twin_of(build(arch="resnet101"))
    assert convolutions_to_compile(shallow) == count_convolutions(shallow.module) <= REGIONAL_CONVOLUTIONS
    assert convolutions_to_compile(deep) < 40 < REGIONAL_CONVOLUTIONS < count_convolutions(deep.module)


def test_failing_compiler_leaves_the_plain_attack_of_a_deep_network_too(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler here")

    pgd, twin = attack(), twin_of(build(blocks=(2,)))
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, regional=True, backend=broken)
    x, y = batch()
    assert torch.equal(pgd.perturb(twin, x, y, iteration=static), pgd.perturb(twin, x, y))
    assert caplog.text.count("runs without torch.compile") == 1
