"""The attack's view of the network: the same gradients as the live one, for every network, norm and activation."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import LAYOUTS, bn_buffers, build_model, set_branch
from distributed_at.models.activations import ACTIVATIONS
from distributed_at.models.norm import norm_layers

CLASSES = 7
# fp32: relative error of the whole gradient; folding and channels-last change the order of roundings alone.
BOUNDS = {torch.float64: 1e-10, torch.float32: 5e-3}


def network(dtype: torch.dtype = torch.float64, **fields: object) -> nn.Module:
    """Return a narrow network whose norms have statistics, scales and shifts of their own, left in training mode."""
    settings: dict[str, object] = {"arch": "resnet", "stem": "cifar", "base_width": 4, "groups": 2, **fields}
    if settings["arch"] in ("resnet", "preact_resnet"):
        settings = {"blocks": (1, 2), "block": "bottleneck", **settings}
    if settings["arch"] == "wide_resnet":
        settings = {"depth": 10, "widen": 1, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(repr(sorted(settings)).encode()))
        model = build_model(ModelConfig.model_validate(settings), num_classes=CLASSES)
        disturb(model)
    return model.to(dtype).train()


def disturb(model: nn.Module) -> None:
    """Change every parameter and statistic in place, as an optimiser step and a train-mode forward would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for layer in norm_layers(model):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-0.3, 0.3)
        for name, buffer in bn_buffers(model).items():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.3, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)


def images(model: nn.Module, size: int = 8, n: int = 3) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return torch.rand((n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def gradient(model, x: torch.Tensor) -> torch.Tensor:
    image = x.clone().requires_grad_()
    loss = F.cross_entropy(model(image), torch.arange(len(x)) % CLASSES, reduction="sum")
    return torch.autograd.grad(loss, image)[0]


def live_gradient(model: nn.Module, x: torch.Tensor, branch: str = "adv") -> torch.Tensor:
    still = copy.deepcopy(model).eval()
    set_branch(still, branch)
    return gradient(still, x)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


CASES = [{"arch": arch} for arch in LAYOUTS if arch not in ("resnet338", "resnet518", "resnet638", "resnet200")]
CASES += [{"arch": "resnet", "blocks": (1, 2), "block": block} for block in ("basic", "bottleneck")]
CASES += [{"arch": "resnet", "activation": name} for name in ACTIVATIONS]
CASES += [{"arch": "preact_resnet", "preact_shortcut": how} for how in ("activated", "raw")]
CASES += [{"arch": "resnet", "stem": "imagenet"}, {"arch": "preact_resnet", "stem": "imagenet"}]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("norm", ["bn", "mbn", "gn"])
def test_gradient_equals_the_live_networks_in_float64(norm: str, case: dict) -> None:
    model = network(norm=norm, **case)
    x = images(model, 32 if case.get("stem") == "imagenet" else 8)
    twin = Twin(model, bn_mode="eval", fuse_group_norm=True)
    assert relative_error(gradient(twin, x), live_gradient(model, x)) < BOUNDS[torch.float64]


@pytest.mark.parametrize("arch", ["resnet18", "preact_resnet18", "wide_resnet", "resnet50"])
@pytest.mark.parametrize("norm", ["bn", "mbn", "gn"])
def test_gradient_is_near_the_live_networks_in_float32(norm: str, arch: str) -> None:
    model = network(torch.float32, arch=arch, norm=norm)
    x = images(model)
    twin = Twin(model, bn_mode="eval")
    assert relative_error(gradient(twin, x), live_gradient(model, x)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("arch", ["resnet", "preact_resnet", "wide_resnet"])
@pytest.mark.parametrize("bn_mode", ["eval", "batch", "train"])
def test_unfolded_twin_in_the_same_layout_gives_the_live_gradient_bitwise(bn_mode: str, arch: str) -> None:
    from distributed_at.models import set_bn_mode

    model = network(torch.float32, arch=arch)
    still = copy.deepcopy(model).eval()
    set_bn_mode(still, bn_mode)
    x = images(model)
    expected = gradient(still, x)
    assert torch.equal(gradient(Twin(model, bn_mode=bn_mode, fold=False, channels_last=False), x), expected)


@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_mixture_folds_the_branch_that_the_attack_names(branch: str) -> None:
    model = network(norm="mbn")
    x = images(model)
    twin = Twin(model, bn_mode="eval", branch=branch)
    other = {"clean": "adv", "adv": "clean"}[branch]
    assert relative_error(gradient(twin, x), live_gradient(model, x, branch)) < BOUNDS[torch.float64]
    assert relative_error(gradient(twin, x), live_gradient(model, x, other)) > 1e-2


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["bn", "mbn", "gn"])
def test_refresh_makes_a_step_visible_in_place(norm: str, dtype: str) -> None:
    model = network(torch.float32, norm=norm)
    twin = Twin(model, bn_mode="eval", dtype=dtype)
    addresses = [t.data_ptr() for t in twin.module.parameters()]
    x = images(model)
    before = twin(x)
    disturb(model)
    twin.refresh()
    fresh = Twin(model, bn_mode="eval", dtype=dtype)
    assert torch.equal(twin(x), fresh(x))
    assert not torch.allclose(twin(x), before, atol=1e-3)
    assert [t.data_ptr() for t in twin.module.parameters()] == addresses


def test_train_mode_moves_the_live_statistics_and_other_modes_do_not() -> None:
    model = network(torch.float32)
    x = images(model)
    for mode, moves in (("eval", False), ("batch", False), ("train", True)):
        before = {name: buffer.clone() for name, buffer in bn_buffers(model).items()}
        gradient(Twin(model, bn_mode=mode), x)
        same = all(torch.equal(buffer, before[name]) for name, buffer in bn_buffers(model).items())
        assert same != moves, mode


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bn_mode", ["eval", "batch", "train"])
def test_attack_leaves_parameters_gradients_and_flags_alone(bn_mode: str, dtype: str) -> None:
    model = network(torch.float32, norm="mbn")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = [p.detach().clone() for p in model.parameters()]
    flags = [layer.training for layer in model.modules()]
    random_state = torch.get_rng_state()
    gradient(Twin(model, bn_mode=bn_mode, dtype=dtype), images(model))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
    assert [layer.training for layer in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_sixteen_bit_logits_stay_near_and_are_float32(norm: str, dtype: str, bound: float) -> None:
    model = network(torch.float32, norm=norm)
    x = images(model)
    twin = Twin(model, bn_mode="eval", dtype=dtype)
    expected = copy.deepcopy(model).eval()(x)
    assert twin(x).dtype == torch.float32
    assert relative_error(twin(x), expected) < bound


@pytest.mark.parametrize("bn_mode", ["eval", "batch"])
def test_function_transform_gives_the_same_gradient(bn_mode: str) -> None:
    model = network()
    x = images(model)
    twin = Twin(model, bn_mode=bn_mode)
    labels = torch.arange(len(x)) % CLASSES
    found = torch.func.grad(lambda image: F.cross_entropy(twin(image), labels, reduction="sum"))(x)
    assert torch.allclose(found, gradient(twin, x), rtol=1e-12, atol=1e-14)


def test_hooks_of_the_live_network_are_not_called() -> None:
    model = network(torch.float32)
    called = []
    for layer in model.modules():
        layer.register_forward_hook(lambda *_: called.append("forward"))
        layer.register_full_backward_hook(lambda *_: called.append("backward"))
    gradient(Twin(model, bn_mode="eval"), images(model))
    assert not called


class Untraceable(nn.Module):
    """A network that looks at its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_untraceable_network_runs_as_it_is_and_says_so(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Untraceable()
    x = images(model)
    twin = Twin(model, bn_mode="eval", dtype=dtype)
    assert "cannot be traced" in caplog.text
    assert twin.folded == 0
    assert torch.allclose(twin(x), model(x), atol=0.02)
